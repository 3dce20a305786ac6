//! Streams of HTTP/2, as both sides of the proxy use them: the body that comes, the body that goes, the tunnel of a
//! CONNECT, and what a head may not hold.
//!
//! Flow control is passed through: what is read is given back to the sender's window when it is taken out of `h2`, and a
//! chunk is taken from its source only when the one before it has been handed to `h2`. Capacity is asked for with a chunk
//! in hand and one byte at a time (`h2` asks for the rest itself), so that a stream that has nothing to send holds none of
//! the connection's window.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, header};
use http_body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::AbortHandle;

use super::body::BodyError;
use super::http::Downstream;
use super::interim::Waiting;
use crate::hygiene::fields::{Present, strip_present};
use crate::metrics::events::{ClusterEvent, CodecEvent};
use crate::upstream::http2;

/// Bytes that a tunnel hands over at a time: a frame of the default size.
const TUNNEL_CHUNK: usize = 16 * 1024;

/// Takes off what HTTP/2 does not know (RFC 9113 section 8.2.2): `h2` refuses to send it.
pub(crate) fn strip(headers: &mut HeaderMap, request: bool) {
    let present = Present::of(headers);
    if present.has(Present::NOT_IN_HTTP2) {
        strip_present(headers, present);
        if !request {
            headers.remove(header::TE);
        }
    }
}

/// `content-length`, which `h2` has checked.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The reason for a reset that an error brings with it.
fn reason_of(error: &BodyError) -> Reason {
    let mut inner: Option<&(dyn std::error::Error + 'static)> = Some(&**error);
    while let Some(error) = inner {
        if let Some(reason) = error.downcast_ref::<h2::Error>().and_then(h2::Error::reason) {
            return reason;
        }
        inner = error.source();
    }
    Reason::INTERNAL_ERROR
}

/// Who counts what happens to a stream that a body comes over.
pub(crate) enum Watcher {
    /// The client's connection.
    Client(Rc<Downstream>),
    /// The endpoint's.
    Endpoint(Rc<http2::State>),
    #[cfg(test)]
    Nobody,
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Client(_) => "Client",
            Self::Endpoint(_) => "Endpoint",
            #[cfg(test)]
            Self::Nobody => "Nobody",
        })
    }
}

impl Watcher {
    fn trailers(&self) {
        match self {
            Self::Client(conn) => conn.note_codec(CodecEvent::Http2Trailers, 1),
            // Envoy counts those of requests only.
            Self::Endpoint(_) => {}
            #[cfg(test)]
            Self::Nobody => {}
        }
    }

    fn broke(&self, error: &h2::Error) {
        match self {
            // Whoever serves the request asks how its stream has ended.
            Self::Client(_) => {}
            Self::Endpoint(state) => state.note_error(error),
            #[cfg(test)]
            Self::Nobody => {}
        }
    }

    /// The body is read no further.
    fn left(&self) {
        match self {
            Self::Client(conn) => conn.note_codec(CodecEvent::Http2TxReset, 1),
            Self::Endpoint(state) => state.note(ClusterEvent::Http2TxReset),
            #[cfg(test)]
            Self::Nobody => {}
        }
    }
}

/// Ends the sending of a request's body with whoever holds it.
#[derive(Debug)]
pub(crate) struct Upload(AbortHandle);

