//! The `serin-proxy` program.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use serin_proxy::bootstrap::{agent, file, inherited};
use serin_proxy::control::run::{Plan, check, run};
use serin_proxy::intercept::{self, Range};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The data plane of Serin: an L4/L7 proxy driven by xDS.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Bootstrap file in Envoy's shape.
    #[arg(short, long)]
    config: Option<PathBuf>,
    /// Worker threads; 0 for one per core.
    #[arg(long, default_value_t = 0)]
    concurrency: usize,
    /// Whether to serve, or only to check the file.
    #[arg(long, value_enum, default_value = "serve")]
    mode: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Serve,
    Validate,
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
    /// Programs the packet filter of the current network namespace so that TCP connections come to the proxy.
    Intercept {
        /// Where outgoing connections are taken.
        #[arg(long, default_value_t = 15001)]
        outbound_port: u16,
        /// Where incoming connections are taken.
        #[arg(long, default_value_t = 15006)]
        inbound_port: u16,
        /// Incoming connections to these ports only.
        #[arg(long, value_delimiter = ',')]
        include_inbound_ports: Vec<u16>,
        /// Incoming connections to these ports pass.
        #[arg(long, value_delimiter = ',', default_value = "15090,15021,15020")]
        exclude_inbound_ports: Vec<u16>,
        /// Outgoing connections to these ports pass.
        #[arg(long, value_delimiter = ',')]
        exclude_outbound_ports: Vec<u16>,
        /// Outgoing connections to these addresses only (10.0.0.0/8).
        #[arg(long, value_delimiter = ',')]
        include_outbound_ranges: Vec<Range>,
        /// Outgoing connections to these addresses pass.
        #[arg(long, value_delimiter = ',')]
        exclude_outbound_ranges: Vec<Range>,
        /// Print the rules instead of applying them.
        #[arg(long)]
        dry_run: bool,
        /// Take the rules away.
        #[arg(long)]
        remove: bool,
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
        None => {
            let Some(path) = cli.config else {
                anyhow::bail!("say what to run: --config FILE, or a command; see --help")
            };
            let mut plan = file::read(&path, cli.concurrency)?;
            if cli.mode == Mode::Validate {
                check(&plan.static_resources)?;
                println!("configuration '{}' OK", path.display());
                return Ok(());
            }
            if let Some(text) = environment.get(inherited::VARIABLE) {
                plan.options.inherited = inherited::adopt(text)?;
            }
            control(plan)
        }
        Some(Command::Proxy {
            role,
            domain,
            concurrency,
        }) => {
            let role = match role {
                RoleName::Sidecar => agent::Role::Sidecar,
                RoleName::Router => agent::Role::Router,
            };
            control(agent::plan(role, &domain, concurrency, &environment)?)
        }
        Some(Command::Intercept { remove: true, .. }) => Ok(intercept::remove()?),
        Some(Command::Intercept {
            outbound_port,
            inbound_port,
            include_inbound_ports,
            exclude_inbound_ports,
            exclude_outbound_ports,
            include_outbound_ranges,
            exclude_outbound_ranges,
            dry_run,
            remove: false,
        }) => {
            let rules = intercept::Rules {
                outbound_port,
                inbound_port,
                include_inbound_ports,
                exclude_inbound_ports,
                exclude_outbound_ports,
                include_outbound_ranges,
                exclude_outbound_ranges,
            };
            if dry_run {
                print!("{}", intercept::script(&rules));
                return Ok(());
            }
            Ok(intercept::install(&rules)?)
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
