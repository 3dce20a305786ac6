//! The demo's own figures: medians and extremes over several runs, beside their goals.
//!
//! Runs the built `serin demo` (from `SERIN_BIN_DIR`) one run after another; `SERIN_BENCH_RUNS` says how many, 5 if
//! unset. The last one is kept, and what it burns without load is measured. The table is Markdown, for
//! `docs/performance.md`. Figures of a noisy machine are to be read against each other, not as absolutes.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Where a figure is in the report, what it is, its goal.
const FIGURES: &[(&str, &str, f64)] = &[
    ("/intervals/up_s", "up to ready (s)", 3.0),
    ("/intervals/push_to_seen_s", "push to revision seen (s)", 0.1),
    (
        "/intervals/push_to_applied_s",
        "push to changed objects applied (s)",
        0.15,
    ),
    (
        "/intervals/image_change_to_canary_requested_s",
        "image change to canary pods asked for (s)",
        0.1,
    ),
    (
        "/intervals/canary_ready_to_first_weight_live_s",
        "canary ready to first weight live (s)",
        0.3,
    ),
    (
        "/intervals/weight_to_live_s/p99",
        "weight written to live everywhere, p99 (s)",
        0.05,
    ),
    (
        "/intervals/first_bad_to_zero_live_s",
        "first bad answer to weight 0 live (s)",
        3.0,
    ),
    ("/requests/failed_by_system", "requests lost to the system", 0.0),
    (
        "/requests/latency_p99_ms",
        "request latency p99 through gateway and sidecar (ms)",
        f64::NAN,
    ),
    ("/memory/serin_mb", "memory of serin (MB)", 120.0),
    (
        "/memory/serin_proxy_max_mb",
        "memory of the largest serin-proxy (MB)",
        15.0,
    ),
];

fn main() {
    let Some(directory) = std::env::var_os("SERIN_BIN_DIR") else {
        eprintln!("SKIPPED: SERIN_BIN_DIR is not set; `make bench` builds the programs and sets it");
        return;
    };
    let runs = std::env::var("SERIN_BENCH_RUNS")
        .ok()
        .and_then(|runs| runs.parse().ok())
        .unwrap_or(5);
    let mut reports = Vec::new();
    let mut as_told = 0;
    let mut idle = None;
    for run in 1..=runs {
        let outcome = report(Path::new(&directory), run == runs);
        if let Err(error) = &outcome.went_as_told {
            eprintln!("run {run} of {runs} did not go as told: {error}");
        } else {
            as_told += 1;
        }
        // A run that lost requests is counted; the figures would be too good without it.
        reports.extend(outcome.report);
        idle = idle.or(outcome.idle_percent);
    }
    println!("{as_told} of {runs} demos went as told\n");
    println!("| figure | median | min | max | goal |\n|---|---|---|---|---|");
    for (pointer, name, goal) in FIGURES {
        let mut values: Vec<f64> = reports
            .iter()
            .filter_map(|report| report.pointer(pointer)?.as_f64())
            .collect();
        values.sort_by(f64::total_cmp);
        if let (Some(min), Some(max)) = (values.first(), values.last()) {
            let goal = if goal.is_nan() {
                "-".to_owned()
            } else {
                format!("≤ {goal}")
            };
            println!(
                "| {name} | {:.3} | {min:.3} | {max:.3} | {goal} |",
                values[values.len() / 2]
            );
        }
    }
    if let Some(idle) = idle {
        println!("| CPU of the whole standing demo without load (% of a core) | {idle:.2} | | | ≤ 2 |");
    }
}

struct Outcome {
    report: Option<Value>,
    went_as_told: Result<(), String>,
    idle_percent: Option<f64>,
}

fn report(directory: &Path, keep: bool) -> Outcome {
    let mut outcome = Outcome {
        report: None,
        went_as_told: Err("no directory could be made".to_owned()),
        idle_percent: None,
    };
    let Ok(home) = tempfile::Builder::new().prefix("serin-").tempdir() else {
        return outcome;
    };
    let file = home.path().join("report.json");
    let serin = || {
        let mut command = Command::new(directory.join("serin"));
        command.env("SERIN_HOME", home.path());
        command
    };
    let mut demo = serin();
    demo.args(["demo", "--report"]).arg(&file);
    if keep {
        demo.arg("--keep");
    }
    outcome.went_as_told = match demo.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Err(error.to_string()),
    };
    outcome.report = std::fs::read(&file)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    if keep {
        outcome.idle_percent = idle_percent(home.path());
        let _ = serin().args(["--name", "demo", "down", "--purge"]).output();
    }
    outcome
}

/// Share of a core that the processes of the clusters below `home` use together while nothing happens.
fn idle_percent(home: &Path) -> Option<f64> {
    const SETTLE: Duration = Duration::from_secs(10);
    const WINDOW: Duration = Duration::from_secs(30);
    // What runs on behalf of the last release ends by itself.
    wait(SETTLE);
    let (before, since) = (ticks(home), Instant::now());
    wait(WINDOW);
    let after = ticks(home);
    let seconds = since.elapsed().as_secs_f64();
    let used: u64 = after
        .iter()
        .filter_map(|(pid, ticks)| Some(ticks - before.get(pid)?))
        .sum();
    // The kernel counts in hundredths of a second (USER_HZ), on every machine that we know of.
    (!before.is_empty()).then(|| used as f64 / seconds)
}

fn wait(time: Duration) {
    let (_keep, never) = mpsc::channel::<()>();
    let _ = never.recv_timeout(time);
}

/// Process id → CPU time in ticks, of the processes that know the directory or have something of it mounted.
fn ticks(home: &Path) -> BTreeMap<u32, u64> {
    let marker = home.to_string_lossy().into_owned();
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let read = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
        let ours = ["cmdline", "environ", "mountinfo"].iter().any(|file| {
            read(file)
                .windows(marker.len())
                .any(|window| window == marker.as_bytes())
        });
        let stat = String::from_utf8_lossy(&read("stat")).into_owned();
        // After the name in brackets: state is the first field, user and system time the 12th and 13th.
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .map(|(_, rest)| rest.split_whitespace().collect())
            .unwrap_or_default();
        let time = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
        if let (true, Some(user), Some(system)) = (ours, time(11), time(12)) {
            found.insert(pid, user + system);
        }
    }
    found
}
