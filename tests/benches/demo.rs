//! The demo's own figures: medians and extremes over several runs, beside their goals.
//!
//! Runs the built `serin demo` (from `SERIN_BIN_DIR`) one run after another; `SERIN_BENCH_RUNS` says how many, 5 if
//! unset. Figures of a noisy machine are to be read against each other, not as absolutes.

use std::path::Path;
use std::process::Command;

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
    for run in 1..=runs {
        match report(Path::new(&directory)) {
            Ok(report) => reports.push(report),
            Err(error) => eprintln!("run {run} of {runs} failed: {error}"),
        }
    }
    println!("{} of {runs} demos went as told", reports.len());
    println!(
        "{:<55} {:>9} {:>9} {:>9} {:>9}",
        "", "median", "min", "max", "goal"
    );
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
                "{name:<55} {:>9.3} {min:>9.3} {max:>9.3} {goal:>9}",
                values[values.len() / 2]
            );
        }
    }
}

fn report(directory: &Path) -> Result<Value, String> {
    let home = tempfile::Builder::new()
        .prefix("serin-")
        .tempdir()
        .map_err(|error| error.to_string())?;
    let file = home.path().join("report.json");
    let output = Command::new(directory.join("serin"))
        .env("SERIN_HOME", home.path())
        .args(["demo", "--report"])
        .arg(&file)
        .output()
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = std::fs::read(&file).map_err(|error| error.to_string())?;
    serde_json::from_slice(&text).map_err(|error| error.to_string())
}
