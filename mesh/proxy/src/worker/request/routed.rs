//! What was decided about a request, and how its route is found.

use std::sync::{Arc, LazyLock};

use http::request::Parts;
use http::{HeaderMap, HeaderName};

use super::view;
use crate::config::headers::{HeaderOps, Scene};
use crate::config::route::{Action, Route, RouteFacts, Target, TargetCluster, Targets, VirtualHost};
use crate::config::slot::Directory;
use crate::config::table::RouteTable;
use crate::policy::metadata::Metadata;
use crate::random;
use crate::worker::http::Downstream;

/// What was decided about a request, for those that act on it.
#[derive(Clone)]
pub(in crate::worker) struct Routed {
    pub(in crate::worker) table: Arc<RouteTable>,
    pub(in crate::worker) host: Arc<VirtualHost>,
    pub(in crate::worker) route: Arc<Route>,
    /// The weighted cluster, where it was chosen before the filters ran.
    pub(in crate::worker) chosen: Option<usize>,
}

/// What stands for a route that there is not, and says nothing to any filter (Envoy's rule).
struct Instead {
    table: Arc<RouteTable>,
    host: Arc<VirtualHost>,
    nobody: Arc<Route>,
    tls: Arc<Route>,
}

static INSTEAD: LazyLock<Instead> = LazyLock::new(|| Instead {
    table: Arc::new(RouteTable::empty()),
    host: Arc::new(VirtualHost::empty("")),
    nobody: Arc::new(Route::instead(Action::Nobody)),
    tls: Arc::new(Route::instead(Action::Tls)),
});

impl Routed {
    /// For a request that nobody answers: filters see it all the same, then it gets its 404.
    pub(in crate::worker) fn nobody() -> Self {
        Self::without_route(&INSTEAD.nobody)
    }

    fn without_route(route: &Arc<Route>) -> Self {
        Self {
            table: INSTEAD.table.clone(),
            host: INSTEAD.host.clone(),
            route: route.clone(),
            chosen: None,
        }
    }

    /// Whether somebody answers.
    pub(in crate::worker) fn is_found(&self) -> bool {
        !matches!(self.route.action, Action::Nobody)
    }

    /// The route, where it is one of the configuration.
    pub(in crate::worker) fn configured(&self) -> Option<Arc<Route>> {
        match self.route.action {
            Action::Nobody | Action::Tls => None,
            Action::Forward(_) | Action::Redirect(_) | Action::Direct(_) => Some(self.route.clone()),
        }
    }

    /// The weighted cluster, if it has been chosen.
    pub(in crate::worker) fn target(&self) -> Option<&Target> {
        match (&self.route.action, self.chosen) {
            (Action::Forward(forward), Some(index)) => match &forward.targets {
                Targets::Weighted(targets, ..) => targets.get(index),
                Targets::One(_) | Targets::Named(..) | Targets::Empty => None,
            },
            _ => None,
        }
    }

    /// The cluster that the request goes to, as far as it is known.
    pub(in crate::worker) fn cluster_name(&self) -> &str {
        if let Some(target) = self.target() {
            return match &target.cluster {
                TargetCluster::Fixed(slot) => &slot.name,
                TargetCluster::Named(..) => "",
            };
        }
        match &self.route.action {
            Action::Forward(forward) => match &forward.targets {
                Targets::One(slot) => &slot.name,
                Targets::Weighted(..) | Targets::Named(..) | Targets::Empty => "",
            },
            Action::Redirect(_) | Action::Direct(_) | Action::Nobody | Action::Tls => "",
        }
    }

    /// The weighted cluster whose turn it would be.
    pub(in crate::worker) fn expected(&self, worker: usize) -> Option<usize> {
        match &self.route.action {
            Action::Forward(forward) => match &forward.targets {
                Targets::Weighted(_, weights, turn) => Some(weights.pick(turn.peek(worker))),
                Targets::One(_) | Targets::Named(..) | Targets::Empty => None,
            },
            Action::Redirect(_) | Action::Direct(_) | Action::Nobody | Action::Tls => None,
        }
    }

