//! Runs the simulations and writes the tables and figures of the documentation.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use serin_simulation::absolute::of_absolute;
use serin_simulation::contest::{ERRORS_STRICT, Entry, of_errors, of_latency, of_regressions};
use serin_simulation::plots;
use serin_simulation::random::seed;
use serin_simulation::report::{Measured as All, Result as Measured, goals, page};
use serin_simulation::run::{Tally, contest};
use serin_simulation::scenario::{Scenario, absolute, healthy, latencies, regressions};
use serin_simulation::watching::SCENES;

/// Runs per point of a figure.
const FIGURE_RUNS: u64 = 400;

/// Simulated hours for Serin's judges and for the rules of others.
#[derive(Parser)]
struct Arguments {
    /// Runs per scenario.
    #[arg(long, default_value_t = 10_000)]
    runs: u64,
    /// Threads; all cores by default. Does not change the results.
    #[arg(long)]
    threads: Option<usize>,
    /// Where `results.md` and the figures are written; printed only without it.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where the tallies of finished scenarios are kept, one file each, and read again by a later call with as many runs:
    /// for a simulation that is interrupted. To be emptied when a judge or a scenario has changed.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Only scenarios whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
}

/// The tallies of a scenario: those that an earlier call has kept, or new ones.
fn kept(directory: Option<&Path>, name: &str, runs: u64, measure: impl FnOnce() -> Vec<Tally>) -> Vec<Tally> {
    let Some(directory) = directory else {
        return measure();
    };
    let file = directory.join(format!("{:016x}-{runs}.json", seed(name, runs)));
    let known = std::fs::read(&file)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    known.unwrap_or_else(|| {
        let tallies = measure();
        let written = serde_json::to_vec(&tallies)
            .map_err(anyhow::Error::from)
            .and_then(|text| {
                std::fs::create_dir_all(directory)?;
                Ok(std::fs::write(&file, text)?)
            });
        if let Err(error) = written {
            eprintln!("{name} is not kept: {error}");
        }
        tallies
    })
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let threads = arguments
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let measure = |scenarios: Vec<Scenario>, entries: &[Entry]| -> Vec<Measured> {
        let wanted = scenarios
            .into_iter()
            .filter(|scenario| scenario.name.contains(&arguments.only));
        wanted
            .map(|scenario| {
                let begun = std::time::Instant::now();
                let tallies = kept(arguments.keep.as_deref(), &scenario.name, arguments.runs, || {
                    contest(&scenario, entries, arguments.runs, threads)
                });
                eprintln!("{} ({:.0} s)", scenario.name, begun.elapsed().as_secs_f64());
                Measured { scenario, tallies }
            })
            .collect()
    };
    let measured = All {
        runs: arguments.runs,
        healthy: measure(healthy(), &of_errors()),
        regressions: measure(regressions(), &of_regressions()),
        latencies: measure(latencies(), &of_latency()),
        absolute: measure(absolute(), &of_absolute()),
        watched: SCENES
            .into_iter()
            .filter(|_| arguments.only.is_empty() || arguments.only == "watch")
            .map(|scene| (scene, scene.watch(arguments.runs.div_ceil(50))))
            .collect(),
    };
    let text = page(&measured);
    print!("{text}");
    let missed = goals(&measured).iter().filter(|goal| !goal.met).count();
    eprintln!("{missed} goals missed");
    let Some(out) = arguments.out else {
        return Ok(());
    };
    let write = |name: &str, content: &str| {
        std::fs::write(out.join(name), content).with_context(|| format!("write {name} to {}", out.display()))
    };
    std::fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    write("results.md", &text)?;
    let figure_runs = FIGURE_RUNS.min(arguments.runs);
    write(
        "time-by-traffic.svg",
        &plots::against_traffic(figure_runs, threads).svg(),
    )?;
    write(
        "time-by-effect.svg",
        &plots::against_effect(figure_runs, threads).svg(),
    )?;
    let plain = measured.healthy.first().and_then(|result| {
        let mut tallies = result.tallies.iter();
        tallies.find(|tally| tally.name == ERRORS_STRICT)
    });
    if let Some(plain) = plain {
        write("false-rollbacks-by-looks.svg", &plots::against_looks(plain).svg())?;
    }
    Ok(())
}
