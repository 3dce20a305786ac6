//! Running a chain of HTTP filters: requests pass it in order before they are routed on, responses, also those that the
//! proxy makes itself, in reverse order.
//!
//! A filter that has something to do with the response says so when the request passes it (`Encode`); a response
//! therefore only meets filters that its request has met, except for header mutations, which change every response, and
//! processors (`ext_proc`), which see every response. A reply of the proxy that a processor must see first waits in the
//! request's outbox until whoever runs the request sends it: replies are made in many places that cannot wait.

mod descriptors;
mod encode;
mod ext_authz;
mod ext_proc;
mod filter_state;
mod jwt;
mod local_rate_limit;
pub(super) mod on_demand;
mod rate_limit;

pub(super) use encode::{encode, encode_waiting, keep_request, waits};
pub(super) use jwt::fetch_ahead;
use local_rate_limit::limit_locally;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};

use super::body::{Ahead, Inbound};
use super::exchange::Exchange;
use super::http::Downstream;
use super::local::LocalReply;
use super::request::{Routed, find_route, view};
use super::scene::RequestScene;
use crate::config::route::{Action, Targets};
use crate::metrics::flags::Flags;
use crate::policy::adaptive_concurrency::AdaptiveConcurrency;
use crate::policy::chain::{Filter, Kind};
use crate::policy::compressor::Compressor;
use crate::policy::cors::{Cors, CorsVerdict};
use crate::policy::ext_authz::Field;
use crate::policy::facts::Facts;
use crate::policy::fault::{ActiveFault, Fault, FaultAbort};
use crate::policy::grpc_stats::{Call, GrpcStats, Messages};
use crate::policy::header_mutation::HeaderMutation;
use crate::policy::metadata::Metadata;
use crate::policy::per_route::Override;
use crate::policy::rbac::{NAMESPACE, Rules};
use crate::random;

static X_RATELIMIT_LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
static X_RATELIMIT_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
static X_RATELIMIT_RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// What filters remember of a request until its response has passed.
#[derive(Default)]
pub struct PolicyState {
    /// What they told each other.
    pub metadata: Metadata,
    encode: Vec<Encode>,
    /// Who counts the call, and the messages of its response.
    grpc: Option<(Arc<GrpcStats>, Messages)>,
    /// Its place among those let in at a time.
    place: Option<Place>,
    /// The request's fields, where a change of the response may name them, and its target where that has changed.
    request: Option<HeaderMap>,
    uri: Option<Uri>,
    /// What was injected.
    fault: Option<ActiveFault>,
    /// Of which services are told when it has ended.
    later: Vec<rate_limit::Later>,
    /// Where a reply waits that a service must see before it goes to the client.
    outbox: Option<Outbox>,
}

/// A reply of the proxy that waits for a service, with the exchange that it ends. Whoever runs the request sends it.
pub(super) type Outbox = Rc<RefCell<Option<(Box<Exchange>, LocalReply)>>>;

/// Where replies to a request would wait.
pub(super) fn outbox(exchange: &Exchange) -> Option<Outbox> {
    exchange.policy.as_ref()?.outbox.clone()
}

/// The same where the present reply must wait. Taken, so that what waits there does not own its place.
pub(super) fn must_wait(exchange: &mut Exchange) -> Option<Outbox> {
    if !waits(exchange) {
        return None;
    }
    exchange.policy.as_mut()?.outbox.take()
}

/// A request's place under an adaptive limit, until it is dropped.
struct Place {
    limit: Arc<AdaptiveConcurrency>,
    /// Once it has been answered.
    latency: std::cell::Cell<Option<std::time::Duration>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.limit
            .leave(self.latency.get(), crate::clock::now_ms(), random::next());
    }
}

