//! Header mutations with Envoy's substitution variables, parsed once.

use http::{HeaderMap, HeaderName, HeaderValue};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;

use crate::error::{Refusal, Within};

/// Values that the variables of a header template can name.
#[derive(Clone, Copy, Debug, Default)]
pub struct Variables<'a> {
    /// `%DOWNSTREAM_REMOTE_ADDRESS%`.
    pub downstream_remote: Option<std::net::SocketAddr>,
    /// `%DOWNSTREAM_LOCAL_ADDRESS%`.
    pub downstream_local: Option<std::net::SocketAddr>,
    /// `%PROTOCOL%`.
    pub protocol: &'a str,
    /// `%ROUTE_NAME%`.
    pub route_name: &'a str,
    /// `%UPSTREAM_CLUSTER%`.
    pub upstream_cluster: &'a str,
    /// `%UPSTREAM_HOST%`.
    pub upstream_host: Option<&'a str>,
    /// `%REQ(:PATH)%`.
    pub path: &'a str,
    /// `%REQ(:METHOD)%`.
    pub method: &'a str,
    /// `%REQ(:AUTHORITY)%`.
    pub authority: &'a str,
    /// `%RESPONSE_FLAGS%`.
    pub response_flags: &'a str,
    /// `%REQUESTED_SERVER_NAME%`.
    pub server_name: &'a str,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(Box<str>),
    RemoteAddress,
    RemoteAddressWithoutPort,
    LocalAddress,
    Protocol,
    RouteName,
    UpstreamCluster,
    UpstreamHost,
    ResponseFlags,
    ServerName,
    RequestPath,
    RequestMethod,
    RequestAuthority,
    RequestHeader(HeaderName),
}

/// The value of a header to add: fixed, or with variables.
#[derive(Clone, Debug)]
enum Template {
    Fixed(HeaderValue),
    Variable(Box<[Segment]>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Append,
    AddIfAbsent,
    Overwrite,
    OverwriteIfExists,
}

#[derive(Clone, Debug)]
struct Addition {
    name: Target,
    value: Template,
    mode: Mode,
}

/// `host` and `:authority` both mean the authority of the request.
#[derive(Clone, Debug)]
enum Target {
    Field(HeaderName),
    Authority,
}

/// A list of mutations, applied removals first as Envoy does.
#[derive(Clone, Debug, Default)]
pub struct HeaderOps {
    remove: Box<[HeaderName]>,
    add: Box<[Addition]>,
}

/// A message that says what is done to the fields of requests and of responses.
pub(crate) trait Mutating {
    /// What is added and removed, of requests and of responses.
    fn mutations(&self) -> [(&[core::HeaderValueOption], &[String]); 2];
}

macro_rules! mutating {
    ($($message:ty),+) => {$(
        impl Mutating for $message {
            fn mutations(&self) -> [(&[core::HeaderValueOption], &[String]); 2] {
                [
                    (&self.request_headers_to_add, &self.request_headers_to_remove),
                    (&self.response_headers_to_add, &self.response_headers_to_remove),
                ]
            }
        }
    )+};
}

mutating!(
    route::RouteConfiguration,
    route::VirtualHost,
    route::Route,
    route::weighted_cluster::ClusterWeight
);

impl HeaderOps {
    /// What a message does to requests, and to responses.
    pub(crate) fn of(message: &impl Mutating) -> Result<(Self, Self), Refusal> {
        let [(add, remove), (response_add, response_remove)] = message.mutations();
        Ok((
            Self::compile(add, remove, "request_headers")?,
            Self::compile(response_add, response_remove, "response_headers")?,
        ))
    }

    /// Compiles `*_headers_to_add` and `*_headers_to_remove`.
    pub(crate) fn compile(
        add: &[core::HeaderValueOption],
        remove: &[String],
        field: &str,
    ) -> Result<Self, Refusal> {
        let remove = remove
            .iter()
            .enumerate()
            .map(|(index, name)| {
                HeaderName::from_bytes(name.as_bytes())
                    .ok()
                    .filter(|name| name != http::header::HOST)
                    .ok_or_else(|| {
                        Refusal::new(
                            format!("{field}_to_remove[{index}]"),
                            format!("{name:?} cannot be removed"),
                        )
                    })
            })
            .collect::<Result<_, _>>()?;
        let add = add
            .iter()
            .enumerate()
            .map(|(index, option)| compile_addition(option).within(format!("{field}_to_add[{index}]")))
            .collect::<Result<_, _>>()?;
        Ok(Self { remove, add })
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }

