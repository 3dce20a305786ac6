//! Envoy and serin-proxy with the same file, the same backends and the same requests: they must answer alike.
//!
//! Where they may differ, and why, is in `docs/supported/proxy-envoy-differences.md`; [`pardoned`] is the code of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use futures::stream::{self, StreamExt};
use http::Response;
use http_body_util::Full;
use serin_proxy::bootstrap::file;
use serin_proxy::control::Proxy;
use serin_proxy::control::run::apply_static;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::envoy;
use crate::fixture::*;

/// The file, for a listener on `port`; `{A}` and so on are backends.
pub(crate) const CONFIG: &str = r#"
node: { id: interop, cluster: interop }
static_resources:
  listeners:
  - name: http
    address: { socket_address: { address: 127.0.0.1, port_value: PORT } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          server_name: gate
          use_remote_address: true
          normalize_path: true
          merge_slashes: true
          generate_request_id: true
          # ACCESS_LOG
          common_http_protocol_options: { max_headers_count: 100 }
          http_filters:
          - name: envoy.filters.http.router
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
          route_config:
            name: main
            request_headers_to_add:
            - { header: { key: x-table, value: "one" } }
            response_headers_to_add:
            - { header: { key: x-answered, value: "yes" } }
            virtual_hosts:
            - name: exact
              domains: ["a.example", "a.example:8080"]
              response_headers_to_remove: [x-secret]
              routes:
              - match: { path: /exact }
                route: { cluster: a }
              - match: { path: /CASE, case_sensitive: false }
                route: { cluster: b }
              - match: { path_separated_prefix: /sep }
                route: { cluster: b }
              - match: { safe_regex: { regex: "/regex/[0-9]+" } }
                route: { cluster: b }
              - match: { prefix: /rewrite }
                route: { cluster: a, prefix_rewrite: /rewritten }
              - match: { prefix: /host }
                route: { cluster: a, host_rewrite_literal: inner.example }
              - match: { prefix: /redirect/https }
                redirect: { https_redirect: true }
              - match: { prefix: /redirect/host }
                redirect: { host_redirect: other.example, response_code: FOUND }
              - match: { prefix: /redirect/path }
                redirect: { path_redirect: /there, response_code: SEE_OTHER }
              - match: { prefix: /redirect/prefix }
                redirect: { prefix_rewrite: /moved, response_code: PERMANENT_REDIRECT }
              - match: { prefix: /redirect/strip }
                redirect: { path_redirect: /bare, strip_query: true, response_code: TEMPORARY_REDIRECT }
              - match: { prefix: /direct }
                direct_response: { status: 418, body: { inline_string: "teapot" } }
              - match: { prefix: /hdr, headers: [ { name: x-kind, string_match: { exact: one } } ] }
                route: { cluster: a }
              - match: { prefix: /hdr, headers: [ { name: x-kind, string_match: { prefix: two, ignore_case: true } } ] }
                route: { cluster: b }
              - match: { prefix: /hdr, headers: [ { name: x-kind, string_match: { safe_regex: { regex: "th.*e" } } } ] }
                direct_response: { status: 203 }
              - match: { prefix: /hdr, headers: [ { name: x-kind, present_match: true, invert_match: true } ] }
                direct_response: { status: 204 }
              - match: { prefix: /query, query_parameters: [ { name: k, string_match: { exact: v } } ] }
                route: { cluster: a }
              - match: { prefix: /query, query_parameters: [ { name: k, present_match: true } ] }
                route: { cluster: b }
              - match: { prefix: /all-a }
                route: { weighted_clusters: { clusters: [ { name: a, weight: 100 }, { name: b, weight: 0 } ] } }
              - match: { prefix: /dead }
                route: { cluster: dead }
              - match: { prefix: /empty }
                route: { cluster: empty }
              - match: { prefix: /retry }
                route: { cluster: a, retry_policy: { retry_on: "5xx", num_retries: 2 } }
              - match: { prefix: /slow }
                route: { cluster: slow, timeout: 0.3s }
              - match: { prefix: /add }
                route: { cluster: a }
                request_headers_to_add:
                - { header: { key: x-route, value: "r %PROTOCOL%" } }
                - { header: { key: x-kind, value: "set" }, append_action: OVERWRITE_IF_EXISTS_OR_ADD }
                request_headers_to_remove: [x-gone]
                response_headers_to_add:
                - { header: { key: x-route-answer, value: "100%%" } }
              - match: { prefix: / }
                route: { cluster: a }
            - name: wild
              domains: ["*.example"]
              include_request_attempt_count: true
              routes:
              - match: { prefix: / }
                route: { cluster: b }
            - name: prefix
              domains: ["pre.*"]
              routes:
              - match: { prefix: /only }
                route: { cluster: b }
  clusters:
  - { name: a, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: a, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: {A} } } } } ] } ] } }
  - { name: b, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: b, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: {B} } } } } ] } ] } }
  - { name: slow, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: slow, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: {SLOW} } } } } ] } ] } }
  - { name: dead, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: dead, endpoints: [ { lb_endpoints: [ { endpoint: { address: { socket_address: { address: 127.99.0.1, port_value: 1 } } } } ] } ] } }
  - { name: empty, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: empty } }
