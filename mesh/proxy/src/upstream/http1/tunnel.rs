//! What is inside of an upgrade or a CONNECT that an endpoint has granted: the connection itself, with what came behind the head.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Buf as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Conn, State};
use crate::upstream::metered::Metered;

/// See the module. The connection ends with it.
#[derive(Debug)]
pub struct Tunnel {
    conn: Rc<Conn>,
}

impl Tunnel {
    /// On that connection.
    pub(super) fn new(conn: Rc<Conn>) -> Self {
        Self { conn }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.conn.end();
    }
}

impl State {
    fn io(&mut self) -> io::Result<Pin<&mut Metered>> {
        match &mut self.io {
            Some(io) => Ok(Pin::new(io)),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let state = &mut *self.conn.state.borrow_mut();
        let behind = &mut state.input.buf;
        if behind.is_empty() {
            return state.io()?.poll_read(cx, buf);
        }
        let count = behind.len().min(buf.remaining());
        buf.put_slice(&behind[..count]);
        behind.advance(count);
        if behind.is_empty() {
            state.input = Default::default();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.conn.state.borrow_mut().io()?.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.conn.state.borrow_mut().io()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.conn.state.borrow_mut().io()?.poll_shutdown(cx)
    }
}
