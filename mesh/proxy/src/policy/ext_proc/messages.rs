//! What a service is told of a head, and what its answers mean.

use std::collections::HashMap;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::http::ext_proc::v3 as filter;
use serin_xds::pb::envoy::service::ext_proc::v3 as service;
use serin_xds::pb::google::protobuf as google;

use super::mode::{Mode, of_response};
use super::namespaces::{Namespaces, taken};
use super::{ExtProc, RouteCache};
use crate::config::convert;
use crate::config::matchers::StringMatch;
use crate::policy::cel::{Attribute, Value};
use crate::policy::ext_authz::{Field, How};
use crate::policy::metadata::Metadata;
use crate::policy::service::header_pair;

/// Under this name attributes are sent.
const NAME: &str = "envoy.filters.http.ext_proc";

/// What is told of a head.
#[derive(Debug)]
pub struct Question<'a> {
    /// Which head.
    pub about: About,
    /// The first message of a stream says what will be sent.
    pub is_first: bool,
    /// Metadata that the service is told.
    pub namespaces: &'a Namespaces,
    /// Pseudo fields.
    pub system: &'a [(&'a str, &'a str)],
    /// The fields.
    pub headers: &'a HeaderMap,
    /// Nothing follows the head.
    pub ends: bool,
    /// What filters have said.
    pub metadata: &'a Metadata,
    /// What is told beside the head.
    pub attributes: google::Struct,
}

/// What an answer means for a head.
#[derive(Debug)]
pub enum Answer {
    /// It comes later: within that time from now, where the service may say so.
    Later(Option<Duration>),
    /// It goes on with these changes.
    Continue(Changes),
    /// The client gets this instead.
    Immediate(Box<Immediate>),
}

/// Changes to a head.
#[derive(Debug, Default)]
pub struct Changes {
    /// Fields to set.
    pub set: Vec<Field>,
    /// Fields to take off.
    pub remove: Vec<HeaderName>,
    /// `:path` of a request.
    pub path: Option<String>,
    /// `:status` of a response.
    pub status: Option<StatusCode>,
    /// For later filters, by namespace.
    pub metadata: Vec<(Box<str>, google::Struct)>,
    /// The route is searched again.
    pub reroute: bool,
    /// What the service wants to see from now on, where it may say so.
    pub mode: Option<Mode>,
}

/// An answer of the service to the client.
#[derive(Debug)]
pub struct Immediate {
    /// Status.
    pub status: StatusCode,
    /// Fields.
    pub headers: Vec<Field>,
    /// Body.
    pub body: Vec<u8>,
    /// gRPC status.
    pub grpc_status: Option<u32>,
    /// Response code details, where the service gives some.
    pub details: String,
    /// For the access log, by namespace.
    pub metadata: Vec<(Box<str>, google::Struct)>,
}

/// Why an answer cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// An answer to something else.
    #[error("spurious_message")]
    Spurious,
    /// It asks for what the proxy does not do.
    #[error("unsupported_response")]
    Unsupported,
    /// An answer to the client, where the service may give none.
    #[error("unhandled_immediate_response_due_to_config_disabled_it")]
    Immediate,
    /// A change that is not allowed, where that is an error.
    #[error("header_mutation_{0}_headers_failed")]
    Forbidden(Change),
    /// A field to be set or taken off that is none.
    #[error("header_mutation_{0}_contains_invalid_character")]
    Malformed(Change),
}

/// An answer that cannot be used, and what it says beside that, which is noted all the same.
#[derive(Debug)]
pub struct Rejected {
    /// Why.
    pub wrong: Wrong,
    /// For later filters and the log, by namespace.
    pub metadata: Vec<(Box<str>, google::Struct)>,
}

/// What was to be done with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was to be set.
    Set,
    /// It was to be taken off.
    Remove,
}

impl std::fmt::Display for Change {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.write_str(match self {
            Self::Set => "set",
            Self::Remove => "remove",
        })
    }
}

impl Wrong {
    /// Whether the message fails also where a failing service lets messages through: it was answered, and wrongly.
    pub fn is_fatal(self) -> bool {
        matches!(self, Self::Forbidden(_) | Self::Malformed(_))
    }
}

/// Which head an answer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// The request's.
    Request,
    /// The response's.
    Response,
}

