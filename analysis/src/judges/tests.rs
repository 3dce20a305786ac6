use proptest::prelude::*;

use super::*;
use crate::judge::quantile::tests::{histogram, log_normal};
use crate::random::Random;
use crate::sample::Histogram;

fn counts(requests: u64, errors: u64) -> Counts {
    Counts {
        requests,
        errors,
        ..Counts::default()
    }
}

fn sample(second: i64, canary: Counts, primary: Counts) -> Sample {
    Sample {
        at_ms: second * 1000,
        from_ms: None,
        canary,
        primary,
    }
}

#[test]
fn without_any_configuration_errors_and_p99_share_one_percent() {
    let options = Options::default();
    let alphas: Vec<(&str, f64)> = options
        .metrics
        .iter()
        .map(|metric| (metric.name.as_str(), options.alpha_of(metric)))
        .collect();
    assert_eq!(alphas, [("errors", 0.0075), ("latency-p99", 0.0025)]);
    assert_eq!(options.tolerance, 1.5);
}

#[test]
fn with_a_handful_of_requests_it_says_that_they_are_too_few() {
    let options = Options {
        metrics: vec![Metric::by_name("errors").unwrap()],
        ..Options::default()
    };
    let mut judges = Judges::default();
    judges.observe(&sample(0, counts(3, 0), counts(90, 1)), 10.0, &options);
    let verdict = judges.verdict(&options).verdict;
    assert_eq!(verdict.word(), "undecided");
    assert!(
        verdict.explanation().starts_with("only 3 requests to the canary"),
        "{}",
        verdict.explanation()
    );
}

#[test]
fn metrics_are_known_by_name() {
    for (name, kind) in [
        (
            "errors-5xx",
            Kind::Errors {
                class: ErrorClass::Http5xx,
            },
        ),
        (
            "latency-p99.9",
            Kind::Latency {
                quantile: 0.9990000000000001,
            },
        ),
        ("latency", Kind::Distribution),
    ] {
        let known = Metric::by_name(name).unwrap().kind;
        match (known, kind) {
            (Kind::Latency { quantile: one }, Kind::Latency { quantile: other }) => {
                assert!((one - other).abs() < 1e-9);
            }
            _ => assert_eq!(known, kind),
        }
    }
    for name in ["latency-p0", "latency-p100", "latency-px", "speed"] {
        assert_eq!(Metric::by_name(name), None, "{name}");
    }
}

#[test]
fn a_bad_release_is_explained_with_the_overall_promise() {
    let options = Options::default();
    let mut judges = Judges::default();
    judges.observe(&sample(0, counts(1204, 49), counts(10_911, 22)), 10.0, &options);
    let combined = judges.verdict(&options);
    assert!(combined.verdict.is_bad());
    assert_eq!(
        combined.verdict.explanation(),
        "canary fails 4.1 % of 1,204 requests, primary 0.2 % of 10,911; at most 1 in 100 healthy releases would ever look this bad"
    );
    assert!(combined.metrics[0].verdict.explanation().contains("1 in 133"));
    assert_eq!(combined.metrics[1].verdict.word(), "no data");
}

#[test]
fn arms_that_are_reported_one_after_the_other_are_compared_as_one_batch() {
    let options = Options::default();
    let (mut apart, mut together) = (Judges::default(), Judges::default());
    for second in 2..8 {
        let (canary, primary) = (counts(10, 3), counts(40, 0));
        apart.observe(&sample(second, canary.clone(), Counts::default()), 20.0, &options);
        apart.observe(
            &sample(second, Counts::default(), primary.clone()),
            20.0,
            &options,
        );
        together.observe(&sample(second, canary, primary), 20.0, &options);
    }
    assert!(apart.verdict(&options).verdict.is_bad());
    assert_eq!(apart.verdict(&options), together.verdict(&options));
}

