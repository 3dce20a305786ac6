//! `serin kubeconfig`: how kubectl reaches the cluster.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;

use crate::cluster::Cluster;

/// Options of `serin kubeconfig`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  export KUBECONFIG=$(serin kubeconfig --path)\n  serin kubeconfig > ~/.kube/serin.yaml"
)]
pub(crate) struct Options {
    /// Print the path of the file instead of its content
    #[arg(long)]
    path: bool,
}

/// Prints the kubeconfig of the running cluster. It holds a token: whoever has it is admin of the cluster.
pub(crate) fn run(cluster: &Cluster, options: &Options) -> anyhow::Result<ExitCode> {
    let path = cluster.kubeconfig();
    if !path.exists() {
        bail!(
            "cluster {} has no kubeconfig yet; start it with: serin up",
            cluster.name()
        );
    }
    if options.path {
        println!("{}", path.display());
    } else {
        print!(
            "{}",
            std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?
        );
    }
    Ok(ExitCode::SUCCESS)
}
