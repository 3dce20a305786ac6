//! An HTTP/2 connection to an endpoint: `h2` itself.
//!
//! A request is handed to `h2` where it is made, and the future that waits for its answer sends its body as well: no
//! channel, no task per request. Only a body that is still being sent when its answer has come gets a task of its own,
//! which ends with the answer's body. The connection has one task, which reads and writes.
//!
//! What `h2` leaves to its user: bodies, tunnels and flow control (`worker::streams`), which fields may be sent,
//! `content-length` of what has none, whether a connection may still be used, and pings for connections that say nothing
//! while requests wait.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection, ResponseFuture, SendRequest};
use h2::{Ping, PingPong, Reason, SendStream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Body as _;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use super::metered::Metered;
use crate::config::http2::{Http2Options, Keepalive};
use crate::metrics::clusters::Shared as Counts;
use crate::metrics::events::ClusterEvent;
use crate::random;
use crate::stream::frames::{Frames, Verdict, Watched};
use crate::stream::keepalive;
use crate::worker::body::UpstreamBody;
use crate::worker::incoming::Incoming;
use crate::worker::interim::Tell;
use crate::worker::seldom::Seldom;
use crate::worker::streams::{Pump, Received, TunnelIo, Upload, Watcher, content_length, strip};

/// Received bytes that may wait for one stream.
const STREAM_WINDOW: u32 = 256 * 1024;
/// The same for a connection.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Largest frame that is taken.
const MAX_FRAME: u32 = 16 * 1024;
/// Largest head of an answer.
const MAX_HEAD: u32 = 16 * 1024;
/// Bytes that may wait to be written for one stream.
const SEND_BUFFER: usize = 1024 * 1024;
/// Streams before the peer has said how many it takes: what RFC 9113 section 6.5.2 wants it to take at least.
const FIRST_STREAMS: usize = 100;
/// Half of the time after which a connection that has said nothing, while there are streams on it, is asked whether it
/// lives.
const QUIET: Duration = Duration::from_secs(30);
/// How long it may take to answer.
const PONG: Duration = Duration::from_secs(20);

/// What the connection's task and its users know of it.
#[derive(Debug)]
pub struct State {
    /// Where what happens to it is counted.
    counts: Arc<Counts>,
    closed: Cell<bool>,
    /// What was read lately, and whether the peer may go on.
    watched: Rc<Watched>,
    /// After how long a silence the peer is asked whether it lives, ahead of a new stream.
    idle: Option<Duration>,
    /// It is to be asked now.
    asked: Notify,
    /// Streams that are in use.
    active: Cell<u32>,
    /// Where tasks of its requests run.
    tasks: TaskTracker,
}

/// The socket of a connection.
type Io = Frames<Metered>;

/// A connection to send requests on. It closes when this and all of its streams are gone.
#[derive(Debug)]
pub struct Handle {
    sender: RefCell<SendRequest<Bytes>>,
    state: Rc<State>,
}

/// Begins to speak HTTP/2; `held` is given up when the connection has ended. Does not wait for the peer's settings.
pub async fn connect<H: 'static>(
    stream: Metered,
    options: Http2Options,
    tasks: &TaskTracker,
    counts: Arc<Counts>,
    held: H,
) -> Result<Handle, h2::Error> {
    let idle = options.keepalive.and_then(|rules| rules.idle);
    let watched = Rc::new(match idle {
        Some(_) => Watched::timed(),
        None => Watched::default(),
    });
    let state = Rc::new(State {
        counts,
        closed: Cell::new(false),
        active: Cell::new(0),
        tasks: tasks.clone(),
        watched: watched.clone(),
        idle,
        asked: Notify::new(),
    });
    let io = Io::of_server(stream, options.frames, watched);
    let mut builder = h2::client::Builder::new();
    if let Some(size) = options.table_size {
        builder.header_table_size(size);
    }
    let (sender, connection) = builder
        .initial_max_send_streams(FIRST_STREAMS)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEAD)
        .max_send_buffer_size(SEND_BUFFER)
        .max_local_error_reset_streams(Some(options.max_errors))
        .enable_push(false)
        .handshake(io)
        .await?;
    let driven = state.clone();
    tasks.spawn_local(async move {
        drive(connection, &driven, options.keepalive.as_ref()).await;
        driven.closed.set(true);
        drop(held);
    });
    Ok(Handle {
        sender: RefCell::new(sender),
        state,
    })
}

