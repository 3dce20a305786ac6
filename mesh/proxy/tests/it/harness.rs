//! What the fuzz targets (`mesh/proxy/fuzz`) do with their bytes; the suite runs the same functions over mutated corpora
//! ([`super::mutations`]). Nothing may panic or hang, and each states what must hold for any input.
//!
//! HTTP/2 frames and HPACK are read by the `h2` crate, which has fuzzers of its own; what we add to it is tested on frames
//! ([`super::matrix2`], [`super::frames`]).

use std::net::SocketAddr;

use http::{HeaderMap, HeaderValue, Method};
use prost::{Message, Name};
use serin_proxy::bootstrap::file;
use serin_proxy::config::hcm::EscapedSlashes;
use serin_proxy::config::matchers::{HeaderMatch, RequestView, StringMatch};
use serin_proxy::config::store::{Store, Update};
use serin_proxy::http1::decode::{Decoded, Decoder, Framing};
use serin_proxy::http1::head::{Finder, HeadLimits};
use serin_proxy::http1::input::Input;
use serin_proxy::http1::request::{parse, valid_host};
use serin_proxy::http1::response::Parser;
use serin_proxy::http1::violation::Violation;
use serin_proxy::hygiene::path::{Normalized, normalize};
use serin_proxy::metrics::peer::Workload;
use serin_proxy::observe::trace::{Context, Propagation};
use serin_proxy::policy::jwt::keys::KeySet;
use serin_proxy::policy::jwt::token::Token;
use serin_proxy::policy::uri_template::UriTemplate;
use serin_proxy::upstream::proxy_header::{self, Header};
use serin_proxy::worker::sniff::detect;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::accesslog::v3 as accesslog;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::access_loggers::file::v3 as log_file;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::google::protobuf as google;

/// What was read of a stream, heads with their content and trailers as text; what is left of it; the verdict.
type Read = (String, Vec<u8>, Option<Violation>);

/// Of heads that are read so.
const LIMITS: HeadLimits = HeadLimits {
    bytes: 8_192,
    fields: 30,
};

/// Reads a stream that comes in pieces. `next` reads a head, if it is whole: as text, how it goes on, and whether nothing that
/// follows it can be read.
fn read_stream(
    bytes: &[u8],
    mut piece: impl FnMut() -> usize,
    mut next: impl FnMut(&mut Input) -> Result<Option<(String, Framing, bool)>, Violation>,
) -> Read {
    let (mut input, mut decoder) = (Input::default(), Decoder::new(Framing::Empty));
    let (mut found, mut rest) = (String::new(), bytes);
    while !rest.is_empty() {
        let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
        rest = later;
        input.buf.extend_from_slice(now);
        loop {
            match decoder.decode(&mut input) {
                Err(violation) => return (found, Vec::new(), Some(violation)),
                Ok(Decoded::More) => break,
                // Where content is cut does not matter.
                Ok(Decoded::Data(data)) => data.iter().for_each(|byte| found.push(char::from(*byte))),
                Ok(Decoded::Trailers(trailers)) => found.push_str(&format!("{trailers:?}")),
                Ok(Decoded::End) if input.buf.is_empty() => break,
                Ok(Decoded::End) => match next(&mut input) {
                    Err(violation) => return (found, Vec::new(), Some(violation)),
                    Ok(None) => break,
                    Ok(Some((head, framing, last))) => {
                        found.push_str(&head);
                        decoder = Decoder::new(framing);
                        if last {
                            return (found, Vec::new(), None);
                        }
                    }
                },
            }
        }
    }
    (found, input.buf.to_vec(), None)
}

/// What is read of requests that come in pieces, up to one that asks for an upgrade.
pub(crate) fn read(bytes: &[u8], piece: impl FnMut() -> usize) -> Read {
    let mut finder = Finder::strict(LIMITS);
    read_stream(bytes, piece, |input| {
        let Some(found) = finder.find(&input.buf)? else {
            return Ok(None);
        };
        let head = parse(&input.take(found.length), found, LIMITS, false)?;
        let text = format!("{:?} {:?}", head.parts, head.framing);
        Ok(Some((text, head.framing, head.undecided)))
    })
}

/// The same for answers to requests that are no HEAD.
pub(crate) fn read_answers(bytes: &[u8], piece: impl FnMut() -> usize) -> Read {
    let mut parser = Parser::new(LIMITS);
    read_stream(bytes, piece, |input| {
        let head = parser.next(input, &Method::GET)?;
        Ok(head.map(|head| (format!("{head:?}"), head.framing, false)))
    })
}

