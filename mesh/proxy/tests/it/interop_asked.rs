//! What clients ask of the router in fields (`x-envoy-retry-on`, `x-envoy-upstream-rq-timeout-ms` and so on): Envoy and
//! serin-proxy obey the same clients in the same way, and tell endpoints the same of it.

use futures::stream::{self, StreamExt};
use serde_json::{Value, json};

use crate::fixture::*;
use crate::interop_origin::{Beside, ask, cluster, listener, telling};

const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";

/// A connection manager whose router is told `options`.
fn manager(edge: bool, options: &Value) -> Value {
    let mut router = json!({ "@type": ROUTER });
    for (key, value) in options.as_object().unwrap() {
        router[key] = value.clone();
    }
    json!({
        "use_remote_address": edge,
        "internal_address_config": { "cidr_ranges": [{ "address_prefix": "10.0.0.0", "prefix_len": 8 }] },
        "http_filters": [{ "name": "envoy.filters.http.router", "typed_config": router }],
    })
}

fn managers() -> Vec<Value> {
    vec![
        manager(true, &json!({})),
        manager(false, &json!({})),
        manager(true, &json!({ "suppress_envoy_headers": true })),
        manager(true, &json!({ "respect_expected_rq_timeout": true })),
        manager(
            true,
            &json!({ "strict_check_headers": [
                "x-envoy-upstream-rq-timeout-ms", "x-envoy-upstream-rq-per-try-timeout-ms", "x-envoy-max-retries",
                "x-envoy-retry-grpc-on", "x-envoy-retry-on",
            ]}),
        ),
    ]
}

fn routes() -> Value {
    let to = |prefix: &str, cluster: &str, more: Value| {
        let mut action = json!({ "cluster": cluster });
        for (key, value) in more.as_object().unwrap() {
            action[key] = value.clone();
        }
        json!({ "match": { "prefix": prefix }, "route": action })
    };
    let waits = json!({ "base_interval": "0.001s", "max_interval": "0.002s" });
    let mut adding = to("/adds", "a", json!({}));
    adding["request_headers_to_add"] = json!([
        { "header": { "key": "x-envoy-retry-on", "value": "5xx" } },
        { "header": { "key": "x-envoy-max-retries", "value": "2" } },
        { "header": { "key": "x-envoy-upstream-rq-timeout-ms", "value": "4000" } },
    ]);
    json!({
        "name": "main",
        "virtual_hosts": [{
            "name": "all",
            "domains": ["*"],
            "include_request_attempt_count": true,
            "include_attempt_count_in_response": true,
            "routes": [
                adding,
                to("/retry", "a", json!({ "retry_policy": { "retry_on": "retriable-4xx", "num_retries": 2, "retry_back_off": waits } })),
                to("/tries", "a", json!({ "timeout": "9s", "retry_policy": {
                    "retry_on": "5xx", "num_retries": 1, "per_try_timeout": "7s", "retry_back_off": waits } })),
                to("/long-tries", "a", json!({ "timeout": "9s", "retry_policy": { "retry_on": "5xx", "per_try_timeout": "10s" } })),
                to("/hedge", "a", json!({ "timeout": "9s", "hedge_policy": { "hedge_on_per_try_timeout": true },
                    "retry_policy": { "retry_on": "5xx", "per_try_timeout": "7s" } })),
                to("/forever", "a", json!({ "timeout": "0s" })),
                to("/rewrite", "a", json!({ "prefix_rewrite": "/rewritten", "host_rewrite_literal": "inner" })),
                to("/streams", "a", json!({ "timeout": "5s", "max_stream_duration": { "max_stream_duration": "8s" } })),
                to("/grpc", "a", json!({ "max_grpc_timeout": "3s" })),
                to("/slow-streams", "slow", json!({ "timeout": "0.1s", "max_stream_duration": { "max_stream_duration": "1s" } })),
                to("/slow-try", "slow", json!({ "timeout": "9s", "retry_policy": {
                    "retry_on": "5xx", "num_retries": 1, "per_try_timeout": "0.1s", "retry_back_off": waits } })),
                to("/slow", "slow", json!({ "timeout": "1.2s" })),
                to("/dead", "dead", json!({})),
                to("/", "a", json!({})),
            ],
        }],
    })
}

