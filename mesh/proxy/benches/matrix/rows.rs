//! The matrix: processor time per request, by protocol, size, connections and configuration.

use std::path::Path;

use crate::configs::{Kind, Setup};
use crate::measure::{self, Sample, h2load, median};
use crate::mesh::{Down, Mesh, Up};
use crate::peers::{Backend, Peer, Tools};
use crate::{chosen, number};

/// What a row's proxies are.
#[derive(Clone, Copy)]
enum Job {
    File(Setup),
    Mesh(Down, Up),
}

/// What is sent.
#[derive(Clone, Copy)]
enum Load {
    /// By h2load, with these arguments.
    Requests(&'static [&'static str]),
    /// New mutual TLS connections with one request each.
    Connections,
    /// gRPC calls.
    Calls(&'static [&'static str]),
}

struct Row {
    name: &'static str,
    job: Job,
    load: Load,
    path: &'static str,
    peers: &'static [Kind],
}

const ALL: &[Kind] = crate::ALL;
const MESH: &[Kind] = crate::MESH;
const TCP: &[Kind] = &[Kind::Serin, Kind::Baseline, Kind::Envoy, Kind::HaProxy];

const fn row(name: &'static str, job: Job, load: Load, path: &'static str, peers: &'static [Kind]) -> Row {
    Row {
        name,
        job,
        load,
        path,
        peers,
    }
}

const BARE: Job = Job::File(Setup::Bare);
const H1: Load = Load::Requests(&["--h1", "-c", "32"]);
const LARGE: Load = Load::Requests(&["--h1", "-c", "8"]);
const H2: Load = Load::Requests(&["-c", "8", "-m", "10"]);

const ROWS: &[Row] = &[
    row("HTTP/1.1, 32 connections, 100 B, bare", BARE, H1, "/", ALL),
    row(
        "HTTP/1.1, 2 connections, 100 B, bare",
        BARE,
        Load::Requests(&["--h1", "-c", "2"]),
        "/",
        ALL,
    ),
    row("HTTP/1.1, 32 connections, 10 KB, bare", BARE, H1, "/10k", ALL),
    row(
        "HTTP/1.1, 8 connections, 1 MB answers, bare",
        BARE,
        LARGE,
        "/1m",
        ALL,
    ),
    row(
        "HTTP/1.1, TLS 1.3 in, mTLS out, 8 connections, 1 MB answers, sidecar",
        Job::Mesh(Down::Tls, Up::MutualHttp1),
        LARGE,
        "/1m",
        MESH,
    ),
    row(
        "HTTP/2 → HTTP/1.1, 8 connections, 1 MB answers, sidecar",
        Job::Mesh(Down::Plain, Up::Http1),
        Load::Requests(&["-c", "8", "-m", "1"]),
        "/1m",
        MESH,
    ),
    row(
        "HTTP/1.1, 32 connections, sidecar",
        Job::Mesh(Down::Plain, Up::Http1),
        H1,
        "/",
        MESH,
    ),
    row(
        "HTTP/1.1, 32 connections, sidecar, 5,000/s",
        Job::Mesh(Down::Plain, Up::Http1),
        Load::Requests(&["--h1", "-c", "32", "--rps", "156"]),
        "/",
        MESH,
    ),
    row(
        "HTTP/1.1, 256 connections, sidecar",
        Job::Mesh(Down::Plain, Up::Http1),
        Load::Requests(&["--h1", "-c", "256"]),
        "/",
        MESH,
    ),
    row(
        "HTTP/1.1, TLS 1.3 in, mTLS out, sidecar",
        Job::Mesh(Down::Tls, Up::MutualHttp1),
        H1,
        "/",
        MESH,
    ),
    row(
        "HTTP/2 → HTTP/1.1, 8 × 10 streams, sidecar",
        Job::Mesh(Down::Plain, Up::Http1),
        H2,
        "/",
        MESH,
    ),
    row(
        "HTTP/2 → HTTP/2, 8 × 10 streams, sidecar",
        Job::Mesh(Down::Plain, Up::Http2),
        H2,
        "/",
        MESH,
    ),
    row(
        "HTTP/2 → HTTP/2, 8 × 10 streams, sidecar, 5,000/s",
        Job::Mesh(Down::Plain, Up::Http2),
        Load::Requests(&["-c", "8", "-m", "10", "--rps", "625"]),
        "/",
        MESH,
    ),
    row(
        "HTTP/2 → HTTP/2, TLS 1.3 in, mTLS out, sidecar",
        Job::Mesh(Down::Tls, Up::MutualHttp2),
        H2,
        "/",
        MESH,
    ),
    row(
        "gRPC unary, 8 × 10 streams, sidecar",
        Job::Mesh(Down::Plain, Up::Grpc),
        Load::Calls(&["-c", "8", "-m", "10"]),
        "/bench.Echo/Unary",
        MESH,
    ),
    row(
        "new mTLS connection and one request, sidecar",
        Job::Mesh(Down::Mutual, Up::Http1),
        Load::Connections,
        "/",
        MESH,
    ),
    row(
        "TCP, 32 connections, 100 B answers",
        Job::File(Setup::Tcp),
        H1,
        "/",
        TCP,
    ),
    row(
        "TCP, 8 connections, 1 MB answers",
        Job::File(Setup::Tcp),
        LARGE,
        "/1m",
        TCP,
    ),
    row(
        "TCP, TLS 1.3 in, mTLS out, 32 connections, 100 B",
        Job::Mesh(Down::Tls, Up::MutualBytes),
        H1,
        "/",
        MESH,
    ),
];

