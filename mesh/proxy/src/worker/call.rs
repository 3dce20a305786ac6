//! Requests of the proxy's own, to services that policies, logs and traces ask: over the same clusters, pools and
//! balancing as everything else, bounded in time and size.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, header};
use http_body_util::BodyExt;
use prost::Message;
use tokio::time::Instant;

use super::Worker;
use super::body::UpstreamBody;
use super::failure::full_text;
use super::incoming::Incoming;
use crate::config::slot::ClusterSlot;
use crate::metrics::flags::Flags;
use crate::policy::service::GrpcTarget;
use crate::upstream::balance::Wish;
use crate::upstream::cluster::{Active, Host, WorkerCluster};
use crate::upstream::connect::{ConnectOptions, Speaking};
use crate::upstream::outlier::Event;

/// Bytes of an answer at most.
pub(crate) const MAX_ANSWER: usize = 4 << 20;

/// Connections found closed while idle, at most, before a call gives up.
const MAX_STALE: u32 = 5;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The cluster does not exist.
    #[error("cluster {0:?} does not exist; check the configuration of the service")]
    NoCluster(Arc<str>),
    /// No endpoint may be used.
    #[error("cluster {0:?} has no usable endpoint")]
    NoHost(Arc<str>),
    /// No connection, or it broke.
    #[error("cluster {0:?}: {1}")]
    Broken(Arc<str>, String),
    /// No answer in time.
    #[error("cluster {0:?} did not answer in time")]
    Timeout(Arc<str>),
    /// The answer is too large, or is not what the protocol says.
    #[error("cluster {0:?}: the answer is {1}")]
    Answer(Arc<str>, &'static str),
    /// The service said no.
    #[error("cluster {0:?}: gRPC status {1}: {2}")]
    Grpc(Arc<str>, u32, String),
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    /// Status and fields.
    pub head: http::response::Parts,
    /// Body.
    pub body: Bytes,
    /// Trailers.
    pub trailers: Option<HeaderMap>,
}

/// Sends a request whose `host` field is set, and reads the answer.
pub async fn call(
    worker: &Worker,
    slot: &Arc<ClusterSlot>,
    request: Request<Bytes>,
    http2: bool,
    timeout: Duration,
) -> Result<Answer, CallError> {
    let name = || slot.name.clone();
    let cluster = worker.cluster(slot).ok_or_else(|| CallError::NoCluster(name()))?;
    let host = cluster
        .pick(&Wish::default(), None)
        .ok_or_else(|| CallError::NoHost(name()))?;
    let _active = Active::on(&host);
    let speaking = if http2 {
        Speaking::Http2
    } else {
        cluster.config.http.for_own_requests()
    };
    let work = exchange(worker, &cluster, &host, request, speaking);
    let began = Instant::now();
    let cells = cluster.cells(&worker.recorder);
    cells.began.add(1);
    let result = tokio::time::timeout_at(began + timeout, work).await;
    let (code, flags) = match &result {
        Ok(Ok(answer)) => (answer.head.status.as_u16(), Flags::default()),
        Ok(Err(_)) => (0, Flags::default()),
        Err(_) => (0, Flags::UPSTREAM_TIMEOUT),
    };
    cells.total.add(1);
    cells.count(code, 1, flags, began.elapsed());
    match result {
        Ok(Ok(answer)) => {
            cluster.record(&host, Event::Status(answer.head.status.as_u16()));
            Ok(answer)
        }
        Ok(Err(error)) => {
            cluster.record(&host, Event::LocalFailure);
            Err(error)
        }
        Err(_) => {
            cluster.record(&host, Event::LocalFailure);
            Err(CallError::Timeout(name()))
        }
    }
}

async fn exchange(
    worker: &Worker,
    cluster: &WorkerCluster,
    host: &Host,
    request: Request<Bytes>,
    speaking: Speaking,
) -> Result<Answer, CallError> {
    let broken = |text: String| CallError::Broken(cluster.slot.name.clone(), text);
    let (parts, body) = request.into_parts();
    let options = ConnectOptions {
        server_name: cluster.config.request_server_name(&parts.headers),
        ..Default::default()
    };
    for attempt in 0.. {
        let mut lease = cluster
            .lease(worker, host, speaking, &options)
            .await
            .map_err(|error| broken(error.to_string()))?;
        let reused = lease.reused();
        let request = build(&parts, &body, lease.is_http2())
            .ok_or_else(|| broken("the request cannot be written".into()))?;
        match lease.send(request, None).await {
            Ok(response) => {
                let answer = read(response, cluster).await?;
                lease.release(
                    cluster.config.max_requests_per_connection,
                    std::time::Instant::now(),
                );
                return Ok(answer);
            }
            // Closed while idle: the next connection, at the latest a new one, tells more.
            Err(_) if reused && attempt < MAX_STALE => {}
            Err(unanswered) => return Err(broken(full_text(&unanswered.error))),
        }
    }
    Err(broken("too many connections were closed".into()))
}

