//! The proxy alone, from a file in Envoy's shape.

use std::path::Path;

use serin_proxy::bootstrap::file;
use serin_proxy::control::Proxy;
use serin_proxy::control::run::apply_static;
use serin_proxy::overload;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::certificates::{Authority, Issued};
use crate::fixture::*;
use crate::tls::tls_get;
use crate::tls_upstream::Front;

const SERVER: &str = "spiffe://cluster.local/ns/prod/sa/reviews";

/// A secret in YAML's flow style, on one line.
fn secret(name: &str, issued: &Issued) -> String {
    format!(
        "{{name: {name}, tls_certificate: {{certificate_chain: {{inline_string: {:?}}}, private_key: {{inline_string: {:?}}}}}}}",
        issued.chain, issued.key
    )
}

/// A file with the client's certificate as SDS wants it; written aside and moved, so that nobody reads half of it.
fn write_sds(path: &Path, issued: &Issued) {
    let text = format!(
        "resources:\n- \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret\n  {}\n",
        secret("client", issued)
            .trim_matches(['{', '}'])
            .replacen(", tls", "\n  tls", 1)
            + "}}"
    );
    let aside = path.with_extension("new");
    std::fs::write(&aside, text).unwrap();
    std::fs::rename(aside, path).unwrap();
}

