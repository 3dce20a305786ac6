//! The same job in each proxy's own words.

use std::fmt::Write;

/// Which proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Serin,
    Envoy,
    HaProxy,
    Nginx,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Serin => "serin-proxy",
            Self::Envoy => "Envoy",
            Self::HaProxy => "HAProxy",
            Self::Nginx => "nginx",
        }
    }
}

/// What it is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Setup {
    /// One route to one cluster.
    Bare,
    /// 100 virtual hosts and everything on.
    Sidecar,
    /// The same towards an HTTP/2 backend.
    SidecarH2,
    /// That many clusters and virtual hosts.
    Many(usize),
    /// Bytes.
    Tcp,
}

/// Ports that a configuration speaks of.
pub(crate) struct Ports {
    pub(crate) listen: u16,
    pub(crate) backend: u16,
    pub(crate) backend2: u16,
}

/// The configuration file of `kind`.
pub(crate) fn text(kind: Kind, setup: Setup, ports: &Ports, folder: &str) -> String {
    match kind {
        Kind::Serin => envoy_like(setup, ports, false),
        Kind::Envoy => envoy_like(setup, ports, true),
        Kind::HaProxy => haproxy(setup, ports),
        Kind::Nginx => nginx(ports, folder),
    }
}

fn cluster(out: &mut String, name: &str, port: u16, http2: bool, sidecar: bool, envoy: bool) {
    let _ = write!(
        out,
        "  - name: \"{name}\"\n    type: STATIC\n    connect_timeout: 1s\n    load_assignment:\n      cluster_name: \"{name}\"\n      \
         endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }} }} }}] }}]\n"
    );
    if sidecar {
        out.push_str("    outlier_detection: { consecutive_5xx: 5, base_ejection_time: 30s }\n");
    }
    out.push_str(
        "    circuit_breakers: { thresholds: [{ max_connections: 10000, max_pending_requests: 10000, max_requests: 10000 }] }\n",
    );
    match (http2, envoy) {
        (false, _) => {}
        (true, false) => out.push_str("    http2_protocol_options: {}\n"),
        (true, true) => out.push_str(
            "    typed_extension_protocol_options:\n      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \
             \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        \
             explicit_http_config: { http2_protocol_options: {} }\n",
        ),
    }
}

fn envoy_like(setup: Setup, ports: &Ports, envoy: bool) -> String {
    let mut out = String::from("node: { id: bench, cluster: bench }\nstatic_resources:\n  listeners:\n  - name: main\n");
    let _ = writeln!(
        out,
        "    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }}\n    traffic_direction: OUTBOUND\n    \
         filter_chains:\n    - filters:",
        ports.listen
    );
    let sidecar = matches!(setup, Setup::Sidecar | Setup::SidecarH2);
    let http2 = setup == Setup::SidecarH2;
    let port = if http2 { ports.backend2 } else { ports.backend };
    if setup == Setup::Tcp {
        out.push_str(
            "      - name: envoy.filters.network.tcp_proxy\n        typed_config:\n          \
             \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy\n          \
             stat_prefix: tcp\n          cluster: main\n  clusters:\n",
        );
        cluster(&mut out, "main", port, false, false, envoy);
        return out;
    }
    out.push_str(
        "      - name: envoy.filters.network.http_connection_manager\n        typed_config:\n          \
         \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager\n          \
         stat_prefix: http\n          normalize_path: true\n",
    );
    if !sidecar {
        // As Envoy's benchmark FAQ asks.
        out.push_str("          generate_request_id: false\n");
    }
    if sidecar && envoy {
        // serin-proxy writes failed requests as JSON without being told.
        out.push_str(
            "          access_log:\n          - name: envoy.access_loggers.file\n            \
             filter: { status_code_filter: { comparison: { op: GE, value: { default_value: 500, runtime_key: x } } } }\n            \
             typed_config:\n              \
             \"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog\n              path: /dev/null\n              \
             log_format: { json_format: { path: \"%REQ(:PATH)%\", code: \"%RESPONSE_CODE%\", flags: \"%RESPONSE_FLAGS%\" } }\n",
        );
    }
    out.push_str(
        "          http_filters:\n          - name: envoy.filters.http.router\n            typed_config: { \"@type\": \
         type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }\n          route_config:\n            name: main\n            \
         virtual_hosts:\n",
    );
    let many = match setup {
        Setup::Many(count) => count,
        _ => 100,
    };
    if setup != Setup::Bare {
        for index in 0..many {
            let target = if sidecar { "main".to_owned() } else { format!("c{index}") };
            let _ = writeln!(
                out,
                "            - name: h{index}\n              domains: [\"svc-{index}.ns.svc.cluster.local\", \"svc-{index}.ns:80\"]\n              \
                 routes: [{{ match: {{ prefix: / }}, route: {{ cluster: {target} }} }}]"
            );
        }
    }
    let action = if sidecar {
        "{ weighted_clusters: { clusters: [{ name: main, weight: 90 }, { name: canary, weight: 10 }] }, timeout: 15s, \
         retry_policy: { retry_on: \"connect-failure,refused-stream,reset\", num_retries: 2 } }"
    } else {
        "{ cluster: main }"
    };
    let _ = writeln!(
        out,
        "            - name: rest\n              domains: [\"*\"]\n              routes: [{{ match: {{ prefix: / }}, route: {action} }}]\n  clusters:"
    );
    cluster(&mut out, "main", port, http2, sidecar, envoy);
    if sidecar {
        cluster(&mut out, "canary", port, http2, sidecar, envoy);
    } else if setup != Setup::Bare {
        for index in 0..many {
            cluster(&mut out, &format!("c{index}"), port, false, false, envoy);
        }
    }
    out
}

fn haproxy(setup: Setup, ports: &Ports) -> String {
    let mode = if setup == Setup::Tcp { "tcp" } else { "http" };
    format!(
        "global\n  nbthread 1\n  maxconn 8000\ndefaults\n  mode {mode}\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
         frontend f\n  bind 127.0.0.1:{}\n  default_backend b\nbackend b\n{}  server s 127.0.0.1:{}\n",
        ports.listen,
        if mode == "http" { "  http-reuse always\n" } else { "" },
        ports.backend
    )
}

fn nginx(ports: &Ports, folder: &str) -> String {
    format!(
        "worker_processes 1; daemon off; master_process off; pid {folder}/proxy.pid; error_log {folder}/proxy.err;\n\
         events {{ worker_connections 8000; }}\nhttp {{ access_log off; keepalive_requests 1000000000;\n\
         upstream u {{ server 127.0.0.1:{}; keepalive 64; keepalive_requests 1000000000; }}\n\
         server {{ listen 127.0.0.1:{} backlog=4096; location / {{ proxy_pass http://u; proxy_http_version 1.1; \
         proxy_set_header Connection \"\"; }} }} }}\n",
        ports.backend, ports.listen
    )
}

/// The backend: nginx, HTTP/1.1 and HTTP/2 in the clear.
pub(crate) fn backend(ports: &Ports, folder: &str) -> String {
    let small = "0123456789".repeat(10);
    format!(
        "worker_processes 1; daemon off; master_process off; pid {folder}/backend.pid; error_log {folder}/backend.err;\n\
         events {{ worker_connections 8000; }}\nhttp {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 3600; \
         sendfile on; tcp_nopush on; root {folder};\n\
         server {{ listen 127.0.0.1:{} backlog=4096; listen 127.0.0.1:{} http2 backlog=4096;\n\
         location = /10k {{ }} location = /1m {{ }} location / {{ return 200 \"{small}\"; }} }} }}\n",
        ports.backend, ports.backend2
    )
}
