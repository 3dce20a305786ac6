//! `serin down`: stops the cluster and removes every process, namespace, mount, interface and rule of it.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;

use crate::cluster::{Cluster, process};

/// Options of `serin down`.
#[derive(Clone, Copy, Debug, Args)]
#[command(
    after_help = "Examples:\n  serin down                                 stop; the next `serin up` finds its objects again\n  serin down --purge                         stop and forget everything"
)]
pub(crate) struct Options {
    /// Forget the cluster's objects, caches and logs as well
    #[arg(long)]
    purge: bool,
}

/// Stops the cluster. Works whatever of it was killed before.
pub(crate) async fn run(cluster: &Cluster, options: &Options) -> anyhow::Result<ExitCode> {
    let ran = stop(cluster, options.purge).await?;
    let what = if options.purge { "gone" } else { "down" };
    if ran {
        println!("cluster {} is {what}", cluster.name());
    } else {
        println!(
            "cluster {} was not running; what was left of it is {what}",
            cluster.name()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Stops the server, then removes what runs without it. Returns whether a server ran.
pub(crate) async fn stop(cluster: &Cluster, purge: bool) -> anyhow::Result<bool> {
    // Locked until the end: nothing starts while this is removed.
    let stopped = process::stop(cluster).await?;
    let directory = cluster.directory().to_owned();
    tokio::task::spawn_blocking(move || serin_workloads::teardown(&directory))
        .await?
        .context("remove what pods left behind")?;
    for socket in [cluster.api_socket(), cluster.xds_socket()] {
        let _ = std::fs::remove_file(socket);
    }
    if purge && cluster.directory().exists() {
        std::fs::remove_dir_all(cluster.directory())
            .with_context(|| format!("remove {}", cluster.directory().display()))?;
    }
    Ok(stopped.ran)
}