/// Takes a place for a request, or refuses it.
fn take_place(exchange: &mut Exchange, limit: &Arc<AdaptiveConcurrency>) -> Result<(), LocalReply> {
    if !limit.enabled() {
        return Ok(());
    }
    if !limit.enter() {
        return Err(LocalReply::new(
            limit.status,
            Flags::default(),
            "reached_concurrency_limit",
            "reached concurrency limit",
        ));
    }
    state(exchange).place = Some(Place {
        limit: limit.clone(),
        latency: std::cell::Cell::new(None),
    });
    Ok(())
}

/// What a filter does to the response.
enum Encode {
    Cors(Arc<Cors>, HeaderValue),
    Mutate(Arc<HeaderMutation>),
    Fields(Vec<Field>),
    /// A service sees it; taken out when that happens.
    Process(Option<Box<ext_proc::Processing>>),
    /// With how much the client wants the encoding.
    Compress(Arc<Compressor>, u16),
}

/// Bytes of a response's body, as the upstream sent them.
pub(super) fn saw_data(exchange: &mut Exchange, data: &[u8]) {
    if let Some(state) = &mut exchange.policy
        && let Some((_, messages)) = &mut state.grpc
    {
        messages.feed(data);
    }
}

/// A request has ended.
pub(super) fn finish(exchange: &Exchange) {
    // One that its client gave up says nothing about the service.
    if let Some(place) = exchange.policy.as_ref().and_then(|state| state.place.as_ref())
        && !exchange.flags.has(Flags::DOWNSTREAM_TERMINATION)
    {
        place.latency.set(Some(exchange.started.elapsed()));
    }
    if let Some(state) = &exchange.policy {
        for later in &state.later {
            rate_limit::tell(exchange, later);
        }
    }
    if let Some(state) = &exchange.policy
        && let Some((stats, messages)) = &state.grpc
        && let Some(cluster) = &exchange.cluster_name
    {
        let call = Call {
            cluster,
            path: exchange.uri.path(),
            status: exchange.grpc_status,
            requests: exchange
                .source
                .as_ref()
                .map_or(0, |source| source.borrow().messages()),
            responses: messages.count,
        };
        stats.count(&call, exchange.conn.worker.id);
    }
}

/// What filters said about a request so far.
pub(super) fn metadata(exchange: &Exchange) -> &Metadata {
    match &exchange.policy {
        Some(state) => &state.metadata,
        None => &exchange.conn.noted,
    }
}

fn state(exchange: &mut Exchange) -> &mut PolicyState {
    let noted = &exchange.conn.noted;
    exchange.policy.get_or_insert_with(|| {
        Box::new(PolicyState {
            metadata: noted.clone(),
            ..Default::default()
        })
    })
}

/// Who and what, for matchers.
pub(super) fn facts<'a>(exchange: &'a Exchange, parts: &'a Parts) -> Facts<'a> {
    let conn = &exchange.conn;
    Facts {
        direct_remote: conn.direct,
        source: conn.remote,
        local: conn.local,
        server_name: conn.server_name(),
        peer: conn.peer_identity(),
        request: Some(view(parts)),
        remote: exchange.remote,
        metadata: metadata(exchange),
    }
}

/// What the most specific level says about a filter: weighted cluster, route, virtual host, route configuration.
fn find<'a>(routed: &'a Routed, name: &str) -> Option<&'a Override> {
    levels(routed)
        .into_iter()
        .flatten()
        .find_map(|level| level.get(name))
}

fn levels(routed: &Routed) -> [Option<&crate::policy::per_route::PerRoute>; 4] {
    [
        routed.target().map(|target| &target.per_filter),
        Some(&routed.route.per_filter),
        Some(&routed.host.per_filter),
        Some(&routed.table.per_filter),
    ]
}

