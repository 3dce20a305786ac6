//! Envoy and serin-proxy asked by clients from everywhere, under each way to configure whom a connection manager believes: what
//! the endpoint is told, which endpoint a hash of the source chooses, what RBAC judges, and what is logged must be the same.
//!
//! Clients come by the PROXY protocol, which both believe here, so that addresses are whatever a case says.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use futures::stream::{self, StreamExt};
use http::Response;
use http_body_util::Full;
use serde_json::{Value, json};
use serin_proxy::bootstrap::file;
use serin_proxy::control::Proxy;
use serin_proxy::control::run::apply_static;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::envoy;
use crate::fixture::*;
use crate::interop::{wait_for, whole_lines};

const HCM: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
const LOG: &str = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog";
const PROXY_PROTOCOL: &str =
    "type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol";

/// Says what of a request an endpoint was told.
pub(crate) async fn telling(name: &'static str) -> Backend {
    Backend::answering(move |seen| {
        let mut fields: Vec<_> = seen
            .headers
            .iter()
            .filter(|(key, _)| {
                let key = key.as_str();
                let of_peers = key.starts_with("x-envoy-peer-metadata");
                key == "via"
                    || key == "x-only"
                    || key.starts_with("x-forwarded-")
                    || (key.starts_with("x-envoy-") && !of_peers)
            })
            .map(|(key, value)| format!("{key}={}", String::from_utf8_lossy(value.as_bytes())))
            .collect();
        let id = seen
            .headers
            .get("x-request-id")
            .map(|id| id.as_bytes() == b"mine");
        fields.push(format!("id={id:?}"));
        fields.sort();
        let text = format!("{name} {} {}", seen.path, fields.join(" "));
        let status = seen.path.rsplit("status=").next();
        Response::builder()
            .status(status.and_then(|text| text.get(..3)?.parse().ok()).unwrap_or(200))
            .header("via", "1.0 behind")
            .body(Full::from(text))
            .unwrap()
    })
    .await
}

/// A listener that believes the PROXY protocol, with a connection manager of which `more` says the rest.
pub(crate) fn listener(
    name: &str,
    port: u16,
    log: &str,
    format: &str,
    more: &Value,
    routes: &Value,
) -> Value {
    let mut manager = json!({
        "@type": HCM,
        "stat_prefix": name,
        "access_log": [{ "name": "envoy.access_loggers.file", "typed_config": {
            "@type": LOG, "path": log,
            "log_format": { "text_format_source": { "inline_string": format!("{format}\n") } },
        }}],
        "http_filters": [{ "name": "envoy.filters.http.router", "typed_config": { "@type": ROUTER } }],
        "route_config": routes,
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        manager[key] = value.clone();
    }
    json!({
        "name": name,
        "address": { "socket_address": { "address": "127.0.0.1", "port_value": port } },
        "listener_filters": [{ "name": "proxy", "typed_config": { "@type": PROXY_PROTOCOL } }],
        "filter_chains": [{ "filters": [{ "name": "hcm", "typed_config": manager }] }],
    })
}

/// A static cluster.
pub(crate) fn cluster(name: &str, policy: &str, hosts: &[SocketAddr]) -> Value {
    let hosts: Vec<_> = hosts
        .iter()
        .map(|at| {
            json!({ "endpoint": { "address": { "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } } } })
        })
        .collect();
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "1s", "lb_policy": policy,
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": hosts }] },
    })
}

/// An answer: status, fields, content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) fields: BTreeMap<String, String>,
    pub(crate) body: String,
}

/// Sends bytes on a connection of their own, and reads one answer with a length.
pub(crate) async fn ask(at: SocketAddr, bytes: &[u8]) -> Option<Answer> {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut raw = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&raw).into_owned();
        if let Some((top, body)) = text.split_once("\r\n\r\n") {
            let fields: BTreeMap<_, _> = top
                .lines()
                .skip(1)
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
                .collect();
            let length = fields
                .get("content-length")
                .and_then(|length| length.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                let status = top.get(9..12)?.parse().ok()?;
                let body = body.to_owned();
                return Some(Answer { status, fields, body });
            }
        }
        if soon("an answer", stream.read_buf(&mut raw)).await.ok()? == 0 {
            return None;
        }
    }
}