#[tokio::test]
async fn a_file_with_everything_that_xds_knows_starts_a_proxy_that_serves_tls_on_both_sides() {
    let authority = Authority::new("ca");
    let first = authority.issue(&["spiffe://cluster.local/ns/edge/sa/first"]);
    let second = authority.issue(&["spiffe://cluster.local/ns/edge/sa/second"]);
    let mut backend = Backend::named("behind tls").await;
    let mut front = Front::start(
        &authority.issue(&[SERVER, "reviews.example"]),
        Some(&authority),
        &["http/1.1"],
        backend.address,
    )
    .await;
    let gateway = free_port().await;
    let directory = tempfile::tempdir().unwrap();
    let (path, sds, roots) = (
        directory.path().join("bootstrap.yaml"),
        directory.path().join("sds.yaml"),
        directory.path().join("roots.pem"),
    );
    write_sds(&sds, &first);
    std::fs::write(&roots, &authority.pem).unwrap();
    let text = format!(
        r#"
node: {{id: alone, cluster: alone}}
static_resources:
  secrets:
  - {secret}
  clusters:
  - name: c
    type: STATIC
    connect_timeout: 2s
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.least_request
          typed_config:
            "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: reviews.example
        max_session_keys: 0
        common_tls_context:
          tls_certificate_sds_secret_configs:
          - name: client
            sds_config: {{path_config_source: {{path: {sds:?}}}, resource_api_version: V3}}
          validation_context:
            system_root_certs: {{}}
            match_typed_subject_alt_names:
            - {{san_type: DNS, matcher: {{exact: reviews.example}}}}
    max_requests_per_connection: 1
    load_assignment:
      cluster_name: c
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}
  listeners:
  - name: l
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            alpn_protocols: [h2, http/1.1]
            tls_certificate_sds_secret_configs: [{{name: server}}]
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: l
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: /}}
                route: {{cluster: c, retry_policy: {{retry_on: 5xx, num_retries: 2}}}}
          http_filters:
          - name: envoy.filters.http.rbac
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
              rules:
                action: DENY
                policies:
                  secret:
                    permissions: [{{url_path: {{path: {{prefix: /secret}}}}}}]
                    principals: [{{any: true}}]
          - name: envoy.filters.http.header_mutation
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
              mutations:
                request_mutations:
                - append: {{header: {{key: x-from-file, value: "yes"}}}}
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
"#,
        secret = secret("server", &authority.issue(&[SERVER, "gate.example"])),
        upstream = front.address.port(),
        port = gateway.port(),
    );
    std::fs::write(&path, &text).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"));
        command
            .args(["--concurrency", "1", "--config"])
            .arg(&path)
            .args(arguments)
            .env("SSL_CERT_FILE", &roots)
            .kill_on_drop(true);
        command
    };
    let checked = soon("the check of the file", run(&["--mode", "validate"]).output())
        .await
        .unwrap();
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );
    if let Some(envoy) = crate::envoy::program() {
        // Envoy's API has the system's authorities, Envoy itself has not.
        let theirs = directory.path().join("envoy.yaml");
        let named = format!("trusted_ca: {{filename: {roots:?}}}");
        std::fs::write(&theirs, text.replace("system_root_certs: {}", &named)).unwrap();
        let mut command = tokio::process::Command::new(envoy);
        command
            .args(["--mode", "validate", "-l", "error", "-c"])
            .arg(&theirs)
            .kill_on_drop(true);
        let checked = soon("Envoy's check of the file", command.output()).await.unwrap();
        assert!(
            checked.status.success(),
            "Envoy does not take the file: {}",
            String::from_utf8_lossy(&checked.stderr)
        );
    }
    let _child = run(&[]).spawn().unwrap();
    soon("the listener", async {
        while TcpStream::connect(gateway).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let client = authority.client().alpn(&["h2"]).build();
    let ask = async |path: &str| tls_get(gateway, &client, "gate.example", path).await.unwrap();
    let (code, _, body) = ask("/").await;
    assert_eq!((code, body.as_str()), (200, "behind tls"));
    assert_eq!(backend.next().await.headers["x-from-file"], "yes");
    let met = front.next().await;
    assert_eq!(met.server_name.as_deref(), Some("reviews.example"));
    assert_eq!(met.peer.unwrap(), first.der().0[0].to_vec());
    assert_eq!(ask("/secret/x").await.0, 403);
    // The certificate in the file rotates under the running proxy.
    write_sds(&sds, &second);
    let rotated = Box::pin(async {
        loop {
            assert_eq!(ask("/").await.0, 200);
            if front.next().await.peer.unwrap() == second.der().0[0].to_vec() {
                return;
            }
        }
    });
    soon("the other certificate", rotated).await;
    // A file whose content is wrong is told with the path.
    std::fs::write(&path, text.replace("num_retries: 2", "num_retries: many")).unwrap();
    let checked = run(&["--mode", "validate"]).output().await.unwrap();
    let told = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert!(!checked.status.success());
    assert!(
        told.contains("routes[0].route.retry_policy.num_retries: is not a whole number"),
        "{told}"
    );
}

/// A proxy from a file with one listener that answers 200 itself, and what the file adds.
async fn alone(more: &str) -> (std::sync::Arc<Proxy>, std::net::SocketAddr, CancellationToken) {
    let text = format!(
        r#"
static_resources:
  listeners:
  - name: l
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: l
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
{more}"#
    );
    let plan = file::parse(&text, 1).unwrap();
    let rules = plan.options.overload.clone();
    let (proxy, _log) = Proxy::start(plan.options).unwrap();
    apply_static(&proxy, &plan.static_resources).await.unwrap();
    let cancel = CancellationToken::new();
    tokio::spawn(overload::run(rules, proxy.overload(), cancel.clone()));
    let at = proxy.listener_address("l").unwrap();
    (proxy, at, cancel)
}

#[tokio::test]
async fn under_pressure_the_proxy_does_less_and_recovers() {
    let directory = tempfile::tempdir().unwrap();
    let gauge = directory.path().join("pressure");
    let press = |pressure: &str| {
        let aside = gauge.with_extension("new");
        std::fs::write(&aside, pressure).unwrap();
        std::fs::rename(aside, &gauge).unwrap();
    };
    press("0.1");
    let (_proxy, at, cancel) = alone(&format!(
        r#"
overload_manager:
  refresh_interval: 0.01s
  resource_monitors:
  - name: gauge
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.resource_monitors.injected_resource.v3.InjectedResourceConfig
      filename: {gauge:?}
  actions:
  - name: envoy.overload_actions.disable_http_keepalive
    triggers: [{{name: gauge, threshold: {{value: 0.5}}}}]
  - name: envoy.overload_actions.stop_accepting_requests
    triggers: [{{name: gauge, threshold: {{value: 0.8}}}}]
  - name: envoy.overload_actions.stop_accepting_connections
    triggers: [{{name: gauge, threshold: {{value: 0.95}}}}]
"#
    ))
    .await;
    let until = async |what: &str, wanted: fn(&(u16, http::HeaderMap, String)) -> bool| {
        soon(what, async {
            while !wanted(&get(at, "/").await) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    };
    let (code, headers, _) = get(at, "/").await;
    assert_eq!((code, headers.contains_key("connection")), (200, false));
    press("0.6");
    until("connections that end with their request", |(code, headers, _)| {
        *code == 200 && headers.get("connection").is_some_and(|value| value == "close")
    })
    .await;
    press("0.85");
    until("requests that are refused", |(code, headers, body)| {
        *code == 503 && headers["x-serin-response-flags"] == "OM" && body == "envoy overloaded"
    })
    .await;
    press("0.99");
    // A connection waits in the kernel's queue now, and is served when the pressure is gone. The last connection that
    // is let in may be the one that the proxy was waiting for when the pressure rose.
    let mut waiting = Vec::new();
    soon("a connection that waits", async {
        loop {
            let mut client = tokio::spawn(async move { get(at, "/").await });
            tokio::select! {
                answer = &mut client => drop(answer.unwrap()),
                () = tokio::time::sleep(std::time::Duration::from_millis(300)) => {
                    waiting.push(client);
                    return;
                }
            }
        }
    })
    .await;
    press("0.1");
    for client in waiting {
        assert_eq!(soon("the waiting answer", client).await.unwrap().0, 200);
    }
    cancel.cancel();
}

#[tokio::test]
async fn connections_beyond_the_limit_of_all_listeners_are_closed_at_once() {
    let (proxy, at, _cancel) = alone(
        "layered_runtime: {layers: [{name: s, static_layer: {overload.global_downstream_max_connections: 2}}]}\n",
    )
    .await;
    let held = [
        TcpStream::connect(at).await.unwrap(),
        TcpStream::connect(at).await.unwrap(),
    ];
    // Both are served, not only in the queue, before the third comes.
    soon("two connections", async {
        while proxy.connections().await < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut third = TcpStream::connect(at).await.unwrap();
    let mut nothing = Vec::new();
    let ended = soon("the end of the third", third.read_to_end(&mut nothing)).await;
    assert!(nothing.is_empty(), "{ended:?}");
    drop(held);
    soon("room for another", async {
        while proxy.connections().await > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(get(at, "/").await.0, 200);
}
