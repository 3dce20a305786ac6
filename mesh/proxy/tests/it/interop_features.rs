//! Envoy and serin-proxy beside each other, a filter or an option at a time that the generated comparisons do not know: the same
//! client and the same endpoint, byte by byte.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::*;
use crate::interop_origin::{Beside, ask, cluster, listener};

/// Before each request: the client's address, which listeners of these tests want to know.
const FROM: &str = "PROXY TCP4 10.1.2.3 10.9.9.9 1000 80\r\n";

/// A connection manager with a filter before the router.
fn with_filter(name: &str, config: &Value) -> Value {
    json!({
        "http_filters": [
            { "name": name, "typed_config": config },
            { "name": "envoy.filters.http.router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" } },
        ],
        "http_protocol_options": { "enable_trailers": true },
    })
}

/// A route for everything to the cluster `a`.
fn to_a() -> Value {
    json!({ "name": "main", "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [
        { "name": "there", "match": { "prefix": "/" }, "route": { "cluster": "a", "timeout": "0s" } },
    ]}]})
}

/// The cluster `a`, whose endpoint may be sent trailers.
fn endpoint_at(at: SocketAddr) -> Value {
    let mut endpoint = cluster("a", "ROUND_ROBIN", &[at]);
    endpoint["typed_extension_protocol_options"] = json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": { "http_protocol_options": { "enable_trailers": true } },
    }});
    endpoint
}

/// Both with one listener and one endpoint.
async fn beside(more: &Value, format: &str, endpoint: SocketAddr) -> Option<Beside> {
    Beside::start(1, |ports, log| {
        json!({ "node": { "id": "n", "cluster": "c" }, "static_resources": {
            "listeners": [listener("l", ports[0], log, format, more, &to_a())],
            "clusters": [endpoint_at(endpoint)],
        }})
    })
    .await
}

/// An endpoint that reads to the end of a chunked request, and then does this with the request and the connection.
async fn endpoint<F, W>(answer: F) -> SocketAddr
where
    F: Fn(String, TcpStream) -> W + Copy + Send + 'static,
    W: Future<Output = ()> + Send + 'static,
{
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = socket.accept().await {
            tokio::spawn(async move {
                let mut bytes = Vec::new();
                while stream.read_buf(&mut bytes).await.is_ok_and(|count| count > 0) {
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    if text.contains("\r\n0\r\n") && text.ends_with("\r\n\r\n") {
                        answer(text, stream).await;
                        return;
                    }
                }
            });
        }
    });
    at
}

#[tokio::test]
async fn query_parameters_are_changed_alike_by_envoy_and_serin_proxy() {
    let backend = Backend::named("ok").await;
    let record = |key: &str, value: &str, action: &str| json!({ "append": { "record": { "key": key, "value": value }, "action": action } });
    let filter = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
        "mutations": { "query_parameter_mutations": [
            record("app", "x%REQ(x-v)%y", "APPEND_IF_EXISTS_OR_ADD"),
            record("over", "new", "OVERWRITE_IF_EXISTS"),
            record("absent", "%REQ(:path)%", "ADD_IF_ABSENT"),
            record("set", "a b&c=d#e%%20~*-._", "OVERWRITE_IF_EXISTS_OR_ADD"),
            record("none", "%REQ(x-none)%", "APPEND_IF_EXISTS_OR_ADD"),
            { "remove": "gone" },
        ]},
    });
    let more = with_filter("envoy.filters.http.header_mutation", &filter);
    let format = "%REQ(X-CASE)% %REQ(:PATH)% %RESPONSE_CODE%";
    let Some(beside) = beside(&more, format, backend.address).await else {
        return;
    };
    let paths = [
        "/q",
        "/q?a=1&over=2&gone=3&b",
        "/q?app=1&%61pp=2&z=a+b",
        "/q?over&gone&absent=7&absent=8",
        "/q?z=1&set=2&a=3&set=4",
        "/?gone",
    ];
    for (index, path) in paths.iter().enumerate() {
        for at in beside.ports[0] {
            let request =
                format!("{FROM}GET {path} HTTP/1.1\r\nhost: h\r\nx-case: c{index}\r\nx-v: v w&=\r\n\r\n");
            assert_eq!(ask(at, request.as_bytes()).await.unwrap().status, 200);
        }
    }
    let [mut ours, mut theirs] = beside.lines(paths.len()).await;
    // Names are written as they came; Envoy writes them without their escapes, and what they escape as well.
    let [one, other] = [&mut ours, &mut theirs].map(|lines| lines.remove("c2").unwrap().remove(0));
    assert_eq!(one.replace("%61pp=2", "app=2"), other);
    assert_eq!(ours, theirs);
    beside.stop().await;
}