/// Lets a request pass the chain. A reply ends its way; it passes the chain back like any response.
pub(super) async fn decode(
    conn: &Rc<Downstream>,
    exchange: &mut Exchange,
    routed: &mut Routed,
    parts: &mut Parts,
    body: &mut Option<Inbound>,
) -> Result<(), LocalReply> {
    let filters = &conn.manager.filters.filters;
    let mut silent = says_nothing(routed);
    for (index, filter) in filters.iter().enumerate() {
        let own = if silent { None } else { find(routed, &filter.name) };
        let skipped = match own {
            Some(Override::Disabled) => true,
            None => !filter.enabled,
            Some(_) => false,
        };
        if skipped {
            continue;
        }
        // What waits for others is boxed: few chains have it, and every request's future would carry its state.
        let mut reroute = false;
        let loaded;
        let kind = match &filter.kind {
            Kind::Discovered(place) => {
                loaded = place.load();
                match &loaded {
                    Some(kind) => &**kind,
                    None => {
                        return Err(LocalReply::new(
                            StatusCode::INTERNAL_SERVER_ERROR,
                            Flags::NO_FILTER_CONFIG,
                            "no_filter_config_found",
                            "",
                        ));
                    }
                }
            }
            kind => kind,
        };
        let result = match (kind, own) {
            (Kind::OnDemand(chain), own) => {
                let rules = match own {
                    Some(Override::OnDemand(own)) => own,
                    _ => chain,
                };
                if let Some(rules) = *rules {
                    Box::pin(on_demand::cluster(conn, &rules, routed, parts)).await;
                }
                Ok(())
            }
            // What a resource configures is never another resource.
            (Kind::Discovered(_), _) => Ok(()),
            (Kind::Fault(_), Some(Override::Fault(Some(fault))))
            | (Kind::Fault(Some(fault)), None | Some(Override::Enabled)) => {
                inject_fault(exchange, fault, routed.cluster_name(), parts).await
            }
            (Kind::Fault(_), _) => Ok(()),
            // Of routes that answer themselves it says nothing (Envoy's rule).
            (Kind::Cors(_), _) if !matches!(routed.route.action, Action::Forward(_)) => Ok(()),
            (Kind::Cors(chain), _) => {
                let cors = cors_of(routed, &filter.name, silent).or_else(|| chain.clone());
                cors.map_or(Ok(()), |cors| judge_origin(exchange, &cors, parts))
            }
            (Kind::Rbac(_), Some(Override::Rbac(rules))) => {
                authorize(conn, exchange, rules.as_deref(), parts)
            }
            (Kind::Rbac(rules), _) => authorize(conn, exchange, rules.as_deref(), parts),
            (Kind::LocalRateLimit(_), Some(Override::LocalRateLimit(limit))) => {
                limit_locally(conn, exchange, limit, routed, parts)
            }
            (Kind::LocalRateLimit(Some(limit)), _) => limit_locally(conn, exchange, limit, routed, parts),
            (Kind::LocalRateLimit(None), _) => Ok(()),
            (Kind::HeaderMutation(chain), _) => {
                mutate(exchange, filter, chain, routed, parts);
                Ok(())
            }
            (Kind::SetMetadata(_), Some(Override::SetMetadata(values))) => {
                values.apply(&mut state(exchange).metadata);
                Ok(())
            }
            (Kind::SetMetadata(values), _) => {
                values.apply(&mut state(exchange).metadata);
                Ok(())
            }
            (Kind::SetFilterState(chain), _) => {
                reroute = filter_state::set_state(exchange, filter, chain, routed, parts);
                Ok(())
            }
            (Kind::Buffer(_), Some(Override::Buffer(own))) => match own {
                Some(buffer) => Box::pin(hold(conn, buffer.limit, parts, body)).await,
                None => Ok(()),
            },
            (Kind::Buffer(buffer), _) => Box::pin(hold(conn, buffer.limit, parts, body)).await,
            (Kind::RateLimit(limit), own) => {
                let own = match own {
                    Some(Override::RateLimit(own)) => Some(own),
                    _ => None,
                };
                Box::pin(rate_limit::ask(exchange, limit, own, &filter.name, routed, parts)).await
            }
            (Kind::Jwt(authn), own) => {
                let own = match own {
                    Some(Override::Jwt(own)) => Some(own),
                    _ => None,
                };
                Box::pin(jwt::authenticate(exchange, authn, own, parts))
                    .await
                    .map(|again| reroute = again)
            }
            // Whose request has no route is not asked about (Envoy's rule).
            (Kind::ExtAuthz(_), _) if !routed.is_found() => Ok(()),
            (Kind::ExtAuthz(authz), own) => {
                let own = match own {
                    Some(Override::ExtAuthz(own)) => Some(own),
                    _ => None,
                };
                Box::pin(ext_authz::ask(exchange, authz, own, routed, parts, body))
                    .await
                    .map(|again| reroute = again)
            }
            (Kind::ExtProc(filter), own) => {
                let own = match own {
                    Some(Override::ExtProc(own)) => Some(own),
                    _ => None,
                };
                Box::pin(ext_proc::request(exchange, filter, own, parts, body.as_ref()))
                    .await
                    .map(|again| reroute = again)
            }
            (Kind::Tap(filter), _) => {
                super::tap::pass(exchange, filter, parts);
                Ok(())
            }
            (Kind::AdaptiveConcurrency(limit), _) => take_place(exchange, limit),
            (Kind::GrpcStats(stats), _) => {
                if exchange.grpc {
                    state(exchange).grpc = Some((stats.clone(), Messages::default()));
                    if let Some(body) = body {
                        body.count_messages();
                    }
                }
                Ok(())
            }
            (Kind::Compressor(_), Some(Override::Compressor(None))) => Ok(()),
            (Kind::Compressor(compressor), own) => {
                let own = match own {
                    Some(Override::Compressor(Some(own))) => own.remove_accept_encoding,
                    _ => None,
                };
                offer_compression(exchange, compressor, own, parts);
                Ok(())
            }
        };
        if let Err(reply) = result {
            pass_by(exchange, &filters[index + 1..], routed, parts);
            return Err(reply);
        }
        if reroute {
            search_again(conn, exchange, routed, parts);
            silent = says_nothing(routed);
        }
    }
    Ok(())
}