/// An HTTP/1 stream: what is read of it does not depend on how it is cut, be it of requests or of answers.
pub(crate) fn http1(data: &[u8]) {
    let pieces = || {
        let mut step = data.len();
        move || {
            step = step.wrapping_mul(31).wrapping_add(7);
            step % 23
        }
    };
    let cut = read(data, pieces());
    assert_eq!(read(data, || usize::MAX), cut, "what is read depends on the cut");
    let cut = read_answers(data, pieces());
    assert_eq!(
        read_answers(data, || usize::MAX),
        cut,
        "what is read of answers depends on the cut"
    );
    let _ = valid_host(data);
}

/// The header of the PROXY protocol: taken off is what is there, more bytes behind it change nothing, and what it says is
/// read back as it is written.
pub(crate) fn proxy_header(data: &[u8]) {
    let read = proxy_header::read(data);
    if let Header::Present {
        version,
        length,
        between,
        ..
    } = read
    {
        assert!(length > 0 && length <= data.len());
        assert_eq!(proxy_header::read(&data[..length]), read, "the header alone");
        let again = proxy_header::write(version, between, &[]);
        match proxy_header::read(&again) {
            Header::Present {
                between: read_back, ..
            } => {
                // An IPv4 address may come as an IPv6 one.
                let plain = |between: Option<(SocketAddr, SocketAddr)>| {
                    between.map(|(from, to)| {
                        [from, to].map(|at| SocketAddr::new(at.ip().to_canonical(), at.port()))
                    })
                };
                assert_eq!(plain(read_back), plain(between));
            }
            other => panic!("written as {again:?} and read as {other:?}"),
        }
    }
    if read != Header::Incomplete {
        let longer = [data, b"more"].concat();
        let same = proxy_header::read(&longer);
        // Only a line without an end can still go wrong.
        assert!(
            same == read || read == Header::Malformed,
            "{read:?} became {same:?}"
        );
    }
}

/// The first bytes of a connection: names are names, and more bytes do not unsay what was said of HTTP/2 and TLS.
pub(crate) fn first_bytes(data: &[u8]) {
    if let Some(detected) = detect(data) {
        if let Some(name) = &detected.server_name {
            assert!(!name.is_empty() && name.bytes().all(|byte| !byte.is_ascii_uppercase()));
        }
        assert!(!(detected.tls && detected.http.is_some()));
        let longer = [data, b"\r\nmore"].concat();
        let same = detect(&longer).expect("what was known is known");
        assert_eq!(same.tls, detected.tls);
        assert_eq!(same.server_name, detected.server_name);
    }
    let _ = Workload::of_header(data);
}

/// A resource of any type (the first byte says which): taken or refused, and good ones are taken after it.
pub(crate) fn xds(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else {
        return;
    };
    let resource_type = ResourceType::ALL[usize::from(*kind) % ResourceType::ALL.len()];
    let name = match resource_type {
        ResourceType::VirtualHost => "80/one",
        _ => "one",
    };
    let mut store = Store::new(2);
    store.apply(resource_type, &[Update { name, body }], &[]);
    store.take_listener_changes();
    let good = crate::fixture::eds_cluster("good").encode_to_vec();
    let update = Update {
        name: "good",
        body: &good,
    };
    assert!(store.apply(ResourceType::Cluster, &[update], &[]).is_empty());
    store.apply(resource_type, &[], &[name]);
}

/// A matcher's pattern, a line, and what it is tried on: regular expressions cost what they may, and plain patterns do
/// what they say.
pub(crate) fn matchers(data: &[u8]) {
    use matcher::string_matcher::MatchPattern;
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let (pattern, subject) = text.split_once('\n').unwrap_or((text, ""));
    for ignore_case in [false, true] {
        let compiled = |match_pattern| {
            StringMatch::compile(&matcher::StringMatcher {
                match_pattern: Some(match_pattern),
                ignore_case,
            })
        };
        let fold = |text: &str| {
            if ignore_case {
                text.to_ascii_lowercase()
            } else {
                text.to_owned()
            }
        };
        let (plain, of) = (fold(pattern), fold(subject));
        for (kind, expected) in [
            (MatchPattern::Exact(pattern.into()), plain == of),
            (MatchPattern::Prefix(pattern.into()), of.starts_with(&plain)),
            (MatchPattern::Suffix(pattern.into()), of.ends_with(&plain)),
            (MatchPattern::Contains(pattern.into()), of.contains(&plain)),
        ] {
            let what = format!("{kind:?}, ignoring case: {ignore_case}");
            if let Ok(test) = compiled(kind) {
                assert_eq!(test.matches(subject), expected, "{what} on {subject:?}");
            }
        }
        if let Ok(test) = compiled(MatchPattern::SafeRegex(matcher::RegexMatcher {
            regex: pattern.into(),
            ..Default::default()
        })) {
            test.matches(subject);
        }
    }
    use route::header_matcher::HeaderMatchSpecifier;
    let Ok(value) = HeaderValue::from_str(subject) else {
        return;
    };
    let mut headers = HeaderMap::new();
    headers.insert("x-kind", value);
    let request = RequestView {
        method: "GET",
        path: "/",
        query: Some(subject),
        authority: Some("a"),
        scheme: Some("http"),
        headers: &headers,
    };
    for name in ["x-kind", ":path", pattern] {
        let from = route::HeaderMatcher {
            name: name.into(),
            header_match_specifier: Some(HeaderMatchSpecifier::PresentMatch(true)),
            ..Default::default()
        };
        if let Ok(test) = HeaderMatch::compile(&from) {
            test.matches(&request);
        }
    }
}

