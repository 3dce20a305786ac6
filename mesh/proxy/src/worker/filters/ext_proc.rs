//! External processing on the worker: the stream of a request, what is sent over it, what becomes of the answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::request::Parts;
use http::response::Parts as Head;
use http::{HeaderMap, StatusCode, Uri};
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::facts::facts;
use super::{Encode, Passed, Verdict, metadata, state};
use crate::metrics::flags::Flags;
use crate::policy::cel::{Attribute, Scene as _, Value};
use crate::policy::ext_authz::apply;
use crate::policy::ext_proc::{
    About, Answer, Changes, ExtProc, Immediate, Mode, Namespaces, PATH, PerRouteProc, Question, Rejected,
    Wrong, told,
};
use crate::policy::per_route::Override;
use crate::policy::service::GrpcTarget;
use crate::worker::Worker;
use crate::worker::body::Inbound;
use crate::worker::call::CallError;
use crate::worker::exchange::Exchange;
use crate::worker::grpc_stream::GrpcStream;
use crate::worker::local::LocalReply;
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
    /// Where nobody waits for answers: what takes the messages.
    observer: Option<mpsc::Sender<Vec<u8>>>,
    /// Whether the service has been told something.
    begun: bool,
    namespaces: Arc<Namespaces>,
}

/// Streams that one filter keeps open at a time only to observe; beyond that nothing is sent.
const MAX_OBSERVED: usize = 4096;

/// Counts a stream that observes.
struct Observed(Arc<ExtProc>);

