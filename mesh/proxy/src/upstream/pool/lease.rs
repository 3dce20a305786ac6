//! The right to send one request on a connection of a pool.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use http::{Request, Response};

use super::Pool;
use super::error::{SendError, Unanswered};
use crate::metrics::clusters::Shared as Counts;
use crate::tls::info::ConnectionTls;
use crate::upstream::{http1, http2};
use crate::worker::body::UpstreamBody;
use crate::worker::incoming::Incoming;
use crate::worker::interim::Tell;

/// An HTTP/1 connection, which carries one request at a time.
#[derive(Debug)]
pub struct Http1 {
    /// To send with.
    pub handle: http1::Handle,
    pub(super) counted: Arc<Counts>,
    /// Requests that it has carried before.
    pub(super) served: u32,
    pub(super) born: Instant,
    pub(super) tls: Option<Arc<ConnectionTls>>,
    pub(super) local: Option<SocketAddr>,
}

/// An HTTP/2 connection, which requests share.
#[derive(Debug)]
pub(super) struct Http2 {
    pub(super) handle: http2::Handle,
    pub(super) counted: Arc<Counts>,
    /// Requests that it has carried, with those on their way.
    pub(super) served: Cell<u32>,
    pub(super) born: Instant,
    pub(super) idle_since: Cell<Instant>,
    pub(super) tls: Option<Arc<ConnectionTls>>,
    pub(super) local: Option<SocketAddr>,
}

/// The right to send one request on a connection.
#[derive(Debug)]
pub enum Lease {
    /// A whole HTTP/1 connection, and the pool that it goes back to.
    Http1(Http1, Rc<Pool>),
    /// A stream of an HTTP/2 connection.
    Http2(StreamLease),
}

/// A stream's place on an HTTP/2 connection.
#[derive(Debug)]
pub struct StreamLease(Rc<Http2>);

impl StreamLease {
    /// A place for one more stream.
    pub(super) fn on(connection: &Rc<Http2>) -> Self {
        connection.handle.enter();
        connection.counted.begin();
        connection.served.set(connection.served.get().saturating_add(1));
        Self(connection.clone())
    }

    /// Sends the request of this place; `tell` is told of interim answers.
    pub fn send(
        &self,
        request: Request<UpstreamBody>,
        tell: Option<Tell>,
    ) -> Result<http2::Answering, Unanswered> {
        self.0.handle.send(request, tell).map_err(|error| Unanswered {
            // What is left is a request that cannot be written.
            unsent: error.is_go_away() || error.is_reset() || error.is_io(),
            error: SendError::Http2(error),
        })
    }
}

impl Drop for StreamLease {
    fn drop(&mut self) {
        self.0.handle.leave();
        self.0.counted.end();
        if self.0.handle.active() == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

impl Lease {
    /// Whether requests went over the connection before: then a failure may be that it was closed while idle.
    pub fn reused(&self) -> bool {
        match self {
            Self::Http1(connection, _) => connection.served > 0,
            Self::Http2(stream) => stream.0.served.get() > 1,
        }
    }

    /// Sends a request and waits for its final answer; `tell` is told of interim ones.
    pub async fn send(
        &mut self,
        mut request: Request<UpstreamBody>,
        tell: Option<Tell>,
    ) -> Result<Response<Incoming>, Unanswered> {
        match self {
            Self::Http1(connection, _) => connection.handle.send(&mut request, tell).await,
            Self::Http2(stream) => Ok(stream.send(request, tell)?.await?),
        }
    }

    /// Whether it is a stream of HTTP/2.
    pub fn is_http2(&self) -> bool {
        matches!(self, Self::Http2(_))
    }

    /// What TLS was negotiated to.
    pub fn tls(&self) -> Option<&Arc<ConnectionTls>> {
        match self {
            Self::Http1(connection, _) => connection.tls.as_ref(),
            Self::Http2(stream) => stream.0.tls.as_ref(),
        }
    }

    /// Our own end of the connection.
    pub fn local(&self) -> Option<SocketAddr> {
        match self {
            Self::Http1(connection, _) => connection.local,
            Self::Http2(stream) => stream.0.local,
        }
    }

    /// The exchange is over `now` and the connection may be used again.
    pub fn release(self, max_requests: u32, now: Instant) {
        match self {
            Self::Http1(connection, pool) => pool.take_back(connection, max_requests, now),
            // The place is given back where it is dropped.
            Self::Http2(_) => {}
        }
    }
}
