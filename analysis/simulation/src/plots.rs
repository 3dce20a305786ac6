//! The figures of the documentation.

use statrs::function::beta::beta_reg;

use crate::contest::{self, ERRORS_DEFAULT};
use crate::rules::SUCCESS_MIN;
use crate::run::{Tally, contest as run};
use crate::scenario::Scenario;
use crate::svg::{Axis, Chart, Series, label};

/// Error rate of the primary in the figures.
const BASE: f64 = 0.001;
/// The canary's share in the figures.
const SHARE: f64 = 0.1;
/// Seconds after which a figure gives up.
const PATIENCE: u32 = 3600;

fn log_axis(title: &str, low: f64, high: f64, ticks: &[f64]) -> Axis {
    Axis {
        title: title.to_owned(),
        range: (low, high),
        ticks: ticks.to_vec(),
        logarithmic: true,
    }
}

fn seconds_axis() -> Axis {
    log_axis(
        "median time to the verdict, seconds",
        1.0,
        f64::from(PATIENCE),
        &[1.0, 3.0, 10.0, 30.0, 60.0, 300.0, 1000.0, 3600.0],
    )
}

/// Median time in which Serin finds a regression; `None` when half of the runs end without.
fn median(rps: f64, canary: f64, runs: u64, threads: usize) -> Option<f64> {
    let entries: Vec<_> = contest::of_errors()
        .into_iter()
        .filter(|entry| entry.name == ERRORS_DEFAULT)
        .collect();
    let scenario = Scenario::regression(rps, SHARE, BASE, canary);
    let tallies = run(&scenario, &entries, runs, threads);
    tallies.first()?.found_within(0.5).map(f64::from)
}

/// Detection time against traffic, one line per size of the regression.
pub fn against_traffic(runs: u64, threads: usize) -> Chart {
    let traffic = [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0];
    let series = [0.005, 0.02, 0.1, 0.5].map(|canary| Series {
        label: format!("{} % errors", label(canary * 100.0)),
        points: traffic
            .iter()
            .filter_map(|rps| Some((*rps, median(*rps, canary, runs, threads)?)))
            .collect(),
        dashed: false,
    });
    Chart {
        title: "How soon a bad release is found, by traffic".to_owned(),
        subtitle: "primary fails 0.1 %, 10 % of the requests go to the canary, tolerance 1.5, alpha 1 %"
            .to_owned(),
        x: log_axis("requests per second, both releases", 10.0, 5000.0, &traffic),
        y: seconds_axis(),
        series: series.into(),
    }
}

/// Detection time against the size of the regression, one line per traffic.
pub fn against_effect(runs: u64, threads: usize) -> Chart {
    let rates = [0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5];
    let series = [10.0, 100.0, 1000.0].map(|rps| Series {
        label: format!("{} requests/s", label(rps)),
        points: rates
            .iter()
            .filter_map(|canary| Some((canary / BASE, median(rps, *canary, runs, threads)?)))
            .collect(),
        dashed: false,
    });
    Chart {
        title: "How soon a bad release is found, by how bad it is".to_owned(),
        subtitle: "primary fails 0.1 %, 10 % of the requests go to the canary, tolerance 1.5, alpha 1 %"
            .to_owned(),
        x: log_axis(
            "the canary's error rate as a multiple of the primary's",
            2.0,
            500.0,
            &[2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0],
        ),
        y: seconds_axis(),
        series: series.into(),
    }
}

/// Probability that a window of `n` healthy requests fails a success rate of at least [`SUCCESS_MIN`].
pub fn window_fails(n: u64, p: f64) -> f64 {
    let allowed = (n as f64 * (100.0 - SUCCESS_MIN) / 100.0 + 1e-9).floor();
    // P(X > k) of a binomial is a regularised incomplete beta function.
    beta_reg(allowed + 1.0, n as f64 - allowed, p)
}

/// Probability that at least `threshold` of `looks` independent checks fail.
fn rolls_back(looks: u64, fails: f64, threshold: u64) -> f64 {
    if looks < threshold {
        return 0.0;
    }
    beta_reg(threshold as f64, (looks - threshold + 1) as f64, fails)
}

/// False rollbacks against the number of looks: the threshold rule, computed, and Serin, measured in the scenario that
/// `healthy` is the tally of (100 requests a second, a tenth of them to the canary, 0.5 % errors, a look each second;
/// without tolerance, which is where the bound is tight).
pub fn against_looks(healthy: &Tally) -> Chart {
    let looks: Vec<u64> = [
        1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000, 3600,
    ]
    .into();
    let fails = window_fails(600, 0.005);
    let mut series: Vec<Series> = [1, 2, 5]
        .map(|threshold| Series {
            label: format!("success ≥ 99 %, threshold {threshold}"),
            points: looks
                .iter()
                .map(|looks| (*looks as f64, 100.0 * rolls_back(*looks, fails, threshold)))
                .collect(),
            dashed: true,
        })
        .into();
    series.push(Series {
        label: "Serin, tolerance 1".to_owned(),
        points: looks
            .iter()
            .map(|looks| {
                let found = healthy.bad_at.partition_point(|at| u64::from(*at) <= *looks);
                (*looks as f64, 100.0 * found as f64 / healthy.runs.max(1) as f64)
            })
            .collect(),
        dashed: false,
    });
    Chart {
        title: "Healthy releases that are rolled back, by how often one looks".to_owned(),
        subtitle: "both releases fail 0.5 %; a look of the rule is a window of 600 requests, of Serin a second of 10"
            .to_owned(),
        x: log_axis("looks", 1.0, 3600.0, &[1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0]),
        y: Axis {
            title: "healthy releases rolled back, %".to_owned(),
            range: (0.0, 100.0),
            ticks: vec![0.0, 20.0, 40.0, 60.0, 80.0, 100.0],
            logarithmic: false,
        },
        series,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of computed false rollbacks that the project started from: ten checks must pass at 99 %, so `threshold - 1`
    /// more may be needed.
    #[test]
    fn the_threshold_rule_fails_as_often_as_computed_elsewhere() {
        for (n, p, fails, rolled_back) in [
            (30, 0.002, 0.058, [0.45, 0.13, 0.0009]),
            (60, 0.005, 0.26, [0.95, 0.82, 0.29]),
            (600, 0.005, 0.033, [0.29, 0.05, 0.0001]),
        ] {
            let found = window_fails(n, p);
            assert!((found - fails).abs() < 0.001, "{n} {p}: {found}");
            for (threshold, expected) in [1, 2, 5].into_iter().zip(rolled_back) {
                let found = rolls_back(9 + threshold, found, threshold);
                assert!((found - expected).abs() < 0.01, "{n} {p} {threshold}: {found}");
            }
        }
    }
}
