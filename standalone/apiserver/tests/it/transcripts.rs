//! Recorded transcripts of a real kube-apiserver, replayed against ours.
//!
//! Every step of the groups below is sent and its answer compared after normalisation (the README beside the data says how
//! symbols such as `$uid1` are meant). What differs is listed in `expected-differences.tsv` with its reason; a scenario that is
//! listed and agrees fails the test, and so does one that differs and is not listed; only what hangs on timing may do either.
//! To look into one: `SERIN_TRANSCRIPT=crud/pod cargo test … transcripts -- --nocapture`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::recording::{data, set_up};

/// Groups of scenarios that are replayed.
const GROUPS: [&str; 11] = [
    "crud",
    "patch-json",
    "patch-merge",
    "patch-strategic",
    "ssa",
    "list",
    "watch",
    "delete",
    "crd",
    "fieldvalidation",
    "errors",
];

/// Per cent of all steps that agree; raise it with each improvement.
const FLOOR: f64 = 96.5;

async fn replay(scenario: &Value) -> (usize, Vec<(usize, String)>) {
    let mut run = set_up(scenario).await;
    let steps = scenario["steps"].as_array().cloned().unwrap_or_default();
    for (i, step) in steps.iter().enumerate() {
        if step.get("storage").is_some() {
            run.take_old_tokens(steps.get(i..).unwrap_or_default()).await;
        }
        run.step(i + 1, step).await;
    }
    run.server.shutdown().await;
    (run.steps, run.failures)
}

/// Members of an object come in the order in which they were recorded: unknown fields are reported in that order.
fn ordered(value: &serde_yaml::Value, out: &mut String) {
    match value {
        serde_yaml::Value::Mapping(members) => {
            out.push('{');
            for (i, (key, member)) in members.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write!(out, "{}:", json!(key.as_str().expect("a name"))).expect("written");
                ordered(member, out);
            }
            out.push('}');
        }
        serde_yaml::Value::Sequence(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                ordered(item, out);
            }
            out.push(']');
        }
        other => out.push_str(&serde_json::to_string(other).expect("JSON")),
    }
}

/// Adds the text of each body as it was recorded; JSON is YAML, and its mappings keep their order.
fn keep_order(scenario: &mut Value, text: &str) {
    let recorded: serde_yaml::Value = serde_yaml::from_str(text).expect("JSON");
    let steps = scenario["steps"].as_array_mut().expect("steps");
    for (step, recorded) in steps
        .iter_mut()
        .zip(recorded["steps"].as_sequence().expect("steps"))
    {
        if let Some(body) = recorded.get("request").and_then(|request| request.get("body")) {
            let mut text = String::new();
            ordered(body, &mut text);
            step["request"]["body_in_order"] = json!(text);
        }
    }
}

/// `scenario<TAB>reason` per line.
fn expected() -> BTreeMap<String, String> {
    include_str!("expected-differences.tsv")
        .lines()
        .filter(|l| !l.starts_with('#') && !l.trim().is_empty())
        .map(|l| {
            let (name, reason) = l.split_once('\t').expect("a scenario and its reason");
            (name.to_owned(), reason.to_owned())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_agree_with_those_of_a_real_kube_apiserver() {
    let Some(root) = data() else {
        eprintln!("SKIPPED: the transcripts of a real kube-apiserver: ../shared is not here");
        return;
    };
    let filter = std::env::var("SERIN_TRANSCRIPT").ok();
    let mut groups: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    let mut differing: BTreeMap<String, Vec<(usize, String)>> = BTreeMap::new();
    for group in GROUPS {
        let mut files: Vec<PathBuf> = std::fs::read_dir(root.join(group))
            .expect("a group")
            .map(|e| e.expect("an entry").path())
            .collect();
        files.sort();
        for file in files {
            let text = std::fs::read_to_string(&file).expect("a scenario");
            let mut scenario: Value = serde_json::from_str(&text).expect("JSON");
            if group == "fieldvalidation" {
                keep_order(&mut scenario, &text);
            }
            let name = scenario["name"].as_str().expect("a name").to_owned();
            if filter.as_ref().is_some_and(|f| !name.contains(f.as_str())) {
                continue;
            }
            let (steps, failures) = replay(&scenario).await;
            let entry = groups.entry(group.to_owned()).or_default();
            entry.0 += steps.saturating_sub(failures.len());
            entry.1 += steps;
            if !failures.is_empty() {
                differing.insert(name, failures);
            }
        }
    }
    let mut report = String::new();
    let (mut passed, mut all) = (0, 0);
    for (group, (p, a)) in &groups {
        writeln!(report, "{group}: {p} of {a}").expect("written");
        passed += p;
        all += a;
    }
    let percent = 100.0 * passed as f64 / all.max(1) as f64;
    writeln!(report, "all: {passed} of {all} = {percent:.1} %").expect("written");
    eprintln!("{report}");
    let expected = expected();
    let mut complaints = Vec::new();
    for (name, failures) in &differing {
        if filter.is_some() || !expected.contains_key(name) {
            for (step, text) in failures {
                complaints.push(format!("{name} step {step}: {text}"));
            }
        }
    }
    if filter.is_none() {
        let agreeing = expected.iter().filter(|(name, _)| !differing.contains_key(*name));
        for (name, _) in agreeing.filter(|(_, reason)| !reason.starts_with("timing: ")) {
            complaints.push(format!(
                "{name} is listed as differing and agrees: take it off the list"
            ));
        }
        if percent < FLOOR {
            complaints.push(format!(
                "{percent:.1} % of the steps agree, less than the floor of {FLOOR} %"
            ));
        }
    }
    assert!(complaints.is_empty(), "{}\n{report}", complaints.join("\n"));
}
