//! A token bucket without locks: filled in steps, as Envoy's `TokenBucket` says, shared by all workers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serin_xds::pb::envoy::r#type::v3 as envoy_type;

use crate::config::convert::{self, required};
use crate::error::{Refusal, Within};

/// Envoy's shortest fill interval.
const MIN_INTERVAL: Duration = Duration::from_millis(50);

/// Size and filling of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fill {
    /// Tokens that fit.
    pub max: u32,
    /// Tokens per step.
    pub per_step: u32,
    /// Milliseconds per step.
    pub step_ms: u64,
}

impl Fill {
    /// Compiles the message.
    pub(crate) fn compile(from: &envoy_type::TokenBucket) -> Result<Self, Refusal> {
        if from.max_tokens == 0 {
            return Err(Refusal::new("max_tokens", "must be above zero"));
        }
        let per_step = from.tokens_per_fill.as_ref().map_or(1, |value| value.value);
        if per_step == 0 {
            return Err(Refusal::new("tokens_per_fill", "must be above zero"));
        }
        let interval = required(from.fill_interval.as_ref(), "fill_interval")?;
        let interval = convert::duration(interval).within("fill_interval")?;
        if interval < MIN_INTERVAL {
            return Err(Refusal::new("fill_interval", "must be 50 ms or more"));
        }
        Ok(Self {
            max: from.max_tokens,
            per_step,
            step_ms: interval.as_millis() as u64,
        })
    }
}

/// What was left after an attempt to take tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Whether there were enough.
    pub granted: bool,
    /// Tokens that remain.
    pub remaining: u32,
    /// Milliseconds until the next step.
    pub next_step_ms: u64,
}

/// See the module. Starts full.
#[derive(Debug)]
pub struct Bucket {
    /// Size and filling.
    pub fill: Fill,
    start_ms: u64,
    /// Steps taken into account (upper half) and tokens (lower half), changed together.
    state: AtomicU64,
}

impl Bucket {
    /// A full bucket, made at `now_ms` of a clock that never goes back.
    pub fn new(fill: Fill, now_ms: u64) -> Self {
        Self {
            fill,
            start_ms: now_ms,
            state: AtomicU64::new(u64::from(fill.max)),
        }
    }

    /// Takes `count` tokens, if there are that many.
    pub fn take(&self, count: u32, now_ms: u64) -> Taken {
        let passed = now_ms.saturating_sub(self.start_ms);
        let steps = passed / self.fill.step_ms;
        let next_step_ms = self.fill.step_ms - passed % self.fill.step_ms;
        let mut seen = self.state.load(Ordering::Relaxed);
        loop {
            // Steps are counted modulo 2^32: at 50 ms that is 6.8 years of standing still.
            let (old_steps, tokens) = (seen >> 32, seen & 0xFFFF_FFFF);
            let due = (steps.wrapping_sub(old_steps)) & 0xFFFF_FFFF;
            // Another thread may have looked at the clock later and got here first.
            let (due, steps) = if due > u64::from(u32::MAX) / 2 {
                (0, old_steps)
            } else {
                (due, steps)
            };
            let filled = tokens
                .saturating_add(due.saturating_mul(u64::from(self.fill.per_step)))
                .min(u64::from(self.fill.max));
            let granted = filled >= u64::from(count);
            let left = if granted {
                filled - u64::from(count)
            } else {
                filled
            };
            let taken = Taken {
                granted,
                remaining: left as u32,
                next_step_ms,
            };
            let next = (steps << 32) | left;
            if next == seen {
                return taken;
            }
            match self
                .state
                .compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return taken,
                Err(now) => seen = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILL: Fill = Fill {
        max: 5,
        per_step: 2,
        step_ms: 100,
    };

    #[test]
    fn a_bucket_starts_full_refuses_when_empty_and_fills_in_steps() {
        let bucket = Bucket::new(FILL, 1000);
        for left in (0..5).rev() {
            let taken = bucket.take(1, 1010);
            assert!(taken.granted);
            assert_eq!((taken.remaining, taken.next_step_ms), (left, 90));
        }
        assert!(!bucket.take(1, 1099).granted);
        assert!(bucket.take(2, 1100).granted);
        assert!(!bucket.take(1, 1150).granted);
        assert_eq!(bucket.take(1, 99_000).remaining, 4, "never above its size");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn no_more_is_granted_than_was_filled(gaps in proptest::collection::vec(0u64..300, 1..100)) {
            let bucket = Bucket::new(FILL, 0);
            let (mut now, mut granted) = (0, 0);
            for gap in gaps {
                now += gap;
                granted += u64::from(bucket.take(1, now).granted);
                prop_assert!(granted <= 5 + now / 100 * 2);
            }
        }
    }
}
