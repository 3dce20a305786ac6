//! Running a chain of HTTP filters: requests pass it in order before they are routed on, responses, also those that the
//! proxy makes itself, in reverse order.
//!
//! A filter that has something to do with the response says so when the request passes it (`Encode`); a response
//! therefore only meets filters that its request has met, except for header mutations, which change every response, and
//! processors (`ext_proc`), which see every response. A reply of the proxy that a processor must see first waits in the
//! request's outbox until whoever runs the request sends it: replies are made in many places that cannot wait.
//!
//! Each filter has a file, and says by a `Verdict` what becomes of a request. `levels` are the parts of the configuration that
//! speak of filters, `state` is what they remember, `facts` what they may look at, `encode` the way back.

mod adaptive_concurrency;
mod buffer;
mod compressor;
mod cors;
mod descriptors;
mod encode;
mod ext_authz;
mod ext_proc;
mod facts;
mod fault;
mod filter_state;
mod header_mutation;
mod jwt;
mod levels;
mod local_rate_limit;
pub(super) mod on_demand;
mod rate_limit;
mod rbac;
mod state;

pub(super) use encode::{encode, encode_trailers, encode_waiting, keep_head, keep_request, waits};
pub(super) use jwt::fetch_ahead;
pub use state::PolicyState;
use state::{Encode, state};
pub(super) use state::{Outbox, finish, metadata, must_wait, outbox, response_rate, saw_data};

use std::rc::Rc;
use std::sync::Arc;

use http::StatusCode;
use http::request::Parts;

use super::body::Inbound;
use super::exchange::Exchange;
use super::http::Downstream;
use super::local::LocalReply;
use super::request::{Routed, find_route};
use super::tap;
use crate::metrics::flags::Flags;
use crate::policy::chain::{Filter, Kind};
use crate::policy::per_route::Override;
use crate::policy::set_metadata::SetMetadata;

/// How a request goes on after a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passed {
    /// To the next filter.
    On,
    /// The same, after its route has been searched again: the filter has changed what routes may look at.
    Rerouted,
}

impl Passed {
    fn rerouted_if(changed: bool) -> Self {
        if changed { Self::Rerouted } else { Self::On }
    }
}

/// What becomes of a request at a filter: it goes on, or is answered.
type Verdict = Result<Passed, LocalReply>;

