//! The levels of the configuration that speak of filters, the most specific first.

use crate::policy::per_route::{Override, PerRoute};
use crate::worker::request::Routed;

/// Weighted cluster, route, virtual host, route configuration.
pub(super) fn levels(routed: &Routed) -> [Option<&PerRoute>; 4] {
    [
        routed.target().map(|target| &target.per_filter),
        Some(&routed.route.per_filter),
        Some(&routed.host.per_filter),
        Some(&routed.table.per_filter),
    ]
}

/// What the most specific level that speaks of a filter says.
pub(super) fn find<'a>(routed: &'a Routed, name: &str) -> Option<&'a Override> {
    levels(routed)
        .into_iter()
        .flatten()
        .find_map(|level| level.get(name))
}

/// Whether no level speaks of any filter.
pub(super) fn says_nothing(routed: &Routed) -> bool {
    levels(routed).into_iter().flatten().all(|level| level.is_empty())
}
