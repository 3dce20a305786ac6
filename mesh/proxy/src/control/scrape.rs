//! One look at everything that is counted, told piece by piece.
//!
//! What there is once is small; what there is of each cluster is large, and made where it is told ([`Rows`]): by clusters
//! for names in Envoy's form, which come one after the other, by families for Prometheus, which wants all series of a family
//! together.

use std::sync::Arc;

use super::{Proxy, server_stats};
use crate::config::store::Store;
use crate::metrics::baseline::Seen;
use crate::metrics::clusters::rows::{Look, Rows};
use crate::metrics::collect::{Family, collect};
use crate::metrics::select::Select;
use crate::metrics::tags::Tags;
use crate::tls;

/// Clusters of a piece.
const CLUSTERS: usize = 64;
/// Series of a piece by families, about: as many families as that makes.
const SERIES: usize = 8_192;

/// In which order series are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// All of a cluster, then the next.
    ByCluster,
    /// All clusters of a family, then the next.
    ByFamily,
}

/// See the module.
pub struct Scrape {
    proxy: Arc<Proxy>,
    select: Select,
    order: Order,
    rows: Rows,
    /// Clusters or families told.
    next: usize,
    /// What is not about clusters.
    other: Option<Vec<Family>>,
    seen: Seen,
}

impl Scrape {
    /// Looks now.
    pub fn new(proxy: &Arc<Proxy>, select: Select, order: Order) -> Self {
        let mut other = proxy.counted_beside_clusters();
        let mut seen = Seen::default();
        proxy.baseline.lock().adjust(&mut other, &mut seen);
        Self {
            rows: proxy.rows(select.deferred),
            proxy: proxy.clone(),
            select,
            order,
            next: 0,
            other: Some(other),
            seen,
        }
    }

    /// What Prometheus' labels are made of.
    pub fn tags(&self) -> &Tags {
        &self.proxy.stats.tags
    }

    /// Whether it is one piece or two, which may as well be made at once.
    pub fn is_small(&self) -> bool {
        self.rows.len() <= CLUSTERS
    }

    /// The next piece; empty ones are possible.
    pub fn piece(&mut self) -> Option<Vec<Family>> {
        let (clusters, families) = (self.rows.len(), self.rows.families());
        let end = match self.order {
            Order::ByCluster => clusters,
            Order::ByFamily => families,
        };
        if self.next >= end {
            let mut other = self.other.take()?;
            self.proxy.baseline.lock().add_rest(&mut other, &self.seen, None);
            self.select.narrow(&mut other);
            self.proxy.stats.buckets.apply(&mut other);
            return Some(other);
        }
        let step = match self.order {
            Order::ByCluster => CLUSTERS,
            Order::ByFamily => (SERIES / clusters.max(1)).max(1),
        };
        let part = self.next..(self.next + step).min(end);
        self.next = part.end;
        let mut out = match self.order {
            Order::ByCluster => self.rows.pick(part, 0..families, &self.select),
            Order::ByFamily => self.rows.pick(0..clusters, part, &self.select),
        };
        let baseline = self.proxy.baseline.lock();
        baseline.adjust(&mut out, &mut self.seen);
        if self.order == Order::ByFamily {
            // A family is told once.
            let names: Vec<&str> = out.iter().map(|family| family.name).collect();
            baseline.add_rest(&mut out, &self.seen, Some(&names));
            for name in names {
                baseline.see(name, &mut self.seen);
            }
        }
        self.proxy.stats.buckets.apply(&mut out);
        Some(out)
    }
}

impl Proxy {
    /// Which statistics are told.
    pub(super) fn select(&self) -> Select {
        Select {
            matcher: self.stats.matcher.clone(),
            deferred: self.stats.deferred,
            ..Select::default()
        }
    }

    /// What workers and the configuration say of clusters.
    fn rows(&self, deferred: crate::metrics::select::Deferred) -> Rows {
        let now_ms = crate::clock::now_ms();
        self.store(|store| {
            let lost = store.lost();
            Rows::read(&self.shards, store.clusters(), deferred, Look { now_ms, lost })
        })
    }

    /// Everything else that this process counted.
    fn counted_beside_clusters(&self) -> Vec<Family> {
        let mut families = collect(&self.own, &self.shards);
        families.extend(tls::stats::families(self.store.lock().secrets().all_stats()));
        families.extend(self.store(|store| store.counters()));
        families.extend(server_stats::server(self));
        families.extend(self.store(server_stats::configuration));
        families.extend(self.store(Store::subscription_families));
        // Of the same families as other listeners and connection managers, which are told once.
        for own in self.admin_counts.families() {
            match families.iter_mut().find(|family| family.name == own.name) {
                Some(family) => family.metrics.extend(own.metrics),
                None => families.push(own),
            }
        }
        families
    }

    /// Everything that was counted, with what counters begin with. Clusters that nobody has used are left out, of which
    /// nothing was counted.
    pub fn metrics(&self) -> Vec<Family> {
        let mut families = self.counted();
        self.baseline.lock().apply(&mut families);
        families
    }

    /// Everything that this process counted.
    pub(super) fn counted(&self) -> Vec<Family> {
        let select = Select {
            deferred: crate::metrics::select::Deferred::Hidden,
            ..Select::default()
        };
        let rows = self.rows(select.deferred);
        let mut families = rows.pick(0..rows.len(), 0..rows.families(), &select);
        families.extend(self.counted_beside_clusters());
        families
    }
}
