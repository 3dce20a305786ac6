//! An open-loop HTTP load generator.
//!
//! Requests are due on a fixed schedule, whatever the server does, and their latency counts from when they were due:
//! a server that stalls is charged for everybody who would have waited (G. Tene's *coordinated omission*). Each answer
//! is attributed: to the application, when it answered badly itself, or to the system between, when the answer was
//! made on the way or never came.

mod connections;
mod outcome;
mod report;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use http::{HeaderName, HeaderValue, Method, Uri};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use connections::Connections;
use outcome::Outcome;
pub(crate) use report::{Counters, Group, Report};

/// Protocol spoken to the server, in clear text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Protocol {
    /// HTTP/1.1 with keep-alive
    #[value(name = "http1")]
    Http1,
    /// HTTP/2 with prior knowledge
    #[value(name = "http2")]
    Http2,
}

/// What to send, where and how fast.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Absolute `http://` URL.
    pub(crate) url: Uri,
    /// Method of every request.
    pub(crate) method: Method,
    /// Headers of every request; `host` replaces the authority of the URL.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    /// Requests per second.
    pub(crate) rate: f64,
    /// How long to send; until cancelled if `None`.
    pub(crate) duration: Option<Duration>,
    /// Most connections that are open at a time.
    pub(crate) connections: usize,
    /// How long a request may take, from when it was due.
    pub(crate) timeout: Duration,
    /// Protocol to speak.
    pub(crate) protocol: Protocol,
    /// Answers are counted apart by this response header, for example `x-podinfo-version`.
    pub(crate) group_by: Option<HeaderName>,
}

impl Plan {
    /// A plan with the usual settings.
    pub(crate) fn new(url: Uri, rate: f64) -> anyhow::Result<Self> {
        if url.scheme_str() != Some("http") || url.host().is_none() {
            bail!("load: {url} is not an absolute http:// URL");
        }
        if !(rate > 0.0 && rate <= RATE_MAX) {
            bail!("load: a rate of {rate} requests a second is not between 0 and {RATE_MAX}");
        }
        Ok(Self {
            url,
            method: Method::GET,
            headers: Vec::new(),
            rate,
            duration: None,
            connections: 64,
            timeout: Duration::from_secs(10),
            protocol: Protocol::Http1,
            group_by: None,
        })
    }

    fn authority(&self) -> anyhow::Result<(String, u16)> {
        let host = self.url.host().context("the URL names no host")?;
        Ok((
            host.trim_matches(['[', ']']).to_owned(),
            self.url.port_u16().unwrap_or(80),
        ))
    }
}

/// Faster than one process can schedule honestly.
const RATE_MAX: f64 = 200_000.0;
/// Requests that are due and not answered yet; past it the generator says that it cannot keep up.
const OUTSTANDING_MAX: usize = 20_000;

/// A running load. Dropping it stops it.
pub(crate) struct Load {
    counters: Arc<Mutex<Counters>>,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
    cancel: CancellationToken,
}

impl Load {
    /// Starts sending.
    pub(crate) fn start(plan: Plan, cancel: CancellationToken) -> Self {
        let counters = Arc::new(Mutex::new(Counters::default()));
        let task = tokio::spawn(send(plan, counters.clone(), cancel.clone()));
        Self {
            counters,
            task,
            cancel,
        }
    }

    /// The counts until now.
    pub(crate) fn counters(&self) -> Counters {
        self.counters.lock().clone()
    }

    /// The counts, for somebody who shows them while they grow.
    pub(crate) fn shared(&self) -> Arc<Mutex<Counters>> {
        self.counters.clone()
    }

    /// Runs the plan to its end (or to cancellation) and waits for what is in flight.
    pub(crate) async fn finish(mut self) -> anyhow::Result<Counters> {
        (&mut self.task)
            .await
            .context("the load generator ended unexpectedly")??;
        Ok(self.counters())
    }

    /// Stops sending, waits for what is in flight.
    pub(crate) async fn stop(self) -> anyhow::Result<Counters> {
        self.cancel.cancel();
        self.finish().await
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn send(plan: Plan, counters: Arc<Mutex<Counters>>, cancel: CancellationToken) -> anyhow::Result<()> {
    let (host, port) = plan.authority()?;
    let connections = Arc::new(Connections::new(host, port, plan.protocol, plan.connections));
    let plan = Arc::new(plan);
    let started = Instant::now();
    let period = Duration::from_secs_f64(1.0 / plan.rate);
    let mut in_flight = JoinSet::new();
    for turn in 0u64.. {
        let due = started + Duration::from_secs_f64(turn as f64 / plan.rate);
        if plan
            .duration
            .is_some_and(|duration| due.duration_since(started) >= duration)
        {
            break;
        }
        // A timer is good for a millisecond; between two ticks requests that are due together leave together.
        if due > Instant::now() + period.min(Duration::from_micros(500)) {
            tokio::select! {
                () = cancel.cancelled() => break,
                () = tokio::time::sleep_until(due) => {}
            }
        } else if cancel.is_cancelled() {
            break;
        }
        while in_flight.try_join_next().is_some() {}
        if in_flight.len() >= OUTSTANDING_MAX {
            bail!("load: {OUTSTANDING_MAX} requests are waiting for an answer; lower the rate");
        }
        counters.lock().sent += 1;
        let (plan, connections, counters) = (plan.clone(), connections.clone(), counters.clone());
        in_flight.spawn(async move {
            let outcome = match tokio::time::timeout_at(due + plan.timeout, connections.send(&plan)).await {
                Ok(outcome) => outcome,
                Err(_) => Outcome::no_answer("timeout"),
            };
            counters.lock().record(&outcome, due.elapsed(), started.elapsed());
        });
    }
    while in_flight.join_next().await.is_some() {}
    Ok(())
}

#[cfg(test)]
mod tests;
