//! A weight change under load: from the moment that it is here until every worker serves by it.
//!
//! In one process, because what is measured is the proxy's part: decode, compile, swap. `Proxy::apply` returns when the
//! change is live on all workers; acknowledging it is one message.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use prost::Message;
use serin_proxy::config::store::Update;
use serin_proxy::control::{Options, Proxy};
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::route::v3 as route;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Changes measured per size.
const CHANGES: u32 = 1_000;

fn table(weight: u32) -> route::RouteConfiguration {
    let target = |name: &str, weight| route::weighted_cluster::ClusterWeight {
        name: name.into(),
        weight: Some(serin_xds::pb::google::protobuf::UInt32Value { value: weight }),
        ..Default::default()
    };
    let action = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::WeightedClusters(
            route::WeightedCluster {
                clusters: vec![target("c0", 100 - weight), target("c1", weight)],
                ..Default::default()
            },
        )),
        ..Default::default()
    };
    route::RouteConfiguration {
        name: "main".into(),
        virtual_hosts: vec![route::VirtualHost {
            name: "all".into(),
            domains: vec!["*".into()],
            routes: vec![route::Route {
                r#match: Some(route::RouteMatch {
                    path_specifier: Some(route::route_match::PathSpecifier::Prefix("/".into())),
                    ..Default::default()
                }),
                action: Some(route::route::Action::Route(action)),
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// The proxy's file: two clusters of `hosts` endpoints each, of which the first is real, behind routes named `main`.
fn file(listen: u16, backend: SocketAddr, hosts: usize) -> String {
    let mut out = format!(
        "static_resources:\n  listeners:\n  - name: main\n    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {listen} }} }}\n    \
         filter_chains:\n    - filters:\n      - name: envoy.filters.network.http_connection_manager\n        typed_config:\n          \
         \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager\n          \
         stat_prefix: http\n          rds: {{ route_config_name: main }}\n          http_filters:\n          - name: envoy.filters.http.router\n  clusters:\n"
    );
    for name in ["c0", "c1"] {
        out.push_str(&format!(
            "  - name: {name}\n    type: STATIC\n    connect_timeout: 1s\n    load_assignment:\n      cluster_name: {name}\n      endpoints:\n      \
             - lb_endpoints:\n        - endpoint: {{ address: {{ socket_address: {{ address: {}, port_value: {} }} }} }}\n      - priority: 1\n        lb_endpoints:\n",
            backend.ip(),
            backend.port()
        ));
        for index in 0..hosts {
            out.push_str(&format!(
                "        - endpoint: {{ address: {{ socket_address: {{ address: 10.{}.{}.{}, port_value: 80 }} }} }}\n",
                index >> 16,
                index >> 8 & 255,
                index & 255
            ));
        }
    }
    out
}

pub(crate) async fn run() -> anyhow::Result<()> {
    println!("\n| weight changes under load, hosts | p50 µs | p99 µs | worst µs | requests meanwhile | failed |\n|---|---|---|---|---|---|");
    for hosts in [10, 1_000, 10_000] {
        one(hosts).await?;
    }
    Ok(())
}

async fn one(hosts: usize) -> anyhow::Result<()> {
    let socket = TcpListener::bind("127.0.0.1:0").await?;
    let backend = socket.local_addr()?;
    let listen = crate::peers::free_port().await?;
    let plan = serin_proxy::bootstrap::file::parse(&file(listen, backend, hosts), 2)?;
    let (proxy, _log) = Proxy::start(Options { concurrency: 2, ..plan.options })?;
    serin_proxy::control::run::apply_static(&proxy, &plan.static_resources).await?;
    change(&proxy, 0).await?;

    // Backend and clients on a thread of their own.
    let (stop, good, bad) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let load = std::thread::Builder::new().spawn({
        let (stop, good, bad) = (stop.clone(), good.clone(), bad.clone());
        let socket = socket.into_std()?;
        move || -> std::io::Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async move {
                let socket = TcpListener::from_std(socket)?;
                tokio::spawn(serve(socket));
                let mut clients = tokio::task::JoinSet::new();
                for _ in 0..8 {
                    clients.spawn(ask(listen, stop.clone(), good.clone(), bad.clone()));
                }
                clients.join_all().await;
                Ok(())
            })
        }
    })?;
    let started = Instant::now();
    while good.load(Ordering::Relaxed) < 100 {
        if started.elapsed().as_secs() > 20 {
            bail!("no request is answered");
        }
        tokio::task::yield_now().await;
    }
    let mut times = Vec::new();
    for index in 0..CHANGES {
        let start = Instant::now();
        change(&proxy, index % 100).await?;
        times.push(start.elapsed().as_micros());
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    stop.store(true, Ordering::Relaxed);
    load.join().map_err(|_| anyhow::anyhow!("the load ended badly"))??;
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!(
        "| {hosts} | {} | {} | {} | {} | {} |",
        at(0.5),
        at(0.99),
        at(1.0),
        good.load(Ordering::Relaxed),
        bad.load(Ordering::Relaxed)
    );
    proxy.stop().await;
    Ok(())
}

async fn change(proxy: &Arc<Proxy>, weight: u32) -> anyhow::Result<()> {
    let body = table(weight).encode_to_vec();
    let update = Update { name: "main", body: &body };
    match proxy.apply(ResourceType::Route, &[update], &[]).await.into_iter().next() {
        None => Ok(()),
        Some((name, refusal)) => bail!("{name}: {refusal}"),
    }
}

async fn serve(socket: TcpListener) {
    while let Ok((mut stream, _)) = socket.accept().await {
        tokio::spawn(async move {
            let mut chunk = [0u8; 4096];
            while let Ok(count) = stream.read(&mut chunk).await {
                // Heads of this benchmark come whole.
                if count == 0 || stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
                    return;
                }
            }
        });
    }
}

async fn ask(port: u16, stop: Arc<AtomicBool>, good: Arc<AtomicU64>, bad: Arc<AtomicU64>) {
    let result: anyhow::Result<()> = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let mut answer = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await?;
            answer.clear();
            while !answer.ends_with(b"ok") {
                if stream.read_buf(&mut answer).await? == 0 || !answer.starts_with(b"HTTP/1.1 200") {
                    bail!("{}", String::from_utf8_lossy(&answer));
                }
            }
            good.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
    .await
    .context("a client");
    if let Err(error) = result {
        eprintln!("{error:#}");
        bad.fetch_add(1, Ordering::Relaxed);
    }
}
