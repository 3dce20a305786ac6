//! Compares the hosts of clusters with each other, once every `outlier_detection.interval`: the ejections by success
//! rate and by failure percentage. What a row of failures does is decided inline, by [`crate::upstream::outlier`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Proxy;
use crate::clock::now_ms;
use crate::config::slot::ClusterSlot;
use crate::upstream::outlier::compare;

/// Compares until cancelled.
pub async fn run(proxy: Arc<Proxy>, cancel: CancellationToken) {
    let mut changes = proxy.changes();
    let mut due: HashMap<Arc<str>, Instant> = HashMap::new();
    let mut clusters: Vec<Arc<ClusterSlot>> = Vec::new();
    let mut stale = true;
    loop {
        if stale {
            changes.borrow_and_update();
            clusters = proxy.store(|store| store.compared_clusters());
            let present: HashSet<&str> = clusters.iter().map(|slot| &*slot.name).collect();
            due.retain(|name, _| present.contains(&**name));
        }
        let now = Instant::now();
        for slot in &clusters {
            let (Some(config), Some(set)) = (slot.config(), slot.endpoints()) else {
                continue;
            };
            let Some(rules) = &config.outlier else { continue };
            let at = due.entry(slot.name.clone()).or_insert(now + rules.interval);
            if now < *at {
                continue;
            }
            *at = now + rules.interval;
            for host in compare(rules, &set.all, now_ms()) {
                let until = host.state.ejected_until.load(Ordering::Relaxed);
                slot.usage.ejected_until.fetch_max(until, Ordering::Relaxed);
                tracing::info!(cluster = %slot.name, host = %host.text, "ejected: it fails more than its siblings");
            }
        }
        let next = due.values().min().copied();
        stale = tokio::select! {
            () = cancel.cancelled() => return,
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                true
            }
            () = wait_for(next) => false,
        };
    }
}

async fn wait_for(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