/// Both proxies with files that differ in ports and logs only.
pub(crate) struct Beside {
    pub(crate) ports: Vec<[SocketAddr; 2]>,
    proxy: std::sync::Arc<Proxy>,
    child: tokio::process::Child,
    folder: tempfile::TempDir,
    _log: tokio::sync::mpsc::Receiver<String>,
}

impl Beside {
    /// `file` makes the file for ports and a log; nothing without Envoy.
    pub(crate) async fn start(listeners: usize, make: impl Fn(&[u16], &str) -> Value) -> Option<Self> {
        let program = envoy::program()?;
        let folder = tempfile::tempdir().unwrap();
        let mut ports = Vec::new();
        for _ in 0..listeners {
            ports.push([free_port().await, free_port().await]);
        }
        let text = |which: usize| {
            let own: Vec<_> = ports.iter().map(|pair| pair[which].port()).collect();
            let log = folder.path().join(format!("{which}.log"));
            make(&own, log.to_str().unwrap()).to_string()
        };
        let config = folder.path().join("envoy.json");
        std::fs::write(&config, text(1)).unwrap();
        let child = envoy::command(&program, &config).spawn().unwrap();
        let plan = file::parse(&text(0), 1).unwrap();
        let (proxy, log) = Proxy::start(plan.options).unwrap();
        apply_static(&proxy, &plan.static_resources).await.unwrap();
        for at in ports.iter().flatten() {
            wait_for(*at).await;
        }
        Some(Self {
            ports,
            proxy,
            child,
            folder,
            _log: log,
        })
    }

