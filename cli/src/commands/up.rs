//! `serin up`: starts the cluster on this machine, or says that it runs.

use std::process::ExitCode;
use std::time::Instant;

use clap::Args;

use crate::cluster::server::Settings;
use crate::cluster::{Cluster, process};
use crate::output::{Mood, paint};

/// Options of `serin up`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Pods and their proxies outlive the server: after a crash, `serin up` adopts what still runs.\n\nExamples:\n  serin up\n  serin up --gateway-port 8088\n  serin --name other up --gateway-port 8081\n  serin up --foreground                      stay attached; Ctrl-C stops the cluster"
)]
pub(crate) struct Options {
    #[command(flatten)]
    settings: Settings,
    /// Stay in the foreground and print the log; Ctrl-C stops the cluster
    #[arg(long)]
    foreground: bool,
}

/// Starts the cluster.
pub(crate) async fn run(cluster: &Cluster, options: &Options) -> anyhow::Result<ExitCode> {
    if process::running(cluster)?.is_some() {
        println!("cluster {} is already running", cluster.name());
        return Ok(ExitCode::SUCCESS);
    }
    if options.foreground {
        return super::internal::foreground(cluster, &options.settings).await;
    }
    let started = Instant::now();
    process::start(cluster, &options.settings.to_arguments(), |line| {
        eprintln!("  {line}")
    })
    .await?;
    println!(
        "cluster {} is {} after {:.1} s",
        cluster.name(),
        paint("ready", Mood::Good),
        started.elapsed().as_secs_f64()
    );
    println!("  gateway   http://127.0.0.1:{}", options.settings.gateway_port);
    if let Some(address) = cluster.webhook_address() {
        println!("  webhooks  {address}");
    }
    println!("  kubectl   export KUBECONFIG={}", cluster.kubeconfig().display());
    println!("  next      serin status · serin demo · serin down");
    Ok(ExitCode::SUCCESS)
}
