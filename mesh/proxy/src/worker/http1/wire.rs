//! The bytes of a client's connection, shared by who serves it and by the content of the request that is being served.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use crate::http1::decode::{Decoded, Decoder, Framing};
use crate::http1::input::Input;
use crate::http1::out::Out;
use crate::stream::traces::Traced;
use crate::tls::rewind::Rewind;
use crate::worker::body::BodyError;
use crate::worker::interim::Waiting;
use crate::worker::io::Io;

/// A client's connection.
pub(in crate::worker) type Stream = Traced<Io>;
/// One that has become a tunnel.
pub(in crate::worker) type Upgraded = Rewind<Stream>;

/// Bytes that are read ahead of the request that is being served. Beyond that its client is held back.
const MAX_AHEAD: usize = 64 * 1024;
/// Bytes of a request's content that are read and dropped after its answer, if they have come.
const MAX_DRAINED: usize = 64 * 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct Wire {
    /// Gone once it is a tunnel's.
    pub(super) io: Option<Stream>,
    pub(super) input: Input,
    pub(super) out: Out,
    /// Of the content of the present request.
    decoder: Decoder,
    /// The present request's content is broken: nothing that follows means anything.
    broken: bool,
    /// Who serves the connection, while somebody else reads it.
    server: Option<Waker>,
    /// Which request's content is read. Who holds that of an earlier one reads no more.
    number: u64,
}

impl Wire {
    /// Of a connection from which `prefix` has been read already.
    pub(super) fn new(io: Stream, prefix: &[u8]) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            io: Some(io),
            input: Input::with(prefix),
            out: Out::default(),
            decoder: Decoder::new(Framing::Empty),
            broken: false,
            server: None,
            number: 0,
        }))
    }

    /// Reads more; false at the end.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let Some(io) = &mut self.io else {
            return Poll::Ready(false);
        };
        let read = ready!(self.input.poll_read(io, cx));
        Poll::Ready(read.is_ok_and(|count| count > 0))
    }

    /// Writes what waits; false if the client takes nothing more.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let (Some(io), false) = (&mut self.io, self.out.is_empty()) else {
            return Poll::Ready(self.io.is_some());
        };
        self.out.poll_flush(io, cx).map(|written| written.is_ok())
    }

    /// Whether the client has gone while it waits for its answer. What it sends ahead is kept. While it still sends content, who
    /// reads that will see.
    pub(super) fn is_gone(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.decoder.is_done() {
            self.server = Some(cx.waker().clone());
            return false;
        }
        while self.input.buf.len() < MAX_AHEAD {
            match self.poll_read(cx) {
                Poll::Ready(true) => {}
                Poll::Ready(false) => return true,
                Poll::Pending => break,
            }
        }
        false
    }

    /// Nobody else reads from now on.
    fn give_back(&mut self, cx: &Context<'_>) {
        if self.decoder.is_done()
            && let Some(server) = self.server.take()
            && !server.will_wake(cx.waker())
        {
            server.wake();
        }
    }

    /// After an answer: whether the next request can be read. What has come of this one's content is dropped.
    pub(super) fn drain(&mut self, cx: &mut Context<'_>) -> bool {
        self.number += 1;
        let mut dropped = 0;
        while !self.broken && dropped < MAX_DRAINED {
            match self.decoder.decode(&mut self.input) {
                Ok(Decoded::End) => return true,
                Ok(Decoded::Data(data)) => dropped += data.len(),
                Ok(Decoded::Trailers(_)) => {}
                Ok(Decoded::More) => {
                    if !matches!(self.poll_read(cx), Poll::Ready(true)) {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
        false
    }

    /// The connection with what was read ahead, for a tunnel.
    pub(super) fn upgrade(&mut self) -> Option<Upgraded> {
        let ahead = std::mem::take(&mut self.input.buf);
        Some(Rewind::new(ahead.to_vec(), self.io.take()?))
    }
}

/// The content of a request, as it is asked for.
#[derive(Debug)]
pub struct Received {
    wire: Rc<RefCell<Wire>>,
    number: u64,
    /// Its client waits to be told that it is wanted.
    expected: Option<Arc<Waiting>>,
}

impl Received {
    /// Of the request whose head was read last.
    pub(super) fn new(wire: &Rc<RefCell<Wire>>, framing: Framing, expected: Option<Arc<Waiting>>) -> Self {
        let mut this = wire.borrow_mut();
        this.decoder = Decoder::new(framing);
        Self {
            wire: wire.clone(),
            number: this.number,
            expected,
        }
    }

    /// The next frame.
    pub(crate) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let wire = &mut *self.wire.borrow_mut();
        if wire.number != self.number {
            return Poll::Ready(Some(Err("its exchange has ended".into())));
        }
        loop {
            let decoded = wire.decoder.decode(&mut wire.input);
            wire.give_back(cx);
            match decoded {
                Ok(Decoded::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Decoded::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(Decoded::End) => return Poll::Ready(None),
                Ok(Decoded::More) => {}
                Err(violation) => {
                    wire.broken = true;
                    let error = io::Error::new(io::ErrorKind::InvalidData, violation);
                    return Poll::Ready(Some(Err(error.into())));
                }
            }
            let Some(io) = &mut wire.io else {
                return Poll::Ready(Some(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())));
            };
            let read = wire.input.poll_read(io, cx);
            if let Some(expected) = self.expected.take()
                && read.is_pending()
            {
                expected.go_on();
            }
            let error = match ready!(read) {
                Ok(count) if count > 0 => continue,
                Ok(_) => io::ErrorKind::UnexpectedEof.into(),
                Err(error) => error,
            };
            wire.broken = true;
            return Poll::Ready(Some(Err(error.into())));
        }
    }

    /// Whether all of it has been taken.
    pub(crate) fn is_end_stream(&self) -> bool {
        let wire = self.wire.borrow();
        wire.number != self.number || wire.decoder.is_done()
    }

    /// How much is still to come.
    pub(crate) fn size_hint(&self) -> SizeHint {
        let wire = self.wire.borrow();
        if wire.number == self.number {
            wire.decoder.size_hint()
        } else {
            SizeHint::default()
        }
    }
}
