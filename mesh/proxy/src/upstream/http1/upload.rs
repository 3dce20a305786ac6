//! Sending a request: its head, which waits already, and its body as it comes.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use http_body::Body as _;

use super::{Conn, Error, State, Use};
use crate::http1::encode::Encoder;
use crate::http1::out::Out;
use crate::worker::body::UpstreamBody;

/// What is still to be sent of a body.
#[derive(Debug)]
pub(super) struct Upload {
    body: UpstreamBody,
    encoder: Encoder,
}

impl Upload {
    /// `body`, as `encoder` writes it.
    pub(super) fn new(body: UpstreamBody, encoder: Encoder) -> Self {
        Self { body, encoder }
    }

    /// Adds what there is to `out`, as long as there is room. Ready at the end of it.
    fn poll(&mut self, out: &mut Out, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while out.has_room() {
            if self.body.is_end_stream() {
                return Poll::Ready(Ok(self.encoder.end(None, out)?));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => return Poll::Ready(Ok(self.encoder.end(None, out)?)),
                Some(Err(error)) => return Poll::Ready(Err(Error::Body(error))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.encoder.data(data, out)?,
                    Err(frame) => {
                        let trailers = frame.into_trailers().ok();
                        return Poll::Ready(Ok(self.encoder.end(trailers.as_ref(), out)?));
                    }
                },
            }
        }
        Poll::Pending
    }
}

impl State {
    /// Sends what there is. Ready when all of the request has been written, or when no more of it can be.
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            let Some(io) = self.io.as_mut().filter(|_| !self.over) else {
                return Poll::Ready(Err(Error::Closed));
            };
            if let Some(upload) = &mut self.upload
                && let Poll::Ready(ended) = upload.poll(&mut self.out, cx)
            {
                self.upload = None;
                ended?;
            }
            // There was room unless something large waits: then there is more to be had once that is written.
            let full = !self.out.has_room();
            ready!(self.out.poll_flush(io, cx)).map_err(Error::Io)?;
            if self.upload.is_none() {
                self.sending = false;
                return Poll::Ready(Ok(()));
            }
            if !full {
                return Poll::Pending;
            }
        }
    }

    /// The request is sent no further, and the connection carries no other one.
    pub(super) fn stop_sending(&mut self) {
        self.sending = false;
        self.upload = None;
        self.keep_alive = false;
    }
}

impl Conn {
    /// Sends the rest of a request beside its answer.
    pub(super) fn send_beside(self: &Rc<Self>, state: &mut State) {
        let conn = self.clone();
        let task = self.tasks.spawn_local(async move {
            let sent = poll_fn(|cx| conn.state.borrow_mut().poll_send(cx)).await;
            conn.sent_beside(sent);
        });
        state.uploader = Some(task.abort_handle());
    }

    fn sent_beside(&self, sent: Result<(), Error>) {
        let mut state = self.state.borrow_mut();
        state.uploader = None;
        match sent {
            Ok(()) => {}
            // The endpoint takes no more. What it has answered may still be read.
            Err(Error::Io(_)) if state.used == Use::Request => state.stop_sending(),
            Err(_) => {
                drop(state);
                self.end();
            }
        }
    }
}
