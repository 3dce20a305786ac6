//! A gRPC stream of messages in both directions, to a service that a filter asks.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, Response, Uri, header};
use http_body_util::BodyExt;
use tokio::sync::mpsc;

use super::Worker;
use super::body::UpstreamBody;
use super::call::{CallError, MAX_ANSWER, framed, grpc_request};
use super::failure::full_text;
use super::incoming::Incoming;
use crate::policy::service::GrpcTarget;
use crate::upstream::balance::Wish;
use crate::upstream::cluster::{Active, Host, WorkerCluster};
use crate::upstream::connect::{ConnectOptions, Speaking};
use crate::upstream::outlier::Event;
use crate::upstream::pool::Lease;

/// Messages that may wait to be sent; the other side is asked one thing at a time.
const WAITING: usize = 2;

type Head = Pin<Box<dyn Future<Output = Result<Response<Incoming>, String>>>>;

enum Answers {
    Awaited(Head),
    Open(Incoming),
}

/// See the module. Ends the stream when dropped.
pub(super) struct GrpcStream {
    name: Arc<str>,
    sender: mpsc::Sender<Bytes>,
    answers: Answers,
    buffer: BytesMut,
    cluster: std::rc::Rc<WorkerCluster>,
    host: std::rc::Rc<Host>,
    reused: bool,
    _lease: Lease,
    _active: Active,
}

impl GrpcStream {
    /// Begins a stream. An error of the connection is told by the first answer.
    pub(super) async fn open(
        worker: &Worker,
        target: &GrpcTarget,
        path: &'static str,
    ) -> Result<Self, CallError> {
        let name = || target.cluster.name.clone();
        let cluster = worker
            .cluster(&target.cluster)
            .ok_or_else(|| CallError::NoCluster(name()))?;
        let host = cluster
            .pick(&Wish::default(), None)
            .ok_or_else(|| CallError::NoHost(name()))?;
        let active = Active::on(&host);
        let (sender, messages) = mpsc::channel(WAITING);
        let mut request = grpc_request(target, path, UpstreamBody::Messages(messages));
        let options = ConnectOptions {
            server_name: cluster.config.request_server_name(request.headers()),
            between: None,
            ..Default::default()
        };
        let authority = request.headers_mut().remove(header::HOST);
        let uri = Uri::builder()
            .scheme("http")
            .authority(
                authority
                    .as_ref()
                    .and_then(|value| value.to_str().ok())
                    .unwrap_or("cluster"),
            )
            .path_and_query(path)
            .build();
        *request.uri_mut() = uri.map_err(|error| CallError::Broken(name(), error.to_string()))?;
        *request.version_mut() = http::Version::HTTP_2;
        let lease = cluster
            .lease(worker, &host, Speaking::Http2, &options)
            .await
            .map_err(|error| {
                cluster.record(&host, Event::LocalFailure);
                CallError::Broken(name(), error.to_string())
            })?;
        let Lease::Http2(stream) = &lease else {
            return Err(CallError::Answer(name(), "no HTTP/2"));
        };
        let answering = stream.send(request, None);
        let head = async move {
            let answering = answering.map_err(|unanswered| full_text(&unanswered.error))?;
            answering.await.map_err(|error| error.to_string())
        };
        Ok(Self {
            name: name(),
            sender,
            answers: Answers::Awaited(Box::pin(head)),
            buffer: BytesMut::new(),
            cluster,
            host,
            reused: lease.reused(),
            _lease: lease,
            _active: active,
        })
    }

    /// Whether the connection was used before: then a failure of the first message may be that it was closed while idle.
    pub(super) fn reused(&self) -> bool {
        self.reused
    }

    /// Sends a message. `false` if the stream has ended.
    pub(super) fn send(&self, message: &[u8]) -> bool {
        self.sender.try_send(framed(message)).is_ok()
    }

    /// The next message; `None` at the end of a stream that went well.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        let result = self.receive().await;
        match &result {
            Ok(_) => self.cluster.record(&self.host, Event::Status(200)),
            Err(_) => self.cluster.record(&self.host, Event::LocalFailure),
        };
        result
    }

    async fn receive(&mut self) -> Result<Option<Bytes>, CallError> {
        let name = || self.name.clone();
        if let Answers::Awaited(head) = &mut self.answers {
            let response = head.await.map_err(|error| CallError::Broken(name(), error))?;
            if !response.status().is_success() {
                return Err(CallError::Answer(name(), "not a success"));
            }
            let (head, incoming) = response.into_parts();
            if head.headers.contains_key("grpc-status") {
                return ended(&self.name, &head.headers);
            }
            self.answers = Answers::Open(incoming);
        }
        let Answers::Open(incoming) = &mut self.answers else {
            return Err(CallError::Answer(name(), "not there"));
        };
        loop {
            if self.buffer.len() >= 5 {
                let length = (&self.buffer[1..5]).get_u32() as usize;
                if self.buffer[0] != 0 || length > MAX_ANSWER {
                    return Err(CallError::Answer(self.name.clone(), "compressed or too large"));
                }
                if self.buffer.len() >= 5 + length {
                    self.buffer.advance(5);
                    return Ok(Some(self.buffer.split_to(length).freeze()));
                }
            }
            match incoming.frame().await {
                None => return Err(CallError::Answer(self.name.clone(), "cut off")),
                Some(Err(error)) => return Err(CallError::Broken(self.name.clone(), error.to_string())),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.buffer.extend_from_slice(&data),
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        return ended(&self.name, &trailers);
                    }
                },
            }
        }
    }
}

/// The end of a stream, by its status.
fn ended(name: &Arc<str>, fields: &HeaderMap) -> Result<Option<Bytes>, CallError> {
    let text = |field: &str| fields.get(field).and_then(|value| value.to_str().ok());
    match text("grpc-status").and_then(|status| status.parse().ok()) {
        Some(0) => Ok(None),
        Some(status) => {
            let message = text("grpc-message").unwrap_or_default().to_owned();
            Err(CallError::Grpc(name.clone(), status, message))
        }
        None => Err(CallError::Answer(name.clone(), "without a status")),
    }
}