fn build(parts: &http::request::Parts, body: &Bytes, http2: bool) -> Option<Request<UpstreamBody>> {
    let mut request = Request::new(if body.is_empty() {
        UpstreamBody::Empty
    } else {
        UpstreamBody::Full(Some(body.clone()))
    });
    *request.method_mut() = parts.method.clone();
    *request.headers_mut() = parts.headers.clone();
    *request.uri_mut() = parts.uri.clone();
    if http2 {
        let authority = request.headers_mut().remove(header::HOST)?;
        *request.uri_mut() = Uri::builder()
            .scheme("http")
            .authority(authority.to_str().ok()?)
            .path_and_query(parts.uri.path_and_query()?.clone())
            .build()
            .ok()?;
        *request.version_mut() = http::Version::HTTP_2;
    }
    Some(request)
}

async fn read(response: Response<Incoming>, cluster: &WorkerCluster) -> Result<Answer, CallError> {
    let (head, mut incoming) = response.into_parts();
    let mut body = BytesMut::new();
    let mut trailers = None;
    while let Some(frame) = incoming.frame().await {
        let frame = frame.map_err(|error| CallError::Broken(cluster.slot.name.clone(), error.to_string()))?;
        match frame.into_data() {
            Ok(data) => {
                if body.len() + data.len() > MAX_ANSWER {
                    return Err(CallError::Answer(cluster.slot.name.clone(), "too large"));
                }
                body.extend_from_slice(&data);
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok(Answer {
        head,
        body: body.freeze(),
        trailers,
    })
}

/// A unary gRPC call.
pub async fn grpc<A: Message + Default>(
    worker: &Worker,
    target: &GrpcTarget,
    path: &'static str,
    message: &impl Message,
    timeout: Duration,
) -> Result<A, CallError> {
    let body = grpc_bytes(
        worker,
        target,
        path,
        &message.encode_to_vec(),
        target.timeout.unwrap_or(timeout),
    )
    .await?;
    A::decode(body).map_err(|_| CallError::Answer(target.cluster.name.clone(), "not the expected message"))
}

/// A message as gRPC frames it.
pub(super) fn framed(message: &[u8]) -> Bytes {
    let mut body = BytesMut::with_capacity(5 + message.len());
    body.put_u8(0);
    body.put_u32(message.len() as u32);
    body.put_slice(message);
    body.freeze()
}

/// The head of a gRPC call.
pub(super) fn grpc_request<B>(target: &GrpcTarget, path: &'static str, body: B) -> Request<B> {
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(path);
    let headers = request.headers_mut();
    headers.insert(header::HOST, target.authority.clone());
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    for (field, value) in &target.metadata {
        headers.append(field, value.clone());
    }
    request
}

/// A gRPC call of one message that is encoded already; the encoded answer.
pub async fn grpc_bytes(
    worker: &Worker,
    target: &GrpcTarget,
    path: &'static str,
    message: &[u8],
    timeout: Duration,
) -> Result<Bytes, CallError> {
    let name = || target.cluster.name.clone();
    let request = grpc_request(target, path, framed(message));
    let answer = call(worker, &target.cluster, request, true, timeout).await?;
    let status = answer
        .trailers
        .as_ref()
        .and_then(|trailers| trailers.get("grpc-status"))
        .or_else(|| answer.head.headers.get("grpc-status"));
    match status
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse().ok())
    {
        Some(0u32) => {}
        Some(code) => {
            let text = |fields: &HeaderMap| {
                fields
                    .get("grpc-message")
                    .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            };
            let message = answer
                .trailers
                .as_ref()
                .and_then(text)
                .or_else(|| text(&answer.head.headers));
            return Err(CallError::Grpc(name(), code, message.unwrap_or_default()));
        }
        None => return Err(CallError::Answer(name(), "no gRPC answer")),
    }
    let mut body = answer.body;
    if body.len() < 5 || body.get_u8() != 0 {
        return Err(CallError::Answer(name(), "no plain gRPC message"));
    }
    let length = body.get_u32() as usize;
    if body.len() < length {
        return Err(CallError::Answer(name(), "cut off"));
    }
    Ok(body.split_to(length))
}
