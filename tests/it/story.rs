//! The demo, run as a user runs it, and its report.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::cluster::{KernelState, TestCluster, programs};

#[test]
fn the_demo_promotes_the_good_release_rolls_the_bad_one_back_and_leaves_nothing() {
    // For the checks on what the machine allows; the demo makes a cluster of its own.
    let Some(_probe) = TestCluster::new() else { return };
    let Some(programs) = programs() else { return };
    let home = tempfile::Builder::new().prefix("serin-").tempdir().unwrap();
    let before = KernelState::read();
    let file = home.path().join("report.json");
    let output = Command::new(programs.join("serin"))
        .env("SERIN_HOME", home.path())
        .args(["demo", "--report"])
        .arg(&file)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let log = std::fs::read_to_string(home.path().join("demo.log")).unwrap_or_default();
    let log: Vec<&str> = log.lines().rev().take(60).collect();
    let errors = String::from_utf8_lossy(&output.stderr);
    let context = format!("{told}\n{errors}\n{}", log.join("\n"));
    assert!(file.exists(), "the story was not told to its end: {context}");

    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(report["outcome"][0]["outcome"], "promoted", "{context}");
    assert_eq!(report["outcome"][1]["outcome"], "rolled_back", "{context}");
    let count = |name: &str| report["requests"][name].as_u64().unwrap();
    assert_eq!(count("failed_by_system"), 0, "{context}");
    assert!(output.status.success(), "{context}");
    for interval in [
        "push_to_seen_s",
        "push_to_applied_s",
        "image_change_to_canary_requested_s",
        "weight_to_live_s",
        "first_bad_to_zero_live_s",
    ] {
        assert!(
            !report["intervals"][interval].is_null(),
            "{interval} was not measured"
        );
    }
    let times: Vec<f64> = report["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["t"].as_f64().unwrap())
        .collect();
    assert!(times.is_sorted(), "the timeline is in order");
    assert_eq!(KernelState::read(), before, "the demo leaves nothing behind");
    eprintln!("{told}");
}
