//! What the process holds over time, and whether it has grown.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::clients::Counts;
use crate::fixture;

/// Samples of a run.
const SAMPLES: u32 = 30;
/// What resident memory may gain beside 3 %: allocators and tables breathe.
const BREATH: usize = 1_500 << 10;
/// Descriptors that may be left: idle connections to endpoints.
const IDLE: usize = 40;

#[derive(Clone, Copy)]
struct Held {
    resident: usize,
    descriptors: usize,
    threads: usize,
    connections: usize,
}

pub(crate) struct Report {
    pid: u32,
    admin: SocketAddr,
    every: Duration,
    next: Duration,
    at_rest: usize,
    samples: Vec<Held>,
    left: Option<Held>,
}

/// A number of `/proc/<pid>/status`.
fn status(pid: u32, key: &str) -> anyhow::Result<usize> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let value = line
        .and_then(|line| line.trim_start_matches(':').split_whitespace().next())
        .with_context(|| format!("no {key} of process {pid}"))?;
    Ok(value.parse()?)
}

fn descriptors(pid: u32) -> anyhow::Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

fn median(mut of: Vec<usize>) -> usize {
    of.sort_unstable();
    of.get(of.len() / 2).copied().unwrap_or(0)
}

impl Report {
    pub(crate) fn new(pid: u32, admin: SocketAddr, whole: Duration) -> anyhow::Result<Self> {
        println!(
            "{:>8} {:>10} {:>9} {:>12} {:>12} {:>8} {:>10} {:>8}",
            "s", "RSS MB", "fds", "connections", "threads", "changes", "requests", "errors"
        );
        Ok(Self {
            pid,
            admin,
            every: whole / SAMPLES,
            next: whole / SAMPLES,
            at_rest: descriptors(pid)?,
            samples: Vec::new(),
            left: None,
        })
    }

    async fn held(&self) -> anyhow::Result<Held> {
        // Connections of clients, of all listeners; the one that asks is the admin port's.
        let (_, _, text) = fixture::get(self.admin, "/stats?filter=downstream_cx_active").await;
        let connections = text
            .lines()
            .filter(|line| line.starts_with("http.") || line.starts_with("listener."))
            .filter(|line| !line.contains(".admin."))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok())
            .max()
            .unwrap_or(0);
        Ok(Held {
            resident: status(self.pid, "VmRSS")? << 10,
            descriptors: descriptors(self.pid)?,
            threads: status(self.pid, "Threads")?,
            connections,
        })
    }

    /// Takes a sample and tells it, if it is time.
    pub(crate) async fn sample(
        &mut self,
        elapsed: Duration,
        counts: &Counts,
        changes: u32,
    ) -> anyhow::Result<()> {
        if elapsed < self.next {
            return Ok(());
        }
        self.next += self.every;
        let held = self.held().await?;
        tell(&format!("{:.0}", elapsed.as_secs_f64()), held, counts, changes);
        self.samples.push(held);
        Ok(())
    }

    /// Waits, up to ten seconds, until what clients held is gone.
    pub(crate) async fn ended(&mut self, counts: &Counts, changes: u32) -> anyhow::Result<()> {
        let mut held = self.held().await?;
        for _ in 0..100 {
            if held.connections == 0 && held.descriptors <= self.at_rest + IDLE {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            held = self.held().await?;
        }
        tell("after", held, counts, changes);
        self.left = Some(held);
        Ok(())
    }

    /// Whether the run was a good one.
    pub(crate) fn verdict(&self, counts: &Counts) -> anyhow::Result<()> {
        let fifth = self.samples.len() / 5;
        if fifth == 0 {
            bail!("too short a time for {SAMPLES} samples");
        }
        let resident = |range: std::ops::Range<usize>| {
            median(self.samples[range].iter().map(|held| held.resident).collect())
        };
        let early = resident(fifth..2 * fifth);
        let late = resident(self.samples.len() - fifth..self.samples.len());
        let limit = early + early * 3 / 100 + BREATH;
        println!(
            "soak: {}; resident {:.1} MB in the second fifth, {:.1} MB in the last, {:.1} MB allowed",
            counts.told(),
            early as f64 / 1e6,
            late as f64 / 1e6,
            limit as f64 / 1e6,
        );
        if late > limit {
            bail!("memory grew");
        }
        let left = self.left.context("the run has not ended")?;
        if left.connections > 0 {
            bail!("{} connections of clients are left", left.connections);
        }
        if left.descriptors > self.at_rest + IDLE {
            bail!(
                "{} descriptors are open, {} were before the load",
                left.descriptors,
                self.at_rest
            );
        }
        match counts.unexpected.load(Ordering::Relaxed) {
            0 => Ok(()),
            some => bail!("{some} answers were not as expected"),
        }
    }
}

fn tell(when: &str, held: Held, counts: &Counts, changes: u32) {
    println!(
        "{when:>8} {:>10.1} {:>9} {:>12} {:>12} {changes:>8} {:>10} {:>8}",
        held.resident as f64 / 1e6,
        held.descriptors,
        held.connections,
        held.threads,
        counts.answered.load(Ordering::Relaxed),
        counts.broken.load(Ordering::Relaxed),
    );
}
