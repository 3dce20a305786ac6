//! A set of names that await sending, each with the sequence number of the change that made it so.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;

/// Room that is kept for later when everything was taken.
const KEPT: usize = 32;

/// Names with sequence numbers, and the lowest of these at hand.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    names: HashMap<Arc<str>, Span, RandomState>,
    oldest: u64,
}

/// The changes that a waiting name has gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    /// The first: whoever depends on it must wait for this name.
    first: u64,
    /// The last: the newest state may refer to whatever came with it, so the name must wait for that.
    last: u64,
}

impl Dirty {
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The lowest sequence number within, `u64::MAX` when empty.
    pub(super) fn oldest(&self) -> u64 {
        if self.names.is_empty() {
            u64::MAX
        } else {
            self.oldest
        }
    }

    /// Adds a name. One that waits already has gone through one more change.
    pub(super) fn insert(&mut self, name: &Arc<str>, sequence: u64) {
        self.oldest = self.oldest().min(sequence);
        let span = self.names.entry(name.clone()).or_insert(Span {
            first: sequence,
            last: sequence,
        });
        span.first = span.first.min(sequence);
        span.last = span.last.max(sequence);
    }

    /// Takes a name out; returns its first number if it was there.
    pub(super) fn remove(&mut self, name: &str) -> Option<u64> {
        let span = self.names.remove(name)?;
        if span.first == self.oldest {
            self.refresh();
        }
        Some(span.first)
    }

    /// Takes names that wait for nothing at or above `barrier`, `most` at most and as long as `limit` admits them, with the
    /// lowest number among them. In name order, so that a history replays identically.
    pub(super) fn take(
        &mut self,
        barrier: u64,
        most: usize,
        mut limit: impl FnMut(&Arc<str>) -> bool,
    ) -> (Vec<Arc<str>>, u64) {
        if self.oldest() >= barrier {
            return (Vec::new(), u64::MAX);
        }
        let mut ready: Vec<_> = self
            .names
            .iter()
            .filter(|(_, span)| span.last < barrier)
            .collect();
        if ready.len() > most {
            // Only what may be taken is sorted: a large view goes out in many responses.
            ready.select_nth_unstable(most);
            ready.truncate(most);
        }
        ready.sort_unstable();
        let mut lowest = u64::MAX;
        let mut taken = Vec::with_capacity(ready.len());
        for (name, span) in ready {
            if !limit(name) {
                break;
            }
            lowest = lowest.min(span.first);
            taken.push(name.clone());
        }
        if taken.len() == self.names.len() {
            if self.names.capacity() > KEPT {
                // A proxy that has its first view changes little from then on.
                self.names = HashMap::default();
            } else {
                self.names.clear();
            }
        } else {
            for name in &taken {
                self.names.remove(name);
            }
            self.refresh();
        }
        (taken, lowest)
    }

    /// Finds the lowest number again; stops early where many share it.
    fn refresh(&mut self) {
        let mut lowest = u64::MAX;
        for span in self.names.values() {
            lowest = lowest.min(span.first);
            if lowest == self.oldest {
                break;
            }
        }
        self.oldest = lowest;
    }
}