    /// Lines of both logs by their first word, once there are as many as `count`.
    pub(crate) async fn lines(&self, count: usize) -> [BTreeMap<String, Vec<String>>; 2] {
        let mut out = [BTreeMap::new(), BTreeMap::new()];
        for (which, lines) in out.iter_mut().enumerate() {
            let path = self.folder.path().join(format!("{which}.log"));
            let read = async {
                loop {
                    let text = whole_lines(&path);
                    if text.lines().filter(|line| line.starts_with('c')).count() >= count {
                        break text;
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            };
            for line in soon("an access log", read).await.lines() {
                let (case, rest) = line.split_once(' ').unwrap();
                lines
                    .entry(case.to_owned())
                    .or_insert_with(Vec::new)
                    .push(rest.to_owned());
            }
        }
        out
    }

    pub(crate) async fn stop(mut self) {
        self.child.kill().await.unwrap();
        self.proxy.stop().await;
    }
}

fn ranges(list: &[&str]) -> Value {
    list.iter()
        .map(|range| {
            let (address, length) = range.split_once('/').unwrap();
            json!({ "address_prefix": address, "prefix_len": length.parse::<u32>().unwrap() })
        })
        .collect()
}

fn xff(config: &Value) -> Value {
    let mut typed = json!({ "@type": "type.googleapis.com/envoy.extensions.http.original_ip_detection.xff.v3.XffConfig" });
    for (key, value) in config.as_object().unwrap() {
        typed[key] = value.clone();
    }
    json!({ "name": "xff", "typed_config": typed })
}

fn custom(config: &Value) -> Value {
    let mut typed = json!({
        "@type": "type.googleapis.com/envoy.extensions.http.original_ip_detection.custom_header.v3.CustomHeaderConfig",
        "header_name": "x-client",
    });
    for (key, value) in config.as_object().unwrap() {
        typed[key] = value.clone();
    }
    json!({ "name": "custom", "typed_config": typed })
}

/// Whom a connection manager may be told to believe.
fn managers() -> Vec<Value> {
    let inner = json!({ "cidr_ranges": ranges(&["10.0.0.0/8", "fd00::/8"]) });
    vec![
        json!({}),
        json!({ "use_remote_address": true }),
        json!({ "use_remote_address": true, "skip_xff_append": true }),
        json!({ "use_remote_address": true, "xff_num_trusted_hops": 1 }),
        json!({ "use_remote_address": true, "xff_num_trusted_hops": 2, "internal_address_config": inner }),
        json!({ "xff_num_trusted_hops": 1 }),
        json!({ "xff_num_trusted_hops": 2, "internal_address_config": inner }),
        json!({ "internal_address_config": inner }),
        json!({ "use_remote_address": true, "internal_address_config": inner }),
        json!({ "use_remote_address": true, "internal_address_config": { "unix_sockets": true } }),
        json!({ "original_ip_detection_extensions": [xff(&json!({}))], "internal_address_config": inner }),
        json!({ "original_ip_detection_extensions": [xff(&json!({ "xff_num_trusted_hops": 1, "skip_xff_append": false }))] }),
        json!({
            "original_ip_detection_extensions": [xff(&json!({ "xff_trusted_cidrs": { "cidrs": ranges(&["10.0.0.0/8", "1.1.0.0/16"]) } }))],
            "internal_address_config": inner,
        }),
        json!({
            "original_ip_detection_extensions": [xff(&json!({
                "xff_trusted_cidrs": { "cidrs": ranges(&["10.1.0.0/16", "2001:db8::/32"]) }, "skip_xff_append": false,
            }))],
            "internal_address_config": inner,
        }),
        json!({ "original_ip_detection_extensions": [custom(&json!({}))], "internal_address_config": inner }),
        json!({
            "original_ip_detection_extensions": [custom(&json!({ "allow_extension_to_set_address_as_trusted": true }))],
            "internal_address_config": inner,
        }),
        json!({ "original_ip_detection_extensions": [custom(&json!({ "reject_with_status": { "code": "Unauthorized" } }))] }),
        json!({ "original_ip_detection_extensions": [custom(&json!({ "reject_with_status": { "code": "OK" } }))] }),
        json!({
            "original_ip_detection_extensions": [custom(&json!({})), xff(&json!({ "skip_xff_append": false }))],
            "internal_address_config": inner,
        }),
        json!({ "via": "serin", "append_x_forwarded_port": true, "use_remote_address": true }),
        json!({ "via": "1.1 serin", "append_x_forwarded_port": true }),
        json!({ "append_x_forwarded_port": true, "use_remote_address": true, "xff_num_trusted_hops": 1 }),
        json!({ "scheme_header_transformation": { "scheme_to_overwrite": "https" } }),
        json!({ "scheme_header_transformation": { "match_upstream": true }, "use_remote_address": true }),
        json!({ "use_remote_address": true, "preserve_external_request_id": true, "internal_address_config": inner }),
        json!({ "generate_request_id": false, "use_remote_address": true }),
    ]
}

/// Every field by which a client could ask something of a proxy.
const ASKING: &str = "x-envoy-internal: true\r\nx-envoy-external-address: 6.6.6.6\r\n\
    x-envoy-decorator-operation: o\r\nx-envoy-downstream-service-cluster: c\r\n\
    x-envoy-downstream-service-node: n\r\nx-envoy-original-path: /was\r\nx-envoy-original-host: was\r\n\
    x-envoy-ip-tags: t\r\nx-envoy-force-trace: 1\r\nx-envoy-attempt-count: 9\r\n\
    x-envoy-something-else: 1\r\nx-only: 1\r\n";

fn heads() -> Vec<String> {
    let mut out: Vec<String> = [
        "",
        "10.9.9.9",
        "9.9.9.9",
        "9.9.9.9, 10.9.9.9",
        "10.9.9.9,9.9.9.9",
        "9.9.9.9,10.8.8.8,10.9.9.9",
        "9.9.9.9 , 1.1.2.2 , 10.1.2.2",
        "fd00::1",
        "2001:db8::2",
        "[fd00::1]",
        "10.9.9.9:80",
        "unknown",
        "unknown, 10.1.9.9",
        "10.1.9.9, unknown",
        "10.9.9.9,",
        ",10.9.9.9",
        "9.9.9.9,,10.9.9.9",
        "010.1.1.1",
    ]
    .iter()
    .map(|list| match *list {
        "" => String::new(),
        list => format!("x-forwarded-for: {list}\r\n"),
    })
    .collect();
    out.push("x-forwarded-for: 9.9.9.9\r\nx-forwarded-for: 10.9.9.9\r\n".into());
    for proto in ["http", "https", "HTTPS", "ftp"] {
        out.push(format!("x-forwarded-proto: {proto}\r\nx-forwarded-port: 77\r\n"));
    }
    for client in [
        "10.4.4.4",
        "9.4.4.4",
        "fd00::4",
        "10.4.4.4:80",
        "nobody",
        "10.4.4.4, 9.9.9.9",
    ] {
        out.push(format!("x-client: {client}\r\n"));
    }
    out.push("x-client: 10.4.4.4\r\nx-forwarded-for: 9.9.9.9\r\n".into());
    out.push("via: 1.0 other\r\n".into());
    out.push("x-request-id: mine\r\n".into());
    out.push("x-request-id: mine\r\nx-forwarded-for: 10.9.9.9\r\n".into());
    out.push(ASKING.into());
    out.push(format!("{ASKING}x-forwarded-for: 10.9.9.9\r\n"));
    out
}

const PEERS: [&str; 3] = [
    "PROXY TCP4 10.1.2.3 10.200.0.1 1234 4321\r\n",
    "PROXY TCP4 8.8.8.8 10.200.0.1 1234 4321\r\n",
    "PROXY TCP6 2001:db8::1 2001:db8::9 1234 4321\r\n",
];

/// RBAC that judges and denies nobody, by one kind of address.
fn judge(kind: &str) -> Value {
    let ids = ranges(&["10.0.0.0/8"]);
    json!({ "name": format!("envoy.filters.http.rbac.{kind}"), "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC",
        "shadow_rules_stat_prefix": format!("{kind}_"),
        "shadow_rules": { "action": "ALLOW", "policies": { "p": {
            "permissions": [{ "any": true }], "principals": [{ kind: ids[0] }],
        }}},
    }})
}

#[tokio::test]
async fn clients_are_told_apart_by_envoy_and_serin_proxy_alike() {
    const KINDS: [&str; 3] = ["remote_ip", "direct_remote_ip", "source_ip"];
    let backends = [telling("a").await, telling("b").await, telling("c").await];
    let hosts = backends.each_ref().map(|backend| backend.address);
    let managers = managers();
    let format = "%REQ(X-CASE)% %DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% \
        %DOWNSTREAM_REMOTE_PORT% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT% %RESPONSE_CODE% \
        %RESPONSE_CODE_DETAILS% %REQ(:SCHEME)% %RESPONSE_FLAGS% "
        .to_owned()
        + &KINDS
            .map(|kind| format!("%DYNAMIC_METADATA(envoy.filters.http.rbac:{kind}_shadow_engine_result)%"))
            .join(" ");
    let routes = json!({
        "name": "main",
        "internal_only_headers": ["x-only"],
        "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [
            { "match": { "prefix": "/redirect" }, "redirect": { "path_redirect": "/there" } },
            { "match": { "prefix": "/" }, "route": {
                "cluster": "ring", "hash_policy": [{ "connection_properties": { "source_ip": true } }],
            }},
        ]}],
    });
    let mut filters: Vec<_> = KINDS.iter().map(|kind| judge(kind)).collect();
    filters.push(json!({ "name": "envoy.filters.http.router", "typed_config": { "@type": ROUTER } }));
    let beside = Beside::start(managers.len(), |ports, log| {
        let listeners: Vec<_> = managers
            .iter()
            .zip(ports)
            .enumerate()
            .map(|(index, (more, port))| {
                let mut more = more.clone();
                more["http_filters"] = json!(filters);
                listener(&format!("l{index}"), *port, log, &format, &more, &routes)
            })
            .collect();
        json!({ "node": { "id": "n", "cluster": "c" }, "static_resources": {
            "listeners": listeners, "clusters": [cluster("ring", "RING_HASH", &hosts)],
        }})
    })
    .await;
    let Some(beside) = beside else { return };
    let mut cases = Vec::new();
    for (manager, ports) in beside.ports.iter().enumerate() {
        for fields in heads() {
            for peer in PEERS {
                for path in ["/", "/redirect"] {
                    if path == "/redirect" && !fields.contains("proto") {
                        continue;
                    }
                    let id = format!("c{}", cases.len());
                    let bytes = format!(
                        "{peer}GET {path} HTTP/1.1\r\nhost: h\r\nx-case: {id}\r\nconnection: close\r\n{fields}\r\n"
                    );
                    cases.push((id, manager, *ports, bytes));
                }
            }
        }
    }
    let answers: Vec<_> = stream::iter(&cases)
        .map(|(_, _, ports, bytes)| async move {
            let mut pair = Vec::new();
            for at in ports {
                let answer = ask(*at, bytes.as_bytes()).await.expect("an answer");
                let told = |name: &str| answer.fields.get(name).cloned();
                pair.push((answer.status, told("via"), told("location"), answer.body));
            }
            pair
        })
        .buffered(16)
        .collect()
        .await;
    let [mut ours, mut theirs] = beside.lines(cases.len()).await;
    // Envoy does not yet know the scheme of a request whose client it does not know.
    for lines in ours.values_mut().chain(theirs.values_mut()).flatten() {
        if let Some((before, _)) = lines.split_once("rejecting_because_detection_failed") {
            *lines = before.to_owned();
        }
    }
    let mut differences = Vec::new();
    for ((id, manager, _, bytes), pair) in cases.iter().zip(&answers) {
        if pair[0] != pair[1] || ours.get(id) != theirs.get(id) {
            differences.push(format!(
                "{}\n{bytes}  ours   {:?}\n         {:?}\n  theirs {:?}\n         {:?}",
                managers[*manager],
                pair[0],
                ours.get(id),
                pair[1],
                theirs.get(id)
            ));
        }
    }
    assert!(
        differences.is_empty(),
        "{} of {} differ:\n{}",
        differences.len(),
        cases.len(),
        differences.join("\n")
    );
    beside.stop().await;
}

