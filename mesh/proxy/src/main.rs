//! The `serin-proxy` program.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use serin_proxy::bootstrap::{agent, file, inherited};
use serin_proxy::control::application::Application;
use serin_proxy::control::levels;
use serin_proxy::control::run::{Plan, check, run};
use serin_proxy::error::Error;
use serin_proxy::intercept;

#[global_allocator]
static ALLOCATOR: serin_proxy::Allocator = serin_proxy::Allocator;

const EXAMPLES: &str = "\
Examples:
  serin-proxy --config bootstrap.yaml --mode validate      say what is wrong with a file, line by line
  serin-proxy --config bootstrap.yaml --concurrency 2      serve by it with two workers
  serin-proxy --config new.yaml --restart-socket /run/serin/restart.sock
                                                           take over from the process that runs with that socket
  serin-proxy --config bootstrap.yaml -- ./shop --port 80  start the shop once the proxy serves, and end with it
  serin-proxy intercept --dry-run                          print the packet filter's rules

It ends with 0 when it was told to end, 1 when it cannot start or the file is refused, 2 when it is called wrongly, and with
the exit code of its application if it has one.";

/// The data plane of Serin: an L4/L7 proxy driven by xDS.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Bootstrap file in Envoy's shape.
    #[arg(short, long)]
    config: Option<PathBuf>,
    /// Worker threads; 0 for one per core.
    #[arg(long, default_value_t = 0)]
    concurrency: usize,
    /// Unix socket for hot restarts: a process that is started with the socket of a running one takes its listening
    /// sockets over, and the running one drains and ends once the new one is ready.
    #[arg(long, env = "SERIN_RESTART_SOCKET", global = true)]
    restart_socket: Option<PathBuf>,
    /// Unix socket for the admin port, in place of its configured address; only this user may use it.
    #[arg(long, env = "SERIN_ADMIN_SOCKET", global = true)]
    admin_socket: Option<PathBuf>,
    /// Whether to serve, or only to check the file.
    #[arg(long, value_enum, default_value = "serve")]
    mode: Mode,
    /// A program with its arguments, to be started once the proxy has its whole configuration and serves. Signals go to it
    /// first, and the proxy ends with it.
    #[arg(last = true, value_name = "APPLICATION", conflicts_with = "restart_socket")]
    application: Vec<OsString>,
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
    Intercept(Box<Intercept>),
}

/// Options of `intercept`; the short forms are those of `istio-iptables`.
#[derive(Debug, clap::Args)]
struct Intercept {
    /// Where outgoing connections are taken.
    #[arg(short = 'p', long, default_value_t = 15001)]
    outbound_port: u16,
    /// Where incoming connections are taken.
    #[arg(short = 'z', long, default_value_t = 15006)]
    inbound_port: u16,
    /// User of the proxy, whose own connections pass.
    #[arg(short = 'u', long, default_value_t = 1337)]
    proxy_uid: u32,
    /// How connections are taken.
    #[arg(short = 'm', long, default_value = "REDIRECT", value_parser = ["REDIRECT"])]
    mode: String,
    /// Incoming connections to these ports only; * for all, nothing for none.
    #[arg(short = 'b', long, default_value = "*")]
    include_inbound_ports: String,
    /// Incoming connections to these ports pass.
    #[arg(short = 'd', long, default_value = "15090,15021,15020")]
    exclude_inbound_ports: String,
    /// Outgoing connections to these ports are taken whatever their address.
    #[arg(short = 'q', long, default_value = "")]
    include_outbound_ports: String,
    /// Outgoing connections to these ports pass.
    #[arg(short = 'o', long, default_value = "")]
    exclude_outbound_ports: String,
    /// Outgoing connections to these addresses only (10.0.0.0/8); * for all, nothing for none.
    #[arg(short = 'i', long, default_value = "*")]
    include_outbound_ranges: String,
    /// Outgoing connections to these addresses pass.
    #[arg(short = 'x', long, default_value = "")]
    exclude_outbound_ranges: String,
    /// Interfaces whose connections pass.
    #[arg(short = 'c', long, default_value = "")]
    exclude_interfaces: String,
    /// Print the rules instead of applying them.
    #[arg(long)]
    dry_run: bool,
    /// Take the rules away.
    #[arg(long)]
    remove: bool,
}

