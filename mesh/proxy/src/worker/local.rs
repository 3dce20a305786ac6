//! Responses that the proxy makes itself.

use std::borrow::Cow;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};

use super::body::ResponseBody;
use super::exchange::{Exchange, Watch};
use super::filters;
use super::logging;
use crate::metrics::flags::Flags;

/// Response flags on responses that the proxy made itself.
static X_RESPONSE_FLAGS: http::HeaderName = http::HeaderName::from_static("x-serin-response-flags");

/// The body type of every response.
pub type Body = ResponseBody<Watch>;

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
            close: false,
        }
    }

    /// Turns it into a response and records the exchange. gRPC clients get a gRPC status in a 200 response.
    pub fn send(self, mut exchange: Box<Exchange>) -> Response<Body> {
        let mut response = Response::new(());
        *response.headers_mut() = self.headers;
        let headers = response.headers_mut();
        exchange.flags.add(self.flags);
        exchange.details = self.details;
        let mut body = self.body;
        if exchange.grpc {
            let status = self.grpc_status.unwrap_or_else(|| grpc_of_http(self.status));
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(status));
            if let Ok(message) = HeaderValue::from_bytes(&body)
                && !body.is_empty()
            {
                headers.insert("grpc-message", message);
            }
            body = Bytes::new();
            exchange.code = 200;
            exchange.grpc_status = u8::try_from(status).ok();
        } else {
            if !body.is_empty() && !headers.contains_key(header::CONTENT_TYPE) {
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
            *response.status_mut() = self.status;
            exchange.code = self.status.as_u16();
        }
        if self.close && exchange.version != http::Version::HTTP_2 {
            response
                .headers_mut()
                .insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        // Who reads a failure can tell ours from the application's, and why; passed on unchanged by gateways.
        if !exchange.flags.is_empty()
            && let Ok(flags) = HeaderValue::from_str(&exchange.flags.to_string())
        {
            response.headers_mut().insert(X_RESPONSE_FLAGS.clone(), flags);
        }
        exchange.sent = body.len() as u64;
        if exchange.policy.is_some() {
            let (mut head, ()) = response.into_parts();
            let long = !body.is_empty() && exchange.method != http::Method::HEAD;
            if long {
                head.headers
                    .insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
            }
            let encoder = filters::encode(&mut exchange, &mut head, long);
            head.headers.remove(header::CONTENT_LENGTH);
            response = Response::from_parts(head, ());
            if let Some(mut encoder) = encoder {
                let encoded = encoder.push(&body).and_then(|start| {
                    let end = encoder.finish()?;
                    Ok(Bytes::from([start, end].concat()))
                });
                match encoded {
                    Ok(encoded) => body = encoded,
                    Err(_) => {
                        response.headers_mut().remove(header::CONTENT_ENCODING);
                    }
                }
            }
            exchange.sent = body.len() as u64;
        }
        // HTTP/2 takes content for what it is, also where there must be none.
        if exchange.method == http::Method::HEAD && !body.is_empty() {
            response
                .headers_mut()
                .insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
            body = Bytes::new();
            exchange.sent = 0;
        }
        exchange
            .conn
            .clone()
            .dress(response.headers_mut(), exchange.version);
        logging::keep_response(&mut exchange, response.headers(), false);
        if let Some(tap) = &mut exchange.tap {
            tap.response(response.status(), response.headers());
            tap.answer().data(&body);
        }
        exchange.finish();
        response.map(|()| ResponseBody::Full((!body.is_empty()).then_some(body)))
    }
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
