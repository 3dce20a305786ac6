//! `POST /tap`: an `envoy.admin.v3.TapRequest` as YAML or JSON; the answer is the traces, as they come or all together.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use tokio::time::Sleep;

use super::telling::Telling;
use super::{Proxy, plain};
use crate::bootstrap;
use crate::policy::tap::{Look, Sink, TapConfig};

/// Bytes of a request.
const MAX_REQUEST: usize = 64 * 1024;
/// Time for it to come.
const REQUEST: Duration = Duration::from_secs(10);

/// The body of an answer of the admin port.
pub(super) enum AdminBody {
    /// Made at once.
    Whole(Full<Bytes>),
    /// Traces.
    Traces(Box<Traces>),
    /// Statistics.
    Pieces(Box<Telling>),
}

/// Traces on their way to who asked.
pub(super) struct Traces {
    look: Look,
    /// Of a buffered sink: how many more are waited for.
    missing: u64,
    until: Option<Pin<Box<Sleep>>>,
    held: VecDeque<Bytes>,
    complete: bool,
}

impl Traces {
    fn new(look: Look) -> Self {
        let (missing, until) = match look.sink {
            Sink::Streaming => (0, None),
            Sink::Buffered(count, timeout) => (
                count,
                timeout.map(|timeout| Box::pin(tokio::time::sleep(timeout))),
            ),
        };
        Self {
            look,
            missing,
            until,
            held: VecDeque::new(),
            complete: false,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.look.sink == Sink::Streaming {
            return self.look.poll_trace(cx);
        }
        while !self.complete {
            match self.look.poll_trace(cx) {
                Poll::Ready(Some(trace)) => {
                    self.held.push_back(trace);
                    self.missing -= 1;
                    self.complete = self.missing == 0;
                }
                Poll::Ready(None) => self.complete = true,
                Poll::Pending => {
                    let timer = self.until.as_mut();
                    if !timer.is_some_and(|timer| timer.as_mut().poll(cx).is_ready()) {
                        return Poll::Pending;
                    }
                    self.complete = true;
                }
            }
        }
        Poll::Ready(self.held.pop_front())
    }
}

impl Body for AdminBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Self::Whole(full) => Pin::new(full).poll_frame(cx),
            Self::Traces(traces) => traces
                .poll(cx)
                .map(|trace| trace.map(|bytes| Ok(Frame::data(bytes)))),
            Self::Pieces(telling) => Pin::new(telling).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(full) => full.is_end_stream(),
            Self::Traces(_) | Self::Pieces(_) => false,
        }
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self {
            Self::Whole(full) => full.size_hint(),
            Self::Traces(_) | Self::Pieces(_) => http_body::SizeHint::default(),
        }
    }
}

/// Answers the request.
pub(super) async fn serve(proxy: &Proxy, request: Request<Incoming>) -> Response<AdminBody> {
    let refused = |status, text: String| plain(status, text + "\n").map(AdminBody::Whole);
    let body = Limited::new(request.into_body(), MAX_REQUEST).collect();
    let body = match tokio::time::timeout(REQUEST, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) => return refused(StatusCode::BAD_REQUEST, error.to_string()),
        Err(_) => return refused(StatusCode::REQUEST_TIMEOUT, "the request did not come".into()),
    };
    let text = String::from_utf8_lossy(&body);
    let wanted = bootstrap::tap_request(&text).and_then(|request| {
        let config = request.tap_config.unwrap_or_default();
        Ok((request.config_id, TapConfig::compile(&config)?))
    });
    let (id, config) = match wanted {
        Ok(wanted) => wanted,
        Err(refusal) => return refused(StatusCode::BAD_REQUEST, refusal.to_string()),
    };
    let Some(spot) = proxy.store(|store| store.tap_spot(&id)) else {
        return refused(
            StatusCode::BAD_REQUEST,
            format!("Unknown config id '{id}'. No extension has registered with this id."),
        );
    };
    match spot.attach(config) {
        Some(look) => {
            let body = AdminBody::Traces(Box::new(Traces::new(look)));
            let mut response = Response::new(body);
            response.headers_mut().insert(
                http::header::CONTENT_TYPE,
                http::HeaderValue::from_static("application/json"),
            );
            response
        }
        None => refused(
            StatusCode::BAD_REQUEST,
            "An attached /tap admin stream already exists. Detach it.".into(),
        ),
    }
}