    /// Applies the mutations to `headers`. Request header variables read `request`, or `headers` itself when that is
    /// the request. A new authority is returned through the `Host` field of `headers`.
    pub fn apply(&self, headers: &mut HeaderMap, request: Option<&HeaderMap>, variables: &Variables<'_>) {
        for name in &self.remove {
            headers.remove(name);
        }
        for addition in &self.add {
            let value = match &addition.value {
                Template::Fixed(value) => value.clone(),
                Template::Variable(segments) => {
                    match HeaderValue::from_str(&render(segments, request.unwrap_or(headers), variables)) {
                        Ok(value) if !value.is_empty() => value,
                        _ => continue,
                    }
                }
            };
            let (name, mode) = match &addition.name {
                Target::Field(name) => (name, addition.mode),
                Target::Authority => (&http::header::HOST, Mode::Overwrite),
            };
            match mode {
                Mode::Append => {
                    headers.append(name, value);
                }
                Mode::AddIfAbsent => {
                    headers.entry(name).or_insert(value);
                }
                Mode::Overwrite => {
                    headers.insert(name, value);
                }
                Mode::OverwriteIfExists => {
                    if headers.contains_key(name) {
                        headers.insert(name, value);
                    }
                }
            }
        }
    }
}

fn compile_addition(option: &core::HeaderValueOption) -> Result<Addition, Refusal> {
    use core::header_value_option::HeaderAppendAction;
    let header = option
        .header
        .as_ref()
        .ok_or_else(|| Refusal::new("header", "is missing"))?;
    let name = match header.key.as_str() {
        ":authority" => Target::Authority,
        key if key.eq_ignore_ascii_case("host") => Target::Authority,
        key => Target::Field(
            HeaderName::from_bytes(key.as_bytes())
                .map_err(|_| Refusal::new("header.key", format!("{key:?} is not a header name")))?,
        ),
    };
    let mode = match (&option.append, HeaderAppendAction::try_from(option.append_action)) {
        (Some(append), _) if append.value => Mode::Append,
        (Some(_), _) => Mode::Overwrite,
        (None, Ok(HeaderAppendAction::AppendIfExistsOrAdd)) => Mode::Append,
        (None, Ok(HeaderAppendAction::AddIfAbsent)) => Mode::AddIfAbsent,
        (None, Ok(HeaderAppendAction::OverwriteIfExistsOrAdd)) => Mode::Overwrite,
        (None, Ok(HeaderAppendAction::OverwriteIfExists)) => Mode::OverwriteIfExists,
        (None, Err(_)) => {
            return Err(Refusal::new(
                "append_action",
                format!("{} is unknown", option.append_action),
            ));
        }
    };
    let value = if header.raw_value.is_empty() {
        compile_template(&header.value).within("header.value")?
    } else {
        Template::Fixed(
            HeaderValue::from_bytes(&header.raw_value)
                .map_err(|_| Refusal::new("header.raw_value", "is not a header value"))?,
        )
    };
    Ok(Addition { name, value, mode })
}

fn compile_template(text: &str) -> Result<Template, Refusal> {
    let mut segments = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    while let Some(start) = rest.find('%') {
        literal.push_str(&rest[..start]);
        rest = &rest[start + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            literal.push('%');
            rest = after;
            continue;
        }
        let end = rest
            .find('%')
            .ok_or_else(|| Refusal::new("", format!("{text:?}: a lone % must be written %%")))?;
        if !literal.is_empty() {
            segments.push(Segment::Literal(std::mem::take(&mut literal).into()));
        }
        segments.push(compile_variable(&rest[..end])?);
        rest = &rest[end + 1..];
    }
    literal.push_str(rest);
    if segments.is_empty() {
        return HeaderValue::from_str(&literal)
            .map(Template::Fixed)
            .map_err(|_| Refusal::new("", format!("{literal:?} is not a header value")));
    }
    if !literal.is_empty() {
        segments.push(Segment::Literal(literal.into()));
    }
    Ok(Template::Variable(segments.into()))
}

fn compile_variable(name: &str) -> Result<Segment, Refusal> {
    if let Some(header) = name.strip_prefix("REQ(").and_then(|rest| rest.strip_suffix(')')) {
        return Ok(match header.to_ascii_lowercase().as_str() {
            ":path" => Segment::RequestPath,
            ":method" => Segment::RequestMethod,
            ":authority" | "host" => Segment::RequestAuthority,
            field => Segment::RequestHeader(
                HeaderName::from_bytes(field.as_bytes())
                    .map_err(|_| Refusal::new("", format!("%{name}%: not a header name")))?,
            ),
        });
    }
    Ok(match name {
        "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Segment::RemoteAddress,
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
            Segment::RemoteAddressWithoutPort
        }
        "DOWNSTREAM_LOCAL_ADDRESS" => Segment::LocalAddress,
        "PROTOCOL" => Segment::Protocol,
        "ROUTE_NAME" => Segment::RouteName,
        "UPSTREAM_CLUSTER" => Segment::UpstreamCluster,
        "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Segment::UpstreamHost,
        "RESPONSE_FLAGS" => Segment::ResponseFlags,
        "REQUESTED_SERVER_NAME" => Segment::ServerName,
        other => {
            return Err(Refusal::new(
                "",
                format!("the variable %{other}% is not supported in headers"),
            ));
        }
    })
}

