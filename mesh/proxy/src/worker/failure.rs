//! How attempts fail, and what the client is told when nothing more can be tried.

use std::borrow::Cow;

use http::{HeaderName, HeaderValue, StatusCode};

use super::body::{BodyError, Fault};
use super::exchange::Exchange;
use super::local::LocalReply;
use crate::config::listener::Direction;
use crate::metrics::flags::Flags;
use crate::upstream::pool::{ConnectError, SendError, Unanswered};

/// gRPC's DEADLINE_EXCEEDED.
const DEADLINE_EXCEEDED: u32 = 4;

/// Says on a response that the request was not processed and may be sent again, whatever its method. Set by an inbound
/// proxy that could not reach its application; believed by the client's proxy, taken off before anyone else sees it.
pub(super) static X_UNPROCESSED: HeaderName = HeaderName::from_static("x-serin-unprocessed");

/// How an attempt failed.
pub(super) enum Failure {
    Connect(ConnectError),
    /// The peer says that it did nothing.
    Refused {
        /// Because it takes no more requests on this connection.
        leaving: bool,
    },
    /// The connection or stream broke.
    Reset {
        sent: bool,
        reused: bool,
        protocol: bool,
        /// By the peer, of this stream only.
        stream: bool,
        text: String,
    },
    PerTryTimeout,
    Timeout,
    /// The client's side broke.
    Client,
}

impl Failure {
    /// Nobody has asked for another protocol, and yet the peer's final answer is an interim one.
    pub(super) fn of_informational(status: StatusCode) -> Self {
        Self::Reset {
            sent: true,
            reused: false,
            protocol: true,
            stream: false,
            text: format!("the final answer is {status}"),
        }
    }

    /// There is no answer; whether the connection was `reused` says how likely it was closed while idle.
    pub(super) fn of_unanswered(unanswered: &Unanswered, reused: bool) -> Self {
        let error = &unanswered.error;
        match refused_by_peer(error) {
            Some(leaving) => Self::Refused { leaving },
            None => Self::Reset {
                sent: !unanswered.unsent,
                reused,
                protocol: broke_protocol(error),
                stream: stream_reset_by_peer(error),
                text: full_text(error),
            },
        }
    }
}

/// The reply when there is no response.
pub(super) fn final_reply(exchange: &mut Exchange, failure: Failure) -> LocalReply {
    match failure {
        Failure::Connect(ConnectError::Overflow) => unavailable(Flags::UPSTREAM_OVERFLOW, "overflow", ""),
        Failure::Connect(error) => not_connected(exchange, &error),
        Failure::Refused { .. } => unavailable(
            Flags::UPSTREAM_RESET,
            "upstream_reset_before_response_started{remote_refused_stream_reset}",
            "upstream connect error or disconnect/reset before headers. reset reason: remote refused stream reset",
        ),
        Failure::Reset {
            protocol,
            stream,
            text,
            ..
        } => {
            exchange.failure = Some(text.into());
            broken_off(protocol, stream)
        }
        Failure::PerTryTimeout => timed_out("upstream_per_try_timeout"),
        Failure::Timeout if exchange.stream_asked => LocalReply::new(
            late_status(exchange),
            Flags::MAX_STREAM_DURATION,
            "upstream_max_stream_duration_reached",
            "upstream max stream duration reached",
        ),
        Failure::Timeout if exchange.stream_limited => took_too_long(exchange),
        Failure::Timeout => timed_out("response_timeout"),
        Failure::Client => {
            let source = exchange.source.as_ref();
            let fault = source.and_then(|source| source.borrow().fault);
            LocalReply::of_fault(fault.unwrap_or(Fault::Broken))
        }
    }
}

fn unavailable(flags: Flags, details: &'static str, text: &'static str) -> LocalReply {
    LocalReply::new(StatusCode::SERVICE_UNAVAILABLE, flags, details, text)
}

fn timed_out(details: &'static str) -> LocalReply {
    LocalReply::new(
        StatusCode::GATEWAY_TIMEOUT,
        Flags::UPSTREAM_TIMEOUT,
        details,
        "upstream request timeout",
    )
}

