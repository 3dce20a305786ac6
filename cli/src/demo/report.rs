//! The figures of the story, as text and as JSON, and whether it went as told.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::observe::{Entry, Fact};
use crate::cluster::{Cluster, process};
use crate::load::{Counters, Group};
use crate::output::{Mood, paint};

/// What the demo found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The timeline.
    events: Vec<Entry>,
    /// What became of the requests.
    requests: Requests,
    /// How long things took.
    intervals: Intervals,
    /// Resident memory.
    memory: MemoryReport,
    /// What became of each release.
    outcome: Vec<ReleaseReport>,
}

/// What became of the requests.
#[derive(Debug, Serialize)]
struct Requests {
    sent: u64,
    answered: u64,
    failed_by_app: u64,
    failed_by_system: u64,
    failed_by_system_by_flag: BTreeMap<String, u64>,
    revisions: BTreeMap<String, Group>,
    latency_p50_ms: f64,
    latency_p99_ms: f64,
}

/// How long things took, in seconds; the longest where they happened more than once.
#[derive(Debug, Default, Serialize)]
struct Intervals {
    up_s: f64,
    push_to_seen_s: Option<f64>,
    push_to_applied_s: Option<f64>,
    image_change_to_canary_requested_s: Option<f64>,
    canary_ready_to_first_weight_live_s: Option<f64>,
    weight_to_live_s: Option<Quantiles>,
    first_bad_to_zero_live_s: Option<f64>,
}

/// A distribution, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
    max: f64,
}

/// Resident memory, in MB of 10⁶ bytes.
#[derive(Debug, Default, Serialize)]
pub(super) struct MemoryReport {
    /// Of the server process.
    serin_mb: Option<f64>,
    /// Of the largest proxy.
    serin_proxy_max_mb: Option<f64>,
    /// How many proxies ran.
    serin_proxies: usize,
}

/// What became of a release.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ReleaseReport {
    pub(super) version: String,
    pub(super) commit: String,
    pub(super) error_percent: u8,
    pub(super) pushed_at: f64,
    pub(super) ended_at: f64,
    pub(super) wanted: Outcome,
    pub(super) outcome: Outcome,
}

/// How a release can end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// It serves everybody.
    Promoted,
    /// It serves nobody.
    RolledBack,
}

impl MemoryReport {
    /// Reads the memory of the server and of every proxy of the cluster that runs now.
    pub(super) fn read(cluster: &Cluster) -> Self {
        let server = process::running(cluster)
            .ok()
            .flatten()
            .and_then(|pid| resident_mb(pid.as_raw()));
        let marker = cluster.directory().display().to_string();
        let mut proxies = Vec::new();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
                continue;
            };
            let named = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
            let is_proxy = named("comm").starts_with(b"serin-proxy");
            // A proxy's namespaces are its own; its parent, the pod's shim, knows the cluster's directory.
            let parent = parent_of(&entry.path()).unwrap_or_default();
            let command = std::fs::read(format!("/proc/{parent}/cmdline")).unwrap_or_default();
            let ours = command
                .windows(marker.len())
                .any(|window| window == marker.as_bytes());
            if is_proxy && ours {
                proxies.extend(resident_mb(pid));
            }
        }
        Self {
            serin_mb: server,
            serin_proxy_max_mb: proxies.iter().copied().reduce(f64::max),
            serin_proxies: proxies.len(),
        }
    }
}

fn parent_of(process: &std::path::Path) -> Option<String> {
    let status = std::fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    Some(line.trim().to_owned())
}

fn resident_mb(pid: i32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024.0 / 1e6)
}

impl Report {
    /// Works the figures out. `steps` are the seconds from a weight's being written to its being live, of each step.
    pub(super) fn new(
        up: f64,
        events: &[Entry],
        counters: &Counters,
        outcome: Vec<ReleaseReport>,
        steps: Vec<f64>,
        memory: MemoryReport,
    ) -> Self {
        let mut events = events.to_vec();
        events.sort_by(|a, b| a.t.total_cmp(&b.t));
        let intervals = Intervals::new(up, &events, &outcome, steps);
        let requests = Requests {
            sent: counters.sent,
            answered: counters.answered,
            failed_by_app: counters.failed_by_app,
            failed_by_system: counters.failed_by_system_total(),
            failed_by_system_by_flag: counters.failed_by_system.clone(),
            revisions: counters.groups.clone(),
            latency_p50_ms: counters.latency_ms(0.5),
            latency_p99_ms: counters.latency_ms(0.99),
        };
        Self {
            events,
            requests,
            intervals,
            memory,
            outcome,
        }
    }