/// Lets a request pass the chain. A reply ends its way; it passes the chain back like any response.
pub(super) async fn decode(
    conn: &Rc<Downstream>,
    exchange: &mut Exchange,
    routed: &mut Routed,
    parts: &mut Parts,
    body: &mut Option<Inbound>,
) -> Result<(), LocalReply> {
    let filters = &conn.manager.filters.filters;
    let mut silent = levels::says_nothing(routed);
    for (index, filter) in filters.iter().enumerate() {
        let name = &*filter.name;
        let own = if silent { None } else { levels::find(routed, name) };
        if is_skipped(filter, own) {
            continue;
        }
        let mut loaded = None;
        let Some(kind) = resolve(&filter.kind, &mut loaded) else {
            return Err(no_configuration());
        };
        // What waits for others is boxed: few chains have it, and every request's future would carry its state.
        let verdict = match kind {
            Kind::Fault(chain) => match fault::of(chain.as_ref(), own) {
                Some(fault) => fault::inject(exchange, fault, routed.cluster_name(), parts).await,
                None => Ok(Passed::On),
            },
            Kind::Cors(chain) => match cors::rules(chain.as_ref(), routed, name) {
                Some(cors) => cors::judge_origin(exchange, &cors, parts),
                None => Ok(Passed::On),
            },
            Kind::Rbac(chain) => rbac::authorize(exchange, chain.as_deref(), own, parts),
            Kind::LocalRateLimit(chain) => {
                local_rate_limit::limit(exchange, chain.as_ref(), own, routed, parts)
            }
            Kind::HeaderMutation(chain) => {
                header_mutation::mutate(exchange, filter, chain, routed, parts, body.as_mut());
                Ok(Passed::On)
            }
            Kind::SetMetadata(chain) => {
                set_metadata(exchange, chain, own);
                Ok(Passed::On)
            }
            Kind::SetFilterState(chain) => Ok(filter_state::set(exchange, filter, chain, routed, parts)),
            Kind::Buffer(chain) => match buffer::limit(chain, own) {
                Some(limit) => Box::pin(buffer::hold(conn, limit, parts, body)).await,
                None => Ok(Passed::On),
            },
            Kind::RateLimit(limit) => {
                Box::pin(rate_limit::ask(exchange, limit, own, name, routed, parts)).await
            }
            Kind::Jwt(authn) => Box::pin(jwt::authenticate(exchange, authn, own, parts)).await,
            // Whose request has no route is not asked about (Envoy's rule).
            Kind::ExtAuthz(_) if !routed.is_found() => Ok(Passed::On),
            Kind::ExtAuthz(authz) => {
                Box::pin(ext_authz::ask(exchange, (authz, name), own, routed, parts, body)).await
            }
            Kind::ExtProc(processor) => {
                Box::pin(ext_proc::request(exchange, processor, own, parts, body.as_ref())).await
            }
            Kind::Tap(filter) => {
                tap::pass(exchange, filter, parts);
                Ok(Passed::On)
            }
            Kind::AdaptiveConcurrency(limit) => adaptive_concurrency::take_place(exchange, limit),
            Kind::GrpcStats(stats) => {
                state::count_call(exchange, stats, body.as_mut());
                Ok(Passed::On)
            }
            Kind::Compressor(chain) => {
                compressor::offer(exchange, chain, own, parts);
                Ok(Passed::On)
            }
            Kind::OnDemand(chain) => {
                if let Some(rules) = on_demand::rules(*chain, own) {
                    Box::pin(on_demand::cluster(conn, &rules, routed, parts)).await;
                }
                Ok(Passed::On)
            }
            // What a resource configures is never another resource.
            Kind::Discovered(_) => Ok(Passed::On),
        };
        match verdict {
            Ok(Passed::On) => {}
            Ok(Passed::Rerouted) => {
                search_again(exchange, routed, parts);
                silent = levels::says_nothing(routed);
            }
            Err(reply) => {
                pass_by(exchange, &filters[index + 1..], routed, parts);
                return Err(reply);
            }
        }
    }
    Ok(())
}

/// Whether a filter has no part in a request.
fn is_skipped(filter: &Filter, own: Option<&Override>) -> bool {
    match own {
        Some(Override::Disabled) => true,
        Some(_) => false,
        None => !filter.enabled,
    }
}

/// What a filter does: as the chain says, or a resource of its own, which `loaded` holds; `None` where none has come.
fn resolve<'a>(kind: &'a Kind, loaded: &'a mut Option<Arc<Kind>>) -> Option<&'a Kind> {
    match kind {
        Kind::Discovered(place) => {
            *loaded = place.load();
            loaded.as_deref()
        }
        kind => Some(kind),
    }
}

fn no_configuration() -> LocalReply {
    LocalReply::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        Flags::NO_FILTER_CONFIG,
        "no_filter_config_found",
        "",
    )
}

fn set_metadata(exchange: &mut Exchange, chain: &SetMetadata, own: Option<&Override>) {
    let values = match own {
        Some(Override::SetMetadata(own)) => own,
        _ => chain,
    };
    values.apply(&mut state(exchange).metadata);
}

/// Searches the route again, after a filter has changed what routes may look at.
fn search_again(exchange: &mut Exchange, routed: &mut Routed, parts: &Parts) {
    let conn = &exchange.conn;
    *routed = find_route(conn, parts, metadata(exchange));
    routed.choose(conn.worker.id);
    let cluster = routed.known_cluster(conn.worker.id, &parts.headers);
    exchange.route = routed.configured();
    exchange.routed = cluster;
}

/// Later filters have not seen a request that has been answered; mutations change its response and processors are shown
/// it all the same.
fn pass_by(exchange: &mut Exchange, filters: &[Filter], routed: &Routed, parts: &Parts) {
    for filter in filters {
        let own = levels::find(routed, &filter.name);
        if is_skipped(filter, own) {
            continue;
        }
        let mut loaded = None;
        match resolve(&filter.kind, &mut loaded) {
            Some(Kind::HeaderMutation(chain)) => {
                header_mutation::remember(exchange, filter, chain, routed, parts);
            }
            Some(Kind::ExtProc(processor)) => ext_proc::answered(exchange, processor, own),
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
