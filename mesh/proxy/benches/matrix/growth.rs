//! What size costs: requests while more and more clusters, virtual hosts and endpoints are loaded, and memory for them.

use anyhow::Context;

use crate::configs::Kind;
use crate::measure::{Sample, h2load, h2load_on, median};
use crate::mesh::{Down, Mesh, Up};
use crate::number;
use crate::peers::{Backend, Peer, Tools};

pub(crate) async fn run(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    println!(
        "\n| sidecar with | proxy | µs/request | resident KB | KB for each | first answer after, s |\n|---|---|---|---|---|---|"
    );
    let plain = Mesh::new(Down::Plain, Up::Http1);
    let clusters = |clusters| Mesh { clusters, ..plain };
    let hosts = |hosts| Mesh { hosts, ..plain };
    for kind in crate::MESH {
        let none = one(tools, *kind, &plain, backend).await?;
        let Some((_, empty, _)) = none else { continue };
        for count in [10, 1_000, 30_000] {
            // Envoy takes minutes and gigabytes for as many clusters.
            if *kind != Kind::Envoy || count <= 1_000 {
                let figures = one(tools, *kind, &clusters(count), backend).await?;
                print(
                    &format!("{count} clusters and virtual hosts"),
                    *kind,
                    figures,
                    empty,
                    count,
                );
            }
            // Two clusters have them.
            let figures = one(tools, *kind, &hosts(count), backend).await?;
            print(
                &format!("2 × {count} endpoints"),
                *kind,
                figures,
                empty,
                2 * count,
            );
        }
    }
    Ok(())
}

fn print(what: &str, kind: Kind, figures: Option<(f64, usize, f64)>, empty: usize, count: usize) {
    if let Some((cost, resident, first)) = figures {
        let each = resident.saturating_sub(empty) as f64 / count as f64;
        println!(
            "| {what} | {} | {cost:.1} | {resident} | {each:.2} | {first:.1} |",
            kind.name()
        );
    }
}

/// Microseconds per request, resident KB, and seconds from the start to the first request that was answered.
async fn one(
    tools: &Tools,
    kind: Kind,
    mesh: &Mesh,
    backend: &Backend,
) -> anyhow::Result<Option<(f64, usize, f64)>> {
    let requests = number("SERIN_BENCH_REQUESTS", 30_000);
    let start = std::time::Instant::now();
    let Some(peer) = Peer::start_mesh(tools, kind, mesh, backend, Some("0")).await? else {
        return Ok(None);
    };
    // The socket may be there before what is behind it.
    let url = peer.url("/");
    let answered = async {
        while h2load_on("1", &["--h1", "-c", "1"], 1, &url).await?.good == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        anyhow::Ok(start.elapsed().as_secs_f64())
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
    Ok(Some((median(samples.into_iter()), peer.resident()?, first)))
}
