//! A set of names that await sending, each with the sequence number of the change that made it so.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Names with sequence numbers, and the lowest of these at hand. What is taken costs what is taken, however much waits: a
/// large view goes out in many responses.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    names: BTreeMap<Arc<str>, Span>,
    /// First numbers, and how many names have each.
    firsts: BTreeMap<u64, usize>,
}

/// The changes that a waiting name has gone through.
#[derive(Clone, Copy, Debug)]
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
        self.firsts
            .first_key_value()
            .map_or(u64::MAX, |(first, _)| *first)
    }

    /// Adds a name. One that waits already has gone through one more change.
    pub(super) fn insert(&mut self, name: &Arc<str>, sequence: u64) {
        let mut span = Span {
            first: sequence,
            last: sequence,
        };
        if let Some(before) = self.names.get_mut(name) {
            span.first = span.first.min(before.first);
            span.last = span.last.max(before.last);
            let before = std::mem::replace(before, span);
            if before.first == span.first {
                return;
            }
            self.leave(before.first);
        } else {
            self.names.insert(name.clone(), span);
        }
        *self.firsts.entry(span.first).or_default() += 1;
    }

    /// Takes a name out; returns its first number if it was there.
    pub(super) fn remove(&mut self, name: &str) -> Option<u64> {
        let span = self.names.remove(name)?;
        self.leave(span.first);
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
        let taken: Vec<Arc<str>> = self
            .names
            .iter()
            .filter(|(_, span)| span.last < barrier)
            .map(|(name, _)| name)
            .take(most)
            .take_while(|name| limit(name))
            .cloned()
            .collect();
        let lowest = taken.iter().filter_map(|name| self.remove(name)).min();
        (taken, lowest.unwrap_or(u64::MAX))
    }

    fn leave(&mut self, first: u64) {
        if let Some(count) = self.firsts.get_mut(&first) {
            *count -= 1;
            if *count == 0 {
                self.firsts.remove(&first);
            }
        }
    }
}
