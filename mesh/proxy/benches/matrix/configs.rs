//! The same job in each proxy's own words.

use std::fmt::Write;

/// Which proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Serin,
    /// Another build of it, to compare with.
    Baseline,
    Envoy,
    HaProxy,
    Nginx,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Serin => "serin-proxy",
            Self::Baseline => "serin-proxy, baseline",
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
    /// That many clusters and virtual hosts.
    Many(usize),
    /// Bytes.
    Tcp,
}

/// Ports that a configuration speaks of.
#[derive(Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) listen: u16,
    pub(crate) backend: u16,
}

/// The configuration file of `kind`.
pub(crate) fn text(kind: Kind, setup: Setup, ports: &Ports, folder: &str) -> String {
    match kind {
        Kind::Serin | Kind::Baseline | Kind::Envoy => envoy_like(setup, ports),
        Kind::HaProxy => haproxy(setup, ports),
        Kind::Nginx => nginx(ports, folder),
    }
}

fn cluster(out: &mut String, name: &str, port: u16) {
    let _ = write!(
        out,
        "  - name: \"{name}\"\n    type: STATIC\n    connect_timeout: 1s\n    load_assignment:\n      cluster_name: \"{name}\"\n      \
         endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }} }} }}] }}]\n    \
         circuit_breakers: {{ thresholds: [{{ max_connections: 10000, max_pending_requests: 10000, max_requests: 10000 }}] }}\n"
    );
}

/// The one file that starts serin-proxy and Envoy alike.
fn envoy_like(setup: Setup, ports: &Ports) -> String {
    let mut out = String::from(
        "node: { id: bench, cluster: bench }\nstatic_resources:\n  listeners:\n  - name: main\n",
    );
    let _ = writeln!(
        out,
        "    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }}\n    traffic_direction: OUTBOUND\n    \
         filter_chains:\n    - filters:",
        ports.listen
    );
    if setup == Setup::Tcp {
        out.push_str(
            "      - name: envoy.filters.network.tcp_proxy\n        typed_config:\n          \
             \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy\n          \
             stat_prefix: tcp\n          cluster: main\n  clusters:\n",
        );
        cluster(&mut out, "main", ports.backend);
        return out;
    }
    // No request ids, as Envoy's benchmark FAQ asks.
    out.push_str(
        "      - name: envoy.filters.network.http_connection_manager\n        typed_config:\n          \
         \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager\n          \
         stat_prefix: http\n          normalize_path: true\n          generate_request_id: false\n          \
         http_filters:\n          - name: envoy.filters.http.router\n            typed_config: { \"@type\": \
         type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }\n          route_config:\n            name: main\n            \
         virtual_hosts:\n",
    );
    let many = match setup {
        Setup::Many(count) => count,
        Setup::Bare | Setup::Tcp => 0,
    };
    for index in 0..many {
        let _ = writeln!(
            out,
            "            - name: h{index}\n              domains: [\"svc-{index}.ns.svc.cluster.local\", \"svc-{index}.ns:80\"]\n              \
             routes: [{{ match: {{ prefix: / }}, route: {{ cluster: c{index} }} }}]"
        );
    }
    out.push_str(
        "            - name: rest\n              domains: [\"*\"]\n              \
         routes: [{ match: { prefix: / }, route: { cluster: main } }]\n  clusters:\n",
    );
    cluster(&mut out, "main", ports.backend);
    for index in 0..many {
        cluster(&mut out, &format!("c{index}"), ports.backend);
    }
    out
}

fn haproxy(setup: Setup, ports: &Ports) -> String {
    let mode = if setup == Setup::Tcp { "tcp" } else { "http" };
    format!(
        "global\n  nbthread 1\n  maxconn 8000\ndefaults\n  mode {mode}\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
         frontend f\n  bind 127.0.0.1:{}\n  default_backend b\nbackend b\n{}  server s 127.0.0.1:{}\n",
        ports.listen,
        if mode == "http" {
            "  http-reuse always\n"
        } else {
            ""
        },
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