impl Drop for Observed {
    fn drop(&mut self) {
        self.0.observed.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sends messages to a service whose answers change nothing; the request goes on meanwhile. The stream ends a while after
/// the request has.
async fn observe(
    worker: std::rc::Rc<Worker>,
    filter: Arc<ExtProc>,
    target: Option<GrpcTarget>,
    mut messages: mpsc::Receiver<Vec<u8>>,
    closing: std::time::Duration,
) {
    let counters = &filter.counters;
    let Some(first) = messages.recv().await else {
        return;
    };
    if filter.observed.fetch_add(1, Ordering::Relaxed) >= MAX_OBSERVED {
        filter.observed.fetch_sub(1, Ordering::Relaxed);
        counters.streams_failed.add(worker.id);
        return;
    }
    let _observed = Observed(filter.clone());
    counters.streams_started.add(worker.id);
    let opened = GrpcStream::open(&worker, target.as_ref().unwrap_or(&filter.target), PATH);
    let Ok(Ok(mut stream)) = tokio::time::timeout(filter.timeout.max(closing), opened).await else {
        counters.streams_failed.add(worker.id);
        return;
    };
    stream.send(&first);
    counters.messages_sent.add(worker.id);
    loop {
        tokio::select! {
            message = messages.recv() => match message {
                Some(message) => {
                    stream.send(&message);
                    counters.messages_sent.add(worker.id);
                }
                None => break,
            },
            answer = stream.next() => match answer {
                Ok(Some(_)) => counters.messages_received.add(worker.id),
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(%error, "the observing service failed");
                    return counters.streams_failed.add(worker.id);
                }
            },
        }
    }
    // Time for the service to read what was sent.
    let drained = async {
        while let Ok(Some(_)) = stream.next().await {
            counters.messages_received.add(worker.id);
        }
    };
    let _ = tokio::time::timeout(closing, drained).await;
}

/// Why there is no answer.
enum Failure {
    Call(CallError),
    Timeout,
    Wrong(Rejected),
}

impl Processing {
    /// Sends a head and waits for the answer. `None` says that the service is not interested any more.
    async fn ask(
        &mut self,
        worker: &Worker,
        about: About,
        question: &[u8],
    ) -> Result<Option<Answer>, Failure> {
        let mut deadline = Instant::now() + self.filter.timeout;
        let mut answer = tokio::time::timeout_at(deadline, self.exchange(worker, question)).await;
        let mut extended = false;
        loop {
            let received = match answer {
                Err(_) => {
                    self.filter.counters.timeouts.add(worker.id);
                    return Err(Failure::Timeout);
                }
                Ok(Err(error)) => return Err(Failure::Call(error)),
                Ok(Ok(None)) => return Ok(None),
                Ok(Ok(Some(received))) => received,
            };
            let counters = &self.filter.counters;
            counters.messages_received.add(worker.id);
            let received = Message::decode(received).map_err(|_| {
                Failure::Wrong(Rejected {
                    wrong: Wrong::Spurious,
                    metadata: Vec::new(),
                })
            })?;
            let read = self.filter.read(about, &self.namespaces, received, worker.id);
            match read.map_err(Failure::Wrong)? {
                Answer::Later(Some(time)) if !extended => {
                    counters.overridden_timeouts.add(worker.id);
                    extended = true;
                    deadline = Instant::now() + time;
                }
                // The time that there was goes on.
                Answer::Later(_) => counters.ignored_overrides.add(worker.id),
                read => return Ok(Some(read)),
            }
            let Some(stream) = &mut self.stream else {
                return Ok(None);
            };
            answer = tokio::time::timeout_at(deadline, stream.next()).await;
        }
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
        let details = match failure {
            Failure::Call(CallError::Grpc(_, status, _)) => format!("ext_proc_error_gRPC_error_{status}"),
            Failure::Call(_) => "ext_proc_error_gRPC_error_14".to_owned(),
            Failure::Timeout => "ext_proc_error_per-message_timeout_exceeded".to_owned(),
            Failure::Wrong(rejected) => rejected.wrong.to_string(),
        };
        if let Failure::Call(error) = failure {
            tracing::debug!(%error, "the processing service failed");
        }
        let fatal = matches!(failure, Failure::Wrong(rejected) if rejected.wrong.is_fatal());
        if self.failure_allows && !fatal {
            counters.failure_allowed.add(worker.id);
            return Ok(());
        }
        let status = self.filter.error_status(matches!(failure, Failure::Timeout));
        Err(LocalReply::new(status, Flags::default(), details, ""))
    }
}

/// Lets the service see a request.
pub(super) async fn request(
    exchange: &mut Exchange,
    filter: &Arc<ExtProc>,
    own: Option<&Override>,
    parts: &mut Parts,
    body: Option<&Inbound>,
) -> Verdict {
    let Some((mode, mut processing)) = begin(exchange, filter, own) else {
        return Ok(Passed::On);
    };
    let mut passed = Passed::On;
    if mode.request {
        let worker = exchange.conn.worker.clone();
        let question = request_question(exchange, &mut processing, parts, body.is_none());
        if let Some(observer) = &processing.observer {
            // A service that is behind misses it.
            let _ = observer.try_send(question);
            await_response(exchange, processing);
            return Ok(Passed::On);
        }
        match processing.ask(&worker, About::Request, &question).await {
            Ok(None) => processing.over = true,
            Ok(Some(Answer::Continue(changes))) => {
                passed = Passed::rerouted_if(changes.reroute);
                if let Some(mode) = changes.mode {
                    processing.response = mode.response;
                }
                change_request(exchange, parts, changes);
            }
            Ok(Some(Answer::Immediate(answer))) => return Err(immediate(exchange, *answer)),
            // Waited for above.
            Ok(Some(Answer::Later(_))) => {}
            Err(failure) => {
                note_rejected(exchange, &failure);
                processing.fail(&failure, &worker)?;
            }
        }
    }
    await_response(exchange, processing);
    Ok(passed)
}

/// What the service is told of a request, which `ends` with its head.
fn request_question(exchange: &Exchange, processing: &mut Processing, parts: &Parts, ends: bool) -> Vec<u8> {
    let filter = &processing.filter;
    let request = view(parts);
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let system = [
        (":method", request.method),
        (":scheme", request.scheme()),
        (":authority", request.authority()),
        (":path", path),
    ];
    let attributes = if filter.request_attributes.is_empty() {
        Default::default()
    } else {
        let facts = facts(exchange, parts);
        told(&filter.request_attributes, |attribute| facts.attribute(attribute))
    };
    let question = Question {
        about: About::Request,
        is_first: !std::mem::replace(&mut processing.begun, true),
        namespaces: &processing.namespaces,
        system: &system,
        headers: &parts.headers,
        ends,
        metadata: metadata(exchange),
        attributes,
    };
    filter.question(question).encode_to_vec()
}

/// Lets the service see only the response: an earlier filter has answered the request.
pub(super) fn answered(exchange: &mut Exchange, filter: &Arc<ExtProc>, own: Option<&Override>) {
    if let Some((_, processing)) = begin(exchange, filter, own) {
        await_response(exchange, processing);
    }
}

/// The processing of a request as filter and route want it; `None` if nobody is asked.
fn begin(
    exchange: &Exchange,
    filter: &Arc<ExtProc>,
    own: Option<&Override>,
) -> Option<(Mode, Box<Processing>)> {
    let mut mode = filter.mode;
    let mut processing = Box::new(Processing {
        filter: filter.clone(),
        target: None,
        failure_allows: filter.failure_allows,
        response: true,
        stream: None,
        over: false,
        observer: None,
        begun: false,
        namespaces: filter.namespaces.clone(),
    });
    match own {
        Some(Override::ExtProc(PerRouteProc::Disabled)) => return None,
        Some(Override::ExtProc(PerRouteProc::Settings {
            mode: own_mode,
            target,
            failure_allows,
            namespaces,
            fields,
        })) => {
            mode = own_mode.unwrap_or(mode);
            processing.target = target.as_deref().cloned();
            if !fields.is_empty() {
                let target = target.as_deref().unwrap_or(&filter.target);
                processing.target = Some(target.with_fields(fields));
            }
            processing.failure_allows = failure_allows.unwrap_or(filter.failure_allows);
            if let Some(namespaces) = namespaces {
                processing.namespaces = namespaces.clone();
            }
        }
        _ => {}
    }
    processing.response = mode.response;
    if let Some(closing) = filter.observing {
        let (sender, messages) = mpsc::channel(2);
        let worker = exchange.conn.worker.clone();
        let target = processing.target.clone();
        let work = observe(worker.clone(), filter.clone(), target, messages, closing);
        worker.tasks.spawn_local(work);
        processing.observer = Some(sender);
    }
    Some((mode, processing))
}

/// Keeps the processing for the response, where the service is still interested.
fn await_response(exchange: &mut Exchange, processing: Box<Processing>) {
    if processing.response && !processing.over {
        let state = state(exchange);
        state.outbox.get_or_insert_default();
        state.encode.push(Encode::Process(Some(processing)));
    }
}

/// Lets the service see a response.
pub(super) async fn response(
    exchange: &mut Exchange,
    mut processing: Box<Processing>,
    head: &mut Head,
    has_body: bool,
) -> Result<(), LocalReply> {
    let worker = exchange.conn.worker.clone();
    let is_first = !std::mem::replace(&mut processing.begun, true);
    let question = processing.filter.question(Question {
        about: About::Response,
        is_first,
        namespaces: &processing.namespaces,
        system: &[(":status", head.status.as_str())],
        headers: &head.headers,
        ends: !has_body,
        metadata: metadata(exchange),
        attributes: told(&processing.filter.response_attributes, |attribute| {
            let text = |text: Option<&str>| text.map(|text| Value::Text(text.to_owned().into()));
            match attribute {
                Attribute::ResponseCode => Some(Value::Int(i64::from(exchange.code))),
                Attribute::ClusterName => {
                    text(exchange.cluster.as_ref().and(exchange.cluster_name.as_deref()))
                }
                Attribute::RouteName => text(exchange.route.as_ref().map(|route| &*route.name)),
                Attribute::UpstreamAddress => text(exchange.host.as_ref().map(|host| &*host.endpoint.text)),
                _ => None,
            }
        }),
    });
    if let Some(observer) = &processing.observer {
        let _ = observer.try_send(question.encode_to_vec());
        return Ok(());
    }
    match processing
        .ask(&worker, About::Response, &question.encode_to_vec())
        .await
    {
        Ok(None | Some(Answer::Later(_))) => Ok(()),
        Ok(Some(Answer::Continue(changes))) => {
            if let Some(status) = changes.status {
                head.status = status;
                exchange.code = status.as_u16();
            }
            change_fields(&mut head.headers, &changes);
            note(exchange, changes);
            Ok(())
        }
        Ok(Some(Answer::Immediate(answer))) => Err(immediate(exchange, *answer)),
        Err(failure) => {
            note_rejected(exchange, &failure);
            processing.fail(&failure, &worker)
        }
    }
}

/// What a service says beside an answer that cannot be used.
fn note_rejected(exchange: &mut Exchange, failure: &Failure) {
    if let Failure::Wrong(rejected) = failure {
        for (namespace, fields) in &rejected.metadata {
            state(exchange).metadata.merge(namespace, fields.clone());
        }
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

fn immediate(exchange: &mut Exchange, from: Immediate) -> LocalReply {
    for (namespace, fields) in from.metadata {
        state(exchange).metadata.merge(&namespace, fields);
    }
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