#[test]
fn counts_whose_other_arm_never_comes_are_not_held_against_later_ones() {
    let options = Options::default();
    let mut judges = Judges::default();
    for second in 0..=10 {
        judges.observe(&sample(second, counts(10, 10), Counts::default()), 20.0, &options);
    }
    judges.observe(&sample(20, Counts::default(), counts(1000, 0)), 20.0, &options);
    judges.observe(&sample(31, counts(1, 0), counts(1000, 0)), 20.0, &options);
    assert!(!judges.verdict(&options).verdict.is_bad());
    assert_eq!(judges.totals().canary, 111);
}

#[test]
fn several_metrics_together_may_stop_what_none_would_stop_alone() {
    let metric = |name: &str| Metric::by_name(name).unwrap();
    let options = Options {
        metrics: vec![metric("errors-5xx"), metric("errors-grpc")],
        ..Options::default()
    };
    let mut judges = Judges::default();
    let mut second = 0;
    // One more of each in turn, until the sum crosses.
    loop {
        let mut canary = counts(100, 2);
        canary.classes.http_5xx = 1;
        canary.classes.grpc = 1;
        judges.observe(&sample(second, canary, counts(100, 0)), 50.0, &options);
        second += 1;
        if judges.verdict(&options).verdict.is_bad() || second == 100 {
            break;
        }
    }
    let combined = judges.verdict(&options);
    assert!(combined.verdict.is_bad());
    let alone = combined
        .metrics
        .iter()
        .filter(|metric| metric.verdict.is_bad())
        .count();
    assert!(alone == 2 || combined.verdict.explanation().contains("all metrics together"));
}

#[test]
fn healthy_releases_are_stopped_less_often_than_alpha_by_all_metrics_together() {
    let metric = |name: &str| Metric::by_name(name).unwrap();
    let options = Options {
        alpha: 0.05,
        tolerance: 1.0,
        metrics: ["errors", "latency-p50", "latency-p90", "latency"]
            .map(metric)
            .to_vec(),
        ..Options::default()
    };
    let mut stopped = 0;
    let runs = 200;
    for seed in 0..runs {
        let mut random = Random::new(seed);
        let mut judges = Judges::default();
        for second in 0..40 {
            let mut arm = |requests| {
                let mut counts = histogram(&mut random, requests, log_normal(0.8, 1.0));
                counts.errors = random.binomial(requests, 0.02);
                counts
            };
            let one = sample(second, arm(20), arm(60));
            judges.observe(&one, 25.0, &options);
        }
        stopped += u64::from(judges.verdict(&options).verdict.is_bad());
    }
    // 10 plus three standard deviations.
    assert!(stopped <= 19, "{stopped} of {runs}");
}

#[test]
fn absolute_guards_see_two_arms_that_are_both_bad() {
    let mut options = Options::default();
    options.metrics.push(Metric {
        name: "error-rate".to_owned(),
        kind: Kind::ErrorRate {
            acceptable: 0.01,
            unacceptable: None,
        },
        weight: 1.0,
        tolerance: None,
    });
    options.metrics.push(Metric {
        name: "latency-bound".to_owned(),
        kind: Kind::LatencyBound {
            quantile: 0.9,
            bound_ms: 100.0,
        },
        weight: 1.0,
        tolerance: None,
    });
    let mut judges = Judges::default();
    let mut random = Random::new(4);
    for second in 0..10 {
        let mut arm = |requests| {
            let mut counts = histogram(&mut random, requests, log_normal(0.5, 10.0));
            counts.errors = requests / 10;
            counts
        };
        let one = sample(second, arm(30), arm(270));
        judges.observe(&one, 10.0, &options);
    }
    let combined = judges.verdict(&options);
    let words: Vec<_> = combined
        .metrics
        .iter()
        .map(|metric| metric.verdict.word())
        .collect();
    assert_eq!(words[0], "undecided");
    assert_eq!(words[2..], ["bad", "bad"], "{combined:#?}");
}