/// Path and fields.
fn cases() -> Vec<(&'static str, String)> {
    let fields = |list: &[(&str, &str)]| {
        list.iter().fold(String::new(), |mut out, (name, value)| {
            out += name;
            out += ": ";
            out += value;
            out + "\r\n"
        })
    };
    let on = |value: &'static str| ("x-envoy-retry-on", value);
    let max = |value: &'static str| ("x-envoy-max-retries", value);
    let all = |value: &'static str| ("x-envoy-upstream-rq-timeout-ms", value);
    let each = |value: &'static str| ("x-envoy-upstream-rq-per-try-timeout-ms", value);
    let mut out = Vec::new();
    for path in [
        "/",
        "/retry",
        "/tries",
        "/long-tries",
        "/hedge",
        "/forever",
        "/rewrite",
        "/streams",
        "/adds?status=503",
        "/slow",
        "/slow-try",
        "/slow-streams",
        "/dead",
        "/?status=503",
        "/grpc",
    ] {
        out.push((path, String::new()));
    }
    for (path, list) in [
        ("/?status=503", vec![on("5xx")]),
        ("/?status=503", vec![on("5xx"), max("3")]),
        ("/?status=503", vec![on("5xx"), max("0")]),
        ("/?status=503", vec![on("5xx"), max("x")]),
        ("/?status=503", vec![on(" gateway-error , nonsense"), max("2")]),
        ("/?status=500", vec![on("gateway-error"), max("2")]),
        ("/?status=503", vec![on("nonsense"), max("2")]),
        ("/?status=503", vec![max("2")]),
        ("/?status=503", vec![("x-envoy-retry-grpc-on", "5xx"), max("2")]),
        ("/?status=503", vec![on("unavailable")]),
        (
            "/?status=418",
            vec![
                on("retriable-status-codes"),
                ("x-envoy-retriable-status-codes", "417, 418,x"),
            ],
        ),
        ("/?status=418", vec![on("retriable-status-codes")]),
        (
            "/?status=200",
            vec![
                on("retriable-headers"),
                ("x-envoy-retriable-header-names", "x-none, via"),
            ],
        ),
        (
            "/?status=200",
            vec![
                on("retriable-headers"),
                ("x-envoy-retriable-header-names", "x-none"),
            ],
        ),
        ("/retry?status=409", vec![max("1")]),
        ("/retry?status=409", vec![]),
        ("/retry?status=503", vec![on("5xx")]),
        ("/tries?status=503", vec![max("3")]),
        ("/dead", vec![on("connect-failure"), max("2")]),
        ("/", vec![all("1234")]),
        ("/", vec![all("0")]),
        ("/", vec![all("x")]),
        ("/", vec![all("-5")]),
        ("/", vec![all("99999999999999999999")]),
        ("/", vec![each("3210")]),
        ("/", vec![each("20000")]),
        ("/", vec![all("2000"), each("1000")]),
        ("/", vec![all("1000"), each("2000")]),
        ("/forever", vec![all("2000")]),
        ("/forever", vec![each("2000")]),
        ("/tries", vec![each("3000")]),
        ("/tries", vec![each("0")]),
        ("/hedge", vec![("x-envoy-hedge-on-per-try-timeout", "false")]),
        ("/tries", vec![("x-envoy-hedge-on-per-try-timeout", "true")]),
        ("/tries", vec![("x-envoy-hedge-on-per-try-timeout", "maybe")]),
        ("/streams", vec![all("2000")]),
        ("/slow", vec![all("400")]),
        ("/slow", vec![each("400")]),
        ("/slow", vec![each("400"), on("5xx"), max("1")]),
        (
            "/slow",
            vec![all("400"), ("x-envoy-upstream-rq-timeout-alt-response", "1")],
        ),
        (
            "/slow",
            vec![each("400"), ("x-envoy-upstream-rq-timeout-alt-response", "1")],
        ),
        ("/slow", vec![("x-envoy-upstream-stream-duration-ms", "400")]),
        ("/", vec![("x-envoy-upstream-stream-duration-ms", "400")]),
        ("/", vec![("x-envoy-upstream-alt-stat-name", "other")]),
        ("/", vec![("x-envoy-expected-rq-timeout-ms", "777")]),
        ("/", vec![("x-envoy-expected-rq-timeout-ms", "777"), all("555")]),
        ("/slow", vec![("x-envoy-expected-rq-timeout-ms", "400")]),
        ("/rewrite", vec![all("1500")]),
        (
            "/grpc",
            vec![("content-type", "application/grpc"), ("grpc-timeout", "2S")],
        ),
        (
            "/grpc",
            vec![("content-type", "application/grpc"), ("grpc-timeout", "20S")],
        ),
        ("/grpc", vec![("content-type", "application/grpc"), all("1500")]),
        ("/grpc", vec![("content-type", "application/grpc"), each("700")]),
        ("/slow-streams", vec![all("400")]),
    ] {
        out.push((path, fields(&list)));
    }
    out
}

