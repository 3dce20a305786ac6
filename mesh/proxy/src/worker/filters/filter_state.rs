//! Objects of the filter state that a request is given.

use std::sync::Arc;

use http::request::Parts;

use super::levels::levels;
use super::{Exchange, Passed, state};
use crate::policy::chain::Filter;
use crate::policy::filter_state::SetFilterState;
use crate::policy::per_route::Override;
use crate::worker::logging;
use crate::worker::request::{Routed, view};

/// Sets objects as the chain says and then every level, the most specific last.
pub(super) fn set(
    exchange: &mut Exchange,
    filter: &Filter,
    chain: &Arc<SetFilterState>,
    routed: &Routed,
    parts: &Parts,
) -> Passed {
    let own = levels(routed)
        .into_iter()
        .rev()
        .flatten()
        .filter_map(|level| match level.get(&filter.name) {
            Some(Override::SetFilterState(own)) => Some(own),
            _ => None,
        });
    let mut reroute = false;
    for level in std::iter::once(chain).chain(own) {
        reroute |= level.reroutes;
        let seen = logging::meanwhile(&level.settings.wants, exchange, &view(parts), &parts.uri);
        for index in 0..level.settings.len() {
            let made = logging::with_record(exchange, &seen, |record| level.settings.make(index, record));
            if let Some(made) = made {
                made.set(&mut state(exchange).metadata.state);
            }
        }
    }
    Passed::rerouted_if(reroute)
}
