//! Consistent hashing: ring hash and Maglev. Built when the hosts change, read per request.

use crate::config::hash::stable_hash;

/// A table from hashes to indices of hosts.
#[derive(Debug)]
pub enum Table {
    /// Points on a ring, sorted.
    Ring(Vec<(u64, u32)>),
    /// Entries, evenly filled.
    Maglev(Vec<u32>),
}

impl Table {
    /// A ring of about `minimum` points, shared out by weight. `hosts` are names and weights.
    pub fn ring(hosts: &[(&str, u32)], minimum: u64) -> Self {
        let total: u64 = hosts.iter().map(|(_, weight)| u64::from(*weight)).sum();
        let mut points = Vec::new();
        for (index, (name, weight)) in hosts.iter().enumerate() {
            let count = (minimum * u64::from(*weight)).div_ceil(total.max(1)).max(1);
            for replica in 0..count {
                points.push((stable_hash(format!("{name}_{replica}").as_bytes()), index as u32));
            }
        }
        points.sort_unstable();
        Self::Ring(points)
    }

    /// A Maglev table of at least `size` entries (rounded up to a prime, as the permutation needs).
    pub fn maglev(hosts: &[(&str, u32)], size: u64) -> Self {
        if hosts.is_empty() {
            return Self::Maglev(Vec::new());
        }
        let size = next_prime(size.max(hosts.len() as u64));
        let heaviest = hosts.iter().map(|(_, weight)| *weight).max().unwrap_or(1);
        struct Row {
            at: u64,
            skip: u64,
            credit: u64,
            weight: u64,
        }
        let mut rows: Vec<Row> = hosts
            .iter()
            .map(|(name, weight)| {
                let hash = stable_hash(name.as_bytes());
                let second = stable_hash(format!("{name}#").as_bytes());
                Row {
                    at: hash % size,
                    skip: second % (size - 1) + 1,
                    credit: 0,
                    weight: u64::from(*weight),
                }
            })
            .collect();
        let mut table = vec![u32::MAX; size as usize];
        let mut left = size;
        'fill: loop {
            for (index, row) in rows.iter_mut().enumerate() {
                // A host of half the weight takes every other turn.
                row.credit += row.weight;
                if row.credit < u64::from(heaviest) {
                    continue;
                }
                row.credit -= u64::from(heaviest);
                while table[row.at as usize] != u32::MAX {
                    row.at = (row.at + row.skip) % size;
                }
                table[row.at as usize] = index as u32;
                left -= 1;
                if left == 0 {
                    break 'fill;
                }
            }
        }
        Self::Maglev(table)
    }

    /// The host for `hash`, moved on by `attempt` for retries.
    pub fn find(&self, hash: u64, attempt: usize) -> Option<usize> {
        match self {
            Self::Ring(points) => {
                let start = points.partition_point(|(point, _)| *point < hash);
                let len = points.len();
                (len > 0).then(|| points[(start + attempt) % len].1 as usize)
            }
            Self::Maglev(table) => {
                let len = table.len();
                (len > 0).then(|| table[(hash as usize % len + attempt) % len] as usize)
            }
        }
    }
}

fn next_prime(from: u64) -> u64 {
    let is_prime = |n: u64| (2..=n.isqrt()).all(|divisor| !n.is_multiple_of(divisor));
    // Bertrand: there is a prime between n and 2n.
    let from = from.max(2);
    (from..=2 * from).find(|n| is_prime(*n)).unwrap_or(65_537)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("10.0.0.{n}:80")).collect()
    }

    fn spread(table: &Table, hosts: usize) -> Vec<usize> {
        let mut counts = vec![0; hosts];
        for key in 0..20_000u32 {
            counts[table.find(stable_hash(&key.to_le_bytes()), 0).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn keys_spread_by_weight() {
        let names = names(4);
        let hosts: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(i, n)| (n.as_str(), if i == 0 { 2 } else { 1 }))
            .collect();
        for table in [Table::ring(&hosts, 16_384), Table::maglev(&hosts, 65_537)] {
            let counts = spread(&table, 4);
            assert!((7_000..9_000).contains(&counts[0]), "{counts:?}");
            assert!(
                counts[1..].iter().all(|count| (3_300..4_700).contains(count)),
                "{counts:?}"
            );
        }
    }

    #[test]
    fn a_host_that_leaves_moves_few_other_keys() {
        let names = names(10);
        let all: Vec<_> = names.iter().map(|n| (n.as_str(), 1)).collect();
        let fewer = &all[..9];
        for (before, after) in [
            (Table::ring(&all, 4096), Table::ring(fewer, 4096)),
            (Table::maglev(&all, 65_537), Table::maglev(fewer, 65_537)),
        ] {
            let keys = (0..10_000u32).map(|key| stable_hash(&key.to_le_bytes()));
            let moved = keys
                .filter(|hash| {
                    let old = before.find(*hash, 0).unwrap();
                    old != 9 && after.find(*hash, 0) != Some(old)
                })
                .count();
            assert!(moved < 1_000, "{moved} of 10000 moved needlessly");
        }
    }

    #[test]
    fn no_hosts_is_nowhere() {
        assert_eq!(Table::ring(&[], 10).find(1, 0), None);
        assert_eq!(Table::maglev(&[], 10).find(1, 0), None);
    }
}