impl Intercept {
    fn rules(&self) -> anyhow::Result<intercept::Rules> {
        for (flag, value) in [
            ("-q", &self.include_outbound_ports),
            ("-c", &self.exclude_interfaces),
        ] {
            anyhow::ensure!(
                value.is_empty(),
                "intercept {flag} {value}: not supported; leave it out"
            );
        }
        anyhow::ensure!(
            self.proxy_uid == intercept::PROXY_ID,
            "intercept -u {}: the proxy's user is {}",
            self.proxy_uid,
            intercept::PROXY_ID
        );
        let exclude_outbound_ranges = match self.include_outbound_ranges.as_str() {
            // Nothing is taken: every address is excluded.
            "" => vec!["0.0.0.0/0".parse(), "::/0".parse()]
                .into_iter()
                .collect::<Result<_, String>>(),
            _ => list(&self.exclude_outbound_ranges),
        };
        Ok(intercept::Rules {
            outbound_port: self.outbound_port,
            inbound_port: self.inbound_port,
            include_inbound_ports: match self.include_inbound_ports.as_str() {
                // Nothing is taken: no connection goes to port 0.
                "" => vec![0],
                ports => list(ports).map_err(anyhow::Error::msg)?,
            },
            exclude_inbound_ports: list(&self.exclude_inbound_ports).map_err(anyhow::Error::msg)?,
            exclude_outbound_ports: list(&self.exclude_outbound_ports).map_err(anyhow::Error::msg)?,
            include_outbound_ranges: list(&self.include_outbound_ranges).map_err(anyhow::Error::msg)?,
            exclude_outbound_ranges: exclude_outbound_ranges.map_err(anyhow::Error::msg)?,
        })
    }
}

/// A list separated by commas; `*` is the empty list, which stands for everything.
fn list<T: std::str::FromStr>(text: &str) -> Result<Vec<T>, String>
where
    T::Err: std::fmt::Display,
{
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty() && *part != "*")
        .map(|part| part.parse().map_err(|error| format!("{part:?}: {error}")))
        .collect()
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleName {
    Sidecar,
    Router,
}

fn main() -> ExitCode {
    ALLOCATOR.begin();
    levels::install();
    match start(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("serin-proxy: {}", told(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, without those that it tells itself.
fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The exit code.
fn start(cli: Cli) -> anyhow::Result<u8> {
    let environment: agent::Environment = std::env::vars().collect();
    match cli.command {
        None => {
            let Some(path) = cli.config else {
                anyhow::bail!("say what to run: --config FILE, or a command; see --help")
            };
            let mut plan = file::read(&path, cli.concurrency)?;
            let placed = |error| file::placed(&path, error);
            if cli.mode == Mode::Validate {
                check(&plan.static_resources).map_err(placed)?;
                println!("configuration '{}' OK", path.display());
                return Ok(0);
            }
            if let Some(text) = environment.get(inherited::VARIABLE) {
                plan.options.inherited = inherited::adopt(text)?;
            }
            plan.options.started_as.config_path = path.display().to_string();
            plan.restart = cli.restart_socket;
            plan.application = Application::of(cli.application);
            plan.serve_admin_at(cli.admin_socket);
            Ok(control(plan).map_err(placed)?)
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
            let mut plan = agent::plan(role, &domain, concurrency, &environment)?;
            plan.restart = cli.restart_socket;
            plan.serve_admin_at(cli.admin_socket);
            Ok(control(plan)?)
        }
        Some(Command::Intercept(options)) => {
            if options.remove {
                intercept::remove()?;
                return Ok(0);
            }
            let rules = options.rules()?;
            if options.dry_run {
                print!("{}", intercept::script(&rules));
            } else {
                intercept::install(&rules)?;
            }
            Ok(0)
        }
    }
}

/// Runs on this thread, which becomes the control thread.
fn control(plan: Plan) -> Result<u8, Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .build()
        .map_err(|source| Error::Start {
            what: "the control thread's runtime",
            source,
        })?
        .block_on(run(plan))
}