    /// Whether each release ended as it should have, every request was answered, and only the bad version failed any.
    pub(super) fn went_as_told(&self) -> bool {
        self.faults().is_empty()
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for release in &self.outcome {
            if release.outcome != release.wanted {
                faults.push(format!(
                    "version {} should have been {:?} and was {:?}",
                    release.version, release.wanted, release.outcome
                ));
            }
        }
        if self.requests.failed_by_system > 0 || self.requests.answered != self.requests.sent {
            faults.push(format!(
                "{} of {} requests were lost to the system: {:?}",
                self.requests
                    .failed_by_system
                    .max(self.requests.sent - self.requests.answered),
                self.requests.sent,
                self.requests.failed_by_system_by_flag
            ));
        }
        for (version, group) in &self.requests.revisions {
            let bad = self
                .outcome
                .iter()
                .any(|release| release.version == *version && release.error_percent > 0);
            if group.failed_by_app > 0 && !bad {
                faults.push(format!(
                    "version {version} failed {} requests",
                    group.failed_by_app
                ));
            }
        }
        for release in &self.outcome {
            let served = self
                .requests
                .revisions
                .get(&release.version)
                .is_some_and(|group| group.answered > 0);
            if !served {
                faults.push(format!("version {} never answered a request", release.version));
            }
        }
        faults
    }

    /// The report for a person.
    pub(super) fn to_text(&self) -> String {
        let mut text = String::new();
        let requests = &self.requests;
        let _ = writeln!(
            text,
            "requests   {} sent, {} answered, {} failed by the application, {} lost to the system",
            requests.sent, requests.answered, requests.failed_by_app, requests.failed_by_system
        );
        for (version, group) in &requests.revisions {
            let _ = writeln!(
                text,
                "           version {version}: {} answered, {} failed",
                group.answered, group.failed_by_app
            );
        }
        let _ = writeln!(
            text,
            "latency    p50 {:.2} ms, p99 {:.2} ms",
            requests.latency_p50_ms, requests.latency_p99_ms
        );
        let intervals = &self.intervals;
        let mut row = |name: &str, value: Option<f64>, goal: &str| {
            if let Some(value) = value {
                let _ = writeln!(text, "{name:<40} {:>9.1} ms   goal {goal}", value * 1000.0);
            }
        };
        row("up to ready", Some(intervals.up_s), "≤ 3 s");
        row("push → revision seen", intervals.push_to_seen_s, "≤ 100 ms");
        row(
            "push → changed objects applied",
            intervals.push_to_applied_s,
            "≤ 150 ms",
        );
        row(
            "image change → canary pods asked for",
            intervals.image_change_to_canary_requested_s,
            "≤ 100 ms",
        );
        row(
            "canary ready → first weight live",
            intervals.canary_ready_to_first_weight_live_s,
            "≤ 300 ms",
        );
        row(
            "weight written → live everywhere (p99)",
            intervals.weight_to_live_s.map(|q| q.p99),
            "≤ 50 ms",
        );
        row(
            "first bad answer → weight 0 live",
            intervals.first_bad_to_zero_live_s,
            "≤ 3 s",
        );
        if let (Some(serin), Some(proxy)) = (self.memory.serin_mb, self.memory.serin_proxy_max_mb) {
            let _ = writeln!(
                text,
                "memory     serin {serin:.1} MB, largest of {} serin-proxy {proxy:.1} MB   goals ≤ 120 MB, ≤ 15 MB",
                self.memory.serin_proxies
            );
        }
        let faults = self.faults();
        if faults.is_empty() {
            text.push_str(&paint("the story went as told", Mood::Good));
        } else {
            let _ = write!(text, "{}", paint("the story did not go as told:", Mood::Bad));
            for fault in faults {
                let _ = write!(text, "\n  {fault}");
            }
        }
        text
    }
}