/// Reads and writes until the connection ends. An error reaches its requests, which tell of it.
async fn drive(mut connection: Connection<Io, Bytes>, state: &State, keepalive: Option<&Keepalive>) {
    let pings = connection.ping_pong();
    let connection = poll_fn(|cx| {
        let ended = Pin::new(&mut connection).poll(cx).is_ready();
        // What the peer has sent is looked at no further; its requests find the connection closed.
        if ended || state.watched.verdict().is_some() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    });
    let dead = async {
        match keepalive {
            Some(rules) => {
                keepalive::until_dead(pings, rules, &state.watched, &state.asked, random::next).await
            }
            None => until_dead(pings, state).await,
        }
    };
    tokio::select! {
        biased;
        () = connection => {}
        () = Seldom::new(dead) => state.counts.note(ClusterEvent::Http2Keepalive),
    }
    if let Some(verdict) = state.watched.verdict() {
        tracing::debug!(reason = verdict.details(), "an endpoint's connection is ended");
        state.counts.note(ClusterEvent::CxProtocolError);
        match verdict {
            Verdict::EmptyFrames => state.counts.note(ClusterEvent::Http2EmptyFlood),
            Verdict::Priority => state.counts.note(ClusterEvent::Http2PriorityFlood),
            Verdict::WindowUpdates => state.counts.note(ClusterEvent::Http2WindowFlood),
            // Of clients only.
            Verdict::Resets | Verdict::LateHeaders => {}
        }
    }
}

/// Ready when the peer no longer answers.
async fn until_dead(pings: Option<PingPong>, state: &State) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    let mut quiet = 0;
    loop {
        tokio::time::sleep(QUIET).await;
        if state.watched.take_heard() || state.active.get() == 0 {
            quiet = 0;
            continue;
        }
        quiet += 1;
        if quiet >= 2 {
            quiet = 0;
            match tokio::time::timeout(PONG, pings.ping(Ping::opaque())).await {
                Ok(Ok(_)) => {}
                // The connection has ended, and its own future says so.
                Ok(Err(_)) => return std::future::pending().await,
                Err(_) => return,
            }
        }
    }
}

impl Handle {
    /// Whether nothing more may be sent on it: it has ended, or the peer has said that it will.
    pub fn is_closed(&self) -> bool {
        self.state.closed.get()
            || matches!(
                self.sender
                    .borrow_mut()
                    .poll_ready(&mut Context::from_waker(Waker::noop())),
                Poll::Ready(Err(_))
            )
    }

    /// Streams that the peer takes at a time, as its SETTINGS say now.
    pub fn streams(&self) -> usize {
        self.sender.borrow().current_max_send_streams()
    }

    /// Streams in use.
    pub fn active(&self) -> u32 {
        self.state.active.get()
    }

    /// A stream is in use from now on.
    pub fn enter(&self) {
        self.state.active.set(self.state.active.get() + 1);
    }

    /// It is no longer.
    pub fn leave(&self) {
        self.state.active.set(self.state.active.get().saturating_sub(1));
    }

    /// Sends a request's head. An error means that nothing of it was sent.
    pub fn send(&self, request: Request<UpstreamBody>, tell: Option<Tell>) -> Result<Answering, h2::Error> {
        let (mut head, body) = request.into_parts();
        strip(&mut head.headers, true);
        if let Some(length) = body.size_hint().exact()
            && (length != 0 || has_content(&head.method))
        {
            head.headers
                .entry(header::CONTENT_LENGTH)
                .or_insert_with(|| HeaderValue::from(length));
        }
        if let Some(idle) = self.state.idle
            && self.state.watched.quiet().is_some_and(|quiet| quiet >= idle)
        {
            self.state.asked.notify_one();
        }
        let connect = head.method == Method::CONNECT;
        if connect {
            // What follows is no message.
            head.headers.remove(header::CONTENT_LENGTH);
        }
        let ended = !connect && body.is_end_stream();
        let mut sender = self.sender.borrow_mut();
        if sender
            .poll_ready(&mut Context::from_waker(Waker::noop()))?
            .is_pending()
        {
            // The stream before has yet to be opened, for which a clone does not wait: `h2` queues them, and how many
            // there may be is known to the pool.
            let fresh = sender.clone();
            *sender = fresh;
        }
        let (answer, stream) = sender.send_request(Request::from_parts(head, ()), ended)?;
        Ok(Answering {
            answer,
            outgoing: if connect {
                Outgoing::Tunnel(stream)
            } else if ended {
                Outgoing::Nothing
            } else {
                Outgoing::Body(Pump::new(stream, body))
            },
            tell,
            state: self.state.clone(),
            answered: false,
        })
    }
}

