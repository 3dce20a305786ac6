//! Memory over time: the program under load and churn of everything that comes and goes, for `SERIN_SOAK_SECONDS` (60).
//!
//! What comes and goes: connections (HTTP/1 and HTTP/2, plain and mutual TLS, kept and not), requests (answered, broken off
//! by their endpoint, cancelled, left half sent, read slowly), routes, endpoints, clusters, listeners and certificates (all
//! over ADS). The proxy is a process of its own, so that what grows in the load does not show; what it says of errors goes to
//! the file `SERIN_SOAK_LOG`, if there is one.
//!
//! Every thirtieth of the time a line tells its resident memory, descriptors, threads and connections. The rule by which the
//! run fails ([`report::Report::verdict`]): the median of resident memory in the last fifth may exceed that of the second
//! fifth by 3 % and 1.5 MB; once the load is gone, no connection of a client and no more descriptors than before the load but
//! for idle connections to endpoints may be left; and no answer may be other than expected.

// The tests' helpers say so by panicking when something is wrong with a fixture.
#[path = "../../tests/it/ads.rs"]
#[allow(dead_code)]
mod ads;
mod arrangement;
#[path = "../../tests/it/certificates.rs"]
#[allow(dead_code, clippy::unwrap_used)]
mod certificates;
mod clients;
#[path = "../../tests/it/fixture.rs"]
#[allow(
    dead_code,
    deprecated,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]
mod fixture;
mod report;

use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::net::TcpStream;

use arrangement::Arrangement;
use clients::{Counts, Target};
use report::Report;

/// Clients at once.
const CLIENTS: u32 = 14;
/// Between two changes of configuration.
const PAUSE: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(run()))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    let seconds = std::env::var("SERIN_SOAK_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(60);
    let whole = Duration::from_secs(seconds);
    let mut arrangement = Arrangement::start().await?;
    let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"))
        .arg("--config")
        .arg(arrangement.bootstrap())
        .args(["--concurrency", "2"])
        .stdout(Stdio::null())
        .stderr(match std::env::var_os("SERIN_SOAK_LOG") {
            Some(path) => std::fs::File::create(path).context("SERIN_SOAK_LOG")?.into(),
            None => Stdio::null(),
        })
        .kill_on_drop(true)
        .spawn()
        .context("starting serin-proxy")?;
    let up = async {
        for at in [arrangement.plain, arrangement.secure] {
            while TcpStream::connect(at).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), up)
        .await
        .context("no listener after 20 s")?;
    let pid = child.id().context("serin-proxy has ended")?;
    let mut report = Report::new(pid, arrangement.admin, whole)?;
    let counts = Arc::new(Counts::default());
    let start = Instant::now();
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..CLIENTS {
        let target = Target {
            plain: arrangement.plain,
            secure: arrangement.secure,
            tls: arrangement.client_tls(),
            until: start + whole,
            counts: counts.clone(),
        };
        clients.spawn(clients::client(number, target));
    }
    let mut changes = 0u32;
    while start.elapsed() < whole {
        changes += 1;
        arrangement.change(changes);
        tokio::time::sleep(PAUSE).await;
        report.sample(start.elapsed(), &counts, changes).await?;
        if let Some(status) = child.try_wait()? {
            bail!("serin-proxy has ended: {status}");
        }
    }
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    arrangement.end();
    let refused = arrangement.refusals();
    report.ended(&counts, changes).await?;
    child.kill().await?;
    if let Some(refused) = refused.first() {
        bail!("{} resources were refused, the first: {refused}", refused.len());
    }
    report.verdict(&counts)
}
