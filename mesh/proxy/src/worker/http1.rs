//! HTTP/1 towards clients.
//!
//! One task serves a connection, one request after the other: it reads a head, lets the request be served, and writes the answer;
//! meanwhile it notices when the client goes away. A request's content is read by whoever asks for it ([`Received`]), from the same
//! [`Wire`], so that a client is held back as whoever reads is. What is wrong with the bytes of a head is answered like any other
//! request: in order, logged and counted. A connection that waits holds no buffer.

mod end;
mod wire;

pub(crate) use self::wire::Received;
pub(super) use self::wire::Upgraded;

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::request::Parts;
use http::{Method, Response, Version};
use http_body::Body as _;
use tokio::sync::oneshot;
use tokio::time::Sleep;

use self::wire::{Stream, Wire};
use super::date;
use super::http::Downstream;
use super::incoming::Incoming;
use super::interim::Waiting;
use super::local::Body;
use super::request::{self, Broken};
use super::rest::{End, wait_for_end};
use super::seldom::Seldom;
use crate::http1::decode::Framing;
use crate::http1::encode::{self, Asked, Begun, Encoder, WrongLength};
use crate::http1::head::{Finder, HeadLimits};
use crate::http1::request::{Head, parse, unreadable};
use crate::http1::violation::Violation;

/// Serves the connection to its end; `prefix` has been read from it already.
pub(super) async fn serve(conn: Rc<Downstream>, stream: Stream, prefix: Vec<u8>) {
    let wire = Wire::new(stream, &prefix);
    drop(prefix);
    let mut turn = Turn {
        conn: &conn,
        wire: &wire,
        ends: ends(&conn),
        closing: false,
    };
    let mut heads = Heads::new(&conn);
    loop {
        let asked = match turn.next_head(&mut heads).await {
            Next::Head(head) => turn.exchange(head).await,
            Next::Refused(violation) => turn.refuse(violation).await,
            Next::Over => After::Close { owed: false },
        };
        match asked {
            After::Next => {}
            After::Close { owed } => return end::close(&wire, owed).await,
            // The tunnel goes on without us, or nobody is left.
            After::Gone => return,
        }
    }
}

/// Waits for what ends a connection.
type Ends<'a> = Seldom<Pin<Box<dyn Future<Output = End> + 'a>>>;

fn ends(conn: &Downstream) -> Ends<'_> {
    Seldom::new(Box::pin(wait_for_end(conn)))
}

/// Where in its heads the connection is.
struct Heads {
    finder: Finder,
    limits: HeadLimits,
    connect: bool,
    /// How long a head may take from its first byte on.
    patience: Option<Duration>,
    /// When the head of which a part has come must be whole. Nothing but a head in several pieces costs a timer.
    deadline: Option<Pin<Box<Sleep>>>,
}

/// What comes next.
enum Next {
    Head(Head),
    /// A head that is not read.
    Refused(Violation),
    /// Nothing.
    Over,
}

/// What becomes of the connection after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Next,
    /// It is closed.
    Close {
        /// The client has not said all that it was about to.
        owed: bool,
    },
    /// It is no longer ours to close.
    Gone,
}

impl Heads {
    fn new(conn: &Downstream) -> Self {
        let limits = HeadLimits {
            bytes: conn.manager.max_head,
            fields: conn.manager.max_header_count,
        };
        Self {
            finder: Finder::strict(limits),
            limits,
            connect: conn.manager.connect,
            patience: conn.manager.headers_timeout,
            deadline: None,
        }
    }

    /// The head that has come, if it is whole.
    fn take(&mut self, wire: &mut Wire) -> Option<Next> {
        if wire.input.buf.is_empty() {
            return None;
        }
        let found = match self.finder.find(&wire.input.buf) {
            Ok(found) => found?,
            Err(violation) => return Some(Next::Refused(violation)),
        };
        self.deadline = None;
        let head = wire.input.take(found.length);
        Some(match parse(&head, found, self.limits, self.connect) {
            Ok(head) => Next::Head(head),
            Err(violation) => Next::Refused(violation),
        })
    }

