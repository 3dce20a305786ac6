//! Tables, and the goals with whether they are met.

use std::fmt::Write;

use crate::contest::{ALPHA, DEFAULT, ERRORS_DEFAULT, ERRORS_STRICT, LATENCY_DEFAULT, LATENCY_STRICT};
use crate::run::Tally;
use crate::scenario::Scenario;

/// A scenario and what became of everybody in it.
pub struct Result {
    /// The scenario.
    pub scenario: Scenario,
    /// One tally per contestant.
    pub tallies: Vec<Tally>,
}

impl Result {
    fn of(&self, name: &str) -> Option<&Tally> {
        self.tallies.iter().find(|tally| tally.name == name)
    }
}

/// Something promised, and whether it holds.
pub struct Goal {
    /// What was promised.
    pub promise: String,
    /// What was measured.
    pub measured: String,
    /// Whether it holds.
    pub met: bool,
}

/// A share in percent, with the digits that matter.
fn percent(share: f64) -> String {
    let value = share * 100.0;
    if value == 0.0 || value >= 99.95 {
        format!("{value:.0}")
    } else if value < 10.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.1}")
    }
}

fn with_interval(tally: &Tally) -> String {
    let (low, high) = tally.interval();
    format!("{} ({}–{})", percent(tally.rate()), percent(low), percent(high))
}

fn seconds(found: Option<u32>, limit: u64) -> String {
    found.map_or_else(|| format!("> {limit}"), |seconds| seconds.to_string())
}

/// Seconds that an ideal test needs on average to tell a canary that equals the primary from one at `tolerance`: `ln
/// 1/alpha` over the information per second. Given that a request failed, it is the canary's with probability equal to
/// its share of the requests, or of the share weighted by the tolerance; information is the relative entropy of the two.
pub fn information_bound(rps: f64, share: f64, base: f64, tolerance: f64) -> f64 {
    let tolerated = share * tolerance / (share * tolerance + 1.0 - share);
    let entropy = share * (share / tolerated).ln() + (1.0 - share) * ((1.0 - share) / (1.0 - tolerated)).ln();
    (1.0 / ALPHA).ln() / (rps * base * entropy)
}

/// Checks the goals that these results can decide. Those without results are left out.
pub fn goals(healthy: &[Result], regressions: &[Result], latencies: &[Result]) -> Vec<Goal> {
    let mut goals = Vec::new();
    let all = healthy
        .iter()
        .chain(latencies.iter().filter(|result| result.scenario.is_healthy()));
    for result in all.filter(|result| result.scenario.exchangeable) {
        for tally in result
            .tallies
            .iter()
            .filter(|tally| tally.name.starts_with("Serin"))
        {
            goals.push(Goal {
                promise: format!(
                    "{}: {} rolls back at most {} % of healthy releases",
                    result.scenario.name,
                    tally.name,
                    percent(ALPHA)
                ),
                measured: format!("{} % of {}", with_interval(tally), tally.runs),
                met: tally.interval().1 <= ALPHA,
            });
        }
    }
    let mut found = |results: &[Result], scenario: &Scenario, name: &str, median: u32, p95: Option<u32>| {
        let Some(tally) = results
            .iter()
            .find(|result| result.scenario.name == scenario.name)
            .and_then(|result| result.of(name))
        else {
            return;
        };
        let (half, most) = (tally.found_within(0.5), tally.found_within(0.95));
        let within = |found: Option<u32>, limit: u32| found.is_some_and(|found| found <= limit);
        let promised_p95 = p95.map(|p95| format!(", p95 ≤ {p95} s")).unwrap_or_default();
        goals.push(Goal {
            promise: format!("{}: {name} median ≤ {median} s{promised_p95}", scenario.name),
            measured: format!(
                "median {} s, p95 {} s",
                seconds(half, scenario.seconds),
                seconds(most, scenario.seconds)
            ),
            met: within(half, median) && p95.is_none_or(|p95| within(most, p95)),
        });
    };
    let strong = Scenario::regression(100.0, 0.1, 0.001, 0.1);
    let weak = Scenario::regression(1000.0, 0.1, 0.001, 0.005);
    for name in [ERRORS_STRICT, ERRORS_DEFAULT, DEFAULT] {
        found(regressions, &strong, name, 3, Some(7));
    }
    found(regressions, &weak, ERRORS_STRICT, 20, None);
    found(regressions, &weak, ERRORS_DEFAULT, 30, None);
    for result in latencies.iter().filter(|result| !result.scenario.is_healthy()) {
        for name in [LATENCY_STRICT, LATENCY_DEFAULT, DEFAULT] {
            found(latencies, &result.scenario, name, 60, None);
        }
    }
    let mut bounds = Vec::new();
    for result in healthy {
        let scenario = &result.scenario;
        let plain = scenario.name == Scenario::healthy("Poisson, independent errors").name
            || scenario.name.starts_with("much traffic");
        let (true, Some(tally)) = (plain, result.of(ERRORS_DEFAULT)) else {
            continue;
        };
        let share = scenario.ladder.first().map_or(0.0, |(_, share)| *share);
        let bound = information_bound(scenario.rps, share, scenario.base, 1.5);
        let good = tally.good_within(0.5);
        bounds.push(Goal {
            promise: format!(
                "{}: good within 1.5 × of the information bound of {bound:.0} s",
                scenario.name
            ),
            measured: format!("median {} s", seconds(good, scenario.seconds)),
            met: good.is_some_and(|good| f64::from(good) <= 1.5 * bound),
        });
    }
    goals.extend(bounds);
    goals
}

