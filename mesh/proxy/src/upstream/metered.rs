//! A connection to an endpoint whose bytes are counted for its cluster.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connect::Stream;
use crate::bell::Ear;
use crate::metrics::clusters::{ClusterCells, Shared};
use crate::stream::{Hooks, Layer};

/// See the module.
pub type Metered = Layer<Stream, Meter>;

/// Where the bytes are counted.
#[derive(Debug)]
pub struct Meter {
    cells: Arc<ClusterCells>,
    /// Through which the stream is read, always: who reads asks for bytes whenever it is woken, for whatever it was.
    ear: Ear,
    /// Told when the endpoint has ended the connection.
    shared: Option<Arc<Shared>>,
}

impl Metered {
    /// Counts what passes `stream` in `cells`, which must be those of the worker that polls it.
    pub fn new(stream: Stream, cells: Arc<ClusterCells>) -> Self {
        let ear = Ear::default();
        let shared = None;
        Self::over(stream, Meter { cells, ear, shared })
    }

    /// The same, which tells `shared` when the endpoint has ended the connection.
    pub fn watched(stream: Stream, cells: Arc<ClusterCells>, shared: Arc<Shared>) -> Self {
        let ear = Ear::default();
        let shared = Some(shared);
        Self::over(stream, Meter { cells, ear, shared })
    }
}

impl Meter {
    fn ended_by_peer(&self) {
        if let Some(shared) = &self.shared {
            shared.ended_by_peer();
        }
    }
}

impl<S> Hooks<S> for Meter {
    fn received(&mut self, count: usize) {
        self.cells.received.add(count as u64);
        if count == 0 {
            self.ended_by_peer();
        }
    }

    fn sent(&mut self, count: usize) {
        self.cells.sent.add(count as u64);
    }

    fn poll_read(
        &mut self,
        below: Pin<&mut S>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>>
    where
        S: AsyncRead,
    {
        let outcome = self.ear.poll(cx, |cx| below.poll_read(cx, buf));
        if matches!(outcome, Poll::Ready(Err(_))) {
            self.ended_by_peer();
        }
        outcome
    }

    /// The end that answers ours is not the endpoint's doing.
    fn poll_shutdown(&mut self, below: Pin<&mut S>, cx: &mut Context<'_>) -> Poll<io::Result<()>>
    where
        S: AsyncWrite,
    {
        self.shared = None;
        below.poll_shutdown(cx)
    }
}