impl ExtProc {
    /// The message about a head.
    pub fn question(&self, question: Question<'_>) -> service::ProcessingRequest {
        use service::processing_request::Request;
        let passes = |name: &str| {
            let any = |list: &[StringMatch]| list.iter().any(|matcher| matcher.matches(name));
            self.allowed.as_deref().is_none_or(any) && !any(&self.disallowed)
        };
        let entry = |name: &str, value: &[u8]| core::HeaderValue {
            key: name.to_owned(),
            raw_value: value.to_vec(),
            ..Default::default()
        };
        let fields = question
            .headers
            .iter()
            .filter(|(name, _)| **name != header::HOST)
            .map(|(name, value)| (name.as_str(), value.as_bytes()));
        let headers = question
            .system
            .iter()
            .map(|(name, value)| (*name, value.as_bytes()))
            .chain(fields)
            .filter(|(name, _)| passes(name))
            .map(|(name, value)| entry(name, value))
            .collect();
        let headers = service::HttpHeaders {
            headers: Some(core::HeaderMap { headers }),
            end_of_stream: question.ends,
            ..Default::default()
        };
        let filter_metadata: HashMap<_, _> = question
            .namespaces
            .sent
            .iter()
            .filter_map(|name| Some((name.to_string(), question.metadata.get(name)?.clone())))
            .collect();
        let attributes = if question.attributes.fields.is_empty() {
            HashMap::default()
        } else {
            [(NAME.to_owned(), question.attributes)].into()
        };
        service::ProcessingRequest {
            attributes,
            observability_mode: self.observing.is_some(),
            // Bodies are never sent, which is what the defaults say.
            protocol_config: question.is_first.then(service::ProtocolConfiguration::default),
            metadata_context: Some(core::Metadata {
                filter_metadata,
                ..Default::default()
            }),
            request: Some(match question.about {
                About::Request => Request::RequestHeaders(headers),
                About::Response => Request::ResponseHeaders(headers),
            }),
            ..Default::default()
        }
    }

    /// What an answer about a head means.
    pub fn read(
        &self,
        about: About,
        namespaces: &Namespaces,
        from: service::ProcessingResponse,
        worker: usize,
    ) -> Result<Answer, Rejected> {
        use service::processing_response::Response;
        if let Some(asked) = &from.override_message_timeout {
            // Nothing else of such a message counts.
            let asked = convert::duration(asked).ok().filter(|asked| {
                *asked >= Duration::from_millis(1) && self.max_timeout.is_some_and(|most| *asked <= most)
            });
            return Ok(Answer::Later(asked));
        }
        let metadata = taken(&namespaces.taken, from.dynamic_metadata);
        let rejected = |wrong: Wrong, metadata| Rejected { wrong, metadata };
        let from_mode = from.mode_override;
        let answer = match (about, from.response) {
            (About::Request, Some(Response::RequestHeaders(answer)))
            | (About::Response, Some(Response::ResponseHeaders(answer))) => {
                answer.response.unwrap_or_default()
            }
            (_, Some(Response::ImmediateResponse(_))) if self.no_immediate => {
                return Err(rejected(Wrong::Immediate, Vec::new()));
            }
            (_, Some(Response::ImmediateResponse(answer))) => {
                return Ok(self.immediate(answer, metadata, worker));
            }
            (_, Some(Response::StreamedImmediateResponse(_))) => {
                return Err(rejected(Wrong::Unsupported, metadata));
            }
            _ => {
                self.counters.spurious_messages.add(worker);
                return Err(rejected(Wrong::Spurious, metadata));
            }
        };
        let replaces = service::common_response::ResponseStatus::ContinueAndReplace as i32;
        if answer.status == replaces || answer.body_mutation.is_some() || answer.trailers.is_some() {
            return Err(rejected(Wrong::Unsupported, metadata));
        }
        let mode = from_mode
            .as_ref()
            .filter(|_| about == About::Request)
            .map_or(Ok(None), |mode| self.overridden(mode));
        let changed = self.changes(answer.header_mutation.as_ref(), about, worker);
        let (mut changes, mode) = match changed.and_then(|changes| Ok((changes, mode?))) {
            Ok(read) => read,
            Err(wrong) => return Err(rejected(wrong, metadata)),
        };
        changes.metadata = metadata;
        changes.mode = mode;
        changes.reroute = about == About::Request
            && match self.route {
                RouteCache::AsAsked => answer.clear_route_cache,
                RouteCache::Clear => true,
                RouteCache::Retain => false,
            };
        Ok(Answer::Continue(changes))
    }

    /// What a service may want to see from now on; nothing where it may not say so.
    fn overridden(&self, mode: &filter::ProcessingMode) -> Result<Option<Mode>, Wrong> {
        let Some(allowed) = &self.mode_override else {
            return Ok(None);
        };
        if !allowed.is_empty() && !allowed.contains(&of_response(*mode)) {
            return Ok(None);
        }
        Mode::compile(Some(mode))
            .map(Some)
            .map_err(|_| Wrong::Unsupported)
    }

