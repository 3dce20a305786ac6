//! Whose turn it is: a set of keys to reconcile, each at most once at a time.
//!
//! A key that is pushed while it runs runs once more afterwards. Urgent keys go before the others. A key may have one
//! appointment in the future; an earlier push does not cancel it, a new appointment replaces it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::key::Key;

/// Order among keys that are ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    /// Somebody waits for the effect.
    High,
    /// Bookkeeping, such as noting a revision that changed nothing.
    Low,
}

#[derive(Default)]
struct Entry {
    ready: Option<(Urgency, u64)>,
    due: Option<(Instant, u64)>,
    running: bool,
    /// Pushed while running.
    again: Option<Urgency>,
}

#[derive(Default)]
struct State {
    entries: HashMap<Key, Entry>,
    ready: BTreeMap<(Urgency, u64), Key>,
    due: BTreeMap<(Instant, u64), Key>,
    sequence: u64,
}

/// The queue. Bounded by the number of objects, since a key is in it once.
#[derive(Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

impl State {
    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    fn make_ready(&mut self, key: &Key, urgency: Urgency) {
        let sequence = self.next_sequence();
        let entry = self.entries.entry(key.clone()).or_default();
        if entry.running {
            entry.again = Some(entry.again.map_or(urgency, |u| u.min(urgency)));
            return;
        }
        match entry.ready {
            Some((held, _)) if held <= urgency => return,
            Some(slot) => {
                self.ready.remove(&slot);
            }
            None => {}
        }
        entry.ready = Some((urgency, sequence));
        self.ready.insert((urgency, sequence), key.clone());
    }

    fn cancel_due(&mut self, key: &Key) {
        if let Some(slot) = self.entries.get_mut(key).and_then(|e| e.due.take()) {
            self.due.remove(&slot);
        }
    }
}

impl Queue {
    /// Makes a key ready.
    pub(crate) fn push(&self, key: &Key, urgency: Urgency) {
        self.state.lock().make_ready(key, urgency);
        self.changed.notify_one();
    }

    /// Sets a key's appointment, in place of the one that it had.
    pub(crate) fn push_at(&self, key: &Key, at: Instant) {
        {
            let mut state = self.state.lock();
            state.cancel_due(key);
            let slot = (at, state.next_sequence());
            state.entries.entry(key.clone()).or_default().due = Some(slot);
            state.due.insert(slot, key.clone());
        }
        self.changed.notify_one();
    }

    /// Removes a key's appointment.
    pub(crate) fn cancel_at(&self, key: &Key) {
        self.state.lock().cancel_due(key);
    }

    /// The next key; it counts as running until [`Queue::done`].
    pub(crate) async fn next(&self) -> Key {
        loop {
            let (now, next_due) = {
                let mut state = self.state.lock();
                let now = Instant::now();
                while let Some(first) = state.due.first_entry()
                    && first.key().0 <= now
                {
                    let key = first.remove();
                    if let Some(entry) = state.entries.get_mut(&key) {
                        entry.due = None;
                    }
                    state.make_ready(&key, Urgency::High);
                }
                if let Some((_, key)) = state.ready.pop_first() {
                    let entry = state.entries.entry(key.clone()).or_default();
                    entry.ready = None;
                    entry.running = true;
                    return key;
                }
                (now, state.due.first_key_value().map(|(slot, _)| slot.0))
            };
            match next_due {
                Some(at) if at > now => {
                    tokio::select! {
                        () = self.changed.notified() => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
                Some(_) => {}
                None => self.changed.notified().await,
            }
        }
    }

    /// Ends a run.
    pub(crate) fn done(&self, key: &Key) {
        let again = {
            let mut state = self.state.lock();
            let Some(entry) = state.entries.get_mut(key) else {
                return;
            };
            entry.running = false;
            let again = entry.again.take();
            if let Some(urgency) = again {
                state.make_ready(key, urgency);
            } else if entry.due.is_none() && entry.ready.is_none() {
                state.entries.remove(key);
            }
            again
        };
        if again.is_some() {
            self.changed.notify_one();
        }
    }
}

/// How many objects a controller works on at a time. None of them holds a thread while it waits for the API server, and the threads of
/// git are bounded on their own, so this bounds memory and load on that server. Flux has 4.
const CONCURRENT: usize = 16;

/// Works on whatever is in the queue until `cancel`. What is under way then is dropped at its next wait; it has ended when this returns.
pub(crate) async fn work<T, R>(
    worker: Arc<T>,
    cancel: CancellationToken,
    queue: fn(&T) -> &Queue,
    reconcile: impl Fn(Arc<T>, Key) -> R,
) where
    T: Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let permits = Arc::new(Semaphore::new(CONCURRENT));
    let running = TaskTracker::new();
    loop {
        let next = async {
            let permit = permits.clone().acquire_owned().await.ok()?;
            Some((permit, queue(&worker).next().await))
        };
        let (permit, key) = tokio::select! {
            () = cancel.cancelled() => break,
            next = next => match next {
                Some(next) => next,
                None => break,
            },
        };
        let (worker, cancel) = (worker.clone(), cancel.clone());
        let work = reconcile(worker.clone(), key.clone());
        running.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = work => {}
            }
            queue(&worker).done(&key);
            drop(permit);
        });
    }
    running.close();
    running.wait().await;
}

