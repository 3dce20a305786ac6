//! Requests that are looked at over the admin port, and the admin port on a Unix socket.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use serin_proxy::control::admin::{AdminPort, Port};
use serin_xds::pb::envoy::config::core::v3::TrafficDirection;
use serin_xds::pb::envoy::extensions::common::tap::v3 as common;
use serin_xds::pb::envoy::extensions::filters::http::tap::v3 as filter;
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::fixture::*;

struct Tapped {
    harness: Harness,
    at: SocketAddr,
    admin: SocketAddr,
    _cancel: tokio_util::sync::DropGuard,
    _backend: Backend,
}

/// A proxy with a tap filter of the id `t`.
async fn tapped() -> Tapped {
    let harness = Harness::start();
    let backend = Backend::answering(|seen: &Seen| {
        let status = if seen.path == "/bad" { 503 } else { 200 };
        let mut response = Response::new(Full::from(seen.body.clone()));
        *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
        response
    })
    .await;
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let mut manager = manager("80");
    let tap = filter::Tap {
        common_config: Some(common::CommonExtensionConfig {
            config_type: Some(common::common_extension_config::ConfigType::AdminConfig(
                common::AdminConfig {
                    config_id: "t".into(),
                },
            )),
        }),
        record_downstream_connection: true,
        record_upstream_connection: true,
        ..Default::default()
    };
    manager
        .http_filters
        .insert(0, http_filter("envoy.filters.http.tap", Some(any(&tap))));
    let at = harness.listen(&manager, TrafficDirection::Outbound).await;
    let port = AdminPort::bind(&harness.proxy, "127.0.0.1:0".parse().unwrap(), Port::Admin).unwrap();
    let admin = port.address().unwrap();
    let cancel = CancellationToken::new();
    tokio::spawn(port.serve(harness.proxy.clone(), CancellationToken::new(), cancel.clone()));
    Tapped {
        harness,
        at,
        admin,
        _cancel: cancel.drop_guard(),
        _backend: backend,
    }
}

/// What came of asking to look.
struct Looking {
    body: hyper::body::Incoming,
    buffer: String,
    _connection: tokio::task::JoinHandle<()>,
}

async fn look(admin: SocketAddr, config: &str) -> Result<Looking, String> {
    let stream = TcpStream::connect(admin).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    let task = tokio::spawn(async move { drop(connection.await) });
    let request = Request::post("/tap")
        .header("host", "a")
        .body(Full::<bytes::Bytes>::from(config.to_owned()))
        .unwrap();
    let response = soon("an answer to /tap", sender.send_request(request))
        .await
        .unwrap();
    let status = response.status();
    let looking = Looking {
        body: response.into_body(),
        buffer: String::new(),
        _connection: task,
    };
    if status == 200 {
        return Ok(looking);
    }
    let body = looking.body.collect().await.unwrap().to_bytes();
    Err(format!("{status}: {}", String::from_utf8_lossy(&body)))
}

impl Looking {
    /// The next trace; nothing at the end.
    async fn next(&mut self) -> Option<Value> {
        loop {
            let mut values = serde_json::Deserializer::from_str(&self.buffer).into_iter::<Value>();
            if let Some(Ok(value)) = values.next() {
                let end = values.byte_offset();
                self.buffer.drain(..end);
                return Some(value["http_buffered_trace"].clone());
            }
            let frame = soon("a trace", self.body.frame()).await?.unwrap();
            self.buffer
                .push_str(std::str::from_utf8(&frame.into_data().unwrap()).unwrap());
        }
    }
}

fn wanted(id: &str, matches: &str, sink: &str) -> String {
    format!(
        "config_id: {id}\ntap_config:\n  match: {matches}\n  output_config:\n    max_buffered_rx_bytes: 4\n    \
         sinks:\n    - {{format: JSON_BODY_AS_STRING, {sink}}}\n"
    )
}

fn header<'a>(message: &'a Value, key: &str) -> Option<&'a str> {
    message["headers"]
        .as_array()?
        .iter()
        .find(|header| header["key"] == key)?["value"]
        .as_str()
}

