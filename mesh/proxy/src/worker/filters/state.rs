//! What filters remember of a request until its response has passed.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Uri};

use super::adaptive_concurrency::Place;
use super::{ext_proc, rate_limit};
use crate::metrics::flags::Flags;
use crate::policy::compressor::Compressor;
use crate::policy::cors::Cors;
use crate::policy::ext_authz::Field;
use crate::policy::fault::ActiveFault;
use crate::policy::grpc_stats::{Call, GrpcStats, Messages};
use crate::policy::header_mutation::HeaderMutation;
use crate::policy::metadata::Metadata;
use crate::worker::body::Inbound;
use crate::worker::exchange::Exchange;
use crate::worker::local::LocalReply;

/// What filters remember of a request until its response has passed.
#[derive(Default)]
pub struct PolicyState {
    /// What they told each other.
    pub metadata: Metadata,
    pub(super) encode: Vec<Encode>,
    /// Who counts the call, and the messages of its response.
    pub(super) grpc: Option<(Arc<GrpcStats>, Messages)>,
    /// Its place among those let in at a time.
    pub(super) place: Option<Place>,
    /// The request's fields, where a change of the response may name them, and its target where that has changed.
    pub(super) request: Option<HeaderMap>,
    pub(super) uri: Option<Uri>,
    /// The response's fields, where a change of its trailers names them.
    pub(super) response: Option<HeaderMap>,
    /// What was injected.
    pub(super) fault: Option<ActiveFault>,
    /// At how many KiB a second the response comes at most.
    pub(super) rate: Option<u64>,
    /// Of which services are told when it has ended.
    pub(super) later: Vec<rate_limit::Later>,
    /// Where a reply waits that a service must see before it goes to the client.
    pub(super) outbox: Option<Outbox>,
}

/// A reply of the proxy that waits for a service, with the exchange that it ends. Whoever runs the request sends it.
pub(in crate::worker) type Outbox = Rc<RefCell<Option<(Box<Exchange>, LocalReply)>>>;

/// What a filter does to the response.
pub(super) enum Encode {
    Cors(Arc<Cors>, HeaderValue),
    Mutate(Arc<HeaderMutation>),
    Fields(Vec<Field>),
    /// A service sees it; taken out when that happens.
    Process(Option<Box<ext_proc::Processing>>),
    /// With how much the client wants the encoding.
    Compress(Arc<Compressor>, u16),
}

/// At how many KiB a second the response to a request comes at most.
pub(in crate::worker) fn response_rate(exchange: &Exchange) -> Option<u64> {
    exchange.policy.as_ref()?.rate
}

/// Where replies to a request would wait.
pub(in crate::worker) fn outbox(exchange: &Exchange) -> Option<Outbox> {
    exchange.policy.as_ref()?.outbox.clone()
}

/// The same where the present reply must wait. Taken, so that what waits there does not own its place.
pub(in crate::worker) fn must_wait(exchange: &mut Exchange) -> Option<Outbox> {
    if !super::waits(exchange) {
        return None;
    }
    exchange.policy.as_mut()?.outbox.take()
}

/// What filters said about a request so far.
pub(in crate::worker) fn metadata(exchange: &Exchange) -> &Metadata {
    match &exchange.policy {
        Some(state) => &state.metadata,
        None => &exchange.conn.noted,
    }
}

/// The same to be changed.
pub(super) fn state(exchange: &mut Exchange) -> &mut PolicyState {
    let noted = &exchange.conn.noted;
    exchange.policy.get_or_insert_with(|| {
        Box::new(PolicyState {
            metadata: noted.clone(),
            ..Default::default()
        })
    })
}

/// Counts the messages of a call.
pub(super) fn count_call(exchange: &mut Exchange, stats: &Arc<GrpcStats>, body: Option<&mut Inbound>) {
    if exchange.grpc {
        state(exchange).grpc = Some((stats.clone(), Messages::default()));
        if let Some(body) = body {
            body.count_messages();
        }
    }
}

/// Bytes of a response's body, as the upstream sent them.
pub(in crate::worker) fn saw_data(exchange: &mut Exchange, data: &[u8]) {
    if let Some(state) = &mut exchange.policy
        && let Some((_, messages)) = &mut state.grpc
    {
        messages.feed(data);
    }
}

/// A request has ended.
pub(in crate::worker) fn finish(exchange: &Exchange) {
    let Some(state) = &exchange.policy else { return };
    // One that its client gave up says nothing about the service.
    if let Some(place) = &state.place
        && !exchange.flags.has(Flags::DOWNSTREAM_TERMINATION)
    {
        place.answered_after(exchange.started.elapsed());
    }
    for later in &state.later {
        rate_limit::tell(exchange, later);
    }
    if let Some((stats, messages)) = &state.grpc
        && let Some(cluster) = &exchange.cluster_name
    {
        let source = exchange.source.as_ref();
        // What has no content was sent with its head. Only an endpoint's whole answer is measured.
        let sent_at = source.map_or(Some(exchange.started), |source| source.borrow().ended_at);
        let answered = exchange.details == "via_upstream" && exchange.grpc_status.is_some();
        let call = Call {
            took: sent_at.filter(|_| answered).map(|at| at.elapsed()),
            cluster,
            path: exchange.uri.path(),
            status: exchange.grpc_status,
            requests: source.map_or(0, |source| source.borrow().messages()),
            responses: messages.count,
        };
        stats.count(&call, exchange.conn.worker.id);
    }
}
