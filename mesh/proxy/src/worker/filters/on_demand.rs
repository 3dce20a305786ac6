//! Requests that wait for the virtual host or the cluster that they need.

use http::HeaderName;
use http::request::Parts;

use super::super::Worker;
use super::super::http::Downstream;
use super::super::request::{Routed, view};
use crate::clock::now_ms;
use crate::config::on_demand::{Answer, Wanted};
use crate::config::route::{Action, TargetCluster, Targets};
use crate::config::slot::Directory;
use crate::policy::on_demand::OnDemandClusters;
use crate::policy::per_route::Override;

/// What the route says of waiting for clusters, or else the chain.
pub(super) fn rules(chain: Option<OnDemandClusters>, own: Option<&Override>) -> Option<OnDemandClusters> {
    match own {
        Some(Override::OnDemand(own)) => *own,
        _ => chain,
    }
}

/// Longest authority that is asked for: the longest name that DNS has, and a port.
const MAX_AUTHORITY: usize = 253 + 6;

async fn wait(worker: &Worker, kind: Wanted, name: &str, limit: std::time::Duration) -> bool {
    match worker.shared.on_demand.ask(kind, name, now_ms()) {
        Answer::Known(known) => known,
        Answer::Full => false,
        Answer::Wait(ticket) => ticket.wait(limit).await,
    }
}

/// Waits for the virtual host of a request that no virtual host answers for; whether one does now.
pub(in crate::worker) async fn virtual_host(conn: &Downstream, parts: &Parts) -> bool {
    let Some(table) = conn.manager.table() else {
        return false;
    };
    let authority = view(parts).authority();
    let fits = !authority.is_empty() && authority.len() <= MAX_AUTHORITY;
    if !table.discovers_hosts || !fits || table.find(authority).is_some() {
        return false;
    }
    let name = format!("{}/{}", table.name, authority.to_ascii_lowercase());
    let limit = conn.worker.shared.on_demand.limits().host_timeout;
    wait(&conn.worker, Wanted::VirtualHost, &name, limit).await
}

/// Waits for a cluster by name, for a connection; whether there is one now.
pub(in crate::worker) async fn cluster_named(worker: &Worker, rules: &OnDemandClusters, name: &str) -> bool {
    !name.is_empty() && wait(worker, Wanted::Cluster, name, rules.timeout).await
}

/// The name of the cluster that a field of the request names, if it names one that cannot be used yet.
fn missing(field: &HeaderName, directory: &Directory, parts: &Parts) -> Option<String> {
    let name = parts.headers.get(field)?.to_str().ok()?;
    if let Some(slot) = directory.find(name)
        && slot.is_live()
    {
        slot.mark_used();
        return None;
    }
    Some(name.to_owned())
}

/// Waits for the cluster of a request, if it does not exist or has not been told its endpoints. Where it does not come the request goes on and finds that out.
pub(super) async fn cluster(conn: &Downstream, rules: &OnDemandClusters, routed: &mut Routed, parts: &Parts) {
    let Action::Forward(forward) = &routed.route.action else {
        return;
    };
    let named;
    let name = match &forward.targets {
        Targets::One(slot) => {
            if slot.is_live() {
                slot.mark_used();
                return;
            }
            &*slot.name
        }
        Targets::Named(field, directory) => match missing(field, directory, parts) {
            None => return,
            Some(name) => {
                named = name;
                &*named
            }
        },
        Targets::Weighted(targets, weights, turn) => {
            // Chosen now: what is waited for must be where the request goes.
            let index = match routed.chosen {
                Some(index) => index,
                None => weights.pick(turn.next(conn.worker.id)),
            };
            routed.chosen = Some(index);
            match &targets[index].cluster {
                TargetCluster::Fixed(slot) => {
                    if slot.is_live() {
                        slot.mark_used();
                        return;
                    }
                    &*slot.name
                }
                TargetCluster::Named(field, directory) => match missing(field, directory, parts) {
                    None => return,
                    Some(name) => {
                        named = name;
                        &*named
                    }
                },
            }
        }
        Targets::Empty => return,
    };
    if !name.is_empty() {
        wait(&conn.worker, Wanted::Cluster, name, rules.timeout).await;
    }
}
