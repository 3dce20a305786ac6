//! Changes through xDS, seen from outside: a weight of the route changes, and the proxy acknowledges it.
//!
//! Two workers, nothing pinned. The load has a fixed rate (`SERIN_BENCH_RATE`, 24,000 a second, and once more at 10,000, about
//! half of what the slowest one reaches); the rate that was reached is printed, since a small machine gives less. A change
//! lasts from when it is handed to the kernel until the kernel has the acknowledgement (see [`crate::stamped`]); beside it
//! stands how long the proxy's control thread waited for a processor meanwhile, by the scheduler's account. serin-proxy
//! acknowledges once every worker serves by the change; Envoy acknowledges and then tells its workers, so its times are a
//! lower bound.

use std::time::Duration;

use anyhow::Context;
use serin_xds::server::Event;

use crate::measure::{Outcome, h2load_on};
use crate::mesh::{self, Down, Mesh, Up};
use crate::number;
use crate::peers::{Backend, Peer, Tools};

/// Between two changes: from this on, by a step each time, so that they fall at no fixed phase of anything.
const PAUSE: Duration = Duration::from_millis(12);
const STEP: Duration = Duration::from_micros(673);
const STEPS: u32 = 9;
/// A change that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn run(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    println!(
        "\n| changes of a weight through xDS under load | proxy | changes | → acknowledged p50 ms | p99 ms | worst ms | control thread waited, µs per change | requests/s | requests | failed |\n|---|---|---|---|---|---|---|---|---|---|"
    );
    for rate in [number("SERIN_BENCH_RATE", 24_000), 10_000] {
        for (hosts, changes) in [(10, 1_000), (1_000, 300), (10_000, 300)] {
            for kind in crate::MESH {
                let mesh = Mesh {
                    hosts,
                    ..Mesh::new(Down::Plain, Up::Http1)
                };
                let Some(mut peer) = Peer::start_mesh(tools, *kind, &mesh, backend, None).await? else {
                    continue;
                };
                let before = waited(&peer)?;
                let (times, outcome, requests) = under_load(&mut peer, &mesh, changes, rate).await?;
                let waited = (waited(&peer)? - before) / times.len().max(1) as f64;
                println!(
                    "| {hosts} hosts, {rate}/s wanted | {} | {} | {:.2} | {:.2} | {:.2} | {waited:.0} | {:.0} | {requests} | {} |",
                    kind.name(),
                    times.len(),
                    at(&times, 0.5),
                    at(&times, 0.99),
                    at(&times, 1.0),
                    outcome.rate,
                    requests - outcome.good
                );
            }
        }
    }
    Ok(())
}

/// A share of sorted times in seconds, in milliseconds.
pub(crate) fn at(times: &[f64], share: f64) -> f64 {
    let last = times.len().saturating_sub(1);
    times.get((last as f64 * share) as usize).copied().unwrap_or(0.0) * 1_000.0
}

/// Microseconds that the first thread, which is the control thread of either proxy, has waited for a processor.
fn waited(peer: &Peer) -> anyhow::Result<f64> {
    let pid = peer.pid()?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/schedstat"))?;
    let nanos: f64 = text
        .split_whitespace()
        .nth(1)
        .context("schedstat has no waiting time")?
        .parse()?;
    Ok(nanos / 1_000.0)
}

/// Sorted times in seconds, and what became of the load and how many requests it had.
async fn under_load(
    peer: &mut Peer,
    mesh: &Mesh,
    changes: u32,
    rate: usize,
) -> anyhow::Result<(Vec<f64>, Outcome, usize)> {
    let clients = 32;
    // As long as the changes take when each is quick; a few more are made if the load lasts longer.
    let pause = PAUSE + STEP * STEPS / 2;
    let requests = (rate as f64 * f64::from(changes) * pause.as_secs_f64() * 1.25) as usize;
    let per_client = (rate / clients).to_string();
    let connections = clients.to_string();
    let url = peer.url("/");
    let load = ["--h1", "-c", &connections, "--rps", &per_client];
    let work = h2load_on("0,1", &load, requests, &url);
    tokio::pin!(work);
    let mut times = Vec::new();
    for change in 0.. {
        tokio::select! {
            outcome = &mut work => {
                times.sort_unstable_by(f64::total_cmp);
                return Ok((times, outcome?, requests));
            }
            time = weight(peer, mesh, change % 100), if change < changes => times.push(time?),
        }
        tokio::select! {
            outcome = &mut work => {
                times.sort_unstable_by(f64::total_cmp);
                return Ok((times, outcome?, requests));
            }
            () = tokio::time::sleep(PAUSE + STEP * (change % STEPS)) => {}
        }
    }
    anyhow::bail!("more changes than can be counted")
}

/// Changes the weight; seconds until it was acknowledged.
pub(crate) async fn weight(peer: &mut Peer, mesh: &Mesh, weight: u32) -> anyhow::Result<f64> {
    let routes = mesh::routes(mesh, weight);
    let (resource_type, version) = (routes.resource_type, routes.version.clone());
    let control = peer.control.as_mut().context("no control plane")?;
    peer.stamps.arm();
    control.source.put_all([routes]);
    let acknowledged = async {
        while let Some((_, event)) = control.events.recv().await {
            match event {
                Event::Held(held) if held.resource_type == resource_type && held.version == version => {
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
    let between = peer.stamps.between().context("nothing was written")?;
    Ok(between.as_secs_f64())
}