impl Upload {
    /// The task that sends it.
    pub(crate) fn new(task: AbortHandle) -> Self {
        Self(task)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A body that comes over HTTP/2.
#[derive(Debug)]
pub struct Received {
    stream: RecvStream,
    /// Bytes that have yet to come, as far as that is known.
    left: Option<u64>,
    data_done: bool,
    /// Seen to have ended.
    ended: bool,
    /// Whoever sends it waits to be told that it is wanted.
    expected: Option<Arc<Waiting>>,
    /// The request that it answers is still being sent.
    _upload: Option<Upload>,
    watcher: Watcher,
}

/// A stream whose end has not been seen is reset by `h2`.
impl Drop for Received {
    fn drop(&mut self) {
        if !self.is_end_stream() && !self.data_done && self.is_open() {
            self.watcher.left();
        }
    }
}

impl Received {
    /// The body of a request with this head. Its client is told to go on through `expected`, if it waits for that.
    pub(crate) fn of_request(
        stream: RecvStream,
        headers: &HeaderMap,
        expected: Option<Arc<Waiting>>,
        conn: Rc<Downstream>,
    ) -> Self {
        let mut body = Self::of_response(stream, headers, None, Watcher::Client(conn));
        body.expected = expected;
        body
    }

    /// The body of a response with this head.
    pub(crate) fn of_response(
        stream: RecvStream,
        headers: &HeaderMap,
        upload: Option<Upload>,
        watcher: Watcher,
    ) -> Self {
        let ended = stream.is_end_stream();
        Self {
            left: content_length(headers).or(ended.then_some(0)),
            stream,
            data_done: false,
            ended,
            expected: None,
            _upload: upload,
            watcher,
        }
    }

    /// A stream that its sender has reset without an error may be read no further, but has been sent as far as it goes:
    /// after a whole answer a server says so that the rest of the request is not wanted (RFC 9113 section 8.1).
    fn broke(&mut self, error: h2::Error) -> Option<Result<Frame<Bytes>, h2::Error>> {
        self.ended = true;
        self.watcher.broke(&error);
        let whole = error.reason() == Some(Reason::NO_ERROR) && self.left.is_none_or(|left| left == 0);
        (!whole).then_some(Err(error))
    }

    /// Whether more may come: its sender has neither ended nor reset it, and the connection lives.
    fn is_open(&mut self) -> bool {
        let polled = self.stream.poll_data(&mut Context::from_waker(Waker::noop()));
        matches!(polled, Poll::Pending | Poll::Ready(Some(Ok(_))))
    }

    /// The next frame.
    pub(crate) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if !self.data_done {
            let polled = self.stream.poll_data(cx);
            if let Some(expected) = self.expected.take()
                && polled.is_pending()
            {
                expected.go_on();
            }
            match ready!(polled) {
                Some(Ok(data)) => {
                    // The stream may be gone already; its window is, too, then.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(self.broke(error)),
                None => self.data_done = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(trailers) => {
                self.ended = true;
                if trailers.is_some() {
                    self.watcher.trailers();
                }
                Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
            }
            Err(error) => Poll::Ready(self.broke(error)),
        }
    }

    /// Whether there is nothing more to read.
    pub fn is_end_stream(&self) -> bool {
        self.ended || self.stream.is_end_stream()
    }

    /// What is known of what has yet to come.
    pub fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// How the sending of a body has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pumped {
    /// Everything was sent.
    Whole,
    /// The peer has reset the stream.
    Reset,
    /// The body has failed, for which we have reset the stream.
    Failed,
    /// The connection is gone.
    Lost,
}

impl Pumped {
    /// Why a stream takes no more.
    fn of(stream: &mut SendStream<Bytes>) -> Self {
        match stream.poll_reset(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(_)) => Self::Reset,
            Poll::Ready(Err(_)) | Poll::Pending => Self::Lost,
        }
    }
}

/// A body that goes over HTTP/2.
#[derive(Debug)]
pub(crate) struct Pump<B> {
    stream: SendStream<Bytes>,
    body: B,
    /// A chunk that waits for capacity.
    chunk: Option<Bytes>,
}

impl<B> Pump<B>
where
    B: Body<Data = Bytes, Error = BodyError> + Unpin,
{
    /// Sends `body` on `stream`.
    pub(crate) fn new(stream: SendStream<Bytes>, body: B) -> Self {
        Self {
            stream,
            body,
            chunk: None,
        }
    }

    /// Sends what there is. Ready when there is nothing more to do: everything was sent, the peer wants no more of it, or
    /// the body has failed, for which the stream has been reset.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Pumped> {
        loop {
            if self.chunk.is_some() {
                if !ready!(poll_capacity(&mut self.stream, cx)) {
                    return Poll::Ready(Pumped::of(&mut self.stream));
                }
                if let Some(data) = self.chunk.take()
                    && self.stream.send_data(data, false).is_err()
                {
                    return Poll::Ready(Pumped::of(&mut self.stream));
                }
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                // Whoever waits for its source is told when the peer has reset the stream.
                Poll::Pending => {
                    return self.stream.poll_reset(cx).map(|reset| match reset {
                        Ok(_) => Pumped::Reset,
                        Err(_) => Pumped::Lost,
                    });
                }
                Poll::Ready(None) => {
                    // An error means that the peer has reset the stream.
                    let _ = self.stream.send_data(Bytes::new(), true);
                    return Poll::Ready(Pumped::Whole);
                }
                Poll::Ready(Some(Err(error))) => {
                    self.stream.send_reset(reason_of(&error));
                    return Poll::Ready(Pumped::Failed);
                }
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        // The last chunk waits in `h2` as well as here.
                        if self.body.is_end_stream() {
                            let _ = self.stream.send_data(data, true);
                            return Poll::Ready(Pumped::Whole);
                        }
                        if !data.is_empty() {
                            self.stream.reserve_capacity(1);
                            self.chunk = Some(data);
                        }
                    }
                    Err(frame) => {
                        if let Ok(mut trailers) = frame.into_trailers() {
                            strip(&mut trailers, false);
                            self.stream.reserve_capacity(0);
                            let _ = self.stream.send_trailers(trailers);
                            return Poll::Ready(Pumped::Whole);
                        }
                    }
                },
            }
        }
    }
}