"#;

/// Only Envoy is given an access log: ours writes what is wrong by itself.
const ACCESS_LOG: &str = r#"access_log:
          - name: envoy.access_loggers.file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: LOG
              log_format: { text_format_source: { inline_string: "%REQ(X-CASE)% %RESPONSE_FLAGS%\n" } }"#;

/// A backend that says what it was asked.
pub(crate) async fn backend(name: &'static str) -> Backend {
    Backend::answering(move |seen| {
        let told = |key: &str| {
            let values: Vec<_> = seen
                .headers
                .get_all(key)
                .iter()
                .map(|value| value.to_str().unwrap())
                .collect();
            values.join("|")
        };
        let status = seen
            .path
            .rsplit("status=")
            .next()
            .and_then(|text| text.get(..3)?.parse().ok());
        let keys = [
            "host",
            "x-table",
            "x-route",
            "x-kind",
            "x-gone",
            "x-forwarded-proto",
            "x-forwarded-for",
            "x-envoy-original-path",
            "x-envoy-attempt-count",
            "content-length",
            "te",
            "connection",
            "x-hop",
        ];
        let mut fields: Vec<_> = keys.iter().map(|key| format!("{key}={}", told(key))).collect();
        fields.push(format!(
            ":authority={}",
            seen.authority.as_deref().unwrap_or_default()
        ));
        let text = format!(
            "{name} {} {} [{}] {} {}",
            seen.method,
            seen.path,
            fields.join(" "),
            !told("x-request-id").is_empty(),
            String::from_utf8_lossy(&seen.body)
        );
        let response = Response::builder()
            .status(status.unwrap_or(200))
            .header("x-secret", "s")
            .header("x-backend", name);
        // hyper leaves out what must not be sent over HTTP/1 only.
        if seen.method == "HEAD" && seen.authority.is_some() {
            return response
                .header("content-length", text.len())
                .body(Full::default())
                .unwrap();
        }
        response.body(Full::from(text)).unwrap()
    })
    .await
}

/// What the client sees, without what may differ by design.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
    pub(crate) flags: String,
}

/// Header fields that are compared.
pub(crate) const COMPARED: [&str; 9] = [
    "location",
    "server",
    "x-answered",
    "x-secret",
    "x-backend",
    "x-route-answer",
    "content-type",
    "content-length",
    "connection",
];

/// A request in a connection of its own, of any kind.
pub(crate) async fn ask(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    bytes: &[u8],
    head: bool,
) -> Option<(u16, BTreeMap<String, String>, String)> {
    let _ = stream.write_all(bytes).await;
    // Not to the end of the connection: Envoy leaves it open for a second.
    let mut raw = Vec::new();
    loop {
        // Who expects to be told to go on is told so first.
        if let Some(rest) = raw.strip_prefix(b"HTTP/1.1 100 Continue\r\n\r\n") {
            raw = rest.to_vec();
        }
        if whole(&raw, head) {
            break;
        }
        match soon("an answer", stream.read_buf(&mut raw)).await {
            Ok(count) if count > 0 => {}
            _ => break,
        }
    }
    let text = String::from_utf8_lossy(&raw).into_owned();
    let (top, body) = text.split_once("\r\n\r\n")?;
    let status = top.get(9..12)?.parse().ok()?;
    let mut headers = BTreeMap::new();
    let mut chunked = false;
    for line in top.lines().skip(1) {
        let (name, value) = line.split_once(':')?;
        let name = name.to_ascii_lowercase();
        chunked |= name == "transfer-encoding";
        if COMPARED.contains(&name.as_str()) || name == "x-serin-response-flags" {
            headers.insert(name, value.trim().to_owned());
        }
    }
    assert!(!chunked || head, "answers of this test are sized: {text}");
    Some((status, headers, body.to_owned()))
}

