//! The proxy beside its peers: Envoy, HAProxy and nginx, where they are installed, in one run, taking turns.
//!
//! Processor time per request is the figure to trust on a shared machine (the kernel accounts it per process); wall times
//! and requests per second are not. Each proxy has one worker, pinned to the first processor; the load (`h2load`, from
//! nghttp2, and an open loop of our own for latencies) and the backend ([`endpoint`]) share the second. What is said beside a proxy is its ratio
//! to Envoy in the same round, the median of all rounds. `SERIN_BENCH_ROUNDS` (3) and `SERIN_BENCH_REQUESTS` (30,000) say
//! how much; `ENVOY_BIN` where Envoy is; `SERIN_BENCH_BASELINE` names another build of serin-proxy to measure beside this
//! one; `SERIN_BENCH_ONLY` the parts to run: `matrix`, `latency`, `memory`, `weights`, `changes`, `growth`, `costs`;
//! (what each took is told on stderr; all of them take about half an hour with Envoy, most of it `matrix`, `latency` and, since
//! Envoy starts slowly under valgrind, `costs`);
//! `SERIN_BENCH_POLITE` lets proxies end by themselves, for builds that write what they counted (`hack/pgo.sh`);
//! `SERIN_BENCH_ROWS` only those rows of the matrix and of `costs` that contain this text (several with `|` between).
//! `SERIN_BENCH_KEEP` is a folder in which callgrind's output stays, for `callgrind_annotate`.
//!
//! *Bare* cases start from files. *Sidecar* cases take a sidecar's whole configuration (see [`mesh`]) from an ADS server
//! in this process, the same resources for serin-proxy and Envoy.

// The tests' helpers say so by panicking when something is wrong with a fixture.
#[path = "../../tests/it/ads.rs"]
#[allow(dead_code)]
mod ads;
#[path = "../../tests/it/certificates.rs"]
#[allow(dead_code, clippy::unwrap_used)]
mod certificates;
mod changes;
mod configs;
mod endpoint;
#[path = "../../tests/it/fixture.rs"]
#[allow(
    dead_code,
    deprecated,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]
mod fixture;
mod growth;
mod helpers;
mod latency;
mod measure;
mod mesh;
mod openloop;
mod peers;
mod rows;
mod socket;
mod stamped;
mod weights;

use std::process::ExitCode;

use configs::{Kind, Setup};
use mesh::{Down, Mesh, Up};
use peers::{Backend, Peer, Tools};

const ALL: &[Kind] = &[
    Kind::Serin,
    Kind::Baseline,
    Kind::Envoy,
    Kind::HaProxy,
    Kind::Nginx,
];
const MESH: &[Kind] = &[Kind::Serin, Kind::Baseline, Kind::Envoy];

fn number(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn wanted(part: &str) -> bool {
    std::env::var("SERIN_BENCH_ONLY").map_or(true, |only| only.split(',').any(|name| name == part))
}

/// Whether a row of this name is to be measured.
fn chosen(row: &str) -> bool {
    std::env::var("SERIN_BENCH_ROWS").map_or(true, |only| only.split('|').any(|part| row.contains(part)))
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(run()))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy benchmark: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    if let Some(result) = helpers::run(&args).await {
        return result;
    }
    let mut parts = Parts::default();
    parts.run("weights", weights::run()).await;
    let Some(tools) = Tools::find() else {
        return parts.end();
    };
    let backend = Backend::start().await?;
    parts.run("matrix", rows::run(&tools, &backend)).await;
    parts.run("latency", latency::run(&tools, &backend)).await;
    parts.run("memory", memory(&tools, &backend)).await;
    parts.run("changes", changes::run(&tools, &backend)).await;
    parts.run("growth", growth::run(&tools, &backend)).await;
    parts.run("costs", costs(&tools, &backend)).await;
    parts.end()
}

/// Parts of a run: one that fails is told, and the others are measured all the same.
#[derive(Default)]
struct Parts {
    failed: Vec<&'static str>,
}

impl Parts {
    async fn run(&mut self, name: &'static str, part: impl Future<Output = anyhow::Result<()>>) {
        if !wanted(name) {
            return;
        }
        let began = std::time::Instant::now();
        let result = part.await;
        eprintln!("{name}: {:.0} s", began.elapsed().as_secs_f64());
        if let Err(error) = result {
            eprintln!("{name}: FAILED: {error:#}");
            self.failed.push(name);
        }
    }

    fn end(self) -> anyhow::Result<()> {
        anyhow::ensure!(self.failed.is_empty(), "failed: {}", self.failed.join(", "));
        Ok(())
    }
}

async fn memory(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    println!(
        "\n| memory, KB | empty | 1,000 clusters and routes | per idle connection (1,000, each after one request) |\n|---|---|---|---|"
    );
    for kind in ALL {
        let Some(peer) = Peer::start(tools, *kind, Setup::Bare, backend).await? else {
            continue;
        };
        // Long enough for whoever gives start-up memory back.
        tokio::time::sleep(std::time::Duration::from_secs(6)).await;
        let empty = peer.resident()?;
        let per_connection = measure::idle_connections(&peer, 1_000).await?;
        drop(peer);
        let many = match Peer::start(tools, *kind, Setup::Many(1_000), backend).await? {
            Some(peer) => {
                tokio::time::sleep(std::time::Duration::from_secs(6)).await;
                peer.resident()?.to_string()
            }
            None => "-".into(),
        };
        println!("| {} | {empty} | {many} | {per_connection:.1} |", kind.name());
    }
    Ok(())
}

/// What costs are told of: name, what clients and endpoints speak, how it is loaded.
const WIRES: &[(&str, Down, Up, &[&str])] = &[
    ("HTTP/1.1", Down::Plain, Up::Http1, &["--h1", "-c", "8"]),
    (
        "HTTP/1.1, TLS 1.3 in, mTLS out",
        Down::Tls,
        Up::MutualHttp1,
        &["--h1", "-c", "8"],
    ),
    (
        "HTTP/2 → HTTP/1.1",
        Down::Plain,
        Up::Http1,
        &["-c", "8", "-m", "10"],
    ),
    (
        "HTTP/2 → HTTP/2",
        Down::Plain,
        Up::Http2,
        &["-c", "8", "-m", "10"],
    ),
    (
        "HTTP/2 → HTTP/2, TLS 1.3 in, mTLS out",
        Down::Tls,
        Up::MutualHttp2,
        &["-c", "8", "-m", "10"],
    ),
];

async fn costs(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    println!(
        "\n| sidecar, 8 connections (× 10 streams) | proxy | instructions/request in user space (callgrind) | system calls/request (strace) |\n|---|---|---|---|"
    );
    for (name, down, up, load) in WIRES.iter().filter(|wire| chosen(wire.0)) {
        let mesh = Mesh::new(*down, *up);
        for kind in MESH {
            if tools.command(*kind, std::path::Path::new("")).is_none() {
                continue;
            }
            let calls = measure::system_calls(tools, *kind, &mesh, load, backend).await?;
            let instructions = measure::instructions(tools, *kind, &mesh, load, backend, name).await?;
            println!("| {name} | {} | {instructions} | {calls} |", kind.name());
        }
    }
    Ok(())
}
