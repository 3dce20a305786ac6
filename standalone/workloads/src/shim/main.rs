//! Entry of the hidden subcommand.

use std::process::ExitCode;

use super::protocol::ShimConfig;
use super::server::Server;

/// Runs a pod's shim until it is told to shut down. `arguments` is what follows the subcommand: one JSON document.
///
/// Must be called before the process starts any thread. Errors go to standard error, which the node reads.
pub fn main(arguments: &[String]) -> ExitCode {
    let Some(config) = arguments
        .first()
        .and_then(|text| serde_json::from_str::<ShimConfig>(text).ok())
    else {
        eprintln!(
            "shim: this subcommand is started by the node, with its configuration as the only argument"
        );
        return ExitCode::from(2);
    };
    let directory = config.directory.display().to_string();
    match Server::start(config).and_then(Server::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shim of {directory}: {error}");
            ExitCode::FAILURE
        }
    }
}
