//! What a service says, and what becomes of it.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::service::auth::v3 as auth;
use serin_xds::pb::google::protobuf as google;

use super::super::service::header_pair;

/// How a field is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// In place of what was there.
    Set,
    /// Beside what was there.
    Append,
    /// Where nothing was there.
    IfAbsent,
    /// Where something was there.
    IfPresent,
}

/// A field to be set.
pub type Field = (HeaderName, HeaderValue, How);

/// What the service said.
#[derive(Debug)]
pub enum Verdict {
    /// The request passes.
    Allowed(Box<Allowed>),
    /// It is answered with this.
    Denied(Box<Denied>),
    /// The service failed.
    Failed,
}

/// Changes to a request that passes.
#[derive(Debug, Default)]
pub struct Allowed {
    /// Fields of the request.
    pub set: Vec<Field>,
    /// Fields taken off the request.
    pub remove: Vec<HeaderName>,
    /// Fields of the response.
    pub response: Vec<Field>,
    /// Query parameters to set.
    pub query_set: Vec<(String, String)>,
    /// Query parameters to remove.
    pub query_remove: Vec<String>,
    /// For later filters.
    pub metadata: Option<google::Struct>,
}

/// The answer to a request that does not pass.
#[derive(Debug)]
pub struct Denied {
    /// Status.
    pub status: StatusCode,
    /// Fields.
    pub headers: Vec<Field>,
    /// Body.
    pub body: Bytes,
    /// For the access log.
    pub metadata: Option<google::Struct>,
}

/// A field as services give it.
pub(crate) fn field(from: &core::HeaderValueOption) -> Option<Field> {
    use core::header_value_option::HeaderAppendAction;
    let (name, value) = header_pair(from.header.as_ref()?).ok()?;
    let how = match (&from.append, HeaderAppendAction::try_from(from.append_action)) {
        (Some(append), _) if append.value => How::Append,
        (Some(_), _) => How::Set,
        // In this API a field without any of the two is set, unlike in routes.
        (None, Ok(HeaderAppendAction::AppendIfExistsOrAdd)) => How::Set,
        (None, Ok(HeaderAppendAction::AddIfAbsent)) => How::IfAbsent,
        (None, Ok(HeaderAppendAction::OverwriteIfExists)) => How::IfPresent,
        (None, _) => How::Set,
    };
    Some((name, value, how))
}

/// Whether every change that an answer asks for can be made (`validate_mutations`). What is to be taken off need not exist.
pub fn is_valid(from: &auth::CheckResponse) -> bool {
    use auth::check_response::HttpResponse;
    let fields = |list: &[core::HeaderValueOption]| list.iter().all(|option| field(option).is_some());
    let query = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'&' | b'#' | b'"' | b'<' | b'>'))
    };
    match &from.http_response {
        Some(HttpResponse::OkResponse(ok)) => {
            fields(&ok.headers)
                && fields(&ok.response_headers_to_add)
                && ok
                    .query_parameters_to_set
                    .iter()
                    .all(|parameter| query(&parameter.key) && query(&parameter.value))
        }
        Some(HttpResponse::DeniedResponse(denied)) => fields(&denied.headers),
        Some(HttpResponse::ErrorResponse(_)) | None => true,
    }
}

/// What the answer of a gRPC service means. Fields that are none are left out.
pub fn read_grpc(from: auth::CheckResponse) -> Verdict {
    use auth::check_response::HttpResponse;
    let code = from.status.as_ref().map_or(0, |status| status.code);
    let fields = |list: &[core::HeaderValueOption]| list.iter().filter_map(field).collect();
    match from.http_response {
        Some(HttpResponse::OkResponse(ok)) if code == 0 => Verdict::Allowed(Box::new(Allowed {
            set: fields(&ok.headers),
            remove: ok
                .headers_to_remove
                .iter()
                .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
                .filter(|name| *name != header::HOST)
                .collect(),
            response: fields(&ok.response_headers_to_add),
            query_set: ok
                .query_parameters_to_set
                .into_iter()
                .map(|parameter| (parameter.key, parameter.value))
                .collect(),
            query_remove: ok.query_parameters_to_remove,
            metadata: from.dynamic_metadata.or(ok.dynamic_metadata),
        })),
        _ if code == 0 => Verdict::Allowed(Box::new(Allowed {
            metadata: from.dynamic_metadata,
            ..Default::default()
        })),
        Some(HttpResponse::ErrorResponse(_)) => Verdict::Failed,
        other => {
            let denied = match other {
                Some(HttpResponse::DeniedResponse(denied)) => denied,
                _ => auth::DeniedHttpResponse::default(),
            };
            let status = denied
                .status
                .as_ref()
                .and_then(|status| u16::try_from(status.code).ok())
                .and_then(|code| StatusCode::from_u16(code).ok())
                .unwrap_or(StatusCode::FORBIDDEN);
            Verdict::Denied(Box::new(Denied {
                status,
                headers: fields(&denied.headers),
                body: denied.body.into(),
                metadata: from.dynamic_metadata,
            }))
        }
    }
}

/// Sets fields.
pub fn apply(fields: &[Field], headers: &mut HeaderMap) {
    for (name, value, how) in fields {
        match how {
            How::Set => {
                headers.insert(name, value.clone());
            }
            How::Append => {
                headers.append(name, value.clone());
            }
            How::IfAbsent => {
                headers.entry(name).or_insert_with(|| value.clone());
            }
            How::IfPresent => {
                if headers.contains_key(name) {
                    headers.insert(name, value.clone());
                }
            }
        }
    }
}
