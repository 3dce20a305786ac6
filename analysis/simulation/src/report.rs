//! Tables, and the goals with whether they are met.

use std::fmt::Write;

use crate::contest::{
    ALPHA, DEFAULT, ERRORS_DEFAULT, ERRORS_STRICT, KAYENTA_RUNS, LATENCY_STRICT, ORACLE, OTHER_RUNS,
    WITH_DISTRIBUTION,
};
use crate::run::Tally;
use crate::scenario::Scenario;
use crate::stats::quantile;
use crate::watching::{ALLOWED, Scene, Watched};

/// Everything that was measured.
#[derive(Default)]
pub struct Measured {
    /// Runs per scenario.
    pub runs: u64,
    /// Nothing is wrong with the canary's errors.
    pub healthy: Vec<Result>,
    /// The canary fails more.
    pub regressions: Vec<Result>,
    /// Latency is judged; the canary is slower in some.
    pub latencies: Vec<Result>,
    /// Judges with a limit of their own.
    pub absolute: Vec<Result>,
    /// The watch after promotion.
    pub watched: Vec<(Scene, Watched)>,
}

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

/// One goal per judge that promises something: the worst of the scenarios in which the promise holds.
fn false_rollback_goals(measured: &Measured) -> Vec<Goal> {
    let Measured {
        healthy,
        latencies,
        absolute,
        ..
    } = measured;
    let mut worst: Vec<(&Tally, &Scenario, usize)> = Vec::new();
    let equal = latencies.iter().filter(|result| result.scenario.is_healthy());
    for result in healthy
        .iter()
        .chain(equal)
        // Beyond the limit the guard is right to stop, even where both releases are.
        .chain(
            absolute
                .iter()
                .filter(|result| result.scenario.name.starts_with("at the limit")),
        )
        .filter(|result| result.scenario.exchangeable)
    {
        let most = result.tallies.iter().map(|tally| tally.runs).max();
        for tally in result
            .tallies
            .iter()
            .filter(|tally| tally.name.starts_with("Serin") && Some(tally.runs) == most)
        {
            match worst.iter_mut().find(|(known, ..)| known.name == tally.name) {
                None => worst.push((tally, &result.scenario, 1)),
                Some((known, scenario, count)) => {
                    *count += 1;
                    if tally.rate() > known.rate() {
                        (*known, *scenario) = (tally, &result.scenario);
                    }
                }
            }
        }
    }
    worst
        .into_iter()
        .map(|(tally, scenario, count)| Goal {
            promise: format!(
                "{}: at most {} % of healthy releases are rolled back, upper confidence limit, in each of {count} exchangeable \
                 scenarios",
                tally.name,
                percent(ALPHA)
            ),
            measured: format!(
                "worst {} % of {} ({})",
                with_interval(tally),
                tally.runs,
                scenario.name
            ),
            met: tally.interval().1 <= ALPHA,
        })
        .collect()
}

/// Checks the goals that these results can decide. Those without results are left out.
pub fn goals(measured: &Measured) -> Vec<Goal> {
    let (healthy, regressions, latencies) = (&measured.healthy, &measured.regressions, &measured.latencies);
    let mut goals = false_rollback_goals(measured);
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
    found(regressions, &strong, ERRORS_STRICT, 3, Some(7));
    found(regressions, &weak, ERRORS_STRICT, 20, None);
    found(regressions, &weak, ERRORS_DEFAULT, 30, None);
    for result in latencies.iter().filter(|result| !result.scenario.is_healthy()) {
        for name in [LATENCY_STRICT, WITH_DISTRIBUTION] {
            found(latencies, &result.scenario, name, 60, None);
        }
    }
    goals.extend(regressions.iter().filter_map(near_the_oracle));
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
    for (scene, watched) in &measured.watched {
        let each_day = watched.alarms as f64 / watched.days.max(1) as f64;
        goals.push(Goal {
            promise: format!(
                "watch after promotion, {} rps, {} % errors{}: at most {ALLOWED} false alarm a day",
                scene.rps,
                percent(scene.rate),
                if scene.at_baseline {
                    " (the baseline itself)"
                } else {
                    ""
                },
            ),
            measured: format!("{each_day:.3} a day in {} days", watched.days),
            met: each_day <= ALLOWED,
        });
    }
    goals
}

/// With a tolerance less can be had: a test that knows what nobody knows says how much less.
fn near_the_oracle(result: &Result) -> Option<Goal> {
    let strong = Scenario::regression(100.0, 0.1, 0.001, 0.1);
    let (default, oracle) = (result.of(DEFAULT)?, result.of(ORACLE)?);
    if result.scenario.name != strong.name {
        return None;
    }
    let times = |tally: &Tally| Some((tally.found_within(0.5)?, tally.found_within(0.95)?));
    let (found, bound) = (times(default)?, times(oracle)?);
    Some(Goal {
        promise: format!(
            "{}: {DEFAULT} at most a second later than {ORACLE}, which takes {} s (median) and {} s (p95)",
            strong.name, bound.0, bound.1
        ),
        measured: format!("median {} s, p95 {} s", found.0, found.1),
        met: found.0 <= bound.0 + 1 && found.1 <= bound.1 + 1,
    })
}

