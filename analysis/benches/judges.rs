//! The two figures of the judges: batches judged per second on one core, and what 5,000 canaries with four metrics each cost
//! per second.

use serin_analysis::judge::ratio::{Batch, Grid, RatioTest};
use serin_analysis::judges::Metric;
use serin_analysis::{Counts, Histogram, Judges, Options, Sample};

fn main() {
    divan::main();
}

const BATCHES: usize = 4096;

/// Batches of a second with errors on both sides, which is the expensive case; the canary fails `times` as often.
fn batches(times: u64) -> Vec<Batch> {
    (0..BATCHES as u64)
        .map(|i| Batch {
            canary: 300 + i % 7,
            canary_bad: times * (1 + i % 2),
            primary: 900 + i % 11,
            primary_bad: 3 + i % 4,
        })
        .collect()
}

/// 1 is a healthy canary, 3 one that fails three times as often.
#[divan::bench(args = [1, 3], counters = [divan::counter::ItemsCount::new(BATCHES)])]
fn error_batches_judged(bencher: divan::Bencher, times: u64) {
    let batches = batches(times);
    bencher.bench_local(|| {
        let mut test = RatioTest::default();
        for batch in &batches {
            test.observe(divan::black_box(batch), 1.5, &Grid::ERRORS);
        }
        test.log_peak()
    });
}

fn sample(i: u64) -> Sample {
    let counts = |requests: u64, errors: u64| {
        let mut latency = Histogram::new(vec![
            0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 30000.0,
            60000.0, 300000.0, 600000.0, 1800000.0, 3600000.0,
        ]);
        for (bucket, share) in [(3, 40), (4, 35), (5, 15), (6, 8), (7, 2)] {
            latency.counts[bucket] = requests * share / 100;
        }
        Counts {
            requests,
            errors,
            latency,
            ..Counts::default()
        }
    };
    Sample {
        at_ms: i as i64 * 1000,
        from_ms: None,
        canary: counts(100, i % 3),
        primary: counts(900, 1 + i % 4),
    }
}

/// One second of 5,000 canaries; the goal is 50 ms.
#[divan::bench(sample_count = 20)]
fn a_second_of_5000_canaries_with_4_metrics(bencher: divan::Bencher) {
    let options = Options {
        metrics: ["errors", "errors-connection", "latency-p99", "latency"]
            .iter()
            .filter_map(|name| Metric::by_name(name))
            .collect(),
        ..Options::default()
    };
    let mut canaries = vec![Judges::default(); 5000];
    let mut second = 0;
    bencher.bench_local(|| {
        second += 1;
        let sample = sample(second);
        for judges in &mut canaries {
            judges.observe(divan::black_box(&sample), 10.0, &options);
        }
    });
}

/// The verdict with its sentence, as it is written into a status.
#[divan::bench]
fn a_verdict_in_words(bencher: divan::Bencher) {
    let options = Options::default();
    let mut judges = Judges::default();
    for i in 0..100 {
        judges.observe(&sample(i), 10.0, &options);
    }
    bencher.bench_local(|| judges.verdict(&options));
}
