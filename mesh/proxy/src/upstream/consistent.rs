//! Consistent hashing: ring hash and Maglev. Built when the hosts change, read per request.
//!
//! Both tables are Envoy's, entry by entry, so that proxies of both kinds send a key to the same host: the points of a
//! ring are hashes of `name_0`, `name_1`, …; Maglev's permutations begin at the hash of the name with seed 0 and step by
//! that with seed 1. The arithmetic of the weights is in double precision because Envoy's is: rounding decides who gets
//! the last point.

use crate::config::balancing::RingFunction;
use crate::config::hash::{murmur_hash_2, xxh64};

/// A host of a table.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// What is hashed: its address, its host name, or what its metadata says.
    pub name: &'a str,
    /// Its index, which [`Table::find`] gives.
    pub index: u32,
    /// Its part of the load; all together have at most 1.
    pub share: f64,
}

/// A table from hashes to indices of hosts.
#[derive(Debug)]
pub enum Table {
    /// Points on a ring, sorted.
    Ring(Vec<(u64, u32)>),
    /// Entries, evenly filled.
    Maglev(Vec<u32>),
}

impl Table {
    /// A ring of `minimum` to `maximum` points, shared out so that the host with the smallest share gets a whole number.
    pub fn ring(hosts: &[Member<'_>], minimum: u64, maximum: u64, function: RingFunction) -> Self {
        let least = hosts.iter().map(|host| host.share).fold(1.0, f64::min);
        if hosts.is_empty() || least <= 0.0 {
            return Self::Ring(Vec::new());
        }
        let scale = ((least * minimum as f64).ceil() / least).min(maximum as f64);
        let mut points = Vec::with_capacity(scale.ceil() as usize);
        // Running sums: who comes first gets what rounding leaves over.
        let (mut have, mut wanted) = (0.0, 0.0);
        let mut text = String::new();
        for host in hosts {
            wanted += scale * host.share;
            text.clear();
            text.push_str(host.name);
            text.push('_');
            let start = text.len();
            let mut number = 0u64;
            while have < wanted {
                text.truncate(start);
                push_number(&mut text, number);
                let point = match function {
                    RingFunction::Xxh64 => xxh64(text.as_bytes(), 0),
                    RingFunction::MurmurHash2 => murmur_hash_2(text.as_bytes()),
                };
                points.push((point, host.index));
                number += 1;
                have += 1.0;
            }
        }
        points.sort_unstable();
        Self::Ring(points)
    }

    /// A Maglev table of `size` entries, a prime.
    pub fn maglev(hosts: &[Member<'_>], size: u64) -> Self {
        struct Row {
            at: u64,
            skip: u64,
            index: u32,
            share: f64,
            target: f64,
        }
        let heaviest = hosts.iter().map(|host| host.share).fold(0.0, f64::max);
        if hosts.is_empty() || heaviest <= 0.0 {
            return Self::Maglev(Vec::new());
        }
        // In the order of the names, so that the order in which hosts are told does not matter.
        let mut sorted: Vec<&Member<'_>> = hosts.iter().filter(|host| host.share > 0.0).collect();
        sorted.sort_by(|a, b| a.name.cmp(b.name));
        let mut rows: Vec<Row> = sorted
            .into_iter()
            .map(|host| Row {
                at: xxh64(host.name.as_bytes(), 0) % size,
                skip: xxh64(host.name.as_bytes(), 1) % (size - 1) + 1,
                index: host.index,
                share: host.share,
                target: 0.0,
            })
            .collect();
        let mut table = vec![u32::MAX; size as usize];
        let mut left = size;
        let mut round = 0.0;
        'fill: loop {
            round += 1.0;
            for row in &mut rows {
                // A host of half the weight takes every other turn.
                if round * row.share < row.target {
                    continue;
                }
                row.target += heaviest;
                while table[row.at as usize] != u32::MAX {
                    row.at = (row.at + row.skip) % size;
                }
                table[row.at as usize] = row.index;
                left -= 1;
                if left == 0 {
                    break 'fill;
                }
            }
        }
        Self::Maglev(table)
    }

    /// The host for `hash`, another one for each further `attempt`.
    pub fn find(&self, hash: u64, attempt: usize) -> Option<usize> {
        match self {
            Self::Ring(points) => {
                let len = points.len();
                if len == 0 {
                    return None;
                }
                let start = points.partition_point(|(point, _)| *point < hash) % len;
                Some(points[(start + attempt) % len].1 as usize)
            }
            Self::Maglev(table) => {
                if table.is_empty() {
                    return None;
                }
                let hash = match attempt {
                    0 => hash,
                    // Most bits change, so that attempts are far from each other.
                    _ => hash ^ (u64::MAX - attempt as u64 + 1),
                };
                Some(table[(hash % table.len() as u64) as usize] as usize)
            }
        }
    }
}

/// Decimal digits without the machinery of formatting: a ring has up to eight million.
fn push_number(text: &mut String, number: u64) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut left = number;
    loop {
        at -= 1;
        digits[at] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    text.extend(digits[at..].iter().map(|digit| char::from(*digit)));
}

/// The order in which hosts are tried whose first one carries too much: a shuffle that the hash decides, with the 32-bit
/// Mersenne Twister (Matsumoto and Nishimura, 1998), since Envoy's is.
pub struct Shuffle {
    state: Box<[u32; 624]>,
    next: usize,
    left: Vec<u32>,
    done: usize,
}

impl Shuffle {
    /// Of `count` hosts.
    pub fn new(hash: u64, count: usize) -> Self {
        let mut state = Box::new([0u32; 624]);
        state[0] = hash as u32;
        for index in 1..624 {
            let before = state[index - 1];
            state[index] = 1_812_433_253u32
                .wrapping_mul(before ^ (before >> 30))
                .wrapping_add(index as u32);
        }
        Self {
            state,
            next: 624,
            left: (0..count as u32).collect(),
            done: 0,
        }
    }

