//! What a service says, and what becomes of it.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::service::auth::v3 as auth;
use serin_xds::pb::google::protobuf as google;

use super::super::service::header_pair;

/// Fields of a request that HTTP/1 has in its first line. Of these a service may change path and authority.
const PSEUDO: [&str; 4] = [":path", ":authority", ":method", ":scheme"];

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
    /// Behind what was there, in one list; nothing where nothing was.
    Join,
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
    /// `:path` of the request.
    pub path: Option<String>,
    /// It asks for what a request cannot be without to be taken off, which is not done.
    pub removes_needed: bool,
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
fn field(from: &core::HeaderValueOption) -> Option<Field> {
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
            .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'%' | b'&' | b'#' | b'"' | b'<' | b'>'))
    };
    let pseudo = |option: &core::HeaderValueOption| {
        option
            .header
            .as_ref()
            .is_some_and(|header| PSEUDO.contains(&header.key.as_str()))
    };
    match &from.http_response {
        Some(HttpResponse::OkResponse(ok)) => {
            ok.headers
                .iter()
                .all(|option| pseudo(option) || field(option).is_some())
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

/// `:path` as the service wants it; the last one counts.
fn path(from: &[core::HeaderValueOption]) -> Option<String> {
    let mut given = from.iter().filter_map(|option| option.header.as_ref());
    let last = given.rfind(|header| header.key == ":path")?;
    Some(if last.raw_value.is_empty() {
        last.value.clone()
    } else {
        String::from_utf8_lossy(&last.raw_value).into_owned()
    })
}

/// A field of a request. It has one host: whatever the service says of it is in place of that.
fn of_request(from: &core::HeaderValueOption) -> Option<Field> {
    let mut from = from.clone();
    if let Some(header) = &mut from.header
        && header.key == ":authority"
    {
        header.key = header::HOST.as_str().into();
    }
    let (name, value, _) = field(&from)?;
    let how = if name == header::HOST {
        How::Set
    } else {
        of_append(&from)
    };
    Some((name, value, how))
}

/// What Envoy looks at in changes of requests and in denials: the older `append` alone.
fn of_append(from: &core::HeaderValueOption) -> How {
    match &from.append {
        Some(append) if append.value => How::Join,
        Some(_) | None => How::Set,
    }
}

/// Fields of the response to a request that passes, in the order in which Envoy takes them: by what they do.
fn of_response(from: &[core::HeaderValueOption]) -> Vec<Field> {
    use core::header_value_option::HeaderAppendAction as Action;
    let mut out: Vec<Field> = from
        .iter()
        .filter_map(|option| {
            let (name, value, _) = field(option)?;
            let how = match (&option.append, Action::try_from(option.append_action)) {
                (Some(append), _) if append.value => How::Append,
                (Some(_), _) => How::Set,
                (None, Ok(Action::AppendIfExistsOrAdd)) => How::Append,
                (None, Ok(Action::AddIfAbsent)) => How::IfAbsent,
                (None, Ok(Action::OverwriteIfExists)) => How::IfPresent,
                (None, Ok(Action::OverwriteIfExistsOrAdd) | Err(_)) => How::Set,
            };
            Some((name, value, how))
        })
        .collect();
    out.sort_by_key(|(_, _, how)| match how {
        How::Append | How::Join => 0,
        How::Set => 1,
        How::IfAbsent => 2,
        How::IfPresent => 3,
    });
    out
}

/// Fields of a denial: they take the place of what is there, all of one name together.
pub fn apply_denied(fields: &[Field], headers: &mut HeaderMap) {
    for one in fields.iter().filter(|(_, _, how)| *how == How::Join) {
        apply(std::slice::from_ref(one), headers);
    }
    for (name, _, how) in fields {
        if *how != How::Join {
            headers.remove(name);
        }
    }
    for (name, value, how) in fields {
        if *how != How::Join {
            headers.append(name, value.clone());
        }
    }
}

/// What the answer of a gRPC service means. Fields that are none are left out.
pub fn read_grpc(from: auth::CheckResponse) -> Verdict {
    use auth::check_response::HttpResponse;
    let code = from.status.as_ref().map_or(0, |status| status.code);
    match from.http_response {
        Some(HttpResponse::OkResponse(ok)) if code == 0 => Verdict::Allowed(Box::new(Allowed {
            path: path(&ok.headers),
            set: {
                let mut set: Vec<Field> = ok.headers.iter().filter_map(of_request).collect();
                // What is added to is what has been set.
                set.sort_by_key(|(_, _, how)| *how == How::Join);
                set
            },
            removes_needed: ok
                .headers_to_remove
                .iter()
                .any(|name| name.starts_with(':') || name.eq_ignore_ascii_case("host")),
            remove: ok
                .headers_to_remove
                .iter()
                .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
                .filter(|name| *name != header::HOST)
                .collect(),
            response: of_response(&ok.response_headers_to_add),
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
                headers: denied
                    .headers
                    .iter()
                    .filter_map(|option| {
                        let (name, value, _) = field(option)?;
                        Some((name, value, of_append(option)))
                    })
                    .collect(),
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
            How::Join => {
                if !headers.contains_key(name) {
                    continue;
                }
                let values = headers.get_all(name).iter().chain([value]);
                let all: Vec<&[u8]> = values
                    .map(HeaderValue::as_bytes)
                    .filter(|value| !value.is_empty())
                    .collect();
                let between: &[u8] = if *name == header::COOKIE { b"; " } else { b"," };
                if let Ok(joined) = HeaderValue::from_bytes(&all.join(between)) {
                    headers.insert(name, joined);
                }
            }
        }
    }
}