impl Intervals {
    fn new(up_s: f64, events: &[Entry], releases: &[ReleaseReport], steps: Vec<f64>) -> Self {
        let mut intervals = Self {
            up_s,
            weight_to_live_s: Quantiles::of(steps),
            ..Self::default()
        };
        let longest = |longest: &mut Option<f64>, value: Option<f64>| {
            if let Some(value) = value {
                *longest = Some(longest.map_or(value, |before| before.max(value)));
            }
        };
        for release in releases {
            let first = |since: f64, wanted: &dyn Fn(&Fact) -> bool| {
                events
                    .iter()
                    .find(|event| event.t >= since && wanted(&event.fact))
                    .map(|event| event.t)
            };
            let since = release.pushed_at;
            let seen = first(
                since,
                &|fact| matches!(fact, Fact::Seen { commit } if *commit == release.commit),
            );
            let applied = first(
                since,
                &|fact| matches!(fact, Fact::Applied { commit } if *commit == release.commit),
            );
            longest(&mut intervals.push_to_seen_s, seen.map(|t| t - since));
            longest(&mut intervals.push_to_applied_s, applied.map(|t| t - since));
            if let Some(changed) = first(since, &|fact| matches!(fact, Fact::ImageChanged { .. })) {
                let asked = first(changed, &|fact| matches!(fact, Fact::CanaryRequested));
                longest(
                    &mut intervals.image_change_to_canary_requested_s,
                    asked.map(|t| t - changed),
                );
            }
            if let Some(ready) = first(since, &|fact| matches!(fact, Fact::CanaryReady)) {
                let live = first(
                    ready,
                    &|fact| matches!(fact, Fact::WeightLive { weight, .. } if *weight > 0),
                );
                longest(
                    &mut intervals.canary_ready_to_first_weight_live_s,
                    live.map(|t| t - ready),
                );
            }
            if let Some(bad) = first(since, &|fact| matches!(fact, Fact::FirstBadAnswer { .. })) {
                let zero = first(bad, &|fact| matches!(fact, Fact::WeightLive { weight: 0, .. }));
                longest(&mut intervals.first_bad_to_zero_live_s, zero.map(|t| t - bad));
            }
        }
        intervals
    }
}

impl Quantiles {
    /// Nearest-rank quantiles; `None` of nothing.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let rank = |q: f64| {
            let index = (q * values.len() as f64).ceil() as usize;
            values.get(index.saturating_sub(1)).copied()
        };
        Some(Self {
            p50: rank(0.5)?,
            p99: rank(0.99)?,
            max: *values.last()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(t: f64, fact: Fact) -> Entry {
        Entry { t, fact }
    }

    fn release(outcome: Outcome, error_percent: u8) -> ReleaseReport {
        ReleaseReport {
            version: "3".to_owned(),
            commit: "c".to_owned(),
            error_percent,
            pushed_at: 10.0,
            ended_at: 20.0,
            wanted: Outcome::RolledBack,
            outcome,
        }
    }

    #[test]
    fn intervals_are_taken_from_the_facts_after_each_push() {
        let events = [
            entry(
                9.0,
                Fact::WeightLive {
                    weight: 0,
                    acked: 1,
                    needed: 1,
                },
            ),
            entry(
                10.04,
                Fact::Seen {
                    commit: "c".to_owned(),
                },
            ),
            entry(
                10.1,
                Fact::ImageChanged {
                    image: "x".to_owned(),
                },
            ),
            entry(10.15, Fact::CanaryRequested),
            entry(11.0, Fact::CanaryReady),
            entry(
                11.2,
                Fact::WeightLive {
                    weight: 10,
                    acked: 1,
                    needed: 1,
                },
            ),
            entry(
                11.5,
                Fact::FirstBadAnswer {
                    version: "3".to_owned(),
                },
            ),
            entry(
                13.0,
                Fact::WeightLive {
                    weight: 0,
                    acked: 1,
                    needed: 1,
                },
            ),
        ];
        let releases = [release(Outcome::RolledBack, 30)];
        let intervals = Intervals::new(1.0, &events, &releases, vec![0.01, 0.03]);
        let near = |value: Option<f64>, wanted: f64| assert!((value.unwrap() - wanted).abs() < 1e-9);
        near(intervals.push_to_seen_s, 0.04);
        near(intervals.image_change_to_canary_requested_s, 0.05);
        near(intervals.canary_ready_to_first_weight_live_s, 0.2);
        near(intervals.first_bad_to_zero_live_s, 1.5);
        assert_eq!(
            intervals.weight_to_live_s,
            Some(Quantiles {
                p50: 0.01,
                p99: 0.03,
                max: 0.03
            })
        );
    }

    #[test]
    fn a_bad_release_that_was_promoted_is_a_fault() {
        let counters = Counters::default();
        let report = Report::new(
            1.0,
            &[],
            &counters,
            vec![release(Outcome::Promoted, 30)],
            vec![],
            MemoryReport::default(),
        );
        assert!(!report.went_as_told());
        assert!(report.to_text().contains("should have been RolledBack"));
    }
}