#[test]
fn durations_of_a_cold_canary_do_not_count_and_its_errors_do() {
    let options = Options {
        warm_up: warmth::Options {
            shortest_ms: 20_000,
            longest_ms: 60_000,
            errors: false,
        },
        ..Options::default()
    };
    let mut judges = Judges::default();
    let mut random = Random::new(6);
    for second in 0..20 {
        let canary = histogram(&mut random, 50, log_normal(0.5, 20.0));
        let primary = histogram(&mut random, 450, log_normal(0.5, 1.0));
        judges.observe(&sample(second, canary, primary), 10.0, &options);
    }
    let verdict = judges.verdict(&options);
    assert!(!judges.is_warm() && !verdict.verdict.is_bad());
    assert!(verdict.metrics[1].verdict.explanation().contains("warming up"));
    let mut failing = histogram(&mut random, 50, log_normal(0.5, 1.0));
    failing.errors = 25;
    judges.observe(
        &sample(21, failing, histogram(&mut random, 450, log_normal(0.5, 1.0))),
        10.0,
        &options,
    );
    assert!(judges.verdict(&options).verdict.is_bad());
}

#[test]
fn errors_of_a_cold_canary_are_left_out_where_asked_and_what_follows_is_judged_as_if_they_had_not_been() {
    let mut options = Options {
        warm_up: warmth::Options {
            shortest_ms: 20_000,
            longest_ms: 20_000,
            errors: true,
        },
        ..Options::default()
    };
    options.metrics = vec![Metric::by_name("errors").unwrap()];
    let (mut judges, mut unshown) = (Judges::default(), Judges::default());
    let cold = |second| sample(second, counts(50, 25), counts(450, 1));
    for second in 0..=20 {
        judges.observe(&cold(second), 10.0, &options);
    }
    assert!(judges.is_warm());
    let verdict = &judges.verdict(&options).metrics[0].verdict;
    assert_eq!(verdict.word(), "no data", "{verdict:?}");
    let mut early = Judges::default();
    early.observe(&cold(0), 10.0, &options);
    let told = early.verdict(&options).metrics[0]
        .verdict
        .explanation()
        .to_owned();
    assert!(told.contains("its errors do not count yet"), "{told}");

    let always = Options {
        warm_up: warmth::Options::NONE,
        ..options.clone()
    };
    for second in 21..40 {
        let warm = sample(second, counts(50, 1), counts(450, 2));
        judges.observe(&warm, 10.0, &options);
        unshown.observe(&warm, 10.0, &always);
        assert_eq!(
            judges.verdict(&options).metrics[0].verdict,
            unshown.verdict(&always).metrics[0].verdict
        );
    }
    // And a canary that goes on failing is found.
    for second in 40..50 {
        judges.observe(&cold(second), 10.0, &options);
    }
    assert!(judges.verdict(&options).verdict.is_bad());
}

#[test]
fn a_metric_that_is_added_in_the_middle_begins_with_nothing_and_the_others_go_on() {
    let mut options = Options::default();
    let mut judges = Judges::default();
    judges.observe(&sample(0, counts(100, 5), counts(900, 5)), 10.0, &options);
    let before = judges.verdict(&options).metrics[0].verdict.clone();
    options
        .metrics
        .insert(0, Metric::by_name("errors-5xx").unwrap().weighing(1e-9));
    judges.observe(&sample(1, counts(1, 0), counts(9, 0)), 10.0, &options);
    let after = judges.verdict(&options);
    let value = |verdict: &Verdict| verdict.evidence().unwrap().value;
    assert_eq!(value(&after.metrics[1].verdict), value(&before));
}