async fn ask(at: SocketAddr, path: &str, body: &'static str) -> u16 {
    let request = Request::post(path)
        .header("host", "reviews")
        .body(Full::from(body))
        .unwrap();
    send(at, request).await.0
}

#[tokio::test]
async fn requests_that_match_are_streamed_with_their_answers_and_bodies_up_to_the_limits() {
    let tapped = tapped().await;
    let condition = "{or_match: {rules: [
        {http_response_headers_match: {headers: [{name: ':status', string_match: {exact: '503'}}]}},
        {http_request_headers_match: {headers: [{name: ':path', string_match: {prefix: /wanted}}]}}]}}";
    let mut looking = look(tapped.admin, &wanted("t", condition, "streaming_admin: {}"))
        .await
        .unwrap();
    for (path, body, status) in [
        ("/no", "1", 200),
        ("/wanted?x=1", "longer", 200),
        ("/bad", "b", 503),
    ] {
        assert_eq!(ask(tapped.at, path, body).await, status);
    }
    let first = looking.next().await.unwrap();
    assert_eq!(
        header(&first["request"], ":path"),
        Some("/wanted?x=1"),
        "{first:#}"
    );
    assert_eq!(header(&first["request"], ":method"), Some("POST"));
    assert_eq!(header(&first["request"], ":authority"), Some("reviews"));
    assert_eq!(
        first["request"]["body"],
        serde_json::json!({"truncated": true, "as_string": "long"})
    );
    assert_eq!(header(&first["response"], ":status"), Some("200"));
    assert_eq!(first["response"]["body"]["as_string"], "longer");
    assert_eq!(
        first["downstream_connection"]["local_address"]["socket_address"]["port_value"],
        u64::from(tapped.at.port())
    );
    let upstream = &first["upstream_connection"];
    assert_eq!(
        upstream["remote_address"]["socket_address"]["port_value"],
        u64::from(tapped._backend.address.port())
    );
    assert!(upstream["local_address"]["socket_address"]["port_value"].is_u64());
    let second = looking.next().await.unwrap();
    assert_eq!(header(&second["response"], ":status"), Some("503"));
    assert_eq!(
        tapped.harness.counter(
            "envoy_http_tap_rq_tapped",
            &[("envoy_http_conn_manager_prefix", "test")]
        ),
        2.0
    );
}

#[tokio::test]
async fn bodies_are_looked_through_beyond_what_of_them_is_shown() {
    let tapped = tapped().await;
    // The endpoint answers with what it was sent.
    let condition = "{or_match: {rules: [
        {and_match: {rules: [
            {http_request_generic_body_match: {patterns: [{string_match: needle}, {binary_match: aGF5}]}},
            {http_request_headers_match: {headers: [{name: ':path', string_match: {exact: /asked}}]}}]}},
        {and_match: {rules: [
            {http_response_generic_body_match: {bytes_limit: 10, patterns: [{string_match: needle}]}},
            {http_request_headers_match: {headers: [{name: ':path', string_match: {exact: /answered}}]}}]}}]}}";
    let mut looking = look(tapped.admin, &wanted("t", condition, "streaming_admin: {}"))
        .await
        .unwrap();
    for (path, body) in [
        ("/asked", "only a needle"),
        ("/asked", "a needle in the hay"),
        ("/answered", "too far is the needle"),
        ("/answered", "the needle is not"),
        ("/other", "a needle in the hay"),
        ("/asked", ""),
        ("/answered", "a needle"),
    ] {
        assert_eq!(ask(tapped.at, path, body).await, 200);
    }
    for (path, body) in [
        ("/asked", "a needle in the hay"),
        ("/answered", "the needle is not"),
        ("/answered", "a needle"),
    ] {
        let trace = looking.next().await.unwrap();
        assert_eq!(header(&trace["request"], ":path"), Some(path), "{trace:#}");
        assert_eq!(trace["response"]["body"]["as_string"], body);
    }
}

