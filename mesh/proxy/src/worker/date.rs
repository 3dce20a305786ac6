//! `date` (RFC 9110 section 6.6.1) as it is now, written once a second.

use std::cell::RefCell;
use std::time::{SystemTime, UNIX_EPOCH};

use http::HeaderValue;

thread_local! {
    /// The present second and how it is written.
    static DATE: RefCell<(u64, HeaderValue)> = const { RefCell::new((0, HeaderValue::from_static(""))) };
}

/// What `read` makes of it.
pub(super) fn with<T>(read: impl FnOnce(&[u8]) -> T) -> T {
    on_present(|value| read(value.as_bytes()))
}

/// As a field has it.
pub(super) fn value() -> HeaderValue {
    on_present(Clone::clone)
}

fn on_present<T>(read: impl FnOnce(&HeaderValue) -> T) -> T {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    DATE.with_borrow_mut(|(written, value)| {
        if *written != now.as_secs() {
            *written = now.as_secs();
            let text = crate::observe::time::http_date(now.as_secs());
            *value = HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""));
        }
        read(value)
    })
}