#[tokio::test]
async fn lines_of_requests_that_have_just_come_are_written_alike_by_envoy_and_serin_proxy() {
    let backend = telling("a").await;
    let format = "%REQ(X-CASE)% %ACCESS_LOG_TYPE% %RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %UPSTREAM_CLUSTER% %ROUTE_NAME% \
        %BYTES_RECEIVED% %BYTES_SENT% %REQUEST_DURATION% %RESPONSE_DURATION% %UPSTREAM_REQUEST_ATTEMPT_COUNT% %REQ(:PATH)%";
    let routes = json!({ "name": "main", "virtual_hosts": [{ "name": "all", "domains": ["h"], "routes": [
        { "name": "direct", "match": { "prefix": "/direct" }, "direct_response": { "status": 204 } },
        { "name": "there", "match": { "prefix": "/" }, "route": { "cluster": "a", "prefix_rewrite": "/x" } },
    ]}]});
    let managers = [
        json!({ "access_log_options": { "flush_access_log_on_new_request": true } }),
        json!({ "flush_access_log_on_new_request": true }),
    ];
    let beside = Beside::start(managers.len(), |ports, log| {
        let listeners: Vec<_> = managers
            .iter()
            .zip(ports)
            .enumerate()
            .map(|(index, (more, port))| listener(&format!("l{index}"), *port, log, format, more, &routes))
            .collect();
        json!({ "node": { "id": "n", "cluster": "c" }, "static_resources": {
            "listeners": listeners, "clusters": [cluster("a", "ROUND_ROBIN", &[backend.address])],
        }})
    })
    .await;
    let Some(beside) = beside else { return };
    let mut count = 0;
    for ports in &beside.ports {
        for (host, path, body) in [
            ("h", "/direct", ""),
            ("h", "/", ""),
            ("h", "/", "body"),
            ("other", "/", ""),
        ] {
            for at in ports {
                let bytes = format!(
                    "{}POST {path} HTTP/1.1\r\nhost: {host}\r\nx-case: c{count}\r\nconnection: close\r\n\
                     content-length: {}\r\n\r\n{body}",
                    PEERS[0],
                    body.len()
                );
                ask(*at, bytes.as_bytes()).await.expect("an answer");
            }
            count += 1;
        }
    }
    let mut told = beside.lines(2 * count).await;
    // Milliseconds are not compared.
    for line in told.iter_mut().flat_map(|lines| lines.values_mut()).flatten() {
        let mut words: Vec<_> = line.split(' ').collect();
        if words.first() == Some(&"DownstreamEnd") {
            (words[7], words[8]) = ("", "");
        }
        *line = words.join(" ");
    }
    for lines in told.iter_mut().flat_map(|lines| lines.values_mut()) {
        lines.sort();
    }
    let [ours, theirs] = told;
    assert_eq!(ours, theirs);
    assert!(ours.values().all(|lines| lines.len() == 2), "{ours:?}");
    beside.stop().await;
}
