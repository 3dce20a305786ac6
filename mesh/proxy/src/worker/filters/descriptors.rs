//! What the local and the global rate limit have in common: descriptors of a request, and the fields that tell a client
//! how much is left.

use http::request::Parts;
use http::{HeaderName, HeaderValue};

use super::facts::facts;
use crate::config::route::Action;
use crate::policy::descriptors::{Descriptor, RateLimitEntry, Scene, VirtualHostLimits};
use crate::policy::ext_authz::{Field, How};
use crate::worker::exchange::Exchange;
use crate::worker::http::Downstream;
use crate::worker::logging;
use crate::worker::request::{Routed, view};

static X_RATELIMIT_LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
static X_RATELIMIT_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
static X_RATELIMIT_RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// `x-ratelimit-*` of draft 03.
pub(super) fn limit_fields(limit: HeaderValue, remaining: u32, reset_s: HeaderValue) -> [Field; 3] {
    [
        (X_RATELIMIT_LIMIT.clone(), limit, How::Set),
        (
            X_RATELIMIT_REMAINING.clone(),
            HeaderValue::from(remaining),
            How::Set,
        ),
        (X_RATELIMIT_RESET.clone(), reset_s, How::Set),
    ]
}

/// The entries of a filter's stage that a request falls under: the filter's own, or those of route and virtual host.
pub(super) struct Entries<'a> {
    /// Entries of routes and hosts have a stage, those of filters have none.
    stage: Option<u32>,
    lists: [&'a [RateLimitEntry]; 2],
}

impl<'a> Entries<'a> {
    pub(super) fn of(
        routed: &'a Routed,
        own: &'a [RateLimitEntry],
        stage: u32,
        hosts: VirtualHostLimits,
    ) -> Self {
        if !own.is_empty() {
            return Self {
                stage: None,
                lists: [own, &[]],
            };
        }
        let stage = Some(stage);
        let (of_route, include) = match &routed.route.action {
            Action::Forward(forward) => (&*forward.rate_limits, forward.include_host_rate_limits),
            // Envoy asks for no descriptors of what it does not forward.
            Action::Redirect(_) | Action::Direct(_) | Action::Nobody | Action::Tls => {
                return Self {
                    stage,
                    lists: [&[], &[]],
                };
            }
        };
        // What the route's action says comes before what the filter's own message says of the route.
        let of_host = include
            || match hosts {
                VirtualHostLimits::Override => of_route.is_empty(),
                VirtualHostLimits::Include => true,
                VirtualHostLimits::Ignore => false,
            };
        let of_host: &[_] = if of_host { &routed.host.rate_limits } else { &[] };
        Self {
            stage,
            lists: [of_route, of_host],
        }
    }

    fn iter(&self) -> impl Iterator<Item = &'a RateLimitEntry> {
        let stage = self.stage;
        let [first, second] = self.lists;
        first
            .iter()
            .chain(second)
            .filter(move |entry| stage.is_none_or(|stage| entry.stage == stage))
    }

    /// Whether some are for the end of the request.
    pub(super) fn at_end(&self) -> bool {
        self.iter().any(|entry| entry.at_end)
    }
}

/// The descriptors of a request: those for its end, or the others.
pub(super) fn describe(
    conn: &Downstream,
    exchange: &Exchange,
    routed: &Routed,
    parts: &Parts,
    entries: &Entries<'_>,
    at_end: bool,
) -> Vec<Descriptor> {
    let facts = facts(exchange, parts);
    let scene = Scene {
        facts: &facts,
        route: routed.route.metadata.as_deref(),
        destination_cluster: routed.cluster_name(),
        source_cluster: &conn.worker.shared.cluster,
        record: None,
    };
    entries
        .iter()
        .filter(|entry| entry.at_end == at_end)
        .filter_map(|entry| match entry.wants() {
            None => entry.describe(&scene),
            Some(wants) => {
                let seen = logging::meanwhile(wants, exchange, &view(parts), &parts.uri);
                logging::with_record(exchange, &seen, |record| {
                    let record = Some(record);
                    entry.describe(&Scene { record, ..scene })
                })
            }
        })
        .collect()
}
