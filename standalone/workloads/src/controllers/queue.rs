//! The keys that a controller has to look at: each once however often it is asked for, later ones by time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

use crate::Error;
use crate::mirror::Key;

/// First and longest wait after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(30));

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    due: BTreeSet<Key>,
    delayed: BTreeMap<Key, Instant>,
    failures: BTreeMap<Key, u32>,
}

impl Queue {
    /// Asks for a key to be looked at now.
    pub(crate) fn add(&mut self, key: Key) {
        self.due.insert(key);
    }

    pub(crate) fn add_all(&mut self, keys: impl IntoIterator<Item = Key>) {
        self.due.extend(keys);
    }

    /// Asks for a key to be looked at after a while, unless it is asked for sooner.
    pub(crate) fn add_after(&mut self, key: Key, delay: Duration) {
        let at = Instant::now() + delay;
        let known = self.delayed.entry(key).or_insert(at);
        *known = (*known).min(at);
    }

    /// It went wrong: again after a while that doubles with every failure.
    fn failed(&mut self, key: Key) {
        let failures = self.failures.entry(key.clone()).or_insert(0);
        let delay = (RETRY.0 * 2_u32.saturating_pow((*failures).min(16))).min(RETRY.1);
        *failures += 1;
        self.add_after(key, delay);
    }

    /// A key that is due.
    pub(crate) fn pop(&mut self) -> Option<Key> {
        let now = Instant::now();
        let late: Vec<Key> = self
            .delayed
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(key, _)| key.clone())
            .collect();
        for key in late {
            self.delayed.remove(&key);
            self.due.insert(key);
        }
        self.due.pop_first()
    }

    /// Takes in how looking at a key went: when to look again, if it was said, or back-off. `doing` is for the log.
    pub(crate) fn settle(&mut self, key: Key, doing: &'static str, outcome: Result<Option<Duration>, Error>) {
        match outcome {
            Ok(again) => {
                self.failures.remove(&key);
                if let Some(after) = again {
                    self.add_after(key, after);
                }
            }
            Err(error) => {
                debug!(?key, %error, doing, "failed; will be tried again");
                self.failed(key);
            }
        }
    }

    /// Sleeps until a delayed key is due; for ever if there is none.
    pub(crate) async fn wait(&self) {
        match self.delayed.values().min() {
            Some(at) => tokio::time::sleep_until(*at).await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        ("n".to_owned(), name.to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn keys_are_taken_once_delayed_ones_in_time_and_failures_back_off() {
        let mut queue = Queue::default();
        queue.add(key("a"));
        queue.add(key("a"));
        assert_eq!(queue.pop(), Some(key("a")));
        assert_eq!(queue.pop(), None);
        queue.add_after(key("b"), Duration::from_secs(5));
        queue.add_after(key("b"), Duration::from_secs(9));
        let start = Instant::now();
        queue.wait().await;
        assert_eq!((Instant::now() - start).as_secs(), 5);
        assert_eq!(queue.pop(), Some(key("b")));
        let mut waits = Vec::new();
        for _ in 0..14 {
            queue.failed(key("c"));
            let start = Instant::now();
            queue.wait().await;
            waits.push((Instant::now() - start).as_millis());
            assert_eq!(queue.pop(), Some(key("c")));
        }
        assert_eq!(&waits[..3], [10, 20, 40]);
        assert_eq!(waits[13], 30_000);
    }
}
