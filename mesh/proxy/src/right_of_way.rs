//! The control thread goes first.
//!
//! A change of configuration is a fraction of a millisecond of work. The control thread is woken for it soon (see
//! [`crate::sys::ask_for_short_turns`]), but it is the longest work that it has, and whoever has used up a turn waits: behind a
//! worker that finds requests whenever it looks until the next tick of the kernel's clock, which may be 4 ms away. So workers
//! offer their processor, a few times, before they look for more requests while the control thread is awake. Where that has a
//! processor, or nobody waits for this one, an offer is a system call without effect; otherwise the answers that have been
//! written are on their way and the next requests wait for what is left of a change.
//!
//! One control thread in a process is what is meant; with several, as in tests, offers are shared.

use std::sync::atomic::{AtomicU32, Ordering};

/// Offers while the control thread is awake. Work of many milliseconds, such as a first configuration or all statistics, is not
/// done at the cost of requests: it has its fair share of the processors then.
const OFFERS: u32 = 8;

static WAY: Way = Way::new();

/// The control thread has been woken.
pub(crate) fn take() {
    WAY.take();
}

/// The control thread has nothing to do.
pub(crate) fn release() {
    WAY.release();
}

/// A worker is about to look for more to do.
pub(crate) fn offer() {
    if WAY.claim() {
        std::thread::yield_now();
    }
}

#[derive(Debug)]
struct Way {
    left: AtomicU32,
}

impl Way {
    const fn new() -> Self {
        Self {
            left: AtomicU32::new(0),
        }
    }

    fn take(&self) {
        self.left.store(OFFERS, Ordering::Relaxed);
    }

    fn release(&self) {
        self.left.store(0, Ordering::Relaxed);
    }

    /// Whether there was an offer left. Nothing hangs on the exact number: two workers may take the same one.
    fn claim(&self) -> bool {
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return false;
        }
        self.left.store(left - 1, Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_give_way_a_few_times_and_only_while_the_control_thread_is_awake() {
        let way = Way::new();
        assert!(!way.claim());
        way.take();
        assert_eq!((0..100).filter(|_| way.claim()).count(), OFFERS as usize);
        way.take();
        assert!(way.claim());
        way.release();
        assert!(!way.claim());
    }
}
