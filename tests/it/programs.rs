//! The programs, run as users run them. They are built by `make build`; a plain `cargo test` says what it left out.

use std::process::{Command, Output};

use crate::cluster::programs;

fn serin(arguments: &[&str]) -> Option<Output> {
    Some(
        Command::new(programs()?.join("serin"))
            .args(arguments)
            .output()
            .unwrap(),
    )
}

#[test]
fn every_command_explains_itself() {
    let commands = [
        "up",
        "down",
        "demo",
        "status",
        "wait",
        "load",
        "image",
        "build",
        "kubeconfig",
        "version",
        "completion",
    ];
    for command in commands {
        let Some(output) = serin(&[command, "--help"]) else {
            return;
        };
        assert!(output.status.success(), "serin {command} --help");
        let text = String::from_utf8_lossy(&output.stdout);
        // Those of `image` are with its subcommands.
        assert!(
            command == "image" || text.contains("Example"),
            "serin {command} --help shows no example"
        );
    }
}

#[test]
fn a_cluster_that_does_not_run_is_said_to_be_down_with_the_remedy() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path().to_str().unwrap();
    let Some(output) = serin(&["--home", home, "status"]) else {
        return;
    };
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("serin up"));
}

#[test]
fn completion_scripts_are_printed_for_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let Some(output) = serin(&["completion", shell]) else {
            return;
        };
        assert!(output.status.success() && output.stdout.len() > 1000, "{shell}");
    }
}