#[tokio::test]
async fn trailers_are_changed_alike_by_envoy_and_serin_proxy() {
    let at = endpoint(|request, mut stream| async move {
        let (_, trailers) = request.split_once("\r\n0\r\n").unwrap();
        let mut lines: Vec<_> = trailers.trim().lines().map(str::to_owned).collect();
        lines.sort();
        let body = lines.join("|");
        let answer = format!(
            "HTTP/1.1 200 OK\r\nx-head: h\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\nx-end: up\r\nx-old: 1\r\n\r\n",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    let append = |key: &str, value: &str, action: &str| json!({ "append": { "header": { "key": key, "value": value }, "append_action": action } });
    let filter = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
        "mutations": {
            "request_trailers_mutations": [
                append("x-new", "%REQ(x-ask)%", "APPEND_IF_EXISTS_OR_ADD"),
                append("x-sum", "over", "OVERWRITE_IF_EXISTS"),
                append("x-none", "over", "OVERWRITE_IF_EXISTS"),
                { "remove": "x-gone" },
                { "remove_on_match": { "key_matcher": { "prefix": "x-all-" } } },
            ],
            "response_trailers_mutations": [
                append("x-new", "%REQ(x-ask)% %RESP(x-head)% %TRAILER(x-old)% %RESPONSE_CODE%", "ADD_IF_ABSENT"),
                append("x-end", "more", "APPEND_IF_EXISTS_OR_ADD"),
                { "remove": "x-old" },
            ],
        },
    });
    let more = with_filter("envoy.filters.http.header_mutation", &filter);
    let Some(beside) = beside(&more, "%REQ(X-CASE)% %TRAILER(x-new)% %TRAILER(x-old)%", at).await else {
        return;
    };
    let mut told = Vec::new();
    for at in beside.ports[0] {
        let mut stream = TcpStream::connect(at).await.unwrap();
        let request = format!(
            "{FROM}POST / HTTP/1.1\r\nhost: h\r\nx-case: c\r\nx-ask: me\r\ntransfer-encoding: chunked\r\nte: trailers\r\n\r\n\
             2\r\nhi\r\n0\r\nx-sum: 1\r\nx-gone: 1\r\nx-all-a: 1\r\nx-all-b: 2\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        while !String::from_utf8_lossy(&bytes).ends_with("\r\n\r\n")
            || !String::from_utf8_lossy(&bytes).contains("\r\n0\r\n")
        {
            assert!(soon("an answer", stream.read_buf(&mut bytes)).await.unwrap() > 0);
        }
        let text = String::from_utf8(bytes).unwrap();
        let (_, body) = text.split_once("\r\n\r\n").unwrap();
        let (body, trailers) = body.split_once("\r\n0\r\n").unwrap();
        let mut trailers: Vec<_> = trailers.trim().lines().map(str::to_owned).collect();
        trailers.sort();
        told.push((body.to_owned(), trailers));
    }
    assert_eq!(told[0], told[1]);
    assert!(told[0].0.ends_with("x-new: me|x-sum: over"), "{told:?}");
    assert_eq!(told[0].1, ["x-end: more", "x-end: up", "x-new: me h 1 200"]);
    let [ours, theirs] = beside.lines(1).await;
    assert_eq!(ours, theirs);
    beside.stop().await;
}

#[tokio::test]
async fn lines_of_requests_that_last_are_written_alike_at_intervals_by_envoy_and_serin_proxy() {
    let at = endpoint(|_, mut stream| async move {
        // Longer than the interval, twice: once while nothing is answered, once within the answer.
        tokio::time::sleep(Duration::from_millis(450)).await;
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabc";
        stream.write_all(head).await.unwrap();
        tokio::time::sleep(Duration::from_millis(450)).await;
        stream.write_all(b"def").await.unwrap();
    })
    .await;
    let format = "%REQ(X-CASE)% %ACCESS_LOG_TYPE% %RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %BYTES_RECEIVED% %BYTES_SENT% \
        %UPSTREAM_CLUSTER% %ROUTE_NAME% %UPSTREAM_REQUEST_ATTEMPT_COUNT% %RESPONSE_FLAGS%";
    for more in [
        json!({ "access_log_options": { "access_log_flush_interval": "0.2s" } }),
        json!({ "access_log_flush_interval": "0.2s" }),
    ] {
        let Some(beside) = beside(&more, format, at).await else {
            return;
        };
        let request = format!(
            "{FROM}POST / HTTP/1.1\r\nhost: h\r\nx-case: c\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
        );
        for at in beside.ports[0] {
            assert_eq!(ask(at, request.as_bytes()).await.unwrap().body, "abcdef");
        }
        let ended = |lines: &[String]| lines.iter().any(|line| line.starts_with("DownstreamEnd"));
        let told = soon("the lines", async {
            loop {
                let told = beside.lines(1).await.map(|mut lines| lines.remove("c").unwrap());
                if told.iter().all(|lines| ended(lines)) {
                    break told;
                }
                tokio::task::yield_now().await;
            }
        })
        .await;
        // How many there are is the machine's business, what they say is not.
        let told = told.map(|mut lines| {
            lines.dedup();
            lines
        });
        assert_eq!(told[0], told[1]);
        let kinds: Vec<_> = told[0]
            .iter()
            .map(|line| line.split(' ').next().unwrap())
            .collect();
        assert_eq!(
            kinds,
            ["DownstreamPeriodic", "DownstreamPeriodic", "DownstreamEnd"]
        );
        beside.stop().await;
    }
}

#[tokio::test]
async fn an_authorization_service_that_is_only_listened_to_is_told_of_alike_by_envoy_and_serin_proxy() {
    let service = Backend::answering(|seen| {
        let answer = http::Response::builder();
        let answer = match seen.path.as_str() {
            "/deny" => answer
                .status(401)
                .header("www-authenticate", "Basic")
                .header("set-cookie", "a=1")
                .header("set-cookie", "b=2"),
            "/fail" => answer.status(503),
            _ => answer.status(200).header("x-up", "u"),
        };
        answer.body(http_body_util::Full::default()).unwrap()
    })
    .await;
    let backend = Backend::named("ok").await;
    let state = |key: &str| format!("%FILTER_STATE({key})%");
    let format = [
        "%REQ(X-CASE)% %RESPONSE_CODE% %RESPONSE_FLAGS% %REQ(x-up)%".to_owned(),
        state("mine.shadow:PLAIN"),
        state("mine.shadow:TYPED"),
        state("mine.shadow:FIELD:check_result"),
        state("mine.shadow:FIELD:status_code"),
        state("mine:PLAIN"),
        state("mine:TYPED"),
        state("mine:FIELD:bytesSent"),
        // Only the number of its digits can be equal.
        format!("us={}", state("mine:FIELD:latency_us")),
    ]
    .join(" ");
    let ways = [
        json!({ "status_on_error": { "code": 502 } }),
        json!({ "failure_mode_allow": true, "failure_mode_allow_header_add": true }),
        json!({ "filter_enabled": { "default_value": { "numerator": 0 } },
            "deny_at_disable": { "default_value": true, "runtime_key": "a" } }),
    ];
    let managers: Vec<_> = ways
        .iter()
        .map(|way| {
            let mut filter = json!({
                "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
                "http_service": {
                    "server_uri": { "uri": "http://h", "cluster": "service", "timeout": "5s" },
                    "authorization_response": { "allowed_upstream_headers": { "patterns": [{ "exact": "x-up" }] },
                        "allowed_client_headers": { "patterns": [{ "exact": "set-cookie" }] } },
                },
                "shadow_mode": true,
                "emit_filter_state_stats": true,
            });
            for (key, value) in way.as_object().unwrap() {
                filter[key] = value.clone();
            }
            with_filter("mine", &filter)
        })
        .collect();
    let beside = Beside::start(managers.len(), |ports, log| {
        let listeners: Vec<_> = managers
            .iter()
            .zip(ports)
            .map(|(more, port)| listener(&format!("l{port}"), *port, log, &format, more, &to_a()))
            .collect();
        json!({ "node": { "id": "n", "cluster": "c" }, "static_resources": {
            "listeners": listeners,
            "clusters": [endpoint_at(backend.address), cluster("service", "ROUND_ROBIN", &[service.address])],
        }})
    })
    .await;
    let Some(beside) = beside else { return };
    let mut count = 0;
    for ports in &beside.ports {
        for path in ["/", "/deny", "/fail"] {
            for at in ports {
                let request = format!("{FROM}GET {path} HTTP/1.1\r\nhost: h\r\nx-case: c{count}\r\n\r\n");
                assert_eq!(ask(*at, request.as_bytes()).await.unwrap().status, 200);
            }
            count += 1;
        }
    }
    let [ours, theirs] = beside.lines(count).await.map(|mut lines| {
        for line in lines.values_mut().flatten() {
            let (before, took) = line.split_once("us=").unwrap();
            let is_number = took.parse::<u64>().is_ok();
            // A length is not among the fields of a denial, since it is that of another answer.
            let length = "{\"key\":\"content-length\",\"value\":\"0\"}";
            *line = before.replace(&format!(",{length}"), "") + &is_number.to_string();
        }
        lines
    });
    assert_eq!(ours, theirs);
    assert!(ours["c1"][0].contains("www-authenticate"), "{ours:?}");
    beside.stop().await;
}

#[tokio::test]
async fn what_is_told_and_changed_before_anything_else_is_alike_in_envoy_and_serin_proxy() {
    let backend = Backend::named("ok").await;
    let ports = json!({ "https_destination_ports": [443, 8443], "http_destination_ports": [80] });
    let early = json!([{ "name": "early", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
        "mutations": [
            { "append": { "header": { "key": "x-early", "value":
                "%REQ(x-forwarded-for)%|%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%|%REQ(x-forwarded-proto)%" } } },
            { "append": { "header": { "key": "x-forwarded-for", "value": "9.9.9.9" } } },
            { "append": { "header": { "key": "x-forwarded-proto", "value": "https" }, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD" } },
            { "remove": "user-agent" },
        ],
    }}]);
    let managers = [
        json!({ "forward_proto_config": ports }),
        json!({ "forward_proto_config": ports, "use_remote_address": true }),
        json!({ "forward_proto_config": ports, "use_remote_address": true, "xff_num_trusted_hops": 1 }),
        json!({ "forward_proto_config": ports, "scheme_header_transformation": { "scheme_to_overwrite": "https" } }),
        json!({ "add_user_agent": true, "use_remote_address": true }),
        json!({ "add_user_agent": true }),
        json!({ "early_header_mutation_extensions": early, "use_remote_address": true }),
        json!({ "early_header_mutation_extensions": early, "add_user_agent": true }),
    ];
    let format = [
        "X-CASE",
        "X-FORWARDED-PROTO",
        ":SCHEME",
        "USER-AGENT",
        "X-ENVOY-DOWNSTREAM-SERVICE-NODE",
        "X-ENVOY-DOWNSTREAM-SERVICE-CLUSTER",
        "X-FORWARDED-FOR",
        "X-EARLY",
        "X-ENVOY-EXTERNAL-ADDRESS",
    ]
    .map(|name| format!("%REQ({name})%"))
    .join(" ");
    let beside = Beside::start(managers.len(), |ports, log| {
        let listeners: Vec<_> = managers
            .iter()
            .zip(ports)
            .map(|(more, port)| listener(&format!("l{port}"), *port, log, &format, more, &to_a()))
            .collect();
        json!({ "node": { "id": "node-1", "cluster": "shop" }, "static_resources": {
            "listeners": listeners, "clusters": [endpoint_at(backend.address)],
        }})
    })
    .await;
    let Some(beside) = beside else { return };
    let mut count = 0;
    for both in &beside.ports {
        for port in [443, 80, 81] {
            for fields in [
                "",
                "x-forwarded-proto: https\r\nuser-agent: me\r\n",
                "x-forwarded-proto: http\r\nuser-agent:\r\nx-envoy-downstream-service-cluster: other\r\n",
            ] {
                for at in both {
                    let request = format!(
                        "PROXY TCP4 10.1.2.3 10.9.9.9 1000 {port}\r\nGET / HTTP/1.1\r\nhost: h\r\nx-case: c{count}\r\n{fields}\r\n"
                    );
                    assert_eq!(ask(*at, request.as_bytes()).await.unwrap().status, 200);
                }
                count += 1;
            }
        }
    }
    let [ours, theirs] = beside.lines(count).await;
    let differences: Vec<_> = ours
        .iter()
        .filter(|(case, lines)| theirs.get(*case) != Some(lines))
        .map(|(case, lines)| format!("{case}\n  ours   {lines:?}\n  theirs {:?}", theirs.get(case)))
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    beside.stop().await;
}

#[tokio::test]
async fn preflights_for_private_networks_are_answered_alike_by_envoy_and_serin_proxy() {
    let backend = Backend::named("ok").await;
    let filter = json!({ "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors" });
    let more = with_filter("envoy.filters.http.cors", &filter);
    let policy = |allowed: bool| {
        json!({ "envoy.filters.http.cors": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",
            "allow_origin_string_match": [{ "exact": "https://a" }],
            "allow_methods": "GET",
            "allow_private_network_access": allowed,
        }})
    };
    let routes = json!({ "name": "main", "virtual_hosts": [{ "name": "all", "domains": ["*"],
        "typed_per_filter_config": policy(true), "routes": [
            { "match": { "prefix": "/closed" }, "route": { "cluster": "a" }, "typed_per_filter_config": policy(false) },
            { "match": { "prefix": "/" }, "route": { "cluster": "a" } },
        ] }] });
    let beside = Beside::start(1, |ports, log| {
        json!({ "node": { "id": "n", "cluster": "c" }, "static_resources": {
            "listeners": [listener("l", ports[0], log, "%REQ(X-CASE)%", &more, &routes)],
            "clusters": [endpoint_at(backend.address)],
        }})
    })
    .await;
    let Some(beside) = beside else { return };
    let mut allowed = Vec::new();
    for path in ["/", "/closed"] {
        for asks in ["true", "false", "TRUE", ""] {
            for origin in ["https://a", "https://b"] {
                let request = format!(
                    "{FROM}OPTIONS {path} HTTP/1.1\r\nhost: h\r\norigin: {origin}\r\naccess-control-request-method: GET\r\n\
                     access-control-request-private-network: {asks}\r\n\r\n"
                );
                let mut told = Vec::new();
                for at in beside.ports[0] {
                    let answer = ask(at, request.as_bytes()).await.unwrap();
                    let fields = answer.fields.into_iter();
                    told.push((
                        answer.status,
                        fields
                            .filter(|(name, _)| name.starts_with("access-control"))
                            .collect::<Vec<_>>(),
                    ));
                }
                assert_eq!(told[0], told[1], "{path} {asks} {origin}");
                let of_private = |(name, _): &(String, String)| name.ends_with("private-network");
                allowed.push(told[0].1.iter().any(of_private));
            }
        }
    }
    assert_eq!(allowed.iter().filter(|allowed| **allowed).count(), 1);
    beside.stop().await;
}

#[tokio::test]
async fn responses_come_no_faster_than_a_fault_says_in_envoy_and_serin_proxy() {
    let content = "x".repeat(16 * 1024);
    let sent = content.clone();
    let backend =
        Backend::answering(move |_| http::Response::new(http_body_util::Full::from(sent.clone()))).await;
    let limits = [
        json!({ "fixed_limit": { "limit_kbps": 32 }, "percentage": { "numerator": 100 } }),
        json!({ "header_limit": {}, "percentage": { "numerator": 100 } }),
    ];
    let managers = limits.map(|limit| {
        let filter = json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
            "response_rate_limit": limit,
        });
        with_filter("envoy.filters.http.fault", &filter)
    });
    let beside = Beside::start(managers.len(), |ports, log| {
        let listeners: Vec<_> = managers
            .iter()
            .zip(ports)
            .map(|(more, port)| listener(&format!("l{port}"), *port, log, "%REQ(X-CASE)%", more, &to_a()))
            .collect();
        json!({ "node": { "id": "n", "cluster": "c" }, "static_resources": {
            "listeners": listeners, "clusters": [endpoint_at(backend.address)],
        }})
    })
    .await;
    let Some(beside) = beside else { return };
    // At 32 KiB a second eight slices of a sixteenth of a second, of which the first comes at once.
    let slow = Duration::from_millis(350);
    for (listener, field, is_slow) in [
        (0, "", true),
        (1, "x-envoy-fault-throughput-response: 32\r\n", true),
        (1, "", false),
        (1, "x-envoy-fault-throughput-response: 0\r\n", false),
        (
            1,
            "x-envoy-fault-throughput-response: 32\r\nx-envoy-fault-throughput-response-percentage: 0\r\n",
            false,
        ),
    ] {
        for at in beside.ports[listener] {
            let request = format!("{FROM}GET / HTTP/1.1\r\nhost: h\r\n{field}\r\n");
            soon("an answer in its time", async {
                loop {
                    let began = std::time::Instant::now();
                    let answer = ask(at, request.as_bytes()).await.unwrap();
                    let took = began.elapsed();
                    assert_eq!(answer.body, content, "{field}");
                    assert!(!is_slow || took >= slow, "{field} {at}: {took:?}");
                    // A machine that is busy makes others slow as well, now and then.
                    if is_slow || took < slow {
                        break;
                    }
                }
            })
            .await;
        }
    }
    beside.stop().await;
}
