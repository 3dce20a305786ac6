//! The binary `serin`: composes everything else; the only crate that knows all the others.
//!
//! * [`cluster`]: the cluster on this machine: its files, its process, what runs inside it.
//! * [`commands`]: one file per command of the user.
//! * [`demo`]: the story that `serin demo` plays, its live view and its report.
//! * [`load`]: the open-loop load generator.
//! * [`output`]: tables for people, JSON and YAML for programs.
//! * `sys`: the one `unsafe` block.

mod arguments;
mod cluster;
mod commands;
mod demo;
mod load;
mod output;
mod sys;

use std::process::ExitCode;

use clap::Parser;

use arguments::{Arguments, Command};

fn main() -> ExitCode {
    // Before anything opens a connection: rustls must be told once which provider to use.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let arguments = Arguments::parse();
    if !matches!(
        arguments.command,
        Command::Server(_) | Command::Node(_) | Command::Shim(_)
    ) {
        sys::end_quietly_on_a_closed_pipe();
    }
    let outcome = match &arguments.command {
        // These fork and enter namespaces: they come before any thread and build what runtime they need themselves.
        Command::Shim(options) => return commands::internal::shim(options),
        Command::Node(options) => return commands::internal::node(options),
        command => run(&arguments, command),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{} {error:#}", output::error_mark());
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments, command: &Command) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let cluster = arguments.cluster()?;
        match command {
            Command::Up(options) => commands::up::run(&cluster, options).await,
            Command::Down(options) => commands::down::run(&cluster, options).await,
            Command::Demo(options) => demo::run(&arguments.demo_cluster()?, options).await,
            Command::Status(options) => commands::status::run(&cluster, options).await,
            Command::Wait(options) => commands::wait::run(&cluster, options).await,
            Command::Load(options) => commands::load::run(options).await,
            Command::Image(command) => commands::image::run(&cluster, command).await,
            Command::Build(options) => commands::build::run(options),
            Command::Judge(options) => commands::judge::run(options),
            Command::Kubeconfig(options) => commands::kubeconfig::run(&cluster, options),
            Command::Version(options) => commands::version::run(options),
            Command::Completion(options) => commands::completion::run(options),
            Command::Server(options) => commands::internal::server(&cluster, options).await,
            Command::Node(_) | Command::Shim(_) => anyhow::bail!("this command runs before any thread"),
        }
    })
}
