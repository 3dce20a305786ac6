//! Interim answers (1xx) of endpoints, passed on to clients over HTTP/1.1 and HTTP/2 where `proxy_100_continue` asks for
//! it (RFC 9110 section 15.2).
//!
//! Endpoints tell as they are read: those over HTTP/1 through [`Tell`], those over HTTP/2 through `h2`
//! (`ResponseFuture::poll_informational`). What they tell waits in the request's [`Waiting`], from where the task that serves the
//! client sends it before it sends the final answer.
//!
//! A client that expects `100 Continue` gets the endpoint's: its head goes on with `Expect`, its body is not asked for
//! (100 is said when it is) until the endpoint has said 100, or has said nothing for a second.
//!
//! 101 is never passed on: it is an upgrade's final answer, and over HTTP/2 it is malformed.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use http::{HeaderMap, Request, Response, StatusCode, header};
use parking_lot::Mutex;

use super::body::{RequestSource, UpstreamBody};
use super::upstream::Plan;
use crate::hygiene::interim::{MAX_PER_REQUEST, MAX_WAITING, passed_on};

/// A client that expects 100 is told to go on after this time, as if its endpoint had said so: many never do, and a
/// client need not wait for longer either (RFC 9110 section 10.1.1).
const PATIENCE: Duration = Duration::from_secs(1);

/// Who is told of an endpoint's interim answers.
pub type Tell = Box<dyn Fn(StatusCode, &HeaderMap) + Send + Sync>;

/// Interim answers that wait for the task of their stream to send them.
#[derive(Debug, Default)]
pub struct Waiting {
    any: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// An attempt is under way.
    open: bool,
    heads: Vec<Response<()>>,
    passed: u32,
    bytes: usize,
    /// The endpoint has said 100, and the client's body waits for that.
    continued: bool,
    /// The client has been told to go on.
    told: bool,
    /// Of the attempt.
    waker: Option<Waker>,
    /// Of the task of the stream.
    task: Option<Waker>,
}

impl State {
    fn push(&mut self, status: StatusCode, headers: HeaderMap) {
        let mut head = Response::new(());
        *head.status_mut() = status;
        *head.headers_mut() = headers;
        self.heads.push(head);
        if let Some(task) = &self.task {
            task.wake_by_ref();
        }
    }
}

fn keep(place: &mut Option<Waker>, waker: &Waker) {
    if !place.as_ref().is_some_and(|own| own.will_wake(waker)) {
        *place = Some(waker.clone());
    }
}

impl Waiting {
    /// The client's body is wanted: it is told so, once.
    pub fn go_on(&self) {
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.told, true) {
            state.push(StatusCode::CONTINUE, HeaderMap::new());
            self.any.store(true, Ordering::Relaxed);
        }
    }

    fn expect(&self, waker: &Waker) -> bool {
        let mut state = self.state.lock();
        state.open = true;
        keep(&mut state.waker, waker);
        std::mem::take(&mut state.continued)
    }

    fn close(&self) {
        let mut state = self.state.lock();
        state.open = false;
        state.waker = None;
    }

    fn offer(&self, status: StatusCode, headers: &HeaderMap, held: bool) {
        let mut state = self.state.lock();
        if !state.open || status == StatusCode::SWITCHING_PROTOCOLS || !status.is_informational() {
            return;
        }
        if status == StatusCode::CONTINUE && held {
            state.continued = true;
            if let Some(waker) = &state.waker {
                waker.wake_by_ref();
            }
        } else {
            let headers = passed_on(headers);
            let bytes = headers
                .iter()
                .map(|(name, value)| name.as_str().len() + value.len())
                .sum::<usize>();
            // Nothing holds them back but the connection: what one request may have is limited as a whole.
            if state.passed >= MAX_PER_REQUEST || state.bytes + bytes > MAX_WAITING {
                return;
            }
            state.passed += 1;
            state.bytes += bytes;
            if status == StatusCode::CONTINUE && std::mem::replace(&mut state.told, true) {
                return;
            }
            state.push(status, headers);
            self.any.store(true, Ordering::Relaxed);
        }
    }

    /// Wakes the present task for each from now on.
    pub(super) fn tell(&self, task: &Waker) {
        keep(&mut self.state.lock().task, task);
    }

    /// Whether something waits.
    pub(super) fn any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// Takes what waits, to be written.
    pub(super) fn take(&self) -> Vec<Response<()>> {
        self.any.store(false, Ordering::Relaxed);
        std::mem::take(&mut self.state.lock().heads)
    }

    /// Sends what waits. The stream must not have been reset, nor its final answer been sent.
    pub(super) fn send(&self, respond: &mut SendResponse<Bytes>) {
        for head in self.take() {
            // A client that is gone needs none.
            let _ = respond.send_informational(head);
        }
    }
}