/// Later filters have not seen a request that has been answered; mutations change its response and processors are shown
/// it all the same.
fn pass_by(exchange: &mut Exchange, filters: &[Filter], routed: &Routed, parts: &Parts) {
    for filter in filters {
        let own = find(routed, &filter.name);
        let skipped = matches!(own, Some(Override::Disabled)) || (own.is_none() && !filter.enabled);
        let loaded;
        let kind = match &filter.kind {
            Kind::Discovered(place) => {
                loaded = place.load();
                match &loaded {
                    Some(kind) => &**kind,
                    None => continue,
                }
            }
            kind => kind,
        };
        match (kind, own) {
            (Kind::HeaderMutation(chain), own) if !matches!(own, Some(Override::Disabled)) => {
                remember_mutations(exchange, filter, chain, routed, parts);
            }
            (Kind::ExtProc(processor), own) if !skipped => {
                let own = match own {
                    Some(Override::ExtProc(own)) => Some(own),
                    _ => None,
                };
                ext_proc::answered(exchange, processor, own);
            }
            _ => {}
        }
    }
}

/// The same for a request that has met no filter at all.
pub(super) fn pass_by_all(exchange: &mut Exchange, parts: &Parts) {
    let manager = exchange.conn.manager.clone();
    if !manager.filters.filters.is_empty() {
        pass_by(exchange, &manager.filters.filters, &Routed::nobody(), parts);
    }
}

