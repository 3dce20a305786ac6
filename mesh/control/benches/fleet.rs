//! A weight change until the last of a fleet of proxies has acknowledged it, and what that costs.
//!
//! Proxies are real clients over a Unix socket that accept at once, in a process of their own; the control plane is the
//! real one without the watches: its input is the changed object. `FLEET` gives sizes as `proxies x services`,
//! comma-separated.
//!
//! The machine is shared by both ends, so the times are upper bounds; processor time and memory are of the control plane
//! alone.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serin_control::MeshWorld;
use serin_control::ads::{CHANGES, Input, Pump};
use serin_control::ledger::Ledger;
use serin_model::{Change, MeshConfig, Object};
use serin_xds::client::{AdsClient, AdsClientConfig, BackoffRange, Endpoint, Interest};
use serin_xds::pb::envoy::config::core::v3::Node;
use serin_xds::{FEATURE_VHDS, ResourceType};
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

type Failure = Box<dyn std::error::Error>;

/// Changes measured per fleet.
const CHANGES_MEASURED: i64 = 100;
/// Time between two changes, so that each is a lone one.
const PAUSE: Duration = Duration::from_millis(150);
const SERVER_THREAD: &str = "control";
/// Tells the other process how many proxies it is.
const PROXIES: &str = "FLEET_PROXIES";
/// And where they connect.
const SOCKET: &str = "FLEET_SOCKET";

fn service(index: usize) -> Result<Vec<Change>, Failure> {
    let name = format!("s{index}");
    let service: k8s_openapi::api::core::v1::Service = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "prod"},
        "spec": {"clusterIP": format!("10.96.{}.{}", index / 250, index % 250 + 1), "selector": {"app": name},
            "ports": [{"name": "http", "port": 8000, "targetPort": 8080, "protocol": "TCP"}]},
    }))?;
    let slice: k8s_openapi::api::discovery::v1::EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": format!("{name}-1"), "namespace": "prod", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": (1..=3).map(|host| json!({
            "addresses": [format!("10.{}.{}.{host}", 1 + index / 250, index % 250)], "conditions": {"ready": true},
        })).collect::<Vec<Value>>(),
    }))?;
    Ok(vec![
        Change::Apply(Object::Service(Arc::new(service))),
        Change::Apply(Object::EndpointSlice(Arc::new(slice))),
        weight(index, 1)?,
    ])
}

/// Rules of a service that send a part of its requests to its neighbour.
fn weight(index: usize, generation: i64) -> Result<Change, Failure> {
    let (name, percent) = (format!("s{index}"), generation % 100);
    let rules = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "prod", "generation": generation, "uid": name},
        "spec": {"hosts": [name], "http": [{"route": [
            {"destination": {"host": name}, "weight": 100 - percent},
            {"destination": {"host": format!("s{}", index.saturating_sub(1))}, "weight": percent}]}]},
    }))?;
    Ok(Change::Apply(Object::VirtualService(Arc::new(rules))))
}

fn proxy(socket: &Path, index: usize, cancel: &CancellationToken) -> AdsClient {
    let config = AdsClientConfig {
        endpoint: Endpoint::Unix(socket.into()),
        node: Node {
            id: format!(
                "sidecar~10.200.{}.{}~p{index}.prod~prod.svc.cluster.local",
                index / 250,
                index % 250
            ),
            client_features: vec![FEATURE_VHDS.into()],
            ..Node::default()
        },
        backoff: BackoffRange::default(),
    };
    let (client, mut deliveries) = AdsClient::spawn(config, cancel.clone());
    for resource_type in ResourceType::ALL {
        client.set_interest(resource_type, Interest::all());
    }
    tokio::spawn(async move {
        while let Some(delivery) = deliveries.recv().await {
            delivery.accept();
        }
    });
    client
}

/// Processor time of the control plane's threads so far.
fn server_cpu() -> Result<Duration, Failure> {
    let mut total = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let path = task?.path();
        // A thread may end between the two reads.
        let Ok(name) = std::fs::read_to_string(path.join("comm")) else {
            continue;
        };
        let Ok(times) = std::fs::read_to_string(path.join("schedstat")) else {
            continue;
        };
        if name.trim() == SERVER_THREAD {
            total += times.split(' ').next().unwrap_or_default().parse::<u64>()?;
        }
    }
    Ok(Duration::from_nanos(total))
}

fn resident_kilobytes() -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

