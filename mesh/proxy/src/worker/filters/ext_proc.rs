//! External processing on the worker: the stream of a request, what is sent over it, what becomes of the answers.

use std::sync::Arc;

use bytes::Bytes;
use http::request::Parts;
use http::response::Parts as Head;
use http::{HeaderMap, StatusCode, Uri};
use prost::Message;

use super::super::Worker;
use super::super::body::Inbound;
use super::super::grpc_stream::GrpcStream;
use super::{Encode, Exchange, LocalReply, metadata, state};
use crate::metrics::flags::Flags;
use crate::policy::ext_authz::apply;
use crate::policy::ext_proc::{About, Answer, Changes, ExtProc, Immediate, PATH, PerRouteProc, Wrong};
use crate::policy::service::GrpcTarget;
use crate::worker::call::CallError;
use crate::worker::request::view;

/// The processing of one request.
pub(super) struct Processing {
    filter: Arc<ExtProc>,
    /// Where the route names another service.
    target: Option<GrpcTarget>,
    failure_allows: bool,
    response: bool,
    stream: Option<GrpcStream>,
    /// The service has ended the stream, or failed and that does not matter.
    over: bool,
}

/// Why there is no answer.
enum Failure {
    Call(CallError),
    Timeout,
    Wrong(Wrong),
}

impl Processing {
    /// Sends a head and waits for the answer. `None` says that the service is not interested any more.
    async fn ask(
        &mut self,
        worker: &Worker,
        about: About,
        question: &[u8],
    ) -> Result<Option<Answer>, Failure> {
        let timeout = self.filter.timeout;
        let work = self.exchange(worker, question);
        let answer = match tokio::time::timeout(timeout, work).await {
            Err(_) => {
                self.filter.counters.timeouts.add(worker.id);
                return Err(Failure::Timeout);
            }
            Ok(Err(error)) => return Err(Failure::Call(error)),
            Ok(Ok(None)) => return Ok(None),
            Ok(Ok(Some(answer))) => answer,
        };
        self.filter.counters.messages_received.add(worker.id);
        let answer = Message::decode(answer).map_err(|_| Failure::Wrong(Wrong::Spurious))?;
        self.filter
            .read(about, answer, worker.id)
            .map(Some)
            .map_err(Failure::Wrong)
    }

    async fn exchange(&mut self, worker: &Worker, question: &[u8]) -> Result<Option<Bytes>, CallError> {
        let counters = &self.filter.counters;
        counters.messages_sent.add(worker.id);
        if let Some(stream) = &mut self.stream {
            // A stream that has ended says so when it is read.
            stream.send(question);
            return stream.next().await;
        }
        counters.streams_started.add(worker.id);
        let target = self.target.as_ref().unwrap_or(&self.filter.target);
        let mut stream = GrpcStream::open(worker, target, PATH).await?;
        stream.send(question);
        let mut answer = stream.next().await;
        if matches!(answer, Err(CallError::Broken(..))) && stream.reused() {
            // Closed while idle: the next connection tells more.
            stream = GrpcStream::open(worker, target, PATH).await?;
            stream.send(question);
            answer = stream.next().await;
        }
        self.stream = Some(stream);
        answer
    }

    /// What becomes of a failure: nothing, or the reply to the client.
    fn fail(&mut self, failure: &Failure, worker: &Worker) -> Result<(), LocalReply> {
        let counters = &self.filter.counters;
        counters.streams_failed.add(worker.id);
        self.stream = None;
        self.over = true;
        let reason = match failure {
            Failure::Call(CallError::Grpc(_, status, _)) => format!("gRPC_error_{status}"),
            Failure::Call(_) => "gRPC_error_14".to_owned(),
            Failure::Timeout => "per-message_timeout_exceeded".to_owned(),
            Failure::Wrong(wrong) => wrong.to_string(),
        };
        if let Failure::Call(error) = failure {
            tracing::debug!(%error, "the processing service failed");
        }
        if self.failure_allows {
            counters.failure_allowed.add(worker.id);
            return Ok(());
        }
        let status = self.filter.error_status(matches!(failure, Failure::Timeout));
        let details = format!("ext_proc_error_{reason}");
        Err(LocalReply::new(status, Flags::default(), details, ""))
    }
}