    /// What the levels of the configuration do to fields, in the order in which they do it: the weighted cluster first, and
    /// whoever has the last word last (Envoy).
    pub(in crate::worker) fn header_levels<'a>(
        &'a self,
        target: Option<&'a HeaderOps>,
        of: fn(&'a Route, &'a VirtualHost, &'a RouteTable) -> [&'a HeaderOps; 3],
    ) -> impl Iterator<Item = &'a HeaderOps> {
        let mut levels = of(&self.route, &self.host, &self.table);
        if self.table.most_specific_wins {
            levels.reverse();
        }
        target.into_iter().chain(levels).filter(|ops| !ops.is_empty())
    }

    /// Mutations of a response, of whatever made it.
    pub(in crate::worker) fn mutate_response(
        &self,
        headers: &mut HeaderMap,
        target: Option<&Target>,
        scene: &dyn Scene,
    ) {
        let target = target.map(|target| &target.response_headers);
        let levels = self.header_levels(target, |route, host, table| {
            [
                &route.response_headers,
                &host.response_headers,
                &table.response_headers,
            ]
        });
        for ops in levels {
            ops.apply(headers, scene);
        }
    }

    /// The cluster that the request would go to as things are, if there is that cluster.
    pub(in crate::worker) fn known_cluster(&self, worker: usize, headers: &HeaderMap) -> Option<Arc<str>> {
        let Action::Forward(forward) = &self.route.action else {
            return None;
        };
        let named = |field: &HeaderName, directory: &Directory| {
            let slot = directory.find(headers.get(field)?.to_str().ok()?)?;
            slot.exists().then(|| slot.name.clone())
        };
        let slot = match &forward.targets {
            Targets::One(slot) => slot,
            Targets::Weighted(targets, ..) => {
                let index = self.chosen.or_else(|| self.expected(worker))?;
                match &targets.get(index)?.cluster {
                    TargetCluster::Fixed(slot) => slot,
                    TargetCluster::Named(field, directory) => return named(field, directory),
                }
            }
            Targets::Named(field, directory) => return named(field, directory),
            Targets::Empty => return None,
        };
        slot.exists().then(|| slot.name.clone())
    }

    /// Chooses the weighted cluster before the chain runs, where filters must know it.
    pub(in crate::worker) fn choose(&mut self, worker: usize) {
        if let Action::Forward(forward) = &self.route.action
            && forward.target_before_filters
            && let Targets::Weighted(_, weights, turn) = &forward.targets
        {
            self.chosen = Some(weights.pick(turn.next(worker)));
        }
    }

    /// Tells which weighted cluster it would have been, for the answer of a filter: nobody's turn is taken.
    pub(in crate::worker) fn expect(&mut self, worker: usize) {
        if self.chosen.is_none() {
            self.chosen = self.expected(worker);
        }
    }
}

/// The route of a request; `metadata` is what filters have noted so far.
pub(in crate::worker) fn find_route(conn: &Downstream, parts: &Parts, metadata: &Metadata) -> Routed {
    configured_route(conn, parts, metadata).unwrap_or_else(Routed::nobody)
}

fn configured_route(conn: &Downstream, parts: &Parts, metadata: &Metadata) -> Option<Routed> {
    let table = conn.manager.table()?;
    let view = view(parts);
    let slot = table.find(view.authority())?;
    if conn.manager.waits_for_hosts {
        slot.mark_used();
    }
    let host = slot.load();
    if host.require_tls && view.scheme() != "https" {
        return Some(Routed::without_route(&INSTEAD.tls));
    }
    let facts = RouteFacts {
        tls: conn.tls.as_deref(),
        metadata: Some(metadata),
    };
    let route = host.find_with(&view, &facts, random::next)?.clone();
    Some(Routed {
        table,
        host,
        route,
        chosen: None,
    })
}
