//! `serin completion`: a completion script for a shell.

use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::arguments::Arguments;

/// Options of `serin completion`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  source <(serin completion bash)\n  serin completion fish > ~/.config/fish/completions/serin.fish"
)]
pub(crate) struct Options {
    /// The shell to complete for
    shell: Shell,
}

/// Prints the script.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    clap_complete::generate(
        options.shell,
        &mut Arguments::command(),
        "serin",
        &mut std::io::stdout(),
    );
    Ok(ExitCode::SUCCESS)
}
