//! Responses that the proxy makes itself.

use std::borrow::Cow;

use bytes::Bytes;
use http::response::Parts as Head;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};

use super::body::{BodyError, Fault, ResponseBody};
use super::exchange::Exchange;
use super::filters;
use super::logging;
use super::request::X_REQUEST_ID;
use super::watch::Watch;
use crate::metrics::events::HttpEvent;
use crate::metrics::flags::Flags;
use crate::policy::compressor::Encoder;

/// Response flags on responses that the proxy made itself.
static X_RESPONSE_FLAGS: http::HeaderName = http::HeaderName::from_static("x-serin-response-flags");

/// The body type of every response.
pub type Body = ResponseBody<Watch>;

/// gRPC's status for what has none.
const UNKNOWN: u8 = 2;

/// A response of our own.
#[derive(Debug)]
pub struct LocalReply {
    /// Status.
    pub status: StatusCode,
    /// Flags to add.
    pub flags: Flags,
    /// Response code details.
    pub details: Cow<'static, str>,
    /// Body.
    pub body: Bytes,
    /// More fields.
    pub headers: HeaderMap,
    /// gRPC status to send instead of the one that follows from the HTTP status.
    pub grpc_status: Option<u32>,
    /// It stays as it is also where the request calls itself gRPC.
    pub plain: bool,
    /// Whether the connection should end.
    pub close: bool,
}

impl LocalReply {
    /// A reply with a text.
    pub fn new(
        status: StatusCode,
        flags: Flags,
        details: impl Into<Cow<'static, str>>,
        body: &'static str,
    ) -> Self {
        Self {
            status,
            flags,
            details: details.into(),
            body: Bytes::from_static(body.as_bytes()),
            headers: HeaderMap::new(),
            grpc_status: None,
            plain: false,
            close: false,
        }
    }

    /// To a client whose body was waited for, and failed like this.
    pub fn of_body(error: &BodyError) -> Self {
        Self::of_fault(Fault::of(error).unwrap_or(Fault::Broken))
    }

    /// To a client whose request did not come to its end.
    pub fn of_fault(fault: Fault) -> Self {
        let (status, flags, details, text) = match fault {
            // Nobody will hear it.
            Fault::Gone => (
                StatusCode::BAD_REQUEST,
                Flags::DOWNSTREAM_TERMINATION,
                "downstream_remote_disconnect",
                "",
            ),
            Fault::Silent => (
                StatusCode::REQUEST_TIMEOUT,
                Flags::STREAM_IDLE,
                "stream_idle_timeout",
                "stream timeout",
            ),
            Fault::Broken => (
                StatusCode::BAD_REQUEST,
                Flags::DOWNSTREAM_PROTOCOL_ERROR,
                "downstream_request_body_failed",
                "",
            ),
        };
        let mut reply = Self::new(status, flags, details, text);
        reply.close = true;
        reply
    }

    /// To a client whose request's head did not come to its end in time. No flag tells it (Envoy).
    pub fn of_late_head() -> Self {
        let mut reply = Self::new(
            StatusCode::REQUEST_TIMEOUT,
            Flags::default(),
            "request_header_timeout",
            "request header timeout",
        );
        reply.close = true;
        reply
    }

    /// Turns it into a response and records the exchange. gRPC clients get a gRPC status in a 200 response. One that a
    /// service must see first is left in the exchange's outbox, and what is returned goes nowhere.
    pub fn send(self, mut exchange: Box<Exchange>) -> Response<Body> {
        if let Some(outbox) = filters::must_wait(&mut exchange) {
            *outbox.borrow_mut() = Some((exchange, self));
            return Response::new(ResponseBody::Full(None));
        }
        let (mut head, body, long) = self.begin(&mut exchange);
        let encoder = if exchange.policy.is_some() {
            filters::encode(&mut exchange, &mut head, long)
        } else {
            None
        };
        finish(exchange, head, body, encoder)
    }

    /// Like [`Self::send`], after the services that must see the reply have.
    pub async fn send_waiting(self, mut exchange: Box<Exchange>) -> Response<Body> {
        let mut reply = self;
        loop {
            let (mut head, body, long) = reply.begin(&mut exchange);
            match filters::encode_waiting(&mut exchange, &mut head, long).await {
                Ok(encoder) => return finish(exchange, head, body, encoder),
                // The filters that are left see what the service says instead; each time there are fewer.
                Err(instead) => reply = instead,
            }
        }
    }