async fn send(row: &Row, peer: &Peer, requests: usize, folder: &Path) -> anyhow::Result<f64> {
    let url = peer.url(row.path);
    match row.load {
        Load::Requests(args) => h2load(args, requests, &url).await,
        Load::Calls(args) => {
            let message = folder.join("message");
            let message = message.to_string_lossy();
            let call = [
                "-d",
                &message,
                "-H",
                "content-type: application/grpc",
                "-H",
                "te: trailers",
            ];
            h2load(&[args, &call].concat(), requests, &url).await
        }
        Load::Connections => measure::new_connections(peer, requests, folder).await,
    }
}

pub(crate) async fn run(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    let rounds = number("SERIN_BENCH_ROUNDS", 3);
    println!(
        "\n| case | proxy | µs/request | user | kernel | × Envoy | requests/s |\n|---|---|---|---|---|---|---|"
    );
    for row in ROWS.iter().filter(|row| chosen(row.name)) {
        let requests = match (row.path, row.load) {
            ("/1m", _) => number("SERIN_BENCH_REQUESTS", 30_000) / 30,
            (_, Load::Connections) => number("SERIN_BENCH_REQUESTS", 30_000) / 15,
            _ => number("SERIN_BENCH_REQUESTS", 30_000),
        };
        let mut peers = Vec::new();
        for kind in row.peers {
            let peer = match row.job {
                Job::File(setup) => Peer::start(tools, *kind, setup, backend).await?,
                Job::Mesh(down, up) => {
                    Peer::start_mesh(tools, *kind, &Mesh::new(down, up), backend, Some("0")).await?
                }
            };
            if let Some(peer) = peer {
                send(row, &peer, requests / 10, backend.folder()).await?;
                peers.push((peer, Vec::new()));
            }
        }
        for _ in 0..rounds {
            for (peer, samples) in &mut peers {
                let work = send(row, peer, requests, backend.folder());
                samples.push(Sample::of(peer, requests, work).await?);
            }
        }
        let envoy: Option<Vec<f64>> = peers
            .iter()
            .find(|(peer, _)| peer.kind == Kind::Envoy)
            .map(|(_, samples)| samples.iter().map(Sample::total).collect());
        for (peer, samples) in &peers {
            let of = |pick: fn(&Sample) -> f64| median(samples.iter().map(pick));
            // Of the same round: what disturbed one disturbed the other.
            let ratio = envoy.as_ref().map_or_else(
                || "-".into(),
                |envoy| {
                    let ratios = samples.iter().zip(envoy).map(|(own, envoy)| own.total() / envoy);
                    format!("{:.2}", median(ratios))
                },
            );
            println!(
                "| {} | {} | {:.1} | {:.1} | {:.1} | {ratio} | {:.0} |",
                row.name,
                peer.kind.name(),
                of(Sample::total),
                of(|sample| sample.user),
                of(|sample| sample.kernel),
                of(|sample| sample.rate),
            );
        }
        if std::env::var_os("SERIN_BENCH_POLITE").is_some() {
            for (peer, _) in peers {
                peer.end().await?;
            }
        }
    }
    Ok(())
}
