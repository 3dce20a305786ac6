//! Memory over time: requests, connections that come and go, clients that vanish, configuration that changes, for
//! `SERIN_SOAK_SECONDS` (60). The process must not be larger at the end than it was after the first fifth.
//!
//! Proxy, backend and clients are one process, so what grows in any of them shows.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use prost::Message;
use serin_proxy::bootstrap::file;
use serin_proxy::config::store::Update;
use serin_proxy::control::Proxy;
use serin_proxy::control::run::apply_static;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::route::v3 as route;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What may be larger at the end, bytes: allocators and tables breathe.
const BREATH: usize = 6 << 20;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn config(listen: u16, backend: SocketAddr) -> String {
    format!(
        "static_resources:\n  listeners:\n  - name: main\n    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {listen} }} }}\n    \
         traffic_direction: OUTBOUND\n    filter_chains:\n    - filters:\n      - name: envoy.filters.network.http_connection_manager\n        \
         typed_config:\n          \
         \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager\n          \
         stat_prefix: http\n          rds: {{ route_config_name: main }}\n          http_filters:\n          - name: envoy.filters.http.router\n  \
         clusters:\n  - name: c\n    type: STATIC\n    connect_timeout: 1s\n    load_assignment:\n      cluster_name: c\n      \
         endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: {}, port_value: {} }} }} }} }}] }}]\n",
        backend.ip(),
        backend.port()
    )
}

fn table(change: u32) -> Vec<u8> {
    route::RouteConfiguration {
        name: "main".into(),
        virtual_hosts: vec![route::VirtualHost {
            name: "all".into(),
            domains: vec!["*".into(), format!("host-{change}.example")],
            routes: vec![route::Route {
                r#match: Some(route::RouteMatch {
                    path_specifier: Some(route::route_match::PathSpecifier::Prefix("/".into())),
                    ..Default::default()
                }),
                action: Some(route::route::Action::Route(route::RouteAction {
                    cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster("c".into())),
                    ..Default::default()
                })),
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    }
    .encode_to_vec()
}

fn resident() -> anyhow::Result<usize> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: usize = text.split(' ').nth(1).context("statm")?.parse()?;
    Ok(pages * 4096)
}

async fn run() -> anyhow::Result<()> {
    let seconds = std::env::var("SERIN_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let whole = Duration::from_secs(seconds);
    let socket = TcpListener::bind("127.0.0.1:0").await?;
    let backend = socket.local_addr()?;
    tokio::spawn(serve(socket));
    let listen = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port();
    let plan = file::parse(&config(listen, backend), 1)?;
    let (proxy, mut log) = Proxy::start(plan.options)?;
    tokio::spawn(async move { while log.recv().await.is_some() {} });
    apply_static(&proxy, &plan.static_resources).await?;
    change(&proxy, 0).await?;
    let good = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..8 {
        clients.spawn(client(listen, number, start + whole, good.clone()));
    }
    let (mut early, mut changes) = (None, 0u32);
    while start.elapsed() < whole {
        changes += 1;
        change(&proxy, changes).await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
        if early.is_none() && start.elapsed() > whole / 5 {
            early = Some(resident()?);
        }
    }
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    let (early, late) = (early.context("too short a time")?, resident()?);
    let (tasks, open) = (proxy.tasks().await, proxy.connections().await);
    println!(
        "soak: {} requests and {changes} configuration changes in {seconds} s; {:.1} MB after a fifth, {:.1} MB at the end; \
         {open} connections and {tasks} tasks left",
        good.load(Ordering::Relaxed),
        early as f64 / 1e6,
        late as f64 / 1e6,
    );
    if late > early + BREATH {
        bail!("memory grew");
    }
    Ok(())
}

async fn change(proxy: &Proxy, number: u32) -> anyhow::Result<()> {
    let body = table(number);
    let update = Update { name: "main", body: &body };
    match proxy.apply(ResourceType::Route, &[update], &[]).await.into_iter().next() {
        None => Ok(()),
        Some((name, refusal)) => bail!("{name}: {refusal}"),
    }
}

async fn serve(socket: TcpListener) {
    while let Ok((mut stream, _)) = socket.accept().await {
        tokio::spawn(async move {
            let mut chunk = vec![0u8; 16 * 1024];
            let mut count = 0u32;
            while let Ok(read) = stream.read(&mut chunk).await {
                count += 1;
                // Now and then the connection breaks instead.
                if read == 0 || count.is_multiple_of(97) {
                    return;
                }
                if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Odd clients keep their connection for a while, even ones make a new one for each request; every seventh request is
/// left before its answer.
async fn client(port: u16, number: u32, until: Instant, good: Arc<AtomicU64>) -> anyhow::Result<()> {
    let mut round = number;
    while Instant::now() < until {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let requests = if number % 2 == 1 { 50 } else { 1 };
        for _ in 0..requests {
            round = round.wrapping_add(1);
            let path = round % 1000;
            stream.write_all(format!("GET /{path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await?;
            if round.is_multiple_of(7) {
                break;
            }
            let mut answer = Vec::new();
            while !answer.windows(4).any(|window| window == b"\r\n\r\n") || answer.len() < 60 {
                if stream.read_buf(&mut answer).await? == 0 {
                    bail!("closed: {}", String::from_utf8_lossy(&answer));
                }
            }
            if !answer.starts_with(b"HTTP/1.1 200") {
                bail!("{}", String::from_utf8_lossy(&answer));
            }
            good.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}