    /// Notes on the exchange why the response will be what it is, for those who look at it before it is sent. Its status is
    /// not known to them (Envoy).
    pub(super) fn foretell(&self, exchange: &mut Exchange) {
        exchange.flags.add(self.flags);
        exchange.details.clone_from(&self.details);
    }

    /// The head before it passes the filters, the body, and whether one will be sent.
    fn begin(self, exchange: &mut Exchange) -> (Head, Bytes, bool) {
        let mut response = Response::new(());
        *response.headers_mut() = self.headers;
        let headers = response.headers_mut();
        let conn = &exchange.conn;
        match &*self.details {
            "request_payload_too_large" => conn.note(HttpEvent::RqTooLarge),
            "stream_idle_timeout" => conn.note(HttpEvent::RqIdleTimeout),
            "request_header_timeout" => conn.note(HttpEvent::RqHeaderTimeout),
            "max_duration_timeout" => conn.note(HttpEvent::RqMaxDuration),
            _ => {}
        }
        exchange.flags.add(self.flags);
        exchange.details = self.details;
        let mut body = self.body;
        if exchange.grpc && self.plain {
            // An answer that says nothing of gRPC.
            exchange.grpc_status = Some(UNKNOWN);
            *response.status_mut() = self.status;
        } else if exchange.grpc {
            let status = self.grpc_status.unwrap_or_else(|| grpc_of_http(self.status));
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(status));
            if let Ok(message) = HeaderValue::from_bytes(&body)
                && !body.is_empty()
                && exchange.method != http::Method::HEAD
            {
                headers.insert("grpc-message", message);
            }
            body = Bytes::new();
            exchange.grpc_status = u8::try_from(status).ok();
        } else {
            if !body.is_empty() && !headers.contains_key(header::CONTENT_TYPE) {
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
            if body.is_empty() {
                headers.remove(header::CONTENT_TYPE);
            }
            *response.status_mut() = self.status;
        }
        // For gRPC as well, until filters have seen it. Nobody hears what is said to a client that is gone.
        exchange.code = if self.flags.has(Flags::DOWNSTREAM_TERMINATION) {
            0
        } else {
            self.status.as_u16()
        };
        if (self.close || !exchange.is_received()) && exchange.version != http::Version::HTTP_2 {
            response
                .headers_mut()
                .insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if exchange.conn.manager.request_id_in_response
            && let Some(id) = &exchange.request_id
        {
            response.headers_mut().insert(X_REQUEST_ID.clone(), id.clone());
        }
        // Who reads a failure can tell ours from the application's, and why; passed on unchanged by gateways.
        if !exchange.flags.is_empty()
            && let Ok(flags) = HeaderValue::from_str(&exchange.flags.to_string())
        {
            response.headers_mut().insert(X_RESPONSE_FLAGS.clone(), flags);
        }
        let long = !body.is_empty() && exchange.method != http::Method::HEAD;
        if long && exchange.policy.is_some() {
            // Filters look at it; what goes out is counted again.
            response
                .headers_mut()
                .insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        (response.into_parts().0, body, long)
    }
}

/// The rest of the way of a reply that has passed the filters.
fn finish(
    mut exchange: Box<Exchange>,
    mut head: Head,
    mut body: Bytes,
    encoder: Option<Encoder>,
) -> Response<Body> {
    if exchange.policy.is_some() {
        head.headers.remove(header::CONTENT_LENGTH);
    }
    if let Some(mut encoder) = encoder {
        let encoded = encoder.push(&body).and_then(|start| {
            let end = encoder.finish()?;
            Ok(Bytes::from([start, end].concat()))
        });
        match encoded {
            Ok(encoded) => body = encoded,
            Err(_) => {
                head.headers.remove(header::CONTENT_ENCODING);
            }
        }
    }
    // HTTP/2 takes content for what it is, also where there must be none.
    if exchange.method == http::Method::HEAD && !body.is_empty() {
        head.headers
            .insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        body = Bytes::new();
    }
    exchange.sent = body.len() as u64;
    if exchange.grpc && exchange.code != 0 {
        exchange.code = head.status.as_u16();
    }
    exchange.conn.clone().dress(&mut head.headers, exchange.version);
    logging::keep_response(&mut exchange, &head.headers, false);
    if let Some(tap) = &mut exchange.tap {
        tap.response(head.status, &head.headers);
        tap.answer().data(&body);
    }
    exchange.finish();
    Response::from_parts(head, ResponseBody::Full((!body.is_empty()).then_some(body)))
}

/// gRPC's own mapping of HTTP statuses.
pub(super) fn grpc_of_http(status: StatusCode) -> u32 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}
