//! A request on its way, up to the head of its final answer.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use http::Response;

use super::body::Body;
use super::tunnel::Tunnel;
use super::{Conn, Error, State, Use};
use crate::http1::decode::Framing;
use crate::http1::response::Head;
use crate::upstream::pool::{SendError, Unanswered};
use crate::worker::incoming::Incoming;

/// Sends a request and waits for the final answer to it. Dropping it ends the connection.
#[derive(Debug)]
pub struct Answering {
    conn: Rc<Conn>,
    /// Something may have been sent.
    begun: bool,
    /// There is an answer, or there will be none.
    done: bool,
}

impl Answering {
    /// For the request that waits to be sent.
    pub(super) fn new(conn: Rc<Conn>) -> Self {
        Self {
            conn,
            begun: false,
            done: false,
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if !self.done {
            self.conn.end();
        }
    }
}

impl Future for Answering {
    type Output = Result<Response<Incoming>, Unanswered>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let outcome = ready!(this.conn.state.borrow_mut().poll_answer(&mut this.begun, cx));
        this.done = true;
        let answer = outcome.and_then(|head| this.conn.answered(head));
        Poll::Ready(answer.map_err(|error| {
            this.conn.end();
            Unanswered {
                unsent: !this.begun,
                error: SendError::Http1(error),
            }
        }))
    }
}

impl State {
    fn poll_answer(&mut self, begun: &mut bool, cx: &mut Context<'_>) -> Poll<Result<Head, Error>> {
        if *begun {
            // First of all: what the endpoint has said counts, whatever becomes of the rest of the request.
            if let Poll::Ready(outcome) = self.poll_head(cx) {
                return Poll::Ready(outcome);
            }
        } else {
            match self.poll_read(cx) {
                Poll::Pending => *begun = true,
                // Closed while it was idle.
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(Error::Closed)),
                Poll::Ready(Ok(_)) => return Poll::Ready(Err(Error::Unasked)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
        if self.sending {
            match self.poll_send(cx) {
                Poll::Pending | Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error @ Error::Io(_))) => {
                    // An endpoint that takes no more has closed the connection, which the reading will tell, after what it
                    // may have answered before.
                    self.stop_sending();
                    self.unwritten = Some(error);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Pending
    }

    /// Reads up to the final head.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Head, Error>> {
        loop {
            while let Some(head) = self
                .parser
                .next(&mut self.input, &self.method)
                .map_err(Error::Malformed)?
            {
                if head.tunnel || !head.status.is_informational() {
                    return Poll::Ready(Ok(head));
                }
                if let Some(tell) = &self.tell {
                    tell(head.status, &head.headers);
                }
            }
            let count = match ready!(self.poll_read(cx)) {
                Ok(count) => count,
                Err(error) => return Poll::Ready(Err(self.unwritten.take().unwrap_or(error))),
            };
            if count == 0 {
                return Poll::Ready(Err(self.unwritten.take().unwrap_or(Error::Closed)));
            }
        }
    }
}

impl Conn {
    /// The answer with that head.
    fn answered(self: &Rc<Self>, head: Head) -> Result<Response<Incoming>, Error> {
        let state = &mut *self.state.borrow_mut();
        state.tell = None;
        state.keep_alive &= head.keep_alive;
        let body = if head.tunnel {
            if state.sending {
                // What follows would be read as the rest of the request.
                return Err(Error::Unasked);
            }
            state.used = Use::Tunnel;
            Incoming::Upgraded(Box::new(Tunnel::new(self.clone())))
        } else {
            if state.sending {
                self.send_beside(state);
            }
            match head.framing {
                Framing::Empty => {
                    state.used = Use::Idle;
                    Incoming::Empty
                }
                framing => Incoming::Answer(Body::new(self.clone(), framing)),
            }
        };
        let mut response = Response::new(body);
        *response.status_mut() = head.status;
        *response.version_mut() = head.version;
        *response.headers_mut() = head.headers;
        Ok(response)
    }
}