fn false_rollbacks<R: std::borrow::Borrow<Result>>(out: &mut String, results: &[R]) {
    let Some(first) = results.first().map(std::borrow::Borrow::borrow) else {
        return;
    };
    let names: Vec<&str> = first.tallies.iter().map(|tally| tally.name.as_str()).collect();
    row(
        out,
        std::iter::once("healthy release; % rolled back within the hour").chain(names.iter().copied()),
    );
    row(out, std::iter::once("---").chain(names.iter().map(|_| "---:")));
    for result in results.iter().map(std::borrow::Borrow::borrow) {
        let star = if result.scenario.exchangeable { "" } else { " *" };
        let cells = result.tallies.iter().map(with_interval);
        row(
            out,
            std::iter::once(format!("{}{star}", result.scenario.name)).chain(cells),
        );
    }
}

/// `harmed` is whether requests fail in these scenarios.
fn detections<R: std::borrow::Borrow<Result>>(out: &mut String, results: &[R], harmed: bool) {
    let last = harmed.then_some("failed canary requests until then");
    let head = ["regression", "judge", "found, %", "median, s", "p95, s"];
    row(out, head.into_iter().chain(last));
    row(
        out,
        ["---", "---", "---:", "---:", "---:"]
            .into_iter()
            .chain(last.map(|_| "---:")),
    );
    for result in results.iter().map(std::borrow::Borrow::borrow) {
        for (index, tally) in result.tallies.iter().enumerate() {
            let limit = result.scenario.seconds;
            let name = if index == 0 {
                result.scenario.name.as_str()
            } else {
                ""
            };
            let cells = [
                name.to_owned(),
                tally.name.clone(),
                percent(tally.rate()),
                seconds(tally.found_within(0.5), limit),
                seconds(tally.found_within(0.95), limit),
            ];
            let last = harmed.then(|| format!("{:.0}", tally.harmed_per_run()));
            row(out, cells.into_iter().chain(last));
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

fn watches(out: &mut String, watched: &[(Scene, Watched)]) {
    row(
        out,
        [
            "what is served after the promotion",
            "false alarms a day",
            "changes to",
            "median, s",
            "p95, s",
        ],
    );
    row(out, ["---", "---:", "---:", "---:", "---:"]);
    for (scene, watched) in watched {
        let found = |q| {
            let seconds = quantile(&watched.found, watched.found.len() as u64, q);
            seconds.map_or_else(String::new, |seconds| seconds.to_string())
        };
        row(
            out,
            [
                format!("{} rps, {} % errors", scene.rps, percent(scene.rate)),
                format!("{:.3}", watched.alarms as f64 / watched.days.max(1) as f64),
                format!("{} %", percent(scene.changed)),
                found(0.5),
                found(0.95),
            ],
        );
    }
}

/// The page of results.
pub fn page(measured: &Measured) -> String {
    let Measured {
        runs,
        healthy,
        regressions,
        latencies,
        absolute,
        watched,
    } = measured;
    let mut out = String::from("# Verdicts, measured\n\n");
    let _ = writeln!(
        out,
        "Written by `cargo run --profile demo -p serin-simulation -- --runs {runs} --out docs/verdicts`; the same on every \
         machine. Each scenario is {runs} runs for the judges that promise something, the first {OTHER_RUNS} of them for the \
         others, {KAYENTA_RUNS} for Kayenta. Every judge saw the same ones. In brackets: 95 % confidence interval \
         (Clopper-Pearson). A run is an hour, looked at every second; times count from the canary's first request and are \
         rounded up to the second in which the report came. alpha is 1 %. Unless the name says otherwise: 100 requests a \
         second, a tenth of them to the canary, 0.5 % errors.\n\n\
         The others' rules have the limits that people set: success rate ≥ 99 %, p99 ≤ 500 ms, over a window of a minute.\n"
    );
    out.push_str("## Goals\n\n");
    row(&mut out, ["goal", "measured", ""]);
    row(&mut out, ["---", "---", "---"]);
    for goal in goals(measured) {
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
    detections(&mut out, regressions, true);
    if !absolute.is_empty() {
        out.push_str(
            "\n## Limits and values\n\n% stopped within the hour. Only the guard and the group-sequential plan promise anything: \
             the guard for up to 1 % errors, the plan for releases that are alike.\n\n",
        );
        false_rollbacks(&mut out, absolute);
        out.push('\n');
        let (_, worse): (Vec<&Result>, Vec<&Result>) =
            absolute.iter().partition(|result| result.scenario.canary < 0.02);
        detections(&mut out, &worse, true);
    }
    if !watched.is_empty() {
        out.push_str("\n## Watch after promotion\n\nAn hour of quiet, then a change.\n\n");
        watches(&mut out, watched);
    }
    if !latencies.is_empty() {
        let (equal, slower): (Vec<&Result>, Vec<&Result>) =
            latencies.iter().partition(|result| result.scenario.is_healthy());
        out.push_str("\n## Latency\n\n");
        false_rollbacks(&mut out, &equal);
        out.push('\n');
        detections(&mut out, &slower, false);
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
