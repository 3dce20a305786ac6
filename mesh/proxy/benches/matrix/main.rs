//! The proxy beside its peers: Envoy, HAProxy and nginx, where they are installed, in one run, taking turns.
//!
//! Processor time per request is the figure to trust on a shared machine (the kernel accounts it per process); wall times
//! and requests per second are not. Each proxy has one worker, pinned to the first processor; the load (`h2load`, from
//! nghttp2) and the backend (nginx) share the second. `SERIN_BENCH_ROUNDS` (3) and `SERIN_BENCH_REQUESTS` (30,000) say how
//! much; `ENVOY_BIN` where Envoy is; `SERIN_BENCH_ONLY` names the parts to run: `matrix`, `latency`, `memory`, `weights`,
//! `growth`, `costs`.
//!
//! The *sidecar* configuration has 100 virtual hosts, a weighted route, a retry policy, outlier detection, Istio's metrics
//! (Envoy: its own) and an error log in JSON; RBAC and rate limits join once the file format has them.

mod configs;
mod measure;
mod peers;
mod weights;

use std::process::ExitCode;

use configs::{Kind, Setup};
use measure::{Sample, h2load, median};
use peers::{Backend, Peer, Tools};

/// One row of the matrix.
struct Row {
    name: &'static str,
    setup: Setup,
    load: &'static [&'static str],
    path: &'static str,
    peers: &'static [Kind],
}

const ALL: &[Kind] = &[Kind::Serin, Kind::Envoy, Kind::HaProxy, Kind::Nginx];
const MESH: &[Kind] = &[Kind::Serin, Kind::Envoy];
const TCP: &[Kind] = &[Kind::Serin, Kind::Envoy, Kind::HaProxy];

const ROWS: &[Row] = &[
    row(
        "HTTP/1.1, 32 connections, 100 B, bare",
        Setup::Bare,
        &["--h1", "-c", "32"],
        "/",
        ALL,
    ),
    row(
        "HTTP/1.1, 2 connections, 100 B, bare",
        Setup::Bare,
        &["--h1", "-c", "2"],
        "/",
        ALL,
    ),
    row(
        "HTTP/1.1, 32 connections, 10 KB, bare",
        Setup::Bare,
        &["--h1", "-c", "32"],
        "/10k",
        ALL,
    ),
    row(
        "HTTP/1.1, 32 connections, 100 B, sidecar",
        Setup::Sidecar,
        &["--h1", "-c", "32"],
        "/",
        MESH,
    ),
    row(
        "HTTP/2 → HTTP/1.1, 8 × 10 streams, sidecar",
        Setup::Sidecar,
        &["-c", "8", "-m", "10"],
        "/",
        MESH,
    ),
    row(
        "HTTP/2 → HTTP/2, 8 × 10 streams, sidecar",
        Setup::SidecarH2,
        &["-c", "8", "-m", "10"],
        "/",
        MESH,
    ),
    row(
        "TCP, 32 connections, 100 B answers",
        Setup::Tcp,
        &["--h1", "-c", "32"],
        "/",
        TCP,
    ),
    row(
        "TCP, 8 connections, 1 MB answers",
        Setup::Tcp,
        &["--h1", "-c", "8"],
        "/1m",
        TCP,
    ),
];