    /// Whether a head has begun and takes too long.
    fn is_late(&mut self, wire: &Wire, cx: &mut Context<'_>) -> bool {
        let Some(patience) = self.patience.filter(|_| !wire.input.buf.is_empty()) else {
            return false;
        };
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        deadline.as_mut().poll(cx).is_ready()
    }
}

/// One turn of the connection after the other.
struct Turn<'a> {
    conn: &'a Rc<Downstream>,
    wire: &'a Rc<RefCell<Wire>>,
    ends: Ends<'a>,
    /// No further request is taken.
    closing: bool,
}

impl Turn<'_> {
    /// Whether the connection ends now. That it ends after the present request is remembered.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> bool {
        while let Poll::Ready(end) = Pin::new(&mut self.ends).poll(cx) {
            match end {
                End::Abort => return true,
                End::Finish => {
                    self.closing = true;
                    self.ends = ends(self.conn);
                }
            }
        }
        false
    }

    /// Waits for the next head.
    async fn next_head(&mut self, heads: &mut Heads) -> Next {
        poll_fn(|cx| {
            let wire = &mut *self.wire.borrow_mut();
            loop {
                if let Some(next) = heads.take(wire) {
                    return Poll::Ready(next);
                }
                match wire.poll_read(cx) {
                    Poll::Ready(true) => {}
                    Poll::Ready(false) => return Poll::Ready(Next::Over),
                    Poll::Pending => break,
                }
            }
            if heads.is_late(wire, cx) {
                return Poll::Ready(Next::Refused(Violation::Unfinished));
            }
            // A head that has begun is waited for: its client would not know whether it was heard.
            if self.poll_end(cx) || (self.closing && wire.input.buf.is_empty()) {
                return Poll::Ready(Next::Over);
            }
            Poll::Pending
        })
        .await
    }

    /// Answers what cannot be read. Nothing that follows it can be, either.
    async fn refuse(&mut self, violation: Violation) -> After {
        self.wire.borrow_mut().input.buf.clear();
        self.conn.refuse(violation);
        let asked = Asked {
            head: false,
            connect: false,
            version: Version::HTTP_11,
            keep_alive: false,
        };
        match self.answer(unreadable(), Incoming::Empty, None, false).await {
            Some(response) => self
                .respond(response, asked)
                .await
                .map_or(After::Gone, |_| After::Close { owed: true }),
            None => After::Gone,
        }
    }

    /// Serves a request.
    async fn exchange(&mut self, head: Head) -> After {
        let Head {
            parts,
            framing,
            keep_alive,
            expects,
            undecided,
        } = head;
        let asked = Asked {
            head: parts.method == Method::HEAD,
            connect: parts.method == Method::CONNECT,
            version: parts.version,
            keep_alive,
        };
        let may_tell = self.conn.manager.interim_answers && parts.version == Version::HTTP_11;
        let interims = (may_tell || expects).then(|| Arc::new(Waiting::default()));
        let incoming = match framing {
            Framing::Empty => Incoming::Empty,
            framing => {
                let expected = interims.clone().filter(|_| expects);
                Incoming::Http1(Received::new(self.wire, framing, expected))
            }
        };
        let granted = undecided.then(|| {
            let (granted, later) = oneshot::channel();
            self.conn.offer_upgrade(later);
            granted
        });
        let response = self.answer(parts, incoming, interims, undecided).await;
        let Some(response) = response else {
            return After::Gone;
        };
        let Some(begun) = self.respond(response, asked).await else {
            return After::Gone;
        };
        if let Some(granted) = granted
            && self.conn.take_upgrade_decision()
        {
            if let Some(upgraded) = self.wire.borrow_mut().upgrade() {
                // The tunnel's task may be gone; then the connection ends with what is dropped here.
                drop(granted.send(upgraded));
            }
            return After::Gone;
        }
        let drained = poll_fn(|cx| Poll::Ready(self.wire.borrow_mut().drain(cx))).await;
        if drained && begun.keep_alive && !self.closing {
            return After::Next;
        }
        After::Close {
            owed: !drained || !self.wire.borrow().input.buf.is_empty(),
        }
    }

    /// Lets a request be served. Nothing if the connection ends before there is an answer.
    async fn answer(
        &mut self,
        parts: Box<Parts>,
        incoming: Incoming,
        interims: Option<Arc<Waiting>>,
        undecided: bool,
    ) -> Option<Response<Body>> {
        // Boxed: a connection that waits for its next request holds no room for it.
        let mut service = Box::pin(request::handle(
            self.conn.clone(),
            parts,
            incoming,
            interims.clone(),
        ));
        let mut told = false;
        poll_fn(|cx| {
            if let Some(interims) = &interims
                && !std::mem::replace(&mut told, true)
            {
                interims.tell(cx.waker());
            }
            let served = service.as_mut().poll(cx);
            if let Some(interims) = interims.as_ref().filter(|interims| interims.any()) {
                let wire = &mut *self.wire.borrow_mut();
                for head in interims.take() {
                    encode::interim_head(wire.out.flat(), head.status(), head.headers());
                }
            }
            match served {
                Poll::Ready(response) => return Poll::Ready(response.map_err(|Broken| ()).ok()),
                Poll::Pending if self.poll_end(cx) => return Poll::Ready(None),
                Poll::Pending => {}
            }
            let wire = &mut *self.wire.borrow_mut();
            // What an upgrade asks for decides whose bytes these are.
            if wire.poll_flush(cx) == Poll::Ready(false) || (!undecided && wire.is_gone(cx)) {
                return Poll::Ready(None);
            }
            Poll::Pending
        })
        .await
    }

    /// Writes an answer. Nothing if the connection ends, or has to, before its end.
    async fn respond(&mut self, response: Response<Body>, asked: Asked) -> Option<Begun> {
        let (head, mut body) = response.into_parts();
        let size = (!body.is_end_stream()).then(|| body.size_hint());
        let begun = date::with(|date| {
            let wire = &mut *self.wire.borrow_mut();
            let out = wire.out.flat();
            encode::response_head(out, head.status, &head.headers, size.as_ref(), asked, date)
        });
        drop(head);
        let mut encoder = begun.encoder;
        let mut ended = size.is_none() || encoder.is_done();
        poll_fn(|cx| {
            loop {
                // The body may be the request's own, read from the same wire: that is not held on to meanwhile.
                let filled = fill(&mut body, &mut encoder, &mut ended, self.wire, cx);
                let wire = &mut *self.wire.borrow_mut();
                let flushed = wire.poll_flush(cx);
                match (filled, flushed) {
                    (Err(WrongLength), _) | (_, Poll::Ready(false)) => return Poll::Ready(None),
                    (Ok(Filled::End), Poll::Ready(true)) => return Poll::Ready(Some(begun)),
                    (Ok(Filled::Full), Poll::Ready(true)) => continue,
                    (Ok(Filled::Waits), Poll::Ready(true)) if wire.is_gone(cx) => return Poll::Ready(None),
                    _ => {}
                }
                return if self.poll_end(cx) {
                    Poll::Ready(None)
                } else {
                    Poll::Pending
                };
            }
        })
        .await
    }
}

/// How far a body has been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filled {
    /// To its end.
    End,
    /// As far as there is room.
    Full,
    /// As far as it has come.
    Waits,
}

/// Takes what has come of a body, as far as there is room. One that breaks off is as wrong as one of another length.
fn fill(
    body: &mut Body,
    encoder: &mut Encoder,
    ended: &mut bool,
    wire: &RefCell<Wire>,
    cx: &mut Context<'_>,
) -> Result<Filled, WrongLength> {
    while !*ended {
        if !wire.borrow().out.has_room() {
            return Ok(Filled::Full);
        }
        let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) else {
            return Ok(Filled::Waits);
        };
        let out = &mut wire.borrow_mut().out;
        match frame {
            None => {
                encoder.end(None, out)?;
                *ended = true;
            }
            Some(Err(_)) => return Err(WrongLength),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    encoder.data(data, out)?;
                    *ended = encoder.is_done();
                }
                Err(frame) => {
                    encoder.end(frame.trailers_ref(), out)?;
                    *ended = true;
                }
            },
        }
        if !*ended && body.is_end_stream() && out.has_room() {
            encoder.end(None, out)?;
            *ended = true;
        }
    }
    Ok(Filled::End)
}