/// Notes how much the client wants an encoding.
fn offer_compression(
    exchange: &mut Exchange,
    compressor: &Arc<Compressor>,
    remove: Option<bool>,
    parts: &mut Parts,
) {
    // A filter before this one may have taken the field off; then it has kept what it said.
    let state = state(exchange);
    let kept = state
        .request
        .as_ref()
        .filter(|_| !parts.headers.contains_key(header::ACCEPT_ENCODING));
    let quality = compressor.quality(kept.unwrap_or(&parts.headers));
    if remove.unwrap_or(compressor.remove_accept_encoding) {
        state.request.get_or_insert_with(|| parts.headers.clone());
        parts.headers.remove(header::ACCEPT_ENCODING);
    }
    state.encode.push(Encode::Compress(compressor.clone(), quality));
}

fn says_nothing(routed: &Routed) -> bool {
    levels(routed).into_iter().flatten().all(|level| level.is_empty())
}

/// Searches the route again, after a filter has changed what routes may look at.
fn search_again(conn: &Rc<Downstream>, exchange: &mut Exchange, routed: &mut Routed, parts: &Parts) {
    *routed = find_route(conn, parts, metadata(exchange));
    exchange.route = routed.configured();
    choose_target(conn, routed);
    exchange.routed = routed.known_cluster(conn.worker.id, &parts.headers);
}

/// Reads a request whole before it goes on.
async fn hold(
    conn: &Downstream,
    limit: usize,
    parts: &mut Parts,
    body: &mut Option<Inbound>,
) -> Result<(), LocalReply> {
    let Some(inbound) = body else { return Ok(()) };
    match inbound.read_ahead(limit, conn.manager.stream_idle_timeout).await {
        Err(error) => Err(LocalReply::of_body(&error)),
        Ok(Ahead::Whole) if inbound.held() <= limit => {
            // The length is known now.
            parts.headers.remove(header::TRANSFER_ENCODING);
            parts
                .headers
                .insert(header::CONTENT_LENGTH, HeaderValue::from(inbound.held()));
            Ok(())
        }
        Ok(_) => Err(too_large()),
    }
}

/// A body that a filter must hold is too large.
fn too_large() -> LocalReply {
    LocalReply::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        Flags::default(),
        "request_payload_too_large",
        "Payload Too Large",
    )
}

/// What all levels say together: of each field the most specific one that says something of it.
fn cors_of(routed: &Routed, name: &str, silent: bool) -> Option<Arc<Cors>> {
    if silent {
        return None;
    }
    let mut found = levels(routed)
        .into_iter()
        .flatten()
        .filter_map(|level| match level.get(name) {
            Some(Override::Cors(cors)) => Some(cors),
            _ => level.cors.as_ref(),
        });
    let first = found.next()?;
    Some(found.fold(first.clone(), |all, next| Arc::new(all.or(next))))
}

fn judge_origin(exchange: &mut Exchange, cors: &Arc<Cors>, parts: &Parts) -> Result<(), LocalReply> {
    if !cors.applies(random::next) {
        return Ok(());
    }
    match cors.judge(&parts.method, &parts.headers) {
        CorsVerdict::None => Ok(()),
        CorsVerdict::Actual(origin) => {
            state(exchange).encode.push(Encode::Cors(cors.clone(), origin));
            Ok(())
        }
        CorsVerdict::Preflight(headers) => {
            let mut reply = LocalReply::new(StatusCode::OK, Flags::default(), "cors_preflight", "");
            reply.headers = *headers;
            Err(reply)
        }
    }
}

