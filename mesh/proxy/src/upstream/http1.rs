//! An HTTP/1 connection to an endpoint.
//!
//! Whoever sends a request drives the connection: [`Answering`] writes the request, as much of it as is ready in one piece, and
//! reads up to the final head; [`Body`] reads on. No task is woken for a request but the request's own. Only a body that is
//! still being sent when its answer has come gets a task for the rest, which ends with the connection at the latest.
//!
//! While nobody uses a connection it is watched by a task of its own, made once: an endpoint that closes it, or says something
//! unasked, ends it there and then and not with the next request. A request does not wake that task: who gives the connection back
//! lays the task's waker down where the socket finds it. The same task closes the connection, whoever ends it, and gives up what is
//! held for it.
//!
//! | room | what |
//! |---|---|
//! | `answering` | a request on its way up to the head of its answer |
//! | `upload` | sending, and the task for what is sent later |
//! | `body` | the answer's body |
//! | `tunnel` | what is inside of an upgrade or a CONNECT |
//! | `error` | why there is no answer |

mod answering;
mod body;
mod error;
mod tunnel;
mod upload;

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use http::{Method, Request};
use http_body::Body as _;
use tokio::io::AsyncWrite as _;
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;

pub use self::answering::Answering;
pub use self::body::Body;
pub use self::error::Error;
pub use self::tunnel::Tunnel;

use self::upload::Upload;
use super::metered::Metered;
use crate::http1::encode;
use crate::http1::head::HeadLimits;
use crate::http1::input::Input;
use crate::http1::out::Out;
use crate::http1::response::Parser;
use crate::hygiene::fields::connection_has;
use crate::worker::body::UpstreamBody;
use crate::worker::interim::Tell;

/// Limits of an answer's head.
const LIMITS: HeadLimits = HeadLimits {
    bytes: 64 * 1024,
    fields: 100,
};
/// How long saying goodbye may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// Who uses a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// Nobody: it is watched.
    Idle,
    /// A request, whose answer is not over.
    Request,
    /// What is no longer HTTP.
    Tunnel,
}

/// The state of a connection, which its request, its answer and its tasks share.
struct State {
    /// Until it is closed.
    io: Option<Metered>,
    input: Input,
    out: Out,
    parser: Parser,
    used: Use,
    /// Of the request that is on it.
    method: Method,
    tell: Option<Tell>,
    /// What is still to be sent of the body.
    upload: Option<Upload>,
    /// The request has not been written whole.
    sending: bool,
    /// Why it is written no further. The endpoint may have answered before.
    unwritten: Option<Error>,
    /// Whether another request may follow.
    keep_alive: bool,
    /// It is over, and its task is about to close it.
    over: bool,
    /// Of the task that watches.
    watcher: Option<Waker>,
    /// Who reads while a task of its own sends.
    reader: Option<Waker>,
    /// That task.
    uploader: Option<AbortHandle>,
}

impl State {
    fn new(io: Metered) -> Self {
        Self {
            io: Some(io),
            input: Input::default(),
            out: Out::default(),
            parser: Parser::new(LIMITS),
            used: Use::Idle,
            method: Method::GET,
            tell: None,
            upload: None,
            sending: false,
            unwritten: None,
            keep_alive: true,
            over: false,
            watcher: None,
            reader: None,
            uploader: None,
        }
    }

    /// Reads once; how many bytes, 0 at the end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Error>> {
        match &mut self.io {
            Some(io) if !self.over => self.input.poll_read(io, cx).map_err(Error::Io),
            _ => Poll::Ready(Err(Error::Closed)),
        }
    }

    /// Ready when the connection is over: it was ended, or something came while nobody used it.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        keep(&mut self.watcher, cx.waker());
        if !self.over {
            if self.used != Use::Idle {
                return Poll::Pending;
            }
            // Its end, or what nobody has asked for.
            let _ = ready!(self.poll_read(cx));
        }
        self.end();
        Poll::Ready(())
    }

    /// Nothing more is read or written.
    fn end(&mut self) {
        self.over = true;
        self.upload = None;
        self.tell = None;
        if let Some(uploader) = self.uploader.take() {
            uploader.abort();
        }
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// A connection.
struct Conn {
    state: RefCell<State>,
    /// Where its tasks run.
    tasks: TaskTracker,
}

impl std::fmt::Debug for Conn {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Conn").finish_non_exhaustive()
    }
}

