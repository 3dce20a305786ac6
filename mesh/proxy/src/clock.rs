//! Milliseconds since the process started: small enough for atomics, never zero, never backwards.

use std::sync::LazyLock;
use std::time::Instant;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Now; at least 1, so that 0 can mean "never".
pub(crate) fn now_ms() -> u64 {
    START.elapsed().as_millis() as u64 + 1
}