fn false_rollbacks(out: &mut String, results: &[Result]) {
    let Some(first) = results.first() else { return };
    let names: Vec<&str> = first.tallies.iter().map(|tally| tally.name.as_str()).collect();
    row(
        out,
        std::iter::once("healthy release; % rolled back within the hour").chain(names.iter().copied()),
    );
    row(out, std::iter::once("---").chain(names.iter().map(|_| "---:")));
    for result in results {
        let star = if result.scenario.exchangeable { "" } else { " *" };
        let cells = result.tallies.iter().map(with_interval);
        row(
            out,
            std::iter::once(format!("{}{star}", result.scenario.name)).chain(cells),
        );
    }
}

fn detections(out: &mut String, results: &[Result]) {
    row(
        out,
        [
            "regression",
            "judge",
            "found, %",
            "median, s",
            "p95, s",
            "failed requests until then",
        ],
    );
    row(out, ["---", "---", "---:", "---:", "---:", "---:"]);
    for result in results {
        for (index, tally) in result.tallies.iter().enumerate() {
            let limit = result.scenario.seconds;
            row(
                out,
                [
                    if index == 0 {
                        result.scenario.name.clone()
                    } else {
                        String::new()
                    },
                    tally.name.clone(),
                    percent(tally.rate()),
                    seconds(tally.found_within(0.5), limit),
                    seconds(tally.found_within(0.95), limit),
                    format!("{:.0}", tally.harmed_per_run()),
                ],
            );
        }
    }
}

fn row<T: std::fmt::Display>(out: &mut String, cells: impl IntoIterator<Item = T>) {
    for cell in cells {
        // Writing to a String does not fail.
        let _ = write!(out, "| {cell} ");
    }
    out.push_str("|\n");
}

/// The page of results.
pub fn page(runs: u64, healthy: &[Result], regressions: &[Result], latencies: &[Result]) -> String {
    let mut out = String::from("# Verdicts, measured\n\n");
    let _ = writeln!(
        out,
        "Written by `cargo run --profile demo -p serin-simulation -- --runs {runs}`; the same on every machine. Each row is \
         {runs} runs (Kayenta: at most 2,000; regressions: at most 2,000), every judge saw the same ones. In brackets: 95 % \
         confidence interval (Clopper-Pearson). An hour is looked at every second. alpha is 1 %. Unless the name says \
         otherwise: 100 requests a second, a tenth of them to the canary, 0.5 % errors.\n\n\
         The others' rules have the limits that people set: success rate ≥ 99 %, p99 ≤ 500 ms, over a window of a minute.\n"
    );
    out.push_str("## Goals\n\n");
    row(&mut out, ["goal", "measured", ""]);
    row(&mut out, ["---", "---", "---"]);
    for goal in goals(healthy, regressions, latencies) {
        row(
            &mut out,
            [
                goal.promise,
                goal.measured,
                if goal.met { "met" } else { "**missed**" }.to_owned(),
            ],
        );
    }
    out.push_str("\n## False rollbacks\n\n");
    false_rollbacks(&mut out, healthy);
    out.push_str(
        "\n\\* Requests of the two releases are not exchangeable within a second, so nothing is promised; the rows above with \
         the mitigation show what helps.\n\n## Detection\n\n",
    );
    detections(&mut out, regressions);
    if !latencies.is_empty() {
        let (equal, slower): (Vec<&Result>, Vec<&Result>) =
            latencies.iter().partition(|result| result.scenario.is_healthy());
        let owned = |results: Vec<&Result>| -> Vec<Result> {
            let copy = |result: &Result| Result {
                scenario: result.scenario.clone(),
                tallies: result.tallies.clone(),
            };
            results.into_iter().map(copy).collect()
        };
        out.push_str("\n## Latency\n\n");
        false_rollbacks(&mut out, &owned(equal));
        out.push('\n');
        detections(&mut out, &owned(slower));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_information_bound_is_the_textbooks() {
        // Half of the requests, so 1/2 against 3/5; five errors a second.
        let entropy: f64 = 0.5 * (0.5_f64 / 0.6).ln() + 0.5 * (0.5_f64 / 0.4).ln();
        let expected = 100.0_f64.ln() / (5.0 * entropy);
        assert!((information_bound(1000.0, 0.5, 0.005, 1.5) - expected).abs() < 1e-9);
    }

    #[test]
    fn percentages_have_the_digits_that_matter() {
        for (share, text) in [(0.0, "0"), (0.0012, "0.12"), (0.455, "45.5"), (1.0, "100")] {
            assert_eq!(percent(share), text);
        }
    }
}