/// Whether a request of that method is expected to have content, so that having none is worth saying.
fn has_content(method: &Method) -> bool {
    !matches!(
        *method,
        Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT
    )
}

/// What is still to be sent of a request.
enum Outgoing {
    Nothing,
    Body(Pump<UpstreamBody>),
    /// Whatever the tunnel brings, if it is granted.
    Tunnel(SendStream<Bytes>),
}

/// Waits for the final answer to a request, and sends its body meanwhile. Dropping it resets the stream.
pub struct Answering {
    answer: ResponseFuture,
    outgoing: Outgoing,
    tell: Option<Tell>,
    state: Rc<State>,
    /// Its end has come, one way or the other.
    answered: bool,
}

/// Nobody waits any more: `h2` resets the stream.
impl Drop for Answering {
    fn drop(&mut self) {
        if !self.answered && !self.state.closed.get() {
            self.state.counts.note(ClusterEvent::Http2TxReset);
        }
    }
}

impl State {
    /// Counts what an error of a stream is.
    pub(crate) fn note_error(&self, error: &h2::Error) {
        if !error.is_reset() {
            return;
        }
        if !error.is_remote() {
            // Of our own finding, or of our own doing.
            if error.is_library() && error.reason() == Some(Reason::PROTOCOL_ERROR) {
                self.counts.note(ClusterEvent::Http2Messaging);
            }
            self.counts.note(ClusterEvent::Http2TxReset);
            return;
        }
        self.counts.note(ClusterEvent::Http2RxReset);
        if error.reason() == Some(Reason::REFUSED_STREAM) {
            self.counts.note(ClusterEvent::Http2Refused);
        }
    }

    /// Something rare has happened on one of its streams.
    pub(crate) fn note(&self, event: ClusterEvent) {
        self.counts.note(event);
    }
}

impl Answering {
    /// Takes interim answers out of the stream; ready when it is time for the final one.
    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        while let Some(interim) = ready!(self.answer.poll_informational(cx)) {
            let interim = interim?;
            if interim.status() == StatusCode::SWITCHING_PROTOCOLS {
                // RFC 9113 section 8.6. The stream is reset when this is dropped.
                return Poll::Ready(Err(Reason::PROTOCOL_ERROR.into()));
            }
            if let Some(tell) = &self.tell {
                tell(interim.status(), interim.headers());
            }
        }
        Poll::Ready(Ok(()))
    }

    fn answered(&mut self, response: Response<h2::RecvStream>) -> Response<Incoming> {
        let (head, stream) = response.into_parts();
        let mut upload = None;
        let body = match std::mem::replace(&mut self.outgoing, Outgoing::Nothing) {
            Outgoing::Tunnel(send) if head.status.is_success() && has_none(&head.headers) => {
                Incoming::Tunnel(Box::new(TunnelIo::new(send, stream)))
            }
            outgoing => {
                if let Outgoing::Body(mut pump) = outgoing {
                    let sending = self
                        .state
                        .tasks
                        .spawn_local(async move { poll_fn(|cx| pump.poll(cx)).await });
                    upload = Some(Upload::new(sending.abort_handle()));
                }
                Incoming::Http2(Received::of_response(
                    stream,
                    &head.headers,
                    upload,
                    Watcher::Endpoint(self.state.clone()),
                ))
            }
        };
        Response::from_parts(head, body)
    }
}

/// Whether a head announces no content.
fn has_none(headers: &HeaderMap) -> bool {
    content_length(headers).is_none_or(|length| length == 0)
}

impl Future for Answering {
    type Output = Result<Response<Incoming>, h2::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if let Outgoing::Body(pump) = &mut this.outgoing
            && pump.poll(cx).is_ready()
        {
            this.outgoing = Outgoing::Nothing;
        }
        let outcome = match ready!(this.poll_interim(cx)) {
            Ok(()) => ready!(Pin::new(&mut this.answer).poll(cx)),
            Err(error) => Err(error),
        };
        this.answered = true;
        match outcome {
            Ok(response) => Poll::Ready(Ok(this.answered(response))),
            Err(error) => {
                this.state.note_error(&error);
                Poll::Ready(Err(error))
            }
        }
    }
}
