//! Series that end: what nobody has used for a while is no longer reported.
//!
//! Peers come and go with every rollout; a proxy that kept each series for ever would grow for ever. A series is one sum
//! over the workers for whoever reads it, so it may only go on all workers at once: the control thread looks at all of
//! them and marks what is unused everywhere; each worker drops what is marked at its next sweep, unless it used it in
//! between. A series that comes back starts from zero, which readers of counters take for a restart, as they should.
//!
//! The budget: while the series of a worker are few, they stay for [`Limits::idle`]; above three quarters of what a
//! worker may hold, only for [`Limits::pressed`]; at the limit new labels are counted as `unknown`
//! ([`super::series::MAX_SERIES`]).

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use super::series::{Life, MAX_SERIES, Shard};

/// How long unused series stay.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Milliseconds without use.
    pub idle: u64,
    /// The same while there are too many.
    pub pressed: u64,
    /// Series of one worker above which there are too many.
    pub many: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            idle: 15 * 60 * 1000,
            pressed: 60 * 1000,
            many: MAX_SERIES / 4 * 3,
        }
    }
}

/// Marks the series that no worker has used lately; returns how many.
pub fn mark(shards: &[Arc<Shard>], now_ms: u64, limits: Limits) -> usize {
    let http: Vec<_> = shards.iter().map(|shard| shard.http.lock().clone()).collect();
    let tcp: Vec<_> = shards.iter().map(|shard| shard.tcp.lock().clone()).collect();
    let largest = http
        .iter()
        .zip(&tcp)
        .map(|(http, tcp)| http.len().max(tcp.len()))
        .max()
        .unwrap_or(0);
    let idle = if largest > limits.many {
        limits.pressed
    } else {
        limits.idle
    };
    let oldest = now_ms.saturating_sub(idle);
    mark_old(
        http.iter().flatten().map(|series| (series.labels.key(), &series.life, false)),
        oldest,
    ) + mark_old(
        tcp.iter().flatten().map(|series| {
            // An open connection will be counted again when it closes.
            let open = series.opened.get() != series.closed.get();
            (series.labels.key(), &series.life, open)
        }),
        oldest,
    )
}

fn mark_old<'a, K: Eq + Hash>(
    series: impl Iterator<Item = (K, &'a Life, bool)> + Clone,
    oldest: u64,
) -> usize {
    let mut used: HashMap<K, u64, foldhash::fast::RandomState> = HashMap::default();
    for (key, life, open) in series.clone() {
        let last = if open { u64::MAX } else { life.touched() };
        let entry = used.entry(key).or_default();
        *entry = last.max(*entry);
    }
    let mut marked = 0;
    for (key, life, _) in series {
        if used.get(&key).is_some_and(|last| *last < oldest) {
            life.expire();
            marked += 1;
        }
    }
    marked
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::flags::Flags;
    use crate::metrics::peer::{ServiceIdentity, Workload};
    use crate::metrics::series::{HttpLabels, Protocol, Recorder, Reporter, TcpLabels};

    const LIMITS: Limits = Limits {
        idle: 1000,
        pressed: 10,
        many: 5,
    };

    fn labels(code: u16) -> HttpLabels {
        HttpLabels {
            principals: None,
            reporter: Reporter::Source,
            peer: Workload::parse("a;b;c;d;e"),
            service: ServiceIdentity::new("h", "n", "s"),
            protocol: Protocol::Http,
            code,
            grpc_status: None,
            flags: Flags::default(),
        }
    }

    #[test]
    fn a_series_ends_on_all_workers_once_none_of_them_uses_it() {
        let shards = [Arc::<Shard>::default(), Arc::default()];
        let workers = shards.each_ref().map(|shard| Recorder::new(shard.clone()));
        let now = crate::clock::now_ms();
        for worker in &workers {
            worker.sweep(now);
            worker.http(&labels(200)).requests.add(1);
        }
        workers[1].sweep(now + 1500);
        workers[1].http(&labels(200));
        assert_eq!(mark(&shards, now + 2000, LIMITS), 0, "one worker still uses it");
        assert_eq!(mark(&shards, now + 2501, LIMITS), 2);
        for (worker, shard) in workers.iter().zip(&shards) {
            worker.sweep(now + 2502);
            assert!(shard.http.lock().is_empty());
            assert_eq!(shard.counters.expired_series.get(), 1);
        }
        assert_eq!(workers[0].http(&labels(200)).requests.get(), 0, "it starts over");
    }

    #[test]
    fn a_series_that_is_used_after_it_was_marked_stays_with_its_count() {
        let shards = [Arc::<Shard>::default()];
        let worker = Recorder::new(shards[0].clone());
        let now = crate::clock::now_ms();
        worker.sweep(now);
        worker.http(&labels(200)).requests.add(7);
        assert_eq!(mark(&shards, now + 5000, LIMITS), 1);
        worker.http(&labels(200)).requests.add(1);
        worker.sweep(now + 5001);
        assert_eq!(shards[0].http.lock()[0].requests.get(), 8);
    }

    #[test]
    fn too_many_series_shorten_their_lives() {
        let shards = [Arc::<Shard>::default()];
        let worker = Recorder::new(shards[0].clone());
        let now = crate::clock::now_ms();
        worker.sweep(now);
        for code in 200..206 {
            worker.http(&labels(code));
        }
        assert_eq!(mark(&shards, now + 100, LIMITS), 6, "more than five: ten milliseconds");
    }

    #[test]
    fn an_open_connection_keeps_its_series() {
        let shards = [Arc::<Shard>::default()];
        let worker = Recorder::new(shards[0].clone());
        let now = crate::clock::now_ms();
        worker.sweep(now);
        let series = worker.tcp(&TcpLabels {
            principals: None,
            reporter: Reporter::Source,
            peer: Workload::parse("a;b;c;d;e"),
            service: ServiceIdentity::new("h", "n", "s"),
            flags: Flags::default(),
        });
        series.opened.add(1);
        assert_eq!(mark(&shards, now + 5000, LIMITS), 0);
        series.closed.add(1);
        assert_eq!(mark(&shards, now + 5000, LIMITS), 1);
    }
}
