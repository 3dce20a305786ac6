//! What size costs: requests and changes while more and more clusters, virtual hosts and endpoints are loaded, memory for
//! them, and the time that it takes to take them in.
//!
//! Virtual hosts come within one route configuration, and once more as resources of their own (VHDS), as Serin's control
//! plane sends them; Envoy has those on demand only and is measured with the former. A change of a weight is of one virtual
//! host: by VHDS its message is small, in a route configuration it is as large as all of them. Changes are made without load;
//! their cost is the whole process's. `SERIN_BENCH_SIZES` says which sizes (10,1000,30000).

use anyhow::Context;

use crate::changes::{at, weight};
use crate::configs::Kind;
use crate::measure::{Sample, Spent, h2load, h2load_on, median};
use crate::mesh::{Down, Mesh, Up};
use crate::number;
use crate::peers::{Backend, Peer, Tools};

/// Changes that are measured.
const CHANGES: u32 = 100;

/// What one size costs.
struct Figures {
    /// Microseconds of processor time per request.
    request: f64,
    /// Resident, KB.
    resident: usize,
    /// Seconds from the start to the first request that was answered.
    first: f64,
    /// Sorted times of changes, seconds.
    changes: Vec<f64>,
    /// Microseconds of processor time per change.
    change: f64,
}

fn sizes() -> Vec<usize> {
    let text = std::env::var("SERIN_BENCH_SIZES").unwrap_or_else(|_| "10,1000,30000".to_owned());
    text.split(',')
        .filter_map(|size| size.trim().parse().ok())
        .collect()
}

pub(crate) async fn run(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    println!(
        "\n| sidecar with | proxy | µs/request | resident KB | KB for each | first answer after, s | weight change → acknowledged, p50 ms | p99 ms | µs of processor per change |\n|---|---|---|---|---|---|---|---|---|"
    );
    let plain = Mesh::new(Down::Plain, Up::Http1);
    for kind in crate::MESH {
        let Some(none) = one(tools, *kind, &plain, backend).await? else {
            continue;
        };
        for count in sizes() {
            // Envoy takes minutes and gigabytes for as many clusters.
            let many = *kind == Kind::Envoy && count > 1_000;
            let cases = [
                (
                    "clusters and virtual hosts",
                    count,
                    Mesh {
                        clusters: count,
                        ..plain
                    },
                    !many,
                ),
                (
                    "clusters and virtual hosts (VHDS)",
                    count,
                    Mesh {
                        clusters: count,
                        by_host: true,
                        ..plain
                    },
                    *kind != Kind::Envoy,
                ),
                // Two clusters have them.
                (
                    "endpoints",
                    2 * count,
                    Mesh {
                        hosts: count,
                        ..plain
                    },
                    true,
                ),
            ];
            for (what, number, mesh, wanted) in cases {
                if !wanted {
                    continue;
                }
                if let Some(figures) = one(tools, *kind, &mesh, backend).await? {
                    print(
                        &format!("{number} {what}"),
                        *kind,
                        &figures,
                        none.resident,
                        number,
                    );
                }
            }
        }
    }
    Ok(())
}

fn print(what: &str, kind: Kind, figures: &Figures, empty: usize, count: usize) {
    let each = figures.resident.saturating_sub(empty) as f64 / count as f64;
    println!(
        "| {what} | {} | {:.1} | {} | {each:.2} | {:.2} | {:.2} | {:.2} | {:.0} |",
        kind.name(),
        figures.request,
        figures.resident,
        figures.first,
        at(&figures.changes, 0.5),
        at(&figures.changes, 0.99),
        figures.change,
    );
}

async fn one(tools: &Tools, kind: Kind, mesh: &Mesh, backend: &Backend) -> anyhow::Result<Option<Figures>> {
    let requests = number("SERIN_BENCH_REQUESTS", 30_000);
    let Some(mut peer) = Peer::start_mesh(tools, kind, mesh, backend, Some("0")).await? else {
        return Ok(None);
    };
    // The socket may be there before what is behind it.
    let url = peer.url("/");
    let answered = async {
        while h2load_on("1", &["--h1", "-c", "1"], 1, &url).await?.good == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        anyhow::Ok(peer.started.elapsed().as_secs_f64())
    };
    let first = tokio::time::timeout(std::time::Duration::from_secs(300), answered)
        .await
        .context("nothing was answered for five minutes")??;
    // Long enough for whoever gives start-up memory back.
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    let load = ["--h1", "-c", "32"];
    h2load(&load, requests / 10, &peer.url("/")).await?;
    let mut samples = Vec::new();
    for _ in 0..number("SERIN_BENCH_ROUNDS", 3) {
        let sample = Sample::take(&peer, &load, requests, &peer.url("/")).await?;
        samples.push(sample.total());
    }
    let resident = peer.resident()?;
    // What came while it started is not asked for any more.
    if let Some(control) = &mut peer.control {
        while control.events.try_recv().is_ok() {}
    }
    weight(&mut peer, mesh, 1).await?;
    let before = Spent::of(peer.pid()?)?;
    let mut changes = Vec::new();
    for index in 0..CHANGES {
        changes.push(weight(&mut peer, mesh, 2 + index % 90).await?);
    }
    let after = Spent::of(peer.pid()?)?;
    changes.sort_unstable_by(f64::total_cmp);
    Ok(Some(Figures {
        request: median(samples.into_iter()),
        resident,
        first,
        changes,
        change: (after.nanos - before.nanos) as f64 / 1_000.0 / f64::from(CHANGES),
    }))
}