/// Objects that come due in the same second after a start would come due together for ever. Up to 5 % later, always
/// the same for one object.
pub(crate) fn jittered(interval: Duration, key: &Key) -> Duration {
    use std::hash::{Hash as _, Hasher as _};
    let mut hasher = std::hash::DefaultHasher::new();
    key.hash(&mut hasher);
    interval + interval.mul_f64((hasher.finish() % 1000) as f64 / 1000.0 * 0.05)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new("ns", name)
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_pushed_while_it_runs_runs_once_more_and_never_twice_at_a_time() {
        let queue = Queue::default();
        queue.push(&key("a"), Urgency::High);
        queue.push(&key("a"), Urgency::High);
        assert_eq!(queue.next().await, key("a"));
        queue.push(&key("a"), Urgency::Low);
        queue.push(&key("a"), Urgency::High);
        let nothing = tokio::time::timeout(Duration::from_secs(1), queue.next()).await;
        assert!(nothing.is_err(), "it is still running");
        queue.done(&key("a"));
        assert_eq!(queue.next().await, key("a"));
        queue.done(&key("a"));
        assert!(
            tokio::time::timeout(Duration::from_secs(1), queue.next())
                .await
                .is_err()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn urgent_keys_overtake_and_a_key_can_become_urgent() {
        let queue = Queue::default();
        for name in ["a", "b", "c"] {
            queue.push(&key(name), Urgency::Low);
        }
        queue.push(&key("d"), Urgency::High);
        queue.push(&key("c"), Urgency::High);
        queue.push(&key("d"), Urgency::Low);
        let mut order = Vec::new();
        for _ in 0..4 {
            order.push(queue.next().await.name);
        }
        assert_eq!(order, ["d", "c", "a", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_appointment_is_kept_and_a_later_one_replaces_it() {
        let queue = Queue::default();
        let start = Instant::now();
        queue.push_at(&key("a"), start + Duration::from_secs(5));
        queue.push_at(&key("a"), start + Duration::from_secs(60));
        queue.push_at(&key("b"), start + Duration::from_secs(30));
        assert_eq!(queue.next().await, key("b"));
        assert_eq!(start.elapsed(), Duration::from_secs(30));
        assert_eq!(queue.next().await, key("a"));
        assert_eq!(start.elapsed(), Duration::from_secs(60));
        queue.push_at(&key("c"), start + Duration::from_secs(70));
        queue.cancel_at(&key("c"));
        assert!(
            tokio::time::timeout(Duration::from_secs(100), queue.next())
                .await
                .is_err()
        );
    }

    #[test]
    fn intervals_are_stretched_by_at_most_a_twentieth_and_always_alike() {
        let minute = Duration::from_secs(60);
        for name in ["a", "b", "c", "d"] {
            let at = jittered(minute, &key(name));
            assert!(at >= minute && at <= Duration::from_secs(63));
            assert_eq!(at, jittered(minute, &key(name)));
        }
    }
}