/// The way of interim answers to the client of one request, where there is one.
pub(super) fn door(plan: &Plan<'_>) -> Option<Arc<Waiting>> {
    plan.interims
        .clone()
        .filter(|_| plan.conn.manager.interim_answers)
}

/// Prepares a request whose interim answers are passed on, or not; who is to be told of them.
pub(super) fn prepare(
    request: &mut Request<UpstreamBody>,
    source: Option<&Rc<RefCell<RequestSource>>>,
    door: Option<&Arc<Waiting>>,
) -> Option<Tell> {
    let mut held = false;
    if let Some(expected) = request.headers().get(header::EXPECT) {
        let expects = expected.as_bytes().eq_ignore_ascii_case(b"100-continue");
        held = door.is_some() && expects && source.is_some_and(|source| source.borrow_mut().hold());
        if !held {
            // It is answered when the body is read.
            request.headers_mut().remove(header::EXPECT);
        }
    }
    let door = door?.clone();
    Some(Box::new(move |status, headers| door.offer(status, headers, held)))
}

/// Closes the door behind the final answer, or behind an attempt that was given up.
struct Open<'a>(&'a Waiting);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Waits for the final answer, and lets interim ones pass meanwhile.
pub(super) async fn pass<T>(door: &Waiting, answer: impl Future<Output = T>) -> T {
    let _open = Open(door);
    let mut answer = pin!(answer);
    poll_fn(|cx| {
        door.expect(cx.waker());
        answer.as_mut().poll(cx)
    })
    .await
}

/// The same for a request whose body is held until the endpoint has said 100.
pub(super) async fn pass_held<T>(
    door: &Waiting,
    source: &RefCell<RequestSource>,
    answer: impl Future<Output = T>,
) -> T {
    let _open = Open(door);
    let mut patience = Some(pin!(tokio::time::sleep(PATIENCE)));
    let mut answer = pin!(answer);
    poll_fn(|cx| {
        let continued = door.expect(cx.waker());
        if let Some(timer) = &mut patience
            && (continued || timer.as_mut().poll(cx).is_ready())
        {
            patience = None;
            source.borrow_mut().go_on();
        }
        answer.as_mut().poll(cx)
    })
    .await
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn heads(waiting: &Waiting) -> Vec<Response<()>> {
        std::mem::take(&mut waiting.state.lock().heads)
    }

    fn hints() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("link", HeaderValue::from_static("</a.css>; rel=preload"));
        headers
    }

    #[test]
    fn only_what_an_attempt_that_is_under_way_says_waits_for_its_stream() {
        let waiting = Waiting::default();
        waiting.offer(StatusCode::EARLY_HINTS, &hints(), false);
        assert!(heads(&waiting).is_empty(), "nobody has asked yet");
        assert!(!waiting.expect(Waker::noop()));
        waiting.offer(StatusCode::SWITCHING_PROTOCOLS, &hints(), false);
        waiting.offer(StatusCode::OK, &hints(), false);
        assert!(heads(&waiting).is_empty(), "not what is no interim answer");
        let mut headers = hints();
        headers.insert("connection", HeaderValue::from_static("close"));
        waiting.offer(StatusCode::EARLY_HINTS, &headers, false);
        assert_eq!(heads(&waiting)[0].headers(), &hints());
        waiting.close();
        waiting.offer(StatusCode::EARLY_HINTS, &hints(), false);
        assert!(heads(&waiting).is_empty(), "the attempt has ended");
    }

    #[test]
    fn a_client_is_told_to_go_on_once() {
        let waiting = Waiting::default();
        waiting.expect(Waker::noop());
        waiting.offer(StatusCode::CONTINUE, &HeaderMap::new(), true);
        assert!(heads(&waiting).is_empty(), "its body is asked for first");
        assert!(waiting.expect(Waker::noop()));
        waiting.go_on();
        waiting.go_on();
        waiting.offer(StatusCode::CONTINUE, &HeaderMap::new(), false);
        assert_eq!(heads(&waiting).len(), 1);
    }

    #[test]
    fn an_endpoint_that_never_stops_fills_no_stream() {
        let waiting = Waiting::default();
        waiting.expect(Waker::noop());
        for _ in 0..1000 {
            waiting.offer(StatusCode::EARLY_HINTS, &hints(), false);
        }
        assert_eq!(heads(&waiting).len(), MAX_PER_REQUEST as usize);
        let waiting = Waiting::default();
        waiting.expect(Waker::noop());
        let mut headers = HeaderMap::new();
        let long = HeaderValue::try_from("x".repeat(MAX_WAITING / 3)).unwrap();
        headers.insert("link", long);
        for _ in 0..1000 {
            waiting.offer(StatusCode::EARLY_HINTS, &headers, false);
        }
        assert_eq!(heads(&waiting).len(), 2);
    }
}