const fn row(
    name: &'static str,
    setup: Setup,
    load: &'static [&'static str],
    path: &'static str,
    peers: &'static [Kind],
) -> Row {
    Row {
        name,
        setup,
        load,
        path,
        peers,
    }
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn wanted(part: &str) -> bool {
    std::env::var("SERIN_BENCH_ONLY").map_or(true, |only| only.split(',').any(|name| name == part))
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
    if wanted("weights") {
        weights::run().await?;
    }
    let Some(tools) = Tools::find() else { return Ok(()) };
    let backend = Backend::start().await?;
    if wanted("matrix") {
        matrix(&tools, &backend).await?;
    }
    if wanted("latency") {
        latency(&tools, &backend).await?;
    }
    if wanted("memory") {
        memory(&tools, &backend).await?;
    }
    if wanted("growth") {
        growth(&tools, &backend).await?;
    }
    if wanted("costs") {
        costs(&tools, &backend).await?;
    }
    Ok(())
}

async fn matrix(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    let rounds = number("SERIN_BENCH_ROUNDS", 3);
    let requests = number("SERIN_BENCH_REQUESTS", 30_000);
    println!(
        "\n| case | proxy | µs/request | user | kernel | × Envoy | requests/s |\n|---|---|---|---|---|---|---|"
    );
    for row in ROWS {
        let requests = if row.path == "/1m" {
            requests / 30
        } else {
            requests
        };
        let mut peers = Vec::new();
        for kind in row.peers {
            if let Some(peer) = Peer::start(tools, *kind, row.setup, backend).await? {
                h2load(row.load, requests / 10, &peer.url(row.path)).await?;
                peers.push((peer, Vec::new()));
            }
        }
        for _ in 0..rounds {
            for (peer, samples) in &mut peers {
                samples.push(Sample::take(peer, row.load, requests, &peer.url(row.path)).await?);
            }
        }
        let total = |samples: &[Sample]| median(samples.iter().map(Sample::total));
        let envoy = peers
            .iter()
            .find(|(peer, _)| peer.kind == Kind::Envoy)
            .map(|(_, samples)| total(samples));
        for (peer, samples) in &peers {
            let of = |pick: fn(&Sample) -> f64| median(samples.iter().map(pick));
            println!(
                "| {} | {} | {:.1} | {:.1} | {:.1} | {} | {:.0} |",
                row.name,
                peer.kind.name(),
                total(samples),
                of(|sample| sample.user),
                of(|sample| sample.kernel),
                envoy.map_or_else(|| "-".into(), |envoy| format!("{:.2}", total(samples) / envoy)),
                of(|sample| sample.rate),
            );
        }
    }
    Ok(())
}

async fn latency(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    let Some(serin) = &tools.serin else {
        eprintln!(
            "SKIPPED: latency: no serin program in SERIN_BIN_DIR (the open-loop generator is `serin load`)"
        );
        return Ok(());
    };
    println!(
        "\n| open loop at a fixed rate, HTTP/1.1, sidecar | p50 ms | p99 ms | p99.9 ms |\n|---|---|---|---|"
    );
    // Half of what the slowest of them takes, so that nobody is measured at saturation.
    let mut peers = Vec::new();
    let mut rate = f64::MAX;
    for kind in MESH {
        if let Some(peer) = Peer::start(tools, *kind, Setup::Sidecar, backend).await? {
            let sample = Sample::take(&peer, &["--h1", "-c", "32"], 20_000, &peer.url("/")).await?;
            rate = rate.min(sample.rate / 2.0);
            peers.push(peer);
        }
    }
    let direct = measure::open_loop(serin, &backend.url("/"), rate).await?;
    println!("| no proxy, {rate:.0}/s | {} |", direct.join(" | "));
    for peer in &peers {
        let figures = measure::open_loop(serin, &peer.url("/"), rate).await?;
        println!("| {}, {rate:.0}/s | {} |", peer.kind.name(), figures.join(" | "));
    }
    Ok(())
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

async fn growth(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    println!("\n| clusters and virtual hosts | µs/request | resident KB |\n|---|---|---|");
    let requests = number("SERIN_BENCH_REQUESTS", 30_000);
    for count in [10, 1_000, 10_000] {
        let Some(peer) = Peer::start(tools, Kind::Serin, Setup::Many(count), backend).await? else {
            continue;
        };
        let load = ["--h1", "-c", "32"];
        h2load(&load, requests / 10, &peer.url("/")).await?;
        let mut samples = Vec::new();
        for _ in 0..number("SERIN_BENCH_ROUNDS", 3) {
            samples.push(
                Sample::take(&peer, &load, requests, &peer.url("/"))
                    .await?
                    .total(),
            );
        }
        println!(
            "| {count} | {:.1} | {} |",
            median(samples.into_iter()),
            peer.resident()?
        );
    }
    Ok(())
}

async fn costs(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    println!(
        "\n| HTTP/1.1, 8 connections, sidecar | instructions/request (callgrind) | system calls/request (strace) |\n|---|---|---|"
    );
    for kind in MESH {
        let calls = measure::system_calls(tools, *kind, backend).await?;
        let instructions = match kind {
            Kind::Serin => measure::instructions(tools, backend).await?,
            // Under callgrind Envoy takes minutes to start.
            _ => "-".into(),
        };
        println!("| {} | {instructions} | {calls} |", kind.name());
    }
    Ok(())
}
