//! The hidden commands: the processes that a cluster consists of.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::cluster::Cluster;
use crate::cluster::server::{self, Settings};

/// Options of `serin server`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ServerOptions {
    #[command(flatten)]
    settings: Settings,
}

/// Options of `serin node`.
#[derive(Clone, Debug, Args)]
pub(crate) struct NodeOptions {
    /// Configuration, written by the server
    config: PathBuf,
}

/// Options of `serin shim`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ShimOptions {
    /// Configuration, given by the node
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// The server in the background: its progress goes to standard output until it is ready, its log to standard error.
pub(crate) async fn server(cluster: &Cluster, options: &ServerOptions) -> anyhow::Result<ExitCode> {
    let cancel = serin_kit::shutdown::on_signal()?;
    server::run(cluster, &options.settings, cancel, |line| println!("{line}")).await?;
    Ok(ExitCode::SUCCESS)
}

/// The server in the foreground: Ctrl-C stops the whole cluster, pods too.
pub(crate) async fn foreground(cluster: &Cluster, settings: &Settings) -> anyhow::Result<ExitCode> {
    let cancel = serin_kit::shutdown::on_signal()?;
    let outcome = server::run(cluster, settings, cancel, |line| eprintln!("{line}")).await;
    super::down::stop(cluster, false).await?;
    outcome?;
    Ok(ExitCode::SUCCESS)
}

/// The process that runs pods. It forks and enters namespaces, so it must come before any thread.
pub(crate) fn node(options: &NodeOptions) -> ExitCode {
    server::start_log();
    serin_workloads::node::main(&options.config)
}

/// The process that supervises one pod.
pub(crate) fn shim(options: &ShimOptions) -> ExitCode {
    serin_workloads::shim::main(&options.arguments)
}