/// Five and a half hours of batches, with more buckets than are kept and a metric of every kind.
#[test]
fn the_state_of_all_judges_does_not_grow_however_long_a_run_is() {
    let mut options = Options {
        metrics: [
            "errors",
            "errors-5xx",
            "errors-by-client",
            "latency-p50",
            "latency-p99",
            "latency",
        ]
        .into_iter()
        .filter_map(Metric::by_name)
        .collect(),
        ..Options::default()
    };
    options.metrics.push(Metric {
        name: "max-error-rate".to_owned(),
        kind: Kind::ErrorRate {
            acceptable: 0.05,
            unacceptable: None,
        },
        weight: 1.0,
        tolerance: None,
    });
    let arm = |second: i64, requests: u64| {
        let mut counts = counts(requests, (second % 3) as u64);
        counts.latency = Histogram::new((1..300).map(f64::from).collect());
        for (bucket, count) in counts.latency.counts.iter_mut().enumerate() {
            *count = requests * (1 + (bucket as u64 + second as u64) % 5);
        }
        counts
    };
    let mut judges = Judges::default();
    let mut longest = 0;
    for second in 0..20_000 {
        // Now and then an arm is missing.
        let canary = if second % 7 == 0 {
            Counts::default()
        } else {
            arm(second, 10)
        };
        judges.observe(&sample(second, canary, arm(second, 90)), 10.0, &options);
        if second % 500 == 499 {
            longest = longest.max(serde_json::to_string(&judges).unwrap().len());
        }
    }
    // 700 bytes per metric and the primary's buckets.
    assert!(longest < 7 * 700 + 1500, "{longest} bytes");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn the_order_inside_a_batch_does_not_matter(
        parts in prop::collection::vec((any::<bool>(), 1u64..50, 0u64..5, 0usize..13), 2..20),
        turn in 0usize..20,
    ) {
        let options = Options::default();
        let batch = |parts: &[(bool, u64, u64, usize)]| {
            let mut whole = sample(0, Counts::default(), Counts::default());
            for (of_canary, requests, errors, bucket) in parts {
                let mut part = counts(*requests, *errors.min(requests));
                part.latency = Histogram::new(crate::judge::quantile::tests::BOUNDS.to_vec());
                part.latency.counts[*bucket] = *requests;
                let one = if *of_canary {
                    sample(0, part, Counts::default())
                } else {
                    sample(0, Counts::default(), part)
                };
                whole.add(&one);
            }
            whole
        };
        let mut turned = parts.clone();
        turned.rotate_left(turn % parts.len());
        let (mut one, mut other) = (Judges::default(), Judges::default());
        for second in 0..3 {
            for (judges, parts) in [(&mut one, &parts), (&mut other, &turned)] {
                let mut batch = batch(parts);
                batch.at_ms = second * 1000;
                judges.observe(&batch, 10.0, &options);
            }
        }
        prop_assert_eq!(one, other);
    }

    #[test]
    fn the_state_of_all_judges_survives_a_restart_and_stays_small(
        batches in prop::collection::vec((0u64..50, 0u64..5, 1u64..500, 0u64..5, 0u64..1000), 1..30),
        restart_at in 0usize..30,
    ) {
        let options = Options::default();
        let (mut straight, mut restarted) = (Judges::default(), Judges::default());
        for (index, (canary, canary_bad, primary, primary_bad, seed)) in batches.into_iter().enumerate() {
            let mut random = Random::new(seed);
            let mut ours = histogram(&mut random, canary, log_normal(0.5, 1.0));
            let mut theirs = histogram(&mut random, primary, log_normal(0.5, 1.0));
            ours.errors = canary_bad.min(canary);
            theirs.errors = primary_bad.min(primary);
            let one = sample(index as i64 * 20, ours, theirs);
            if index == restart_at {
                let text = serde_json::to_string(&restarted).unwrap();
                prop_assert!(text.len() < 2000, "{} bytes", text.len());
                restarted = serde_json::from_str(&text).unwrap();
                straight.unpaired = None;
            }
            straight.observe(&one, 10.0, &options);
            restarted.observe(&one, 10.0, &options);
        }
        let (one, other) = (straight.verdict(&options), restarted.verdict(&options));
        prop_assert_eq!(one.verdict.word(), other.verdict.word());
        for (one, other) in one.metrics.iter().zip(&other.metrics) {
            prop_assert_eq!(one.verdict.word(), other.verdict.word());
        }
    }
}
