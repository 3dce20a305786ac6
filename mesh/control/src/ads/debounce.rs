//! How long to wait for more changes before pushing.

use std::time::Duration;

use super::MAX_DEBOUNCE;

/// First wait once changes follow each other closely.
const FIRST: Duration = Duration::from_millis(1);

/// Longest wait as long as pushes are cheap: a weight must be live within 50 ms even in the middle of a storm.
const CHEAP: Duration = Duration::from_millis(16);

/// Adaptive debounce: a lone change waits for nothing; while changes keep coming the wait doubles, up to 16 ms or twice
/// what a push takes, whichever is longer (so that pushing takes at most a third of the time), at most 100 ms. Istio's
/// is a constant 100 ms of quiet, at most 10 s.
///
/// Pure: times are since any fixed moment.
#[derive(Debug, Default)]
pub struct Debounce {
    window: Duration,
    last_push: Option<Duration>,
    last_cost: Duration,
}

impl Debounce {
    /// How long the first change since the last push has to wait.
    pub fn wait(&self, now: Duration) -> Duration {
        match self.last_push {
            Some(last) if self.is_storm(now) => {
                let next = self.next_window();
                (last + next).saturating_sub(now)
            }
            _ => Duration::ZERO,
        }
    }

    /// A push has ended and took `cost`.
    pub fn pushed(&mut self, now: Duration, cost: Duration) {
        self.window = if self.is_storm(now.saturating_sub(cost)) {
            self.next_window()
        } else {
            Duration::ZERO
        };
        self.last_push = Some(now);
        self.last_cost = cost;
    }

    /// Whether something that happens now follows the last push closely.
    fn is_storm(&self, now: Duration) -> bool {
        let close = 4 * self.next_window();
        self.last_push.is_some_and(|last| now < last + close)
    }

    fn next_window(&self) -> Duration {
        let ceiling = CHEAP.max(2 * self.last_cost).min(MAX_DEBOUNCE);
        (2 * self.window).max(FIRST).max(2 * self.last_cost).min(ceiling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_lone_change_waits_for_nothing() {
        let mut debounce = Debounce::default();
        assert_eq!(debounce.wait(ms(0)), ms(0));
        debounce.pushed(ms(0), ms(0));
        assert_eq!(debounce.wait(ms(500)), ms(0));
    }

    #[test]
    fn under_a_storm_the_wait_grows_to_its_bound_and_falls_back_after_it() {
        let mut debounce = Debounce::default();
        let mut now = ms(0);
        let mut waits = Vec::new();
        for _ in 0..10 {
            let wait = debounce.wait(now);
            waits.push(wait.as_millis());
            now += wait;
            debounce.pushed(now, ms(0));
        }
        assert_eq!(waits, [0, 1, 2, 4, 8, 16, 16, 16, 16, 16]);
        assert_eq!(debounce.wait(now + ms(200)), ms(0));
    }

    #[test]
    fn expensive_pushes_take_a_bounded_share_of_the_time() {
        let mut debounce = Debounce::default();
        debounce.pushed(ms(0), ms(0));
        debounce.pushed(ms(31), ms(30));
        assert_eq!(debounce.wait(ms(31)), ms(60));
        debounce.pushed(ms(1000), ms(400));
        assert_eq!(debounce.wait(ms(1000)), MAX_DEBOUNCE);
    }
}