    fn immediate(
        &self,
        from: service::ImmediateResponse,
        metadata: Vec<(Box<str>, google::Struct)>,
        worker: usize,
    ) -> Answer {
        let status = from
            .status
            .and_then(|status| u16::try_from(status.code).ok())
            .and_then(|code| StatusCode::from_u16(code).ok())
            .unwrap_or(StatusCode::OK);
        // Of changes that cannot be made none is; the answer is one all the same.
        let changes = self
            .changes(from.headers.as_ref(), About::Response, worker)
            .unwrap_or_default();
        Answer::Immediate(Box::new(Immediate {
            metadata,
            status,
            headers: changes.set,
            body: from.body,
            grpc_status: from.grpc_status.map(|status| status.status),
            details: from.details,
        }))
    }

    /// Fields that may not be changed are left out, or fail the message.
    fn changes(
        &self,
        from: Option<&service::HeaderMutation>,
        about: About,
        worker: usize,
    ) -> Result<Changes, Wrong> {
        let mut out = Changes::default();
        let Some(from) = from else { return Ok(out) };
        let rejected = |change: Change| {
            self.counters.rejected_mutations.add(worker);
            if self.rules.is_error {
                Err(Wrong::Forbidden(change))
            } else {
                Ok(())
            }
        };
        let malformed = |change: Change| {
            self.counters.rejected_mutations.add(worker);
            Wrong::Malformed(change)
        };
        for name in &from.remove_headers {
            match HeaderName::from_bytes(name.as_bytes()) {
                Ok(name) if self.rules.allows_removal(&name) => out.remove.push(name),
                Err(_) if !name.starts_with(':') => return Err(malformed(Change::Remove)),
                _ => rejected(Change::Remove)?,
            }
        }
        for option in &from.set_headers {
            let Some(given) = &option.header else { continue };
            let name = given.key.to_ascii_lowercase();
            let text = if given.raw_value.is_empty() {
                given.value.as_bytes()
            } else {
                &given.raw_value
            };
            // The length is the message's own: bodies are not changed. A request has no status.
            let own = name == "content-length"
                || name == "transfer-encoding"
                || (name == ":status" && about == About::Request);
            if own {
                continue;
            }
            // Whether it may be changed or not (Envoy).
            let system = name.starts_with(':');
            if !system && HeaderName::from_bytes(name.as_bytes()).is_err()
                || HeaderValue::from_bytes(text).is_err()
            {
                return Err(malformed(Change::Set));
            }
            if !self.rules.allows(&name) {
                rejected(Change::Set)?;
                continue;
            }
            let text = String::from_utf8_lossy(text);
            match (&*name, about) {
                (":path", About::Request) => out.path = Some(text.into_owned()),
                (":status", About::Response) => match text.parse().ok().map(StatusCode::from_u16) {
                    Some(Ok(status)) => out.status = Some(status),
                    _ => rejected(Change::Set)?,
                },
                (":authority" | "host", About::Request) => match HeaderValue::from_str(&text) {
                    Ok(value) => out.set.push((header::HOST, value, How::Set)),
                    Err(_) => return Err(malformed(Change::Set)),
                },
                _ => match header_pair(given) {
                    // Envoy looks at the older `append` alone.
                    Ok((name, value)) => {
                        let appends = option.append.as_ref().is_some_and(|append| append.value);
                        let how = if appends { How::Append } else { How::Set };
                        out.set.push((name, value, how));
                    }
                    Err(_) if name.starts_with(':') => rejected(Change::Set)?,
                    Err(_) => return Err(malformed(Change::Set)),
                },
            }
        }
        Ok(out)
    }
}

/// The values of attributes that are there.
pub fn told<'a>(
    wanted: &[(Box<str>, Attribute)],
    mut value: impl FnMut(Attribute) -> Option<Value<'a>>,
) -> google::Struct {
    use google::value::Kind;
    let fields = wanted.iter().filter_map(|(name, attribute)| {
        let kind = match value(*attribute)? {
            Value::Text(text) => Kind::StringValue(text.into_owned()),
            Value::Int(number) => Kind::NumberValue(number as f64),
            Value::Uint(number) => Kind::NumberValue(number as f64),
            Value::Bool(value) => Kind::BoolValue(value),
            _ => return None,
        };
        Some((name.to_string(), google::Value { kind: Some(kind) }))
    });
    google::Struct {
        fields: fields.collect(),
    }
}