fn any<M: Message + Name>(message: &M) -> google::Any {
    google::Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

/// A format, as that of an access log and as the value of a header: taken or refused.
#[allow(deprecated)]
pub(crate) fn formats(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let log = log_file::FileAccessLog {
        path: "/dev/null".into(),
        access_log_format: Some(log_file::file_access_log::AccessLogFormat::Format(text.into())),
    };
    let manager = hcm::HttpConnectionManager {
        access_log: vec![accesslog::AccessLog {
            name: "envoy.access_loggers.file".into(),
            config_type: Some(accesslog::access_log::ConfigType::TypedConfig(any(&log))),
            ..Default::default()
        }],
        ..crate::fixture::manager("80")
    };
    let message = crate::fixture::listener_of(
        "l",
        core::TrafficDirection::Outbound,
        vec![crate::fixture::http_chain(&manager)],
    );
    let mut host = crate::fixture::host(
        "all",
        "*",
        vec![crate::fixture::prefix_route("/", crate::fixture::to_cluster("c"))],
    );
    host.request_headers_to_add = vec![core::HeaderValueOption {
        header: Some(core::HeaderValue {
            key: "x-made".into(),
            value: text.into(),
            ..Default::default()
        }),
        ..Default::default()
    }];
    let table = route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: vec![host],
        ..Default::default()
    };
    let mut store = Store::new(1);
    for (resource_type, name, body) in [
        (ResourceType::Listener, "l", message.encode_to_vec()),
        (ResourceType::Route, "80", table.encode_to_vec()),
    ] {
        store.apply(resource_type, &[Update { name, body: &body }], &[]);
    }
    let _ = store.take_listener_changes();
}

/// A template, a line, and a path: what is literal matches itself.
pub(crate) fn uri_template(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let (template, path) = text.split_once('\n').unwrap_or((text, "/"));
    if let Ok(compiled) = UriTemplate::compile(template) {
        compiled.matches(path);
        if !template.contains(['*', '{', '}', '=']) {
            assert!(compiled.matches(template), "{template:?} is literal");
        }
    }
}

/// A path: what comes out comes out again, and never leads out of the root.
pub(crate) fn path(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    for slashes in [
        EscapedSlashes::Keep,
        EscapedSlashes::Reject,
        EscapedSlashes::Redirect,
        EscapedSlashes::Forward,
    ] {
        for merge in [false, true] {
            let Normalized::Path(once) = normalize(text, true, merge, slashes) else {
                continue;
            };
            if !text.starts_with('/') {
                continue;
            }
            assert!(
                once.split('/').all(|segment| segment != ".." && segment != "."),
                "{text:?} became {once:?}"
            );
            match normalize(&once, true, merge, slashes) {
                Normalized::Path(twice) => assert_eq!(once, twice, "{text:?}"),
                _ => panic!("{text:?} became {once:?}, which is not taken"),
            }
        }
    }
}

/// A bootstrap file: taken or refused.
pub(crate) fn bootstrap(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = file::parse(text, 1);
    }
}

/// Tokens, key sets and trace contexts, which come from clients and from their issuers.
pub(crate) fn tokens(data: &[u8]) {
    let keys = KeySet::parse(data);
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(token) = Token::parse(text.trim())
    {
        let _ = token.check_time(1_700_000_000, 60);
        if let Ok(keys) = keys {
            let _ = token.check_signature(&keys);
        }
    }
    let Ok(value) = HeaderValue::from_bytes(data) else {
        return;
    };
    for name in ["traceparent", "b3", "x-b3-traceid", "x-datadog-trace-id"] {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.clone());
        for how in [
            Propagation::W3c,
            Propagation::B3,
            Propagation::B3AndW3c,
            Propagation::Datadog,
        ] {
            if let Some(context) = Context::read(how, &headers) {
                let mut written = HeaderMap::new();
                context.write(how, None, &mut written);
                assert!(!written.is_empty());
            }
        }
    }
}
