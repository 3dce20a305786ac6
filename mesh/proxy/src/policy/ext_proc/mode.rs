//! Which heads a service sees. Modes that ask for bodies or trailers are refused.

use serin_xds::pb::envoy::extensions::filters::http::ext_proc::v3 as filter;

use crate::error::Refusal;

/// Which heads are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Of requests.
    pub request: bool,
    /// Of responses.
    pub response: bool,
}

impl Mode {
    pub(super) fn compile(from: Option<&filter::ProcessingMode>) -> Result<Self, Refusal> {
        let from = from.copied().unwrap_or_default();
        for (field, mode) in [
            ("request_body_mode", from.request_body_mode),
            ("response_body_mode", from.response_body_mode),
        ] {
            if mode != filter::processing_mode::BodySendMode::None as i32 {
                return Err(Refusal::new(
                    field,
                    "only NONE is supported: bodies are not sent to processors",
                ));
            }
        }
        // By default trailers are not sent.
        let send = filter::processing_mode::HeaderSendMode::Send as i32;
        for (field, mode) in [
            ("request_trailer_mode", from.request_trailer_mode),
            ("response_trailer_mode", from.response_trailer_mode),
        ] {
            if mode == send {
                return Err(Refusal::new(field, "SEND is not supported"));
            }
        }
        let skip = filter::processing_mode::HeaderSendMode::Skip as i32;
        Ok(Self {
            request: from.request_header_mode != skip,
            response: from.response_header_mode != skip,
        })
    }
}

/// A mode without its request's head, which has been sent when a mode is overridden.
pub(super) fn of_response(mode: filter::ProcessingMode) -> filter::ProcessingMode {
    filter::ProcessingMode {
        request_header_mode: 0,
        ..mode
    }
}