impl Conn {
    /// Ends the connection.
    fn end(&self) {
        let mut state = self.state.borrow_mut();
        if !state.over {
            state.end();
            if let Some(watcher) = &state.watcher {
                watcher.wake_by_ref();
            }
        }
    }
}

/// Remembers who waits.
fn keep(place: &mut Option<Waker>, waker: &Waker) {
    if !place.as_ref().is_some_and(|own| own.will_wake(waker)) {
        *place = Some(waker.clone());
    }
}

/// Says goodbye, for which the endpoint may have to read first.
async fn close(mut io: Metered) {
    let goodbye = poll_fn(|cx| Pin::new(&mut io).poll_shutdown(cx));
    // Whether it was heard nobody asks.
    let _ = tokio::time::timeout(GOODBYE, goodbye).await;
}

/// Begins to speak HTTP/1; `held` is given up when the connection has been closed.
pub fn connect<H: 'static>(stream: Metered, tasks: &TaskTracker, held: H) -> Handle {
    let conn = Rc::new(Conn {
        state: RefCell::new(State::new(stream)),
        tasks: tasks.clone(),
    });
    let watched = conn.clone();
    tasks.spawn_local(async move {
        poll_fn(|cx| watched.state.borrow_mut().poll_over(cx)).await;
        let io = watched.state.borrow_mut().io.take();
        if let Some(io) = io {
            // Boxed: it is needed once, and the task lives as long as the connection.
            Box::pin(close(io)).await;
        }
        drop(held);
    });
    Handle { conn }
}

/// A connection to send requests on, one after the other. It is closed when this is dropped, unless a tunnel goes on.
#[derive(Debug)]
pub struct Handle {
    conn: Rc<Conn>,
}

impl Handle {
    /// Whether nothing more may be sent on it.
    pub fn is_closed(&self) -> bool {
        self.conn.state.borrow().over
    }

    /// Whether a request may be sent on it now.
    pub fn is_ready(&self) -> bool {
        let state = self.conn.state.borrow();
        !state.over && state.used == Use::Idle && !state.sending && state.keep_alive
    }

    /// Sends a request, of which no more than the body is taken: its head is written here and now. Nothing else happens before the
    /// answer is waited for. `tell` is told of interim answers.
    pub fn send(&self, request: &mut Request<UpstreamBody>, tell: Option<Tell>) -> Answering {
        let body = std::mem::replace(request.body_mut(), UpstreamBody::Empty);
        let mut state = self.conn.state.borrow_mut();
        let size = (!body.is_end_stream()).then(|| body.size_hint());
        let encoder = encode::request_head(state.out.flat(), request, size.as_ref());
        state.upload = size.is_some().then(|| Upload::new(body, encoder));
        state.keep_alive &= !connection_has(request.headers(), "close");
        state.method = request.method().clone();
        state.tell = tell;
        state.sending = true;
        state.used = Use::Request;
        Answering::new(self.conn.clone())
    }

    /// The exchange is over: the connection is watched again. Whether it may be used for another one, now, or when what is
    /// left of the request has been sent.
    pub fn rest(&self) -> bool {
        let state = &mut *self.conn.state.borrow_mut();
        if state.over || state.used != Use::Idle || !state.keep_alive || !state.input.buf.is_empty() {
            return false;
        }
        // With the room that a long answer took.
        state.input = Input::default();
        match (&mut state.io, &state.watcher) {
            (Some(io), Some(watcher)) => {
                let mut cx = Context::from_waker(watcher);
                state.input.poll_read(io, &mut cx).is_pending()
            }
            // The task has yet to begin, and looks for itself.
            (io, None) => io.is_some(),
            (None, _) => false,
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let tunnel = self.conn.state.borrow().used == Use::Tunnel;
        if !tunnel {
            self.conn.end();
        }
    }
}

#[cfg(test)]
mod tests;
