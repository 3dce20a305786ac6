//! Draining, listeners that change, inherited sockets, admin.

use std::collections::HashMap;
use std::time::Duration;

use http::Request;
use http_body_util::{BodyExt, Full};
use serin_proxy::control::admin::{AdminPort, Port};
use serin_proxy::control::{Options, Proxy};
use serin_proxy::worker::DrainPhase;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::fixture::*;

#[tokio::test]
async fn draining_tells_clients_to_close_then_finishes_what_runs() {
    let harness = Harness::start();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    harness.cluster("slow", &[socket.local_addr().unwrap()]).await;
    let quick = Backend::named("quick").await;
    harness.cluster("quick", &[quick.address]).await;
    let at = harness
        .serve(vec![
            prefix_route("/slow", to_cluster("slow")),
            prefix_route("/", to_cluster("quick")),
        ])
        .await;
    harness.proxy.set_ready();
    assert!(harness.proxy.is_ready());
    let running = tokio::spawn(async move { get(at, "/slow").await });
    let (mut server, _) = soon("the slow request", socket.accept()).await.unwrap();

    harness.proxy.drain(DrainPhase::Discouraging).await;
    assert!(!harness.proxy.is_ready());
    // Still served, on new connections too, but told to go.
    let answer = raw(at, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"),
        "{answer}"
    );

    harness.proxy.drain(DrainPhase::Closing).await;
    assert_eq!(harness.proxy.connections().await, 1);
    server
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlate")
        .await
        .unwrap();
    let (status, _, body) = soon("the slow answer", running).await.unwrap();
    assert_eq!((status, body.as_str()), (200, "late"));
    soon("the end", harness.proxy.shut_down(Duration::ZERO, PATIENCE)).await;
    assert!(TcpStream::connect(at).await.is_err(), "still listening");
    harness.proxy.stop().await;
}

#[tokio::test]
async fn an_http2_client_is_sent_away_by_goaway_and_loses_nothing() {
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let mut client = h2_client(at).await;
    let request = || Request::get("http://a/").body(Full::from("")).unwrap();
    assert_eq!(
        soon("a response", client.send_request(request()))
            .await
            .unwrap()
            .status(),
        200
    );
    harness.proxy.drain(DrainPhase::Discouraging).await;
    let response = soon("a response", client.send_request(request())).await.unwrap();
    assert_eq!(response.status(), 200);
    response.into_body().collect().await.unwrap();
    let closed = async {
        while !client.is_closed() {
            tokio::task::yield_now().await;
        }
    };
    soon("the end of the connection", closed).await;
}

#[tokio::test]
async fn a_listener_that_is_replaced_or_removed_drops_no_request() {
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    let mut exchange = async |close: bool| {
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(soon("a response", stream.read_u8()).await.unwrap());
        }
        assert_eq!(stream.read_u8().await.unwrap(), b'b');
        let head = String::from_utf8(head).unwrap().to_lowercase();
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert_eq!(head.contains("connection: close"), close, "{head}");
    };
    exchange(false).await;
    exchange(false).await;
    // Same address, other content: the socket stays, the old connection is told to close with its next response.
    let mut changed = listener_of(
        "l",
        core::TrafficDirection::Outbound,
        vec![http_chain(&manager("80"))],
    );
    changed.address = address(at);
    changed.stat_prefix = "changed".into();
    harness.put(ResourceType::Listener, "l", &changed).await;
    exchange(true).await;
    let at = harness.proxy.listener_address("l").unwrap();
    assert_eq!(get(at, "/").await.0, 200);
    harness.remove(ResourceType::Listener, "l").await;
    assert_eq!(harness.proxy.listener_address("l"), None);
}

#[tokio::test]
async fn a_listener_on_a_taken_port_is_refused_and_told_why() {
    let harness = Harness::start();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut message = listener_of(
        "l",
        core::TrafficDirection::Outbound,
        vec![http_chain(&manager("80"))],
    );
    message.address = address(taken.local_addr().unwrap());
    let refusal = harness
        .try_put(ResourceType::Listener, "l", &message)
        .await
        .expect("refused");
    assert!(refusal.contains("another process"), "{refusal}");
    // Also where it could be opened at once.
    harness.route_all_to("c").await;
    let refusal = harness.try_put(ResourceType::Listener, "l", &message).await;
    assert!(refusal.expect("refused").contains("another process"));
    drop(taken);
    assert_eq!(harness.try_put(ResourceType::Listener, "l", &message).await, None);
    assert!(harness.proxy.listener_address("l").is_some());
}

#[tokio::test]
async fn a_listener_that_waits_for_a_taken_port_is_refused_and_the_one_before_serves_on() {
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let chains = vec![http_chain(&manager("late"))];
    let mut message = listener_of("l", core::TrafficDirection::Outbound, chains);
    message.address = address(taken.local_addr().unwrap());
    let refusal = harness.try_put(ResourceType::Listener, "l", &message).await;
    assert!(refusal.expect("refused").contains("another process"));
    assert!(
        harness.proxy.store(|store| store.is_complete()),
        "nothing is waited for"
    );
    assert_eq!(harness.proxy.listener_address("l"), Some(at));
    assert_eq!(get(at, "/").await.0, 200);
}

