//! The story that `serin demo` plays, with real processes, a real git repository and real HTTP traffic: version 1 under
//! load, a good version 2 shifted step by step and promoted, a bad version 3 stopped and rolled back, and not one
//! request lost to the system itself.
//!
//! * [`story`]: what happens in which order.
//! * [`repository`]: the git repository that is pushed to.
//! * [`observe`]: watches on the cluster's objects, as a timeline.
//! * [`view`]: the timeline and the live line on the terminal.
//! * [`report`]: the figures, as text and as JSON; whether the story went as told.

mod observe;
mod report;
mod repository;
mod story;
mod view;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use crate::cluster::{Cluster, process};
use crate::commands::{down, parse_duration};

/// Options of `serin demo`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "The cluster of the demo is called `demo`; with --keep look at it with: serin --name demo status\nExit code 0 only if the story went as told and no request was lost.\n\nExamples:\n  serin demo\n  serin demo --report report.json\n  serin demo --keep"
)]
pub(crate) struct Options {
    /// Leave the cluster running afterwards
    #[arg(long)]
    keep: bool,
    /// Write the report to this file, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Requests a second
    #[arg(long, default_value_t = 200.0)]
    rate: f64,
    /// Port of the gateway on this machine [default: 8080, or a free one]
    #[arg(long)]
    gateway_port: Option<u16>,
    /// How long each release may take before the story has failed
    #[arg(long, value_parser = parse_duration, default_value = "90s", hide = true)]
    patience: Duration,
}

/// Plays the story. The cluster is removed afterwards, also after Ctrl-C, unless `--keep` says otherwise.
pub(crate) async fn run(cluster: &Cluster, options: &Options) -> anyhow::Result<ExitCode> {
    if let Some(pid) = process::running(cluster)? {
        anyhow::bail!(
            "a demo is already running (process {pid}); stop it with: serin --name {} down --purge",
            cluster.name()
        );
    }
    let cancel = serin_kit::shutdown::on_signal().context("watch for Ctrl-C")?;
    down::stop(cluster, true)
        .await
        .context("clear what an earlier demo left")?;
    let told = tokio::select! {
        told = story::tell(cluster, options) => told,
        () = cancel.cancelled() => Err(anyhow::anyhow!("interrupted")),
    };
    let outcome = match told {
        Ok(report) => {
            println!("\n{}", report.to_text());
            if let Some(path) = &options.report {
                let json = serde_json::to_string_pretty(&report)?;
                std::fs::write(path, json + "\n").with_context(|| format!("write {}", path.display()))?;
            }
            Ok(if report.went_as_told() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Err(error) => Err(error),
    };
    if options.keep && !cancel.is_cancelled() {
        println!(
            "\nthe cluster is still running; look at it with: serin --name {} status",
            cluster.name()
        );
        println!("stop it with: serin --name {} down --purge", cluster.name());
    } else {
        if outcome.is_err() {
            keep_log(cluster);
        }
        down::stop(cluster, true)
            .await
            .context("remove the demo's cluster")?;
    }
    outcome
}

/// A story that broke off leaves the server's log beside the directory that is removed.
fn keep_log(cluster: &Cluster) {
    let kept = cluster.directory().with_extension("log");
    if std::fs::copy(cluster.log(), &kept).is_ok() {
        eprintln!("the server's log is in {}", kept.display());
    }
}
