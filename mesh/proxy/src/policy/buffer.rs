//! The buffer filter: a request is read whole before it goes on.

use serin_xds::pb::envoy::extensions::filters::http::buffer::v3 as filter;

use crate::error::Refusal;

/// The largest request that may be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Bytes.
    pub limit: usize,
}

impl Buffer {
    /// Compiles the message.
    pub(crate) fn compile(from: &filter::Buffer) -> Result<Self, Refusal> {
        match from.max_request_bytes.as_ref().map(|value| value.value) {
            None | Some(0) => Err(Refusal::new("max_request_bytes", "must be above zero")),
            Some(limit) => Ok(Self {
                limit: limit as usize,
            }),
        }
    }

    /// Compiles what a route says; `None` switches the filter off.
    pub(crate) fn compile_route(from: &filter::BufferPerRoute) -> Result<Option<Self>, Refusal> {
        use filter::buffer_per_route::Override;
        match &from.r#override {
            Some(Override::Disabled(true)) => Ok(None),
            Some(Override::Disabled(false)) => Err(Refusal::new("disabled", "must be true")),
            Some(Override::Buffer(buffer)) => Self::compile(buffer).map(Some),
            None => Err(Refusal::new("override", "is missing")),
        }
    }
}
