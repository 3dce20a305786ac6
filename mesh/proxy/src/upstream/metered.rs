//! A connection to an endpoint whose bytes are counted for its cluster.

use std::sync::Arc;

use super::connect::Stream;
use crate::metrics::clusters::ClusterCells;
use crate::stream::{Hooks, Layer};

/// See the module.
pub type Metered = Layer<Stream, Meter>;

/// Where the bytes are counted.
#[derive(Debug)]
pub struct Meter(Arc<ClusterCells>);

impl Metered {
    /// Counts what passes `stream` in `cells`, which must be those of the worker that polls it.
    pub fn new(stream: Stream, cells: Arc<ClusterCells>) -> Self {
        Self::over(stream, Meter(cells))
    }
}

impl<S> Hooks<S> for Meter {
    fn received(&mut self, count: usize) {
        self.0.received.add(count as u64);
    }

    fn sent(&mut self, count: usize) {
        self.0.sent.add(count as u64);
    }
}