fn render(segments: &[Segment], request: &HeaderMap, variables: &Variables<'_>) -> String {
    let mut out = String::new();
    for segment in segments {
        match segment {
            Segment::Literal(text) => out.push_str(text),
            Segment::RemoteAddress => push(&mut out, variables.downstream_remote),
            Segment::RemoteAddressWithoutPort => push(&mut out, variables.downstream_remote.map(|a| a.ip())),
            Segment::LocalAddress => push(&mut out, variables.downstream_local),
            Segment::Protocol => out.push_str(variables.protocol),
            Segment::RouteName => out.push_str(variables.route_name),
            Segment::UpstreamCluster => out.push_str(variables.upstream_cluster),
            Segment::UpstreamHost => push(&mut out, variables.upstream_host),
            Segment::ResponseFlags => out.push_str(variables.response_flags),
            Segment::ServerName => out.push_str(variables.server_name),
            Segment::RequestPath => out.push_str(variables.path),
            Segment::RequestMethod => out.push_str(variables.method),
            Segment::RequestAuthority => out.push_str(variables.authority),
            Segment::RequestHeader(name) => {
                if let Some(value) = request.get(name).and_then(|value| value.to_str().ok()) {
                    out.push_str(value);
                }
            }
        }
    }
    out
}

fn push(out: &mut String, value: Option<impl std::fmt::Display>) {
    use std::fmt::Write;
    if let Some(value) = value {
        // Writing to a String cannot fail.
        let _ = write!(out, "{value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(key: &str, value: &str, action: i32) -> core::HeaderValueOption {
        core::HeaderValueOption {
            header: Some(core::HeaderValue {
                key: key.into(),
                value: value.into(),
                ..Default::default()
            }),
            append_action: action,
            ..Default::default()
        }
    }

    #[test]
    fn header_operations_remove_first_then_append_overwrite_or_add_if_absent() {
        let ops = HeaderOps::compile(
            &[
                option("x-append", "b", 0),
                option("x-absent", "no", 1),
                option("x-new", "yes", 1),
                option("x-over", "new", 2),
                option("x-never", "new", 3),
                option("x-gone", "back", 0),
            ],
            &["x-gone".into()],
            "request_headers",
        )
        .unwrap();
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("x-append", "a"),
            ("x-absent", "a"),
            ("x-over", "a"),
            ("x-gone", "a"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        ops.apply(&mut headers, None, &Variables::default());
        let all = |name: &str| {
            headers
                .get_all(name)
                .iter()
                .map(|v| v.to_str().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(all("x-append"), ["a", "b"]);
        assert_eq!(all("x-absent"), ["a"]);
        assert_eq!(all("x-new"), ["yes"]);
        assert_eq!(all("x-over"), ["new"]);
        assert!(all("x-never").is_empty());
        assert_eq!(all("x-gone"), ["back"]);
    }

    #[test]
    fn header_values_substitute_variables_and_refuse_unknown_ones() {
        let ops = HeaderOps::compile(
            &[option(
                "x-v",
                "100%% %PROTOCOL% %REQ(x-a)% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
                2,
            )],
            &[],
            "request_headers",
        )
        .unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("x-a", HeaderValue::from_static("v"));
        let variables = Variables {
            protocol: "HTTP/2",
            downstream_remote: Some("10.0.0.1:5".parse().unwrap()),
            ..Default::default()
        };
        ops.apply(&mut headers, None, &variables);
        assert_eq!(headers["x-v"], "100% HTTP/2 v 10.0.0.1");

        let error =
            HeaderOps::compile(&[option("x-v", "%NOT_A_THING%", 2)], &[], "request_headers").unwrap_err();
        assert_eq!(error.path, "request_headers_to_add[0].header.value");
        assert!(error.reason.contains("NOT_A_THING"), "{error}");
    }
}
