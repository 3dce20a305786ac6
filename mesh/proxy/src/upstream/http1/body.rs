//! The body of an answer, read as it is asked for.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::{Conn, Error, State, Use, keep};
use crate::http1::decode::{Decoded, Decoder, Framing};

/// The body of an answer. Dropped before its end, it ends the connection.
#[derive(Debug)]
pub struct Body {
    /// Up to the end: from there on the connection may carry another request.
    conn: Option<Rc<Conn>>,
    decoder: Decoder,
    /// Why it breaks off.
    broken: Option<Error>,
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Some(conn) = &self.conn {
            conn.end();
        }
    }
}

impl Body {
    /// What follows a head on that connection.
    pub(super) fn new(conn: Rc<Conn>, framing: Framing) -> Self {
        Self {
            conn: Some(conn),
            decoder: Decoder::new(framing),
            broken: None,
        }
    }

    /// The next frame.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let Some(conn) = &self.conn else {
            return Poll::Ready(None);
        };
        if let Some(error) = self.broken.take() {
            self.conn = None;
            return Poll::Ready(Some(Err(error)));
        }
        let next = ready!(conn.state.borrow_mut().poll_body(&mut self.decoder, cx));
        match next {
            Ok(frame) => {
                if self.decoder.is_done() {
                    conn.state.borrow_mut().used = Use::Idle;
                    self.conn = None;
                }
                Poll::Ready(frame.map(Ok))
            }
            Err(error) => {
                conn.end();
                // Whoever passes the answer on is given time to write what came before.
                self.broken = Some(error);
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }

    /// Whether there is nothing more to read.
    pub fn is_end_stream(&self) -> bool {
        self.conn.is_none()
    }

    /// What is known of what has yet to come.
    pub fn size_hint(&self) -> SizeHint {
        self.decoder.size_hint()
    }
}

impl State {
    fn poll_body(
        &mut self,
        decoder: &mut Decoder,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Frame<Bytes>>, Error>> {
        loop {
            match decoder.decode(&mut self.input).map_err(Error::Malformed)? {
                Decoded::Data(data) => return Poll::Ready(Ok(Some(Frame::data(data)))),
                Decoded::Trailers(trailers) => return Poll::Ready(Ok(Some(Frame::trailers(trailers)))),
                Decoded::End => return Poll::Ready(Ok(None)),
                Decoded::More => {}
            }
            if self.sending {
                // The connection may be ended by the task that sends.
                keep(&mut self.reader, cx.waker());
            }
            if ready!(self.poll_read(cx))? == 0 {
                return Poll::Ready(if decoder.close() {
                    Ok(None)
                } else {
                    Err(Error::Closed)
                });
            }
        }
    }
}