async fn measure(server: &Runtime, proxies: usize, services: usize) -> Result<(), Failure> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("xds.sock");
    let cancel = CancellationToken::new();
    let ledger = Ledger::new();
    let (pump, ads) = Pump::new(
        MeshWorld::new(MeshConfig::default()),
        ledger.clone(),
        cancel.clone(),
    );
    let (inputs, receiver) = mpsc::channel::<Input<Change>>(CHANGES);
    server.spawn(pump.run(receiver, cancel.clone()));
    let listener = {
        let _inside = server.enter();
        UnixListener::bind(&socket)?
    };
    let router = tonic::transport::Server::builder().add_service(ads.service());
    let shutdown = cancel.clone().cancelled_owned();
    server.spawn(async move {
        router
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown)
            .await
    });

    for index in 0..services {
        inputs.send(Input::Changes(service(index)?)).await?;
    }
    inputs.send(Input::Synced).await?;
    let first = "VirtualService/prod/s1";
    ledger
        .watch(first, 1)
        .wait_for(|liveness| liveness.observed)
        .await?;
    let (memory, cpu, started) = (resident_kilobytes()?, server_cpu()?, Instant::now());
    let mut fleet = std::process::Command::new(std::env::current_exe()?)
        .env(PROXIES, proxies.to_string())
        .env(SOCKET, &socket)
        .stdin(std::process::Stdio::piped())
        .spawn()?;
    ledger
        .watch(first, 1)
        .wait_for(|liveness| liveness.needed == proxies && liveness.is_live())
        .await?;
    let joined = started.elapsed();
    // Whatever else the newcomers are still sent must not be taken for the cost of a change.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let join_cpu = server_cpu()?.saturating_sub(cpu);
    let memory = resident_kilobytes()?.saturating_sub(memory);

    let cpu = server_cpu()?;
    let mut times = Vec::new();
    for generation in 2..2 + CHANGES_MEASURED {
        let mut watch = ledger.watch(first, generation);
        let started = Instant::now();
        inputs.send(Input::Changes(vec![weight(1, generation)?])).await?;
        watch
            .wait_for(|liveness| liveness.acked == proxies && liveness.is_live())
            .await?;
        times.push(started.elapsed());
        tokio::time::sleep(PAUSE).await;
    }
    let cpu = server_cpu()?.saturating_sub(cpu);
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
    let per = |cpu: Duration, count: usize| cpu.as_secs_f64() * 1e6 / count as f64;
    println!(
        "{proxies:>6} {services:>8} {:>9.1} {:>9.1} {:>9.1} {:>14.1} {:>9.2} {:>12.0} {:>10}",
        at(0.5),
        at(0.99),
        at(1.0),
        per(cpu, proxies * CHANGES_MEASURED as usize),
        joined.as_secs_f64(),
        per(join_cpu, proxies),
        memory / proxies as u64,
    );
    // The fleet ends with its standard input.
    drop(fleet.stdin.take());
    fleet.wait()?;
    cancel.cancel();
    ads.drained().await;
    Ok(())
}

/// The other process: proxies until the standard input ends.
async fn fleet(proxies: usize, socket: &Path) -> Result<(), Failure> {
    let cancel = CancellationToken::new();
    let clients: Vec<_> = (0..proxies).map(|index| proxy(socket, index, &cancel)).collect();
    tokio::io::copy(&mut tokio::io::stdin(), &mut tokio::io::sink()).await?;
    cancel.cancel();
    for client in clients {
        client.join().await;
    }
    Ok(())
}

fn run() -> Result<(), Failure> {
    if let (Ok(proxies), Some(socket)) = (std::env::var(PROXIES), std::env::var_os(SOCKET)) {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        return runtime.block_on(fleet(proxies.parse()?, Path::new(&socket)));
    }
    let sizes = std::env::var("FLEET").unwrap_or_else(|_| "1x100,100x100,1000x100,100x1000".into());
    let server = Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name(SERVER_THREAD)
        .enable_all()
        .build()?;
    let clients = Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("proxies")
        .enable_all()
        .build()?;
    println!(
        "weight change → acknowledged by every proxy (ms); processor time and memory of the control plane"
    );
    println!(
        "{:>6} {:>8} {:>9} {:>9} {:>9} {:>14} {:>9} {:>12} {:>10}",
        "proxies", "services", "p50", "p99", "max", "µs/proxy,chg", "join s", "µs/join", "kB/proxy"
    );
    for size in sizes.split(',') {
        let (proxies, services) = size
            .split_once('x')
            .ok_or("FLEET is proxies x services, for example 100x100")?;
        clients.block_on(measure(
            &server,
            proxies.trim().parse()?,
            services.trim().parse()?,
        ))?;
    }
    server.shutdown_timeout(Duration::from_secs(5));
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fleet: {error}");
            ExitCode::FAILURE
        }
    }
}
