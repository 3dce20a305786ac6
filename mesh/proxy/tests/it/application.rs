//! An application that the proxy starts, and with which it ends.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::ads::Ads;
use crate::fixture::*;

/// A listener that answers everything with `hello`, and an admin port; with a control plane at that socket, if there is one.
fn bootstrap(gateway: SocketAddr, admin: SocketAddr, control: Option<&Path>) -> String {
    let (dynamic, cluster) = match control {
        None => (String::new(), String::new()),
        Some(socket) => (
            "dynamic_resources:
  ads_config: {api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}
  cds_config: {resource_api_version: V3, ads: {}}
  lds_config: {resource_api_version: V3, ads: {}}
"
            .to_owned(),
            format!(
                "  clusters:
  - name: xds
    http2_protocol_options: {{}}
    load_assignment: {{cluster_name: xds, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{pipe: {{path: {socket}}}}}}}}}]}}]}}
",
                socket = socket.display(),
            ),
        ),
    };
    format!(
        r#"node: {{id: n, cluster: c}}
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}
{dynamic}static_resources:
  listeners:
    - name: l
      address: {{socket_address: {{address: 127.0.0.1, port_value: {gateway}}}}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                route_config:
                  virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200, body: {{inline_string: hello}}}}}}]}}]
                http_filters: [{{name: envoy.filters.http.router}}]
{cluster}"#,
        admin = admin.port(),
        gateway = gateway.port(),
    )
}

/// A proxy with an application, in a folder of its own.
struct Pair {
    gateway: SocketAddr,
    admin: SocketAddr,
    folder: tempfile::TempDir,
}

impl Pair {
    async fn new() -> Self {
        Self {
            gateway: free_port().await,
            admin: free_port().await,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// Starts the proxy with these words for its application, which runs in the folder.
    fn start(&self, control: Option<&Path>, application: &[&str]) -> Child {
        let config = self.folder.path().join("bootstrap.yaml");
        std::fs::write(&config, bootstrap(self.gateway, self.admin, control)).unwrap();
        Command::new(env!("CARGO_BIN_EXE_serin-proxy"))
            .args(["--concurrency", "1", "--config"])
            .arg(&config)
            .arg("--")
            .args(application)
            .current_dir(self.folder.path())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// Waits until the application has written that file.
    async fn wrote(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        soon(name, async {
            loop {
                match std::fs::read_to_string(&path) {
                    Ok(text) if text.ends_with('\n') => return text,
                    _ => tokio::task::yield_now().await,
                }
            }
        })
        .await
    }
}

fn signal(child: &Child, signal: Signal) {
    let id = i32::try_from(child.id().unwrap()).unwrap();
    kill(Pid::from_raw(id), signal).unwrap();
}

async fn exit_code(mut child: Child) -> Option<i32> {
    soon("the end of the process", child.wait()).await.unwrap().code()
}

#[tokio::test]
async fn an_application_is_held_until_the_configuration_is_whole_and_the_proxy_ends_with_its_exit_code() {
    let pair = Pair::new().await;
    let socket = pair.folder.path().join("xds.sock");
    let script = format!(
        "curl -s http://{}/ready > ready; curl -s http://{}/ > answer; echo >> answer; read line; exit 7",
        pair.admin, pair.gateway
    );
    let mut child = pair.start(Some(&socket), &["sh", "-c", &script]);
    // It serves what the file has, but its control plane has not spoken yet.
    soon("the listener", async {
        while tokio::net::TcpStream::connect(pair.gateway).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(get(pair.gateway, "/").await.2, "hello");
    let (status, _, state) = get(pair.admin, "/ready").await;
    assert_eq!((status, state.trim()), (503, "PRE_INITIALIZING"));
    assert!(!pair.folder.path().join("ready").exists(), "it has begun");

    let _control = Ads::start(&socket).unwrap();
    assert_eq!(pair.wrote("answer").await, "hello\n");
    let ready = std::fs::read_to_string(pair.folder.path().join("ready")).unwrap();
    assert_eq!(ready.trim(), "LIVE", "when it began");
    // The proxy's standard input is the application's.
    let stdin = child.stdin.take().unwrap().into_owned_fd().unwrap();
    std::fs::File::from(stdin).write_all(b"\n").unwrap();
    assert_eq!(exit_code(child).await, Some(7));
    assert!(tokio::net::TcpStream::connect(pair.gateway).await.is_err());
}

#[tokio::test]
async fn an_application_hears_a_signal_first_and_is_served_until_it_has_ended() {
    for (number, name) in [(Signal::SIGTERM, "TERM"), (Signal::SIGINT, "INT")] {
        let pair = Pair::new().await;
        let script = format!(
            "trap 'echo told > told; while [ ! -e let ]; do sleep 0.01; done; exit 3' {name}; \
             echo up > up; while :; do sleep 0.01; done"
        );
        let child = pair.start(None, &["sh", "-c", &script]);
        pair.wrote("up").await;
        signal(&child, number);
        pair.wrote("told").await;
        let (status, headers, body) = get(pair.gateway, "/").await;
        assert_eq!((status, body.as_str()), (200, "hello"));
        assert!(!headers.contains_key("connection"), "it still needs its way out");
        std::fs::write(pair.folder.path().join("let"), "").unwrap();
        assert_eq!(exit_code(child).await, Some(3), "{name}");
    }
}

#[tokio::test]
async fn an_application_that_does_not_hear_is_ended_by_the_second_signal() {
    let pair = Pair::new().await;
    let script = "trap 'echo told > told' TERM; echo $$ > up; while :; do sleep 0.01; done";
    let child = pair.start(None, &["sh", "-c", script]);
    let id: i32 = pair.wrote("up").await.trim().parse().unwrap();
    signal(&child, Signal::SIGTERM);
    pair.wrote("told").await;
    signal(&child, Signal::SIGTERM);
    assert_eq!(exit_code(child).await, Some(0));
    let gone = async {
        while kill(Pid::from_raw(id), None).is_ok() {
            tokio::task::yield_now().await;
        }
    };
    soon("the end of the application", gone).await;
}

#[tokio::test]
async fn the_end_of_an_application_by_a_signal_is_told_as_a_shell_tells_it_and_one_that_is_not_there_by_its_name()
 {
    let pair = Pair::new().await;
    let child = pair.start(None, &["sh", "-c", "kill -9 $$"]);
    assert_eq!(exit_code(child).await, Some(137));

    let pair = Pair::new().await;
    let child = pair.start(None, &["./not-there", "--port", "80"]);
    let output = soon("the end of the process", child.wait_with_output())
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("starting the application ./not-there: No such file"),
        "{text}"
    );
    assert!(text.contains("check the words after --"), "{text}");
}

#[tokio::test]
async fn an_application_cannot_be_handed_over_to_a_successor() {
    let output = Command::new(env!("CARGO_BIN_EXE_serin-proxy"))
        .args(["--config", "a.yaml", "--restart-socket", "b.sock", "--", "sh"])
        .output()
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("cannot be used with"), "{text}");
}