/// Whether these bytes are a whole answer.
fn whole(raw: &[u8], head: bool) -> bool {
    let text = String::from_utf8_lossy(raw);
    let Some((top, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = top
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0);
    head || top.contains(" 204 ") || body.len() >= length
}

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) head: bool,
}

/// Some three hundred ordinary requests.
pub(crate) fn cases() -> Vec<Case> {
    let hosts = [
        "a.example",
        "A.Example",
        "a.example:8080",
        "x.wild.example",
        "pre.fix",
        "unknown.test",
    ];
    let paths = [
        "/",
        "/exact",
        "/exact/",
        "/exact?q=1",
        "/case",
        "/sep",
        "/sep/x",
        "/sepx",
        "/regex/123",
        "/regex/12a",
        "/rewrite/x?y=1",
        "/rewrite",
        "/host/x",
        "/redirect/https?q=1",
        "/redirect/host/x?q=1",
        "/redirect/path?q=1",
        "/redirect/prefix/x?q=1",
        "/redirect/strip?q=1",
        "/direct",
        "/hdr",
        "/query?k=v",
        "/query?k=w&k=v",
        "/query?j=1",
        "/query?k",
        "/all-a",
        "/add",
        "/a/../exact",
        "/./exact",
        "//exact",
        "/x//y",
        "/%65xact",
        "/a/%2e%2e/exact",
        "/a%2Fb",
        "/only/x",
        "/x?status=404",
        "/x?status=503",
        "/retry?status=500",
        "/p;x=1",
        "/~u",
        "/?a=b&c=%20",
    ];
    let mut out = Vec::new();
    let mut add = |method: &str, host: &str, path: &str, fields: &str, body: &str| {
        let name = format!("c{}", out.len());
        let length = if body.is_empty() {
            String::new()
        } else {
            format!("Content-Length: {}\r\n", body.len())
        };
        out.push(Case {
            bytes: format!(
                "{method} {path} HTTP/1.1\r\nHost: {host}\r\nX-Case: {name}\r\nConnection: close\r\n{fields}{length}\r\n{body}"
            )
            .into_bytes(),
            head: method == "HEAD",
            name: format!("{name}: {method} {host} {path} {fields}"),
        });
    };
    for host in hosts {
        for path in paths {
            add("GET", host, path, "", "");
        }
    }
    for path in ["/hdr", "/add"] {
        for value in ["one", "two", "TWO-more", "three", "thre", "", "one,two"] {
            add("GET", "a.example", path, &format!("X-Kind: {value}\r\n"), "");
        }
    }
    for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"] {
        for path in ["/", "/rewrite/x", "/direct", "/redirect/path"] {
            add(method, "a.example", path, "", "body");
        }
    }
    for path in ["/", "/direct", "/redirect/host", "/x?status=404"] {
        add("HEAD", "a.example", path, "", "");
    }
    for fields in [
        "X-Gone: 1\r\nX-Gone: 2\r\n",
        "X-Kind: 1\r\nX-Kind: 2\r\n",
        "X-Forwarded-For: 1.2.3.4\r\n",
        "X-Forwarded-Proto: https\r\n",
        "X-Request-Id: mine\r\n",
        "TE: trailers\r\n",
        "TE: gzip\r\n",
        "X-Envoy-Original-Path: /x\r\n",
        "Keep-Alive: timeout=5\r\n",
        "Proxy-Connection: close\r\n",
        "Expect: 100-continue\r\n",
        "X-Empty:\r\n",
        "X-Empty: \t \r\n",
        "Accept: */*\r\nAccept: text/html\r\n",
        "User-Agent: test\r\n",
        "X-Long: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n",
        "Cookie: a=1; b=2\r\n",
    ] {
        add("GET", "a.example", "/add", fields, "");
    }
    for path in ["/dead", "/empty", "/slow"] {
        add("GET", "a.example", path, "", "");
    }
    out
}

