//! The `serin-proxy` program.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use serin_proxy::bootstrap::agent;
use serin_proxy::control::run::{Plan, run};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The data plane of Serin: an L4/L7 proxy driven by xDS.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs as a pod's proxy, configured by the environment that injection gives it.
    Proxy {
        /// Beside an application, or on its own.
        role: RoleName,
        /// DNS domain of the node id.
        #[arg(long, env = "DNS_DOMAIN", default_value = "cluster.local")]
        domain: String,
        /// Worker threads; 0 for one per core.
        #[arg(long, env = "PROXY_CONCURRENCY", default_value_t = 1)]
        concurrency: usize,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleName {
    Sidecar,
    Router,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .init();
    match start(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("serin-proxy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<()> {
    let environment: agent::Environment = std::env::vars().collect();
    match cli.command {
        None => anyhow::bail!("say what to run; see --help"),
        Some(Command::Proxy { role, domain, concurrency }) => {
            let role = match role {
                RoleName::Sidecar => agent::Role::Sidecar,
                RoleName::Router => agent::Role::Router,
            };
            control(agent::plan(role, &domain, concurrency, &environment)?)
        }
    }
}

/// Runs on this thread, which becomes the control thread.
fn control(plan: Plan) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .build()
        .context("starting the control thread's runtime")?
        .block_on(run(plan))?;
    Ok(())
}
