//! A map by text whose copies share what they have in common: what a large table is changed in without being copied.
//!
//! Entries lie in buckets of a few; a copy shares the buckets, and changing an entry of one copies its bucket only. So a
//! table of 30,000 domains that workers read is followed by one with a domain more at the cost of some microseconds. A small
//! map is one bucket, searched from end to end by hash.

use std::hash::BuildHasher;
use std::sync::Arc;

/// Entries per bucket, on average, at most.
const LOAD: usize = 8;

#[derive(Clone, Debug)]
struct Entry<V> {
    hash: u32,
    key: Arc<str>,
    value: V,
}

type Bucket<V> = Arc<Vec<Entry<V>>>;

/// See the module.
#[derive(Clone, Debug)]
pub struct SharedMap<V> {
    hasher: foldhash::fast::RandomState,
    /// A power of two of them, or none.
    buckets: Vec<Bucket<V>>,
    len: usize,
}

impl<V> Default for SharedMap<V> {
    fn default() -> Self {
        Self {
            hasher: foldhash::fast::RandomState::default(),
            buckets: Vec::new(),
            len: 0,
        }
    }
}

impl<V: Clone> SharedMap<V> {
    /// Entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&V> {
        let (hash, at) = self.place(key)?;
        self.buckets[at]
            .iter()
            .find(|entry| entry.hash == hash && *entry.key == *key)
            .map(|entry| &entry.value)
    }

    /// Sets the value of a key; returns the one before.
    pub fn insert(&mut self, key: &str, value: V) -> Option<V> {
        if self.len >= self.buckets.len() * LOAD {
            self.spread((self.buckets.len() * 2).max(1));
        }
        let (hash, at) = self.place(key)?;
        let bucket = Arc::make_mut(&mut self.buckets[at]);
        let known = bucket
            .iter_mut()
            .find(|entry| entry.hash == hash && *entry.key == *key);
        if let Some(entry) = known {
            return Some(std::mem::replace(&mut entry.value, value));
        }
        bucket.push(Entry {
            hash,
            key: key.into(),
            value,
        });
        self.len += 1;
        None
    }

    /// Takes a key out; returns its value.
    pub fn remove(&mut self, key: &str) -> Option<V> {
        let (hash, at) = self.place(key)?;
        let index = self.buckets[at]
            .iter()
            .position(|entry| entry.hash == hash && *entry.key == *key)?;
        let entry = Arc::make_mut(&mut self.buckets[at]).swap_remove(index);
        self.len -= 1;
        // Far from the next growth, so that a name that comes and goes does not move all others.
        if self.buckets.len() > 1 && self.len * 4 < self.buckets.len() * LOAD {
            self.spread(self.buckets.len() / 2);
        }
        Some(entry.value)
    }

    /// Hash of a key and its bucket; nothing while there are no buckets.
    fn place(&self, key: &str) -> Option<(u32, usize)> {
        let mask = self.buckets.len().checked_sub(1)?;
        let hash = self.hasher.hash_one(key);
        Some((hash as u32, (hash >> 32) as usize & mask))
    }

    fn spread(&mut self, count: usize) {
        let mut next: Vec<Vec<Entry<V>>> = vec![Vec::new(); count];
        for entry in self.buckets.iter().flat_map(|bucket| bucket.iter()) {
            let at = (self.hasher.hash_one(&*entry.key) >> 32) as usize & (count - 1);
            next[at].push(entry.clone());
        }
        self.buckets = next.into_iter().map(Arc::new).collect();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn a_map_and_its_copies_each_hold_what_was_put_into_them(
            steps in proptest::collection::vec((0u8..4, 0u16..300), 1..600)
        ) {
            let mut map = SharedMap::default();
            let mut model = BTreeMap::new();
            let mut copies = Vec::new();
            for (index, (step, key)) in steps.into_iter().enumerate() {
                let key = format!("name-{key}");
                match step {
                    0 => prop_assert_eq!(map.remove(&key), model.remove(&key)),
                    1 if copies.len() < 4 => copies.push((map.clone(), model.clone())),
                    _ => prop_assert_eq!(map.insert(&key, index), model.insert(key, index)),
                }
                prop_assert_eq!(map.len(), model.len());
                prop_assert_eq!(map.is_empty(), model.is_empty());
            }
            copies.push((map, model));
            for (map, model) in copies {
                for key in (0..300).map(|key| format!("name-{key}")) {
                    prop_assert_eq!(map.get(&key), model.get(&key));
                }
            }
        }
    }

    #[test]
    fn a_copy_that_is_changed_shares_all_buckets_but_one() {
        let mut map = SharedMap::default();
        for index in 0..1_000 {
            map.insert(&index.to_string(), index);
        }
        let copy = map.clone();
        map.insert("7", 0);
        let differing = |map: &SharedMap<i32>| {
            let pairs = map.buckets.iter().zip(&copy.buckets);
            pairs.filter(|(one, other)| !Arc::ptr_eq(one, other)).count()
        };
        assert_eq!(differing(&map), 1);
        assert_eq!((copy.get("7"), map.get("7")), (Some(&7), Some(&0)));
    }
}