pub(crate) async fn wait_for(at: SocketAddr) {
    let up = async {
        while TcpStream::connect(at).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    soon("a listener", up).await;
}

/// The lines of a file that have been written to their end.
pub(crate) fn whole_lines(path: &std::path::Path) -> String {
    let mut text = std::fs::read_to_string(path).unwrap_or_default();
    text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
    text
}

/// Names and values that differ for a listed reason, made equal.
pub(crate) fn pardoned(case: &Case, mut seen: Seen) -> Seen {
    seen.headers.remove("x-serin-response-flags");
    // Envoy puts this machine's own address where the client's is a loopback address.
    if let Some((before, rest)) = seen.body.split_once("x-forwarded-for=")
        && let Some((value, after)) = rest.split_once(' ')
    {
        let first = value.rsplit_once(',').map_or("", |(first, _)| first);
        seen.body = format!("{before}x-forwarded-for={first} {after}");
        seen.headers.remove("content-length");
    }
    // Texts of local answers are worded differently where Envoy names its own transport's reason.
    if seen.status >= 500 && !seen.headers.contains_key("x-backend") {
        seen.body.clear();
        seen.headers.remove("content-length");
    }
    if case.head {
        seen.headers.remove("content-length");
    }
    seen
}

#[tokio::test]
async fn envoy_and_serin_proxy_answer_the_same_requests_alike() {
    let Some(envoy) = envoy::program() else { return };
    let (a, b) = (backend("a").await, backend("b").await);
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    let (ours, theirs) = (free_port().await, free_port().await);
    let text = |at: SocketAddr| {
        CONFIG
            .replace("PORT", &at.port().to_string())
            .replace("{A}", &a.address.port().to_string())
            .replace("{B}", &b.address.port().to_string())
            .replace("{SLOW}", &silent.local_addr().unwrap().port().to_string())
    };
    let config = folder.path().join("envoy.yaml");
    let access = ACCESS_LOG.replace("LOG", log.to_str().unwrap());
    std::fs::write(&config, text(theirs).replace("# ACCESS_LOG", &access)).unwrap();
    let mut child = envoy::command(&envoy, &config).spawn().unwrap();
    let plan = file::parse(&text(ours), 1).unwrap();
    let (proxy, _log) = Proxy::start(plan.options).unwrap();
    apply_static(&proxy, &plan.static_resources).await.unwrap();
    wait_for(ours).await;
    wait_for(theirs).await;

    let cases = cases();
    assert!(cases.len() >= 300, "{}", cases.len());
    let answers: Vec<Vec<Seen>> = stream::iter(&cases)
        .map(|case| async move {
            let mut pair = Vec::new();
            for at in [ours, theirs] {
                let stream = TcpStream::connect(at).await.unwrap();
                let (status, headers, body) = ask(stream, &case.bytes, case.head)
                    .await
                    .unwrap_or_else(|| panic!("{} was not answered by {at}", case.name));
                let flags = headers.get("x-serin-response-flags").cloned().unwrap_or_default();
                pair.push(Seen {
                    status,
                    headers,
                    body,
                    flags,
                });
            }
            pair
        })
        .buffered(16)
        .collect()
        .await;
    // Envoy's flags come from its log, which is written a moment later.
    let flags: BTreeMap<String, String> = {
        let read = async {
            loop {
                let text = whole_lines(&log);
                if text.lines().count() >= cases.len() {
                    break text;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        let text = soon("Envoy's access log", read).await;
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(case, flags)| (case.to_owned(), flags.trim_matches('-').to_owned()))
            .collect()
    };
    let mut differences = Vec::new();
    for (case, mut pair) in cases.iter().zip(answers) {
        let id = case.name.split(':').next().unwrap();
        // An answer of the upstream has its flags in the log only; ours then has none in a header.
        let local = !pair[1].headers.contains_key("x-backend");
        pair[1].flags = if local {
            flags.get(id).cloned().unwrap_or_default()
        } else {
            String::new()
        };
        let [ours, theirs] = [pair[0].clone(), pair[1].clone()].map(|seen| pardoned(case, seen));
        if ours != theirs {
            differences.push(format!("{}\n   ours   {ours:?}\n   theirs {theirs:?}", case.name));
        }
    }
    assert!(
        differences.is_empty(),
        "{} of {} differ:\n{}",
        differences.len(),
        cases.len(),
        differences.join("\n")
    );
    child.kill().await.unwrap();
    proxy.stop().await;
}