/// Lets the service see a request. `Ok(true)` says that the route is to be searched again.
pub(super) async fn request(
    exchange: &mut Exchange,
    filter: &Arc<ExtProc>,
    own: Option<&PerRouteProc>,
    parts: &mut Parts,
    body: Option<&Inbound>,
) -> Result<bool, LocalReply> {
    let (mut mode, mut target, mut failure_allows) = (filter.mode, None, filter.failure_allows);
    match own {
        None => {}
        Some(PerRouteProc::Disabled) => return Ok(false),
        Some(PerRouteProc::Settings {
            mode: own_mode,
            target: own_target,
            failure_allows: own_failure,
        }) => {
            mode = own_mode.unwrap_or(mode);
            target = own_target.as_deref().cloned();
            failure_allows = own_failure.unwrap_or(failure_allows);
        }
    }
    let mut processing = Box::new(Processing {
        filter: filter.clone(),
        target,
        failure_allows,
        response: mode.response,
        stream: None,
        over: false,
    });
    let mut reroute = false;
    if mode.request {
        let worker = exchange.conn.worker.clone();
        let question = {
            let request = view(parts);
            let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
            let system = [
                (":method", request.method),
                (":scheme", request.scheme()),
                (":authority", request.authority()),
                (":path", path),
            ];
            filter.question(
                About::Request,
                &system,
                &parts.headers,
                body.is_none(),
                metadata(exchange),
            )
        };
        match processing
            .ask(&worker, About::Request, &question.encode_to_vec())
            .await
        {
            Ok(None) => processing.over = true,
            Ok(Some(Answer::Continue(changes))) => {
                reroute = changes.reroute;
                change_request(exchange, parts, changes);
            }
            Ok(Some(Answer::Immediate(answer))) => return Err(immediate(*answer)),
            Err(failure) => processing.fail(&failure, &worker)?,
        }
    }
    if processing.response && !processing.over {
        state(exchange).encode.push(Encode::Process(Some(processing)));
    }
    Ok(reroute)
}

/// Lets the service see a response.
pub(super) async fn response(
    exchange: &mut Exchange,
    mut processing: Box<Processing>,
    head: &mut Head,
    has_body: bool,
) -> Result<(), LocalReply> {
    let worker = exchange.conn.worker.clone();
    let question = processing.filter.question(
        About::Response,
        &[(":status", head.status.as_str())],
        &head.headers,
        !has_body,
        metadata(exchange),
    );
    match processing
        .ask(&worker, About::Response, &question.encode_to_vec())
        .await
    {
        Ok(None) => Ok(()),
        Ok(Some(Answer::Continue(changes))) => {
            if let Some(status) = changes.status {
                head.status = status;
                exchange.code = status.as_u16();
            }
            change_fields(&mut head.headers, &changes);
            note(exchange, changes);
            Ok(())
        }
        Ok(Some(Answer::Immediate(answer))) => Err(immediate(*answer)),
        Err(failure) => processing.fail(&failure, &worker),
    }
}

fn change_fields(headers: &mut HeaderMap, changes: &Changes) {
    for name in &changes.remove {
        headers.remove(name);
    }
    apply(&changes.set, headers);
}

fn note(exchange: &mut Exchange, changes: Changes) {
    for (namespace, fields) in changes.metadata {
        state(exchange).metadata.merge(&namespace, fields);
    }
}

fn change_request(exchange: &mut Exchange, parts: &mut Parts, changes: Changes) {
    change_fields(&mut parts.headers, &changes);
    // What the service sends may be no path; then the request goes on with its own.
    if let Some(path) = &changes.path
        && path.starts_with('/')
        && let Ok(uri) = path.parse::<Uri>()
    {
        parts.uri = uri;
    }
    note(exchange, changes);
}

fn immediate(from: Immediate) -> LocalReply {
    let details = if from.details.is_empty() {
        "ext_proc_immediate_response".to_owned()
    } else {
        from.details.replace(char::is_whitespace, "_")
    };
    let mut reply = LocalReply::new(from.status, Flags::default(), details, "");
    apply(&from.headers, &mut reply.headers);
    reply.grpc_status = from.grpc_status;
    if reply.status != StatusCode::NO_CONTENT && reply.status != StatusCode::NOT_MODIFIED {
        reply.body = Bytes::from(from.body);
    }
    reply
}