#[tokio::test]
async fn a_buffered_tap_ends_with_its_traces_and_everything_can_be_looked_at_without_a_filter() {
    let tapped = tapped().await;
    let config = wanted(
        "serin.http_connection_managers",
        "{any_match: true}",
        "buffered_admin: {max_traces: 2, timeout: 60s}",
    );
    let mut looking = look(tapped.admin, &config).await.unwrap();
    for path in ["/1", "/2"] {
        assert_eq!(ask(tapped.at, path, "").await, 200);
    }
    for path in ["/1", "/2"] {
        let trace = looking.next().await.unwrap();
        assert_eq!(header(&trace["request"], ":path"), Some(path));
    }
    assert!(looking.next().await.is_none());
    let short = wanted(
        "t",
        "{any_match: true}",
        "buffered_admin: {max_traces: 2, timeout: 0.05s}",
    );
    let mut looking = look(tapped.admin, &short).await.unwrap();
    assert!(looking.next().await.is_none(), "its time is over");
}

#[tokio::test]
async fn one_looks_at_a_time_and_what_cannot_be_looked_at_is_refused_by_name() {
    let tapped = tapped().await;
    let config = wanted("t", "{any_match: true}", "streaming_admin: {}");
    let first = look(tapped.admin, &config).await.unwrap();
    let busy = look(tapped.admin, &config).await.err().unwrap();
    assert!(busy.contains("already exists"), "{busy}");
    drop(first);
    // The end of the connection is noticed in its time.
    soon("the first one's end", async {
        while look(tapped.admin, &config).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for (config, part) in [
        (
            wanted("none", "{any_match: true}", "streaming_admin: {}"),
            "Unknown config id 'none'",
        ),
        (wanted("t", "{nothing: true}", "streaming_admin: {}"), "nothing"),
        (
            wanted("t", "{any_match: true}", "file_per_tap: {path_prefix: /a}"),
            "output_config.sinks[0]",
        ),
        ("- 1".to_owned(), ""),
    ] {
        let refusal = look(tapped.admin, &config).await.err().unwrap();
        assert!(refusal.starts_with("400") && refusal.contains(part), "{refusal}");
    }
    assert_eq!(get(tapped.admin, "/tap").await.0, 405);
}

async fn over_unix(path: &Path) -> Option<String> {
    let stream = UnixStream::connect(path).await.ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .ok()?;
    let _task = tokio::spawn(connection);
    let request = Request::get("/ready")
        .header("host", "a")
        .body(Full::<bytes::Bytes>::default());
    let response = sender.send_request(request.unwrap()).await.ok()?;
    let body = response.into_body().collect().await.ok()?.to_bytes();
    Some(String::from_utf8_lossy(&body).into_owned())
}

#[tokio::test]
async fn the_admin_port_on_a_unix_socket_is_its_users_alone_and_gone_with_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bootstrap.yaml");
    let [by_file, by_flag] = ["file.sock", "flag.sock"].map(|name| directory.path().join(name));
    let text = format!(
        "admin: {{address: {{pipe: {{path: {}, mode: 432}}}}}}\n",
        by_file.display()
    );
    std::fs::write(&file, text).unwrap();
    let start = |more: &[&Path]| {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"));
        command
            .args(["--concurrency", "1", "--config"])
            .arg(&file)
            .args(more)
            .kill_on_drop(true)
            .stderr(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    // What a process that was killed has left behind.
    drop(std::os::unix::net::UnixListener::bind(&by_file).unwrap());
    for (path, mode, more) in [
        (&by_file, 0o660, &[][..]),
        (&by_flag, 0o600, &[Path::new("--admin-socket"), &by_flag]),
    ] {
        let mut child = start(more);
        soon("the admin socket", async {
            while over_unix(path).await.as_deref() != Some("LIVE\n") {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert_eq!(
            std::fs::metadata(path).unwrap().permissions().mode() & 0o777,
            mode
        );
        let second = start(more).wait_with_output();
        let second = soon("the end of another one", second).await.unwrap();
        let told = String::from_utf8_lossy(&second.stderr).into_owned();
        assert!(
            !second.status.success() && told.contains("a running process serves there"),
            "{told}"
        );
        let id = nix::unistd::Pid::from_raw(child.id().unwrap() as i32);
        nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(soon("the end", child.wait()).await.unwrap().success());
        assert!(!path.exists(), "the socket is gone");
    }
}