/// What remains of a time that has begun to pass is not the same to the millisecond.
fn steady(text: &str) -> String {
    const NAME: &str = "x-envoy-expected-rq-timeout-ms=";
    let again = !text.contains("x-envoy-attempt-count=1 ");
    text.split(' ')
        .map(|word| {
            match word
                .strip_prefix(NAME)
                .and_then(|millis| millis.parse::<u64>().ok())
            {
                Some(millis) if again && millis > 3000 => format!("{NAME}<{}", millis.div_ceil(3000) * 3000),
                _ => word.to_owned(),
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

#[tokio::test]
async fn envoy_and_serin_proxy_obey_the_same_clients_about_retries_and_timeouts() {
    let backend = telling("a").await;
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let never = silent.local_addr().unwrap();
    // Connections are taken and nothing is said on them.
    let held = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = silent.accept().await {
            held.push(stream);
        }
    });
    let dead = closed_port().await;
    let managers = managers();
    let format = "%REQ(X-CASE)% %RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS% %UPSTREAM_REQUEST_ATTEMPT_COUNT% \
        %REQ(X-ENVOY-ORIGINAL-PATH)% %RESP(GRPC-STATUS)%";
    let beside = Beside::start(managers.len(), |ports, log| {
        let listeners: Vec<_> = managers
            .iter()
            .zip(ports)
            .enumerate()
            .map(|(index, (more, port))| listener(&format!("l{index}"), *port, log, format, more, &routes()))
            .collect();
        let mut clusters = [
            cluster("a", "ROUND_ROBIN", &[backend.address]),
            cluster("slow", "ROUND_ROBIN", &[never]),
            cluster("dead", "ROUND_ROBIN", &[dead]),
        ];
        for cluster in &mut clusters {
            // Requests of this test do not wait for each other.
            cluster["circuit_breakers"] = json!({ "thresholds": [{ "max_retries": 1000 }] });
        }
        json!({ "node": { "id": "n", "cluster": "c" }, "static_resources": { "listeners": listeners, "clusters": clusters } })
    })
    .await;
    let Some(beside) = beside else { return };
    let mut asked = Vec::new();
    for (manager, ports) in beside.ports.iter().enumerate() {
        for (path, fields) in cases() {
            for client in ["10.1.2.3", "8.8.8.8"] {
                // Where the client is not who is connected, a hop before says who it is.
                let named = if manager == 1 {
                    format!("x-forwarded-for: {client}\r\n")
                } else {
                    String::new()
                };
                let id = format!("c{}", asked.len());
                let bytes = format!(
                    "PROXY TCP4 {client} 10.200.0.1 1234 4321\r\n\
                     GET {path} HTTP/1.1\r\nhost: h\r\nx-case: {id}\r\nconnection: close\r\n{named}{fields}\r\n"
                );
                asked.push((id, manager, *ports, bytes));
            }
        }
    }
    let answers: Vec<_> = stream::iter(&asked)
        .map(|(_, _, ports, bytes)| async move {
            let one = async |at| {
                let answer = ask(at, bytes.as_bytes()).await.expect("an answer");
                let names: Vec<_> = answer
                    .fields
                    .iter()
                    .filter(|(name, _)| name.starts_with("x-envoy-"))
                    .map(|(name, value)| {
                        let timed = name == "x-envoy-upstream-service-time";
                        format!("{name}={}", if timed { "" } else { value })
                    })
                    .collect();
                // Texts of failures name the transport's reason in Envoy.
                let own = answer.status >= 500 && !answer.body.starts_with("a ");
                let body = if own { String::new() } else { steady(&answer.body) };
                (answer.status, names, body)
            };
            let (ours, theirs) = tokio::join!(one(ports[0]), one(ports[1]));
            [ours, theirs]
        })
        .buffered(48)
        .collect()
        .await;
    let [ours, theirs] = beside.lines(asked.len()).await;
    let told = |line: Option<&Vec<String>>| {
        let mut words: Vec<_> = line.map_or("", |lines| &lines[0]).split(' ').collect();
        let mut flags: Vec<_> = words[2].split(',').collect();
        flags.sort_unstable();
        let flags = flags.join(",");
        words[2] = &flags;
        let line = words.join(" ");
        // Details of a failed connection name the transport's reason in Envoy.
        line.split_once('{').map_or(line.clone(), |(before, rest)| {
            format!("{before}{}", rest.rsplit_once('}').map_or("", |(_, after)| after))
        })
    };
    let mut differences = Vec::new();
    for ((id, manager, _, bytes), pair) in asked.iter().zip(&answers) {
        let lines = [told(ours.get(id)), told(theirs.get(id))];
        if pair[0] != pair[1] || lines[0] != lines[1] {
            differences.push(format!(
                "{}\n{bytes}  ours   {:?}\n         {}\n  theirs {:?}\n         {}",
                managers[*manager], pair[0], lines[0], pair[1], lines[1]
            ));
        }
    }
    assert!(
        differences.is_empty(),
        "{} of {} differ:\n{}",
        differences.len(),
        asked.len(),
        differences.join("\n")
    );
    held.abort();
    beside.stop().await;
}
