//! Changes through xDS under load, seen from outside: a weight of the route changes, and the proxy acknowledges it.
//!
//! The load has a fixed rate (`SERIN_BENCH_RATE`, 24,000 a second), two workers, nothing pinned; the rate that was reached
//! is printed, since a small machine gives less. serin-proxy acknowledges once every worker serves by the change; Envoy
//! acknowledges and then tells its workers, so its times are a lower bound.

use std::time::{Duration, Instant};

use anyhow::Context;
use serin_xds::ResourceType;
use serin_xds::server::Event;

use crate::measure::{Outcome, h2load_on};
use crate::mesh::{self, Down, Mesh, Up};
use crate::number;
use crate::peers::{Backend, Peer, Tools};

/// Between two changes.
const PAUSE: Duration = Duration::from_millis(15);
/// A change that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn run(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    let rate = number("SERIN_BENCH_RATE", 24_000);
    println!(
        "\n| changes of a weight through xDS under load | proxy | changes | → acknowledged p50 ms | p99 ms | requests/s | requests | failed |\n|---|---|---|---|---|---|---|---|"
    );
    for (hosts, changes) in [(10, 1_000), (1_000, 300), (10_000, 300)] {
        for kind in crate::MESH {
            let mesh = Mesh {
                hosts,
                ..Mesh::new(Down::Plain, Up::Http1)
            };
            let Some(mut peer) = Peer::start_mesh(tools, *kind, &mesh, backend, None).await? else {
                continue;
            };
            let (times, outcome, requests) = one(&mut peer, &mesh, changes, rate).await?;
            let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize] * 1000.0;
            println!(
                "| {hosts} hosts, {rate}/s wanted | {} | {} | {:.2} | {:.2} | {:.0} | {requests} | {} |",
                kind.name(),
                times.len(),
                at(0.5),
                at(0.99),
                outcome.rate,
                requests - outcome.good
            );
        }
    }
    Ok(())
}

/// Sorted times in seconds, and what became of the load and how many requests it had.
async fn one(
    peer: &mut Peer,
    mesh: &Mesh,
    changes: u32,
    rate: usize,
) -> anyhow::Result<(Vec<f64>, Outcome, usize)> {
    let clients = 32;
    // As long as the changes take when each is quick; a few more are made if the load lasts longer.
    let requests = rate * changes as usize * PAUSE.as_millis() as usize / 1000 * 5 / 4;
    let per_client = (rate / clients).to_string();
    let connections = clients.to_string();
    let url = peer.url("/");
    let load = ["--h1", "-c", &connections, "--rps", &per_client];
    let work = h2load_on("0,1", &load, requests, &url);
    tokio::pin!(work);
    let control = peer.control.as_mut().context("no control plane")?;
    let mut times = Vec::new();
    let mut change = 0;
    loop {
        tokio::select! {
            outcome = &mut work => {
                times.sort_unstable_by(f64::total_cmp);
                return Ok((times, outcome?, requests));
            }
            time = weight(control, mesh, change % 100), if change < changes => times.push(time?),
        }
        change += 1;
        if change < changes {
            tokio::select! {
                outcome = &mut work => {
                    times.sort_unstable_by(f64::total_cmp);
                    return Ok((times, outcome?, requests));
                }
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }
}

async fn weight(control: &mut crate::ads::Ads, mesh: &Mesh, weight: u32) -> anyhow::Result<f64> {
    let routes = mesh::routes(mesh, weight);
    let version = routes.version.clone();
    let start = Instant::now();
    control.source.put_all([routes]);
    let acknowledged = async {
        while let Some((_, event)) = control.events.recv().await {
            match event {
                Event::Held(held) if held.resource_type == ResourceType::Route && held.version == version => {
                    return Ok(());
                }
                Event::Refused(_, reason) => anyhow::bail!("refused: {reason}"),
                _ => {}
            }
        }
        anyhow::bail!("the control plane is gone")
    };
    tokio::time::timeout(PATIENCE, acknowledged)
        .await
        .context("a change was not acknowledged")??;
    Ok(start.elapsed().as_secs_f64())
}
