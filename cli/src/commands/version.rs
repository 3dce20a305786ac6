//! `serin version`.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use crate::output::{Format, print_structured};

/// Options of `serin version`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  serin version\n  serin version -o json")]
pub(crate) struct Options {
    /// How to print it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct Version {
    serin: &'static str,
    kubernetes: &'static str,
    platform: String,
}

/// Prints the version of this program and of the Kubernetes API that it serves.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let version = Version {
        serin: env!("CARGO_PKG_VERSION"),
        kubernetes: "v1.33",
        platform: format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
    };
    if !print_structured(&version, options.output)? {
        println!(
            "serin {} ({}, Kubernetes API {})",
            version.serin, version.platform, version.kubernetes
        );
    }
    Ok(ExitCode::SUCCESS)
}
