//! Interim answers (1xx) on their way to an HTTP/1 client.
//!
//! hyper's server writes one answer per request, and `100 Continue` of its own. So an interim answer of an endpoint is
//! written below it: it waits here, and [`super::strict::StrictIo`] writes it when hyper has flushed everything that came
//! before (between two answers of pipelined requests), or right before the final answer. What comes too late is dropped,
//! for nobody waits for it.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;

use http::{HeaderMap, StatusCode, header};
use parking_lot::Mutex;

/// Bytes of interim answers that may wait for one client; more are dropped.
pub(crate) const MAX_WAITING: usize = 64 * 1024;
/// Interim answers that are passed on for one request: an endpoint that sends them for ever occupies nobody.
pub(crate) const MAX_PER_REQUEST: u32 = 64;

/// See the module. Costs a connection that passes none on one flag per write.
#[derive(Debug, Default)]
pub struct Interims {
    waiting: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Which request of the connection they belong to, counted from 1; 0 for none: its final answer has begun.
    of: u32,
    bytes: Vec<u8>,
    passed: u32,
    /// The endpoint has said 100.
    continued: bool,
    waker: Option<Waker>,
}

impl Interims {
    /// Whether there is something to write, or to drop.
    pub(super) fn waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    /// What is to be written now. `between` is false where bytes of an earlier answer have yet to be written.
    pub(super) fn take(&self, between: bool) -> Vec<u8> {
        let mut state = self.state.lock();
        if state.of != 0 && !between {
            // There will be a better moment: the flush after those bytes.
            return Vec::new();
        }
        self.waiting.store(false, Ordering::Relaxed);
        let bytes = std::mem::take(&mut state.bytes);
        if between { bytes } else { Vec::new() }
    }

    /// From now on those of that request are passed on, and `waker` is woken for each. Tells, once, that the endpoint has
    /// said 100.
    pub fn expect(&self, of: u32, waker: &Waker) -> bool {
        let mut state = self.state.lock();
        if state.of != of {
            *state = State {
                of,
                ..State::default()
            };
        }
        if !state.waker.as_ref().is_some_and(|own| own.will_wake(waker)) {
            state.waker = Some(waker.clone());
        }
        std::mem::take(&mut state.continued)
    }

    /// The final answer has come, or nobody waits any more.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.of = 0;
        state.waker = None;
    }

    /// An interim answer has come for that request. `held` says that the client's body waits for a 100, which hyper will
    /// write when the body is asked for.
    pub fn offer(&self, of: u32, status: StatusCode, headers: &HeaderMap, held: bool) {
        let mut state = self.state.lock();
        if state.of != of || status == StatusCode::SWITCHING_PROTOCOLS || !status.is_informational() {
            return;
        }
        if status == StatusCode::CONTINUE && held {
            state.continued = true;
        } else {
            if state.passed >= MAX_PER_REQUEST {
                return;
            }
            state.passed += 1;
            let length = state.bytes.len();
            write_head(&mut state.bytes, status, headers);
            if state.bytes.len() > MAX_WAITING {
                state.bytes.truncate(length);
                return;
            }
            self.waiting.store(true, Ordering::Relaxed);
        }
        if let Some(waker) = &state.waker {
            waker.wake_by_ref();
        }
    }
}

/// Fields that belong to the connection to the endpoint, or that an answer without content cannot have.
fn stays_behind(name: &header::HeaderName, headers: &HeaderMap) -> bool {
    matches!(
        *name,
        header::CONNECTION
            | header::TRANSFER_ENCODING
            | header::CONTENT_LENGTH
            | header::UPGRADE
            | header::TRAILER
            | header::TE
            | header::PROXY_AUTHENTICATE
            | header::PROXY_AUTHORIZATION
    ) || matches!(
        name.as_str(),
        "keep-alive"
            | "proxy-connection"
            | "x-envoy-peer-metadata"
            | "x-envoy-peer-metadata-id"
            | "x-serin-unprocessed"
    ) || headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|nominated| nominated.trim().eq_ignore_ascii_case(name.as_str()))
}

/// What of an interim answer's head goes on.
pub(crate) fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let mut passed = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers {
        if !stays_behind(name, headers) {
            passed.append(name.clone(), value.clone());
        }
    }
    passed
}

fn write_head(out: &mut Vec<u8>, status: StatusCode, headers: &HeaderMap) {
    let mut line = String::with_capacity(32);
    // Writing to a String cannot fail. A client does not mind an empty reason, which keeps its space.
    let _ = write!(
        line,
        "HTTP/1.1 {} {}\r\n",
        status.as_str(),
        status.canonical_reason().unwrap_or("")
    );
    out.extend_from_slice(line.as_bytes());
    for (name, value) in headers {
        if !stays_behind(name, headers) {
            out.extend_from_slice(name.as_str().as_bytes());
            out.extend_from_slice(b": ");
            out.extend_from_slice(value.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
    }
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn hints(count: usize) -> (StatusCode, HeaderMap) {
        let mut headers = HeaderMap::new();
        for _ in 0..count {
            headers.append("link", HeaderValue::from_static("</a>; rel=preload"));
        }
        (StatusCode::EARLY_HINTS, headers)
    }

    #[test]
    fn what_belongs_to_the_connection_stays_behind_and_the_rest_is_written_as_it_came() {
        let (status, mut headers) = hints(2);
        for (name, value) in [
            ("connection", "x-own, close"),
            ("x-own", "1"),
            ("content-length", "3"),
            ("transfer-encoding", "chunked"),
            ("x-envoy-peer-metadata", "abc"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let interims = Interims::default();
        assert!(!interims.expect(1, Waker::noop()));
        interims.offer(1, status, &headers, false);
        assert!(interims.waiting());
        assert_eq!(
            String::from_utf8(interims.take(true)).unwrap(),
            "HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\nlink: </a>; rel=preload\r\n\r\n"
        );
        assert!(!interims.waiting());
    }

    #[test]
    fn only_the_request_that_waits_gets_them_and_only_between_messages() {
        let interims = Interims::default();
        let (status, headers) = hints(1);
        interims.offer(1, status, &headers, false);
        assert!(!interims.waiting(), "nobody has asked yet");
        interims.expect(1, Waker::noop());
        interims.offer(2, status, &headers, false);
        interims.offer(1, StatusCode::SWITCHING_PROTOCOLS, &headers, false);
        assert!(!interims.waiting());
        interims.offer(1, status, &headers, false);
        assert!(
            interims.take(false).is_empty(),
            "in the middle of an earlier answer"
        );
        assert!(interims.waiting(), "they wait for its end");
        interims.close();
        assert!(interims.take(false).is_empty(), "the final answer has begun");
        assert!(!interims.waiting());
    }

    #[test]
    fn a_100_that_the_clients_body_waits_for_is_told_once_and_not_written() {
        let interims = Interims::default();
        interims.expect(3, Waker::noop());
        interims.offer(3, StatusCode::CONTINUE, &HeaderMap::new(), true);
        assert!(!interims.waiting());
        assert!(interims.expect(3, Waker::noop()));
        assert!(!interims.expect(3, Waker::noop()));
    }

    #[test]
    fn an_endpoint_that_never_stops_fills_no_memory() {
        let interims = Interims::default();
        interims.expect(1, Waker::noop());
        let (status, headers) = hints(100);
        for _ in 0..1000 {
            interims.offer(1, status, &headers, false);
        }
        assert!(interims.take(true).len() <= MAX_WAITING);
        for _ in 0..1000 {
            interims.offer(1, status, &HeaderMap::new(), false);
        }
        assert!(interims.take(true).len() < 64 * 40);
    }
}
