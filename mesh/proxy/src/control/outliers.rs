//! Compares the hosts of clusters with each other, once every `outlier_detection.interval`: the ejections by success
//! rate and by failure percentage. What a row of failures does is decided inline, by [`crate::upstream::outlier`].
//!
//! A cluster is looked at from its first use on. One that nobody uses costs nothing, however many there are.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Proxy;
use crate::clock::now_ms;
use crate::config::cluster::Outlier;
use crate::config::slot::ClusterSlot;
use crate::upstream::outlier::compare;

/// How often a cluster without rules is looked at, in case that it has got some: Envoy's default interval.
const WITHOUT_RULES: Duration = Duration::from_secs(10);

/// Clusters in use, by when they are compared next.
#[derive(Default)]
struct Watched {
    due: BTreeMap<(Instant, u64), Weak<ClusterSlot>>,
    known: HashMap<Arc<str>, Weak<ClusterSlot>>,
    /// Tells apart what is due at the same time.
    next: u64,
}

impl Watched {
    fn add(&mut self, slot: &Arc<ClusterSlot>, now: Instant) {
        let weak = Arc::downgrade(slot);
        let before = self.known.insert(slot.name.clone(), weak.clone());
        if !before.is_some_and(|before| before.ptr_eq(&weak)) {
            self.put(weak, now + interval(slot));
        }
    }

    fn put(&mut self, slot: Weak<ClusterSlot>, at: Instant) {
        self.next += 1;
        self.due.insert((at, self.next), slot);
    }

    /// A cluster that is due by now.
    fn take(&mut self, now: Instant) -> Option<Weak<ClusterSlot>> {
        let entry = self.due.first_entry().filter(|entry| entry.key().0 <= now)?;
        Some(entry.remove())
    }

    fn forget(&mut self, slot: &Weak<ClusterSlot>) {
        self.known.retain(|_, known| !known.ptr_eq(slot));
    }
}

fn interval(slot: &ClusterSlot) -> Duration {
    let config = slot.config();
    let rules = config.as_ref().and_then(|config| config.outlier.as_ref());
    rules
        .filter(|rules| rules.compares())
        .map_or(WITHOUT_RULES, |rules| rules.interval)
}

/// Compares until cancelled.
pub async fn run(proxy: Arc<Proxy>, cancel: CancellationToken) {
    let uses = proxy.store(|store| store.first_uses());
    uses.follow();
    let mut watched = Watched::default();
    let earlier: Vec<_> = proxy.store(|store| {
        let clusters = store.clusters();
        let used = clusters.filter(|slot| slot.usage.used.load(Ordering::Relaxed));
        used.cloned().collect()
    });
    for slot in earlier {
        watched.add(&slot, Instant::now());
    }
    loop {
        let now = Instant::now();
        for slot in uses.take().iter().filter_map(Weak::upgrade) {
            watched.add(&slot, now);
        }
        while let Some(weak) = watched.take(now) {
            match weak.upgrade().filter(|slot| slot.exists()) {
                Some(slot) => {
                    look_at(&slot);
                    watched.put(weak, now + interval(&slot));
                }
                // If it comes back its first use is told again.
                None => watched.forget(&weak),
            }
        }
        let next = watched.due.first_key_value().map(|((at, _), _)| *at);
        tokio::select! {
            () = cancel.cancelled() => return,
            () = uses.told() => {}
            () = wait_for(next) => {}
        }
    }
}

fn look_at(slot: &ClusterSlot) {
    let (Some(config), Some(set)) = (slot.config(), slot.endpoints()) else {
        return;
    };
    let Some(rules) = config.outlier.as_ref().filter(|rules| Outlier::compares(rules)) else {
        return;
    };
    for host in compare(rules, &set.all, now_ms(), &slot.counted) {
        let until = host.state.ejected_until.load(Ordering::Relaxed);
        slot.usage.ejected_until.fetch_max(until, Ordering::Relaxed);
        tracing::info!(cluster = %slot.name, host = %host.text, "ejected: it fails more than its siblings");
    }
}

async fn wait_for(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