/// Whether there is capacity for some of what waits; not, if the stream has been reset.
fn poll_capacity(stream: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<bool> {
    while stream.capacity() == 0 {
        match stream.poll_capacity(cx) {
            // Told once, and used up since by what was buffered.
            Poll::Ready(Some(Ok(_))) => {}
            Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(false),
            Poll::Pending => return Poll::Pending,
        }
    }
    Poll::Ready(true)
}

/// What is inside of a CONNECT over HTTP/2.
#[derive(Debug)]
pub struct TunnelIo {
    send: SendStream<Bytes>,
    received: RecvStream,
    /// Taken out of `h2`, not yet read.
    unread: Bytes,
    shut: bool,
}

impl TunnelIo {
    /// Of the two halves of a stream.
    pub fn new(send: SendStream<Bytes>, received: RecvStream) -> Self {
        Self {
            send,
            received,
            unread: Bytes::new(),
            shut: false,
        }
    }
}

fn io_error(error: h2::Error) -> io::Error {
    if error.reason() == Some(Reason::STREAM_CLOSED) {
        return io::Error::new(io::ErrorKind::BrokenPipe, error);
    }
    if error.is_io()
        && let Some(kind) = error.get_io().map(io::Error::kind)
    {
        return io::Error::new(kind, error);
    }
    io::Error::other(error)
}

impl AsyncRead for TunnelIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.unread.is_empty() {
            match ready!(this.received.poll_data(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Ok(data)) => this.unread = data,
                Some(Err(error)) => {
                    return Poll::Ready(match error.reason() {
                        Some(Reason::NO_ERROR | Reason::CANCEL) => Ok(()),
                        _ => Err(io_error(error)),
                    });
                }
            }
        }
        let count = this.unread.len().min(buf.remaining());
        buf.put_slice(&this.unread[..count]);
        this.unread.advance(count);
        let _ = this.received.flow_control().release_capacity(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if this.shut {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        this.send.reserve_capacity(1);
        if !ready!(poll_capacity(&mut this.send, cx)) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let count = buf.len().min(TUNNEL_CHUNK);
        this.send
            .send_data(Bytes::copy_from_slice(&buf[..count]), false)
            .map_err(io_error)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection writes what it has been handed.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !std::mem::replace(&mut this.shut, true) {
            // A peer that has reset the stream needs no end of it.
            let _ = this.send.send_data(Bytes::new(), true);
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests;
