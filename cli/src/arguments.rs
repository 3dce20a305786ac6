//! What can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::cluster::Cluster;
use crate::commands::{
    build, completion, down, image, internal, judge, kubeconfig, load, status, up, version, wait,
};
use crate::demo;

/// Takes a git push to safe production: GitOps, progressive delivery and a service mesh in one system.
#[derive(Debug, Parser)]
#[command(
    name = "serin",
    version,
    propagate_version = true,
    after_help = "Examples:\n  serin up                                   start the cluster on this machine\n  serin status                               what runs, what is being rolled out, what is live\n  serin wait vs/reviews --for=live           until every proxy has acknowledged the route\n  serin demo                                 play the story from push to rollback\n  export KUBECONFIG=$(serin kubeconfig --path); kubectl get pods -A"
)]
pub(crate) struct Arguments {
    /// Name of the cluster on this machine [default: default; `demo` for the demo]
    #[arg(long, global = true, env = "SERIN_CLUSTER")]
    name: Option<String>,
    /// Directory that holds the clusters [default: $XDG_STATE_HOME/serin or ~/.local/state/serin]
    #[arg(long, global = true, env = "SERIN_HOME", hide_env_values = true)]
    home: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the cluster on this machine, or adopt the one that still runs
    Up(up::Options),
    /// Stop the cluster and remove every process, namespace and rule of it
    Down(down::Options),
    /// Play the story: a good release promoted, a bad one rolled back
    Demo(demo::Options),
    /// Show sources, rollouts and how live the routes are
    Status(status::Options),
    /// Wait until an object is live, ready, or in a condition
    Wait(wait::Options),
    /// Send HTTP requests on a fixed schedule and report what became of them
    Load(load::Options),
    /// The programs that stand for container images
    #[command(subcommand)]
    Image(image::Command),
    /// Print what a kustomization builds, as `kustomize build` does
    Build(build::Options),
    /// Replay recorded measurements: is the canary worse, and how sure is that?
    Judge(judge::Options),
    /// Print the kubeconfig of the cluster, or its path
    Kubeconfig(kubeconfig::Options),
    /// Print the version
    Version(version::Options),
    /// Print a completion script for a shell
    Completion(completion::Options),
    /// The process of the cluster (started by `up`)
    #[command(hide = true)]
    Server(internal::ServerOptions),
    /// The process that runs pods (started by the server)
    #[command(hide = true)]
    Node(internal::NodeOptions),
    /// The process that supervises one pod (started by the node)
    #[command(hide = true)]
    Shim(internal::ShimOptions),
}

impl Arguments {
    /// The cluster that the command is about.
    pub(crate) fn cluster(&self) -> anyhow::Result<Cluster> {
        Cluster::named(self.name.as_deref().unwrap_or("default"), self.home.as_deref())
    }

    /// The cluster of the demo: never by accident the one that somebody works with.
    pub(crate) fn demo_cluster(&self) -> anyhow::Result<Cluster> {
        Cluster::named(self.name.as_deref().unwrap_or("demo"), self.home.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }
}