fn not_connected(exchange: &mut Exchange, error: &ConnectError) -> LocalReply {
    exchange.failure = Some(error.to_string().into());
    let (details, text) = match error {
        ConnectError::Timeout => (
            "upstream_reset_before_response_started{connection_timeout}",
            "upstream connect error or disconnect/reset before headers. reset reason: connection timeout",
        ),
        _ => (
            "upstream_reset_before_response_started{connection_failure}",
            "upstream connect error or disconnect/reset before headers. reset reason: connection failure",
        ),
    };
    let mut reply = unavailable(Flags::UPSTREAM_CONNECTION_FAILURE, details, text);
    if exchange.conn.direction == Direction::Inbound {
        // The application never saw the request: the client's proxy may try another pod, whatever the method.
        reply
            .headers
            .insert(X_UNPROCESSED.clone(), HeaderValue::from_static("1"));
    }
    reply
}

fn broken_off(protocol: bool, stream: bool) -> LocalReply {
    if stream {
        return unavailable(
            Flags::UPSTREAM_RESET,
            "upstream_reset_before_response_started{remote_reset}",
            "upstream connect error or disconnect/reset before headers. reset reason: remote reset",
        );
    }
    if protocol {
        return LocalReply::new(
            StatusCode::BAD_GATEWAY,
            Flags::UPSTREAM_PROTOCOL_ERROR,
            "upstream_reset_before_response_started{protocol_error}",
            "upstream connect error or disconnect/reset before headers. reset reason: protocol error",
        );
    }
    unavailable(
        Flags::UPSTREAM_CONNECTION_TERMINATION,
        "upstream_reset_before_response_started{connection_termination}",
        "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
    )
}

/// The time of the whole stream is over.
/// Whose fault it is that a request took too long.
fn late_status(exchange: &Exchange) -> StatusCode {
    if received_whole(exchange) {
        StatusCode::GATEWAY_TIMEOUT
    } else {
        StatusCode::REQUEST_TIMEOUT
    }
}

fn took_too_long(exchange: &Exchange) -> LocalReply {
    let mut reply = LocalReply::new(
        late_status(exchange),
        Flags::default(),
        "max_duration_timeout",
        "downstream duration timeout",
    );
    reply.grpc_status = Some(DEADLINE_EXCEEDED);
    reply
}

/// How the end of a response that had begun is told.
pub(super) fn after_start(error: &BodyError) -> (Flags, Cow<'static, str>) {
    let reset = error.downcast_ref::<h2::Error>();
    let (flags, details) = match reset.filter(|error| error.is_reset() && error.is_remote()) {
        Some(error) if error.reason() == Some(h2::Reason::REFUSED_STREAM) => (
            Flags::UPSTREAM_RESET,
            "upstream_reset_after_response_started{remote_refused_stream_reset}",
        ),
        Some(_) => (
            Flags::UPSTREAM_RESET,
            "upstream_reset_after_response_started{remote_reset}",
        ),
        None if Fault::of(error) == Some(Fault::Broken) => (
            Flags::UPSTREAM_PROTOCOL_ERROR,
            "upstream_reset_after_response_started{protocol_error}",
        ),
        None => (
            Flags::UPSTREAM_CONNECTION_TERMINATION,
            "upstream_reset_after_response_started{connection_termination}",
        ),
    };
    (flags, Cow::Borrowed(details))
}

fn received_whole(exchange: &Exchange) -> bool {
    let source = exchange.source.as_ref();
    source.is_none_or(|source| source.borrow().ended_at.is_some())
}

/// An error with its causes.
pub(super) fn full_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

/// Whether the peer has reset the stream, and not the connection, by HTTP/2.
fn stream_reset_by_peer(error: &SendError) -> bool {
    match error {
        SendError::Http1(_) => false,
        SendError::Http2(error) => error.is_reset() && error.is_remote(),
    }
}

/// Whether the peer says by HTTP/2 that it did not process the stream, and then whether that is for it leaves.
fn refused_by_peer(error: &SendError) -> Option<bool> {
    let SendError::Http2(error) = error else {
        return None;
    };
    let leaving = error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR);
    (leaving || error.reason() == Some(h2::Reason::REFUSED_STREAM)).then_some(leaving)
}

/// Whether what the peer has sent is no answer.
fn broke_protocol(error: &SendError) -> bool {
    match error {
        SendError::Http1(error) => error.is_malformed(),
        // Of our own making: neither received nor detected by `h2`.
        SendError::Http2(error) => {
            error.reason() == Some(h2::Reason::PROTOCOL_ERROR) && !(error.is_reset() || error.is_go_away())
        }
    }
}