/// Delays, and the reply of an abort.
async fn inject_fault(
    exchange: &mut Exchange,
    fault: &Arc<Fault>,
    cluster: &str,
    parts: &Parts,
) -> Result<(), LocalReply> {
    let decision = fault.decide(&view(parts), cluster, random::next);
    if decision.delay.is_none() && decision.abort.is_none() {
        return Ok(());
    }
    let Some(active) = fault.begin() else {
        return Ok(());
    };
    state(exchange).fault = Some(active);
    if let Some(delay) = decision.delay {
        exchange.flags.add(Flags::DELAY_INJECTED);
        // Boxed, because few requests wait and every request's future would carry the timer.
        Box::pin(tokio::time::sleep(delay.min(Duration::from_secs(3600)))).await;
    }
    let Some(abort) = decision.abort else {
        return Ok(());
    };
    let mut reply = LocalReply::new(StatusCode::OK, Flags::FAULT_INJECTED, "fault_filter_abort", "");
    reply.body = fault.body.clone();
    match abort {
        FaultAbort::Http(status) => reply.status = status,
        FaultAbort::Grpc(status) => {
            reply.grpc_status = Some(status);
            exchange.grpc = true;
        }
    }
    Err(reply)
}

fn authorize(
    conn: &Downstream,
    exchange: &mut Exchange,
    rules: Option<&Rules>,
    parts: &Parts,
) -> Result<(), LocalReply> {
    let Some(rules) = rules else { return Ok(()) };
    let (denied, notes) = rules.judge(&facts(exchange, parts), conn.worker.id);
    if !notes.is_empty() {
        notes.write(NAMESPACE, &mut state(exchange).metadata);
    }
    match denied {
        None => Ok(()),
        Some(details) => Err(LocalReply::new(
            StatusCode::FORBIDDEN,
            Flags::default(),
            details,
            "RBAC: access denied",
        )),
    }
}

/// The mutations of all levels in the order in which they are applied: the chain's own first; then from the least to
/// the most specific level, or the other way round where the filter says that the least specific has the last word.
fn mutations<'a>(
    filter: &Filter,
    chain: &'a Arc<HeaderMutation>,
    routed: &'a Routed,
) -> impl Iterator<Item = &'a Arc<HeaderMutation>> {
    let mut found: Vec<_> = levels(routed)
        .into_iter()
        .flatten()
        .filter_map(|level| match level.get(&filter.name) {
            Some(Override::HeaderMutation(mutation)) => Some(mutation),
            _ => None,
        })
        .collect();
    if chain.most_specific_wins {
        found.reverse();
    }
    std::iter::once(chain).chain(found)
}

fn mutate(
    exchange: &mut Exchange,
    filter: &Filter,
    chain: &Arc<HeaderMutation>,
    routed: &Routed,
    parts: &mut Parts,
) {
    let cluster = routed.known_cluster(exchange.conn.worker.id, &parts.headers);
    for mutation in mutations(filter, chain, routed) {
        let scene = RequestScene {
            exchange: &*exchange,
            uri: &parts.uri,
            cluster: cluster.as_deref(),
        };
        mutation.request(&mut parts.headers, &scene);
    }
    remember_mutations(exchange, filter, chain, routed, parts);
}

fn remember_mutations(
    exchange: &mut Exchange,
    filter: &Filter,
    chain: &Arc<HeaderMutation>,
    routed: &Routed,
    parts: &Parts,
) {
    let first = state(exchange).encode.len();
    for mutation in mutations(filter, chain, routed) {
        if !mutation.spares_responses() {
            let state = state(exchange);
            state.request.get_or_insert_with(|| parts.headers.clone());
            // Responses pass backwards, the levels of one filter do not.
            state.encode.insert(first, Encode::Mutate(mutation.clone()));
        }
    }
}

/// Chooses the weighted cluster before the chain runs, where filters must know it.
pub(super) fn choose_target(conn: &Downstream, routed: &mut Routed) {
    if let Action::Forward(forward) = &routed.route.action
        && forward.target_before_filters
        && let Targets::Weighted(_, weights, turn) = &forward.targets
    {
        routed.chosen = Some(weights.pick(turn.next(conn.worker.id)));
    }
}

/// Tells which weighted cluster it would have been, for the answer of a filter: nobody's turn is taken.
pub(super) fn expect_target(conn: &Downstream, routed: &mut Routed) {
    if routed.chosen.is_none() {
        routed.chosen = routed.expected(conn.worker.id);
    }
}