#[tokio::test]
async fn an_inherited_socket_serves_the_listener_of_its_port_on_every_worker() {
    let inherited = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    inherited.set_nonblocking(true).unwrap();
    let at = inherited.local_addr().unwrap();
    let options = Options {
        concurrency: 2,
        inherited: HashMap::from([(8080, inherited)]),
        ..Default::default()
    };
    let (proxy, log) = Proxy::start(options).unwrap();
    let harness = Harness { proxy, log };
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let mut message = listener_of(
        "gateway",
        core::TrafficDirection::Outbound,
        vec![http_chain(&manager("80"))],
    );
    message.address = address("0.0.0.0:8080".parse().unwrap());
    harness.put(ResourceType::Listener, "gateway", &message).await;
    for _ in 0..10 {
        assert_eq!(get(at, "/").await.0, 200);
    }
}

#[tokio::test]
async fn admin_ports_show_only_what_is_theirs() {
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let cancel = CancellationToken::new();
    let quit = CancellationToken::new();
    let mut ports = HashMap::new();
    for port in [Port::Admin, Port::Prometheus, Port::Ready] {
        let bound = AdminPort::bind(&harness.proxy, "127.0.0.1:0".parse().unwrap(), port).unwrap();
        ports.insert(format!("{port:?}"), bound.address().unwrap());
        tokio::spawn(bound.serve(harness.proxy.clone(), quit.clone(), cancel.clone()));
    }
    let (status, _, body) = get(ports["Ready"], "/healthz/ready").await;
    assert_eq!(status, 503, "{body}");
    harness.proxy.set_ready();
    assert_eq!(get(ports["Ready"], "/healthz/ready").await.0, 200);
    assert_eq!(get(ports["Admin"], "/ready").await.0, 200);
    assert_eq!(get(ports["Ready"], "/config_dump").await.0, 404);
    assert_eq!(get(ports["Prometheus"], "/quitquitquit").await.0, 404);
    assert!(
        get(ports["Prometheus"], "/stats/prometheus")
            .await
            .2
            .contains("serin_proxy_downstream")
    );
    let dump: serde_json::Value = serde_json::from_str(&get(ports["Admin"], "/config_dump").await.2).unwrap();
    assert_eq!(
        dump["configs"][1]["dynamic_active_clusters"][0]["cluster"]["name"],
        "c"
    );
    assert!(
        get(ports["Admin"], "/clusters")
            .await
            .2
            .contains("::health_flags::healthy")
    );
    assert_eq!(get(ports["Admin"], "/quitquitquit").await.0, 405);
    let post = Request::post("/quitquitquit")
        .header("host", "a")
        .body(Full::from(""))
        .unwrap();
    assert_eq!(send(ports["Admin"], post).await.0, 200);
    soon("quit", quit.cancelled()).await;
    cancel.cancel();
}

#[test]
fn the_program_validates_a_file_and_names_what_is_wrong_with_another() {
    let program = || std::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"));
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/example/bootstrap.yaml");
    let output = program()
        .args(["--config", example, "--mode", "validate"])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bad.yaml");
    std::fs::write(
        &path,
        "static_resources:\n  clusters:\n  - name: a\n    type: STATIC\n    colour: red\n",
    )
    .unwrap();
    let refused = |arguments: &[&str]| {
        let output = program()
            .args(arguments)
            .arg("--config")
            .arg(&path)
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let at = path.display();
    assert_eq!(
        refused(&["--mode", "validate"]),
        format!(
            "serin-proxy: {at}:5: static_resources.clusters[0].colour: is not a field that this proxy knows here\n"
        )
    );
    // What only shows when resources are compiled is told of all of them, with their names; to serve is refused alike.
    std::fs::write(
        &path,
        "static_resources:\n  clusters:\n  - name: a\n    type: STATIC\n    lb_policy: 77\n  - name: b\n    \
         dns_lookup_family: ALL\n    max_requests_per_connection: 1\n    lb_policy: LOAD_BALANCING_POLICY_CONFIG\n",
    )
    .unwrap();
    let text = refused(&["--mode", "validate"]);
    for (line, cluster) in [(5, "(\"a\")"), (9, "(\"b\")")] {
        let wanted = format!("{at}:{line}: static_resources.clusters[");
        assert!(
            text.lines()
                .any(|told| told.contains(&wanted) && told.ends_with(cluster)),
            "{text}"
        );
    }
    assert_eq!(refused(&[]), text);
    // Help says how to come here.
    let help = program().arg("--help").output().unwrap();
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    assert!(
        help.contains("--mode validate") && help.contains("refused, 2 when"),
        "{help}"
    );
    assert_eq!(
        program().arg("--concurrency").output().unwrap().status.code(),
        Some(2)
    );
    // Where the document itself is broken the reader of YAML says where.
    std::fs::write(&path, "a: [\n").unwrap();
    let text = refused(&[]);
    assert!(
        text.starts_with(&format!("serin-proxy: {at}: ")) && text.contains("line 2"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");
    std::fs::remove_file(&path).unwrap();
    let text = refused(&[]);
    assert_eq!(text.matches("No such file").count(), 1, "{text}");
}

#[tokio::test]
async fn a_process_started_from_a_file_serves_and_ends_on_sigterm() {
    let backend = Backend::named("from file").await;
    let gateway = free_port().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bootstrap.yaml");
    let text = format!(
        r#"
static_resources:
  clusters:
    - name: c
      load_assignment:
        endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}}}]}}]
  listeners:
    - name: l
      address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                route_config:
                  virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: c}}}}]}}]
                http_filters: [{{name: envoy.filters.http.router}}]
"#,
        backend.address.port(),
        gateway.port()
    );
    std::fs::write(&path, text).unwrap();
    let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"))
        .args(["--concurrency", "1", "--config"])
        .arg(&path)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    soon("the listener", async {
        while TcpStream::connect(gateway).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(get(gateway, "/").await.2, "from file");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = soon("the end of the process", child.wait()).await.unwrap();
    assert!(status.success(), "{status}");
}