    fn number(&mut self) -> u32 {
        if self.next == 624 {
            for index in 0..624 {
                let bits = (self.state[index] & 0x8000_0000) | (self.state[(index + 1) % 624] & 0x7fff_ffff);
                let twist = if bits & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[index] = self.state[(index + 397) % 624] ^ (bits >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut out = self.state[self.next];
        self.next += 1;
        out ^= out >> 11;
        out ^= (out << 7) & 0x9d2c_5680;
        out ^= (out << 15) & 0xefc6_0000;
        out ^ (out >> 18)
    }
}

impl Iterator for Shuffle {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let count = self.left.len() - self.done;
        if count == 0 {
            return None;
        }
        let part = (1u64 << 32) / count as u64;
        let drawn = loop {
            let drawn = u64::from(self.number()) / part;
            if drawn < count as u64 {
                break drawn as usize;
            }
        };
        self.left.swap(self.done, self.done + drawn);
        self.done += 1;
        Some(self.left[self.done - 1] as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("10.0.0.{n}:80")).collect()
    }

    fn members<'a>(names: &'a [String], weights: &[u32]) -> Vec<Member<'a>> {
        let sum: u32 = weights.iter().sum();
        names
            .iter()
            .zip(weights)
            .enumerate()
            .map(|(index, (name, weight))| Member {
                name,
                index: index as u32,
                share: f64::from(*weight) / f64::from(sum),
            })
            .collect()
    }

    fn ring(hosts: &[Member<'_>], minimum: u64) -> Table {
        Table::ring(hosts, minimum, 8 << 20, RingFunction::Xxh64)
    }

    fn spread(table: &Table, hosts: usize) -> Vec<usize> {
        let mut counts = vec![0; hosts];
        for key in 0..20_000u32 {
            counts[table.find(xxh64(&key.to_le_bytes(), 0), 0).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn keys_spread_by_weight() {
        let names = names(4);
        let hosts = members(&names, &[2, 1, 1, 1]);
        for table in [ring(&hosts, 16_384), Table::maglev(&hosts, 65_537)] {
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
        let all = members(&names, &[1; 10]);
        let fewer = members(&names[..9], &[1; 9]);
        for (before, after) in [
            (ring(&all, 4096), ring(&fewer, 4096)),
            (Table::maglev(&all, 65_537), Table::maglev(&fewer, 65_537)),
        ] {
            let keys = (0..10_000u32).map(|key| xxh64(&key.to_le_bytes(), 0));
            let moved = keys
                .filter(|hash| {
                    let old = before.find(*hash, 0).unwrap();
                    old != 9 && after.find(*hash, 0) != Some(old)
                })
                .count();
            assert!(moved < 1_500, "{moved} of 10000 moved needlessly");
        }
    }

    #[test]
    fn a_ring_has_as_many_points_as_the_lightest_host_needs_and_no_more_than_allowed() {
        let names = names(3);
        let count = |weights: &[u32], minimum, maximum| {
            let hosts = members(&names, weights);
            match Table::ring(&hosts, minimum, maximum, RingFunction::Xxh64) {
                Table::Ring(points) => (0..3)
                    .map(|index| points.iter().filter(|(_, host)| *host == index).count())
                    .collect::<Vec<_>>(),
                Table::Maglev(_) => unreachable!(),
            }
        };
        assert_eq!(count(&[1, 1, 1], 1024, 8 << 20), [342, 342, 342]);
        assert_eq!(count(&[1, 2, 3], 1024, 8 << 20), [171, 342, 513]);
        assert_eq!(count(&[1, 2, 3], 1024, 12), [2, 4, 6]);
        // Beyond the maximum the first hosts win what rounding leaves over.
        assert_eq!(count(&[1, 1, 1], 1024, 4).iter().sum::<usize>(), 4);
    }

    #[test]
    fn no_hosts_is_nowhere() {
        assert_eq!(ring(&[], 10).find(1, 0), None);
        assert_eq!(Table::maglev(&[], 11).find(1, 0), None);
    }

    #[test]
    fn the_numbers_of_a_shuffle_are_those_of_the_mersenne_twister() {
        // The ten thousandth number with the default seed, which the C++ standard states.
        let mut shuffle = Shuffle::new(5489, 1);
        let last = (0..10_000).map(|_| shuffle.number()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    #[test]
    fn a_shuffle_names_everybody_once() {
        for hash in 0..50 {
            let mut all: Vec<_> = Shuffle::new(hash, 9).collect();
            all.sort_unstable();
            assert_eq!(all, (0..9).collect::<Vec<_>>());
        }
    }
}
