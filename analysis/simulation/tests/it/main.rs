//! A small run of everything.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests may fail like tests

use serin_simulation::contest::{ERRORS_DEFAULT, ERRORS_STRICT, of_errors};
use serin_simulation::report::{Measured, Result, goals, page};
use serin_simulation::run::{Tally, contest};
use serin_simulation::scenario::{Scenario, healthy};

fn tally<'t>(tallies: &'t [Tally], name: &str) -> &'t Tally {
    tallies.iter().find(|tally| tally.name == name).unwrap()
}

/// Fewer seconds, so that the suite stays quick; the full hours are in `docs/verdicts/results.md`.
fn short(scenario: Scenario, seconds: u64) -> Scenario {
    Scenario { seconds, ..scenario }
}

#[test]
fn the_number_of_threads_does_not_change_the_results() {
    let scenario = short(Scenario::regression(100.0, 0.1, 0.001, 0.02), 300);
    let one = contest(&scenario, &of_errors(), 40, 1);
    assert_eq!(one, contest(&scenario, &of_errors(), 40, 3));
}

#[test]
fn healthy_releases_stay_in_every_exchangeable_scenario() {
    for scenario in healthy().into_iter().filter(|scenario| scenario.exchangeable) {
        let scenario = short(scenario, 600);
        let tallies = contest(&scenario, &of_errors()[..2], 60, 2);
        for tally in &tallies {
            // 60 runs at alpha 1 %: five or more happen with probability 0.0003.
            assert!(tally.bad_at.len() < 5, "{}: {tally:?}", scenario.name);
        }
    }
}

#[test]
fn strong_regressions_are_found_in_seconds_and_the_fixed_rule_takes_minutes() {
    let scenario = short(Scenario::regression(100.0, 0.1, 0.001, 0.1), 600);
    let tallies = contest(&scenario, &of_errors(), 60, 2);
    assert!(tally(&tallies, ERRORS_DEFAULT).found_within(0.5).unwrap() <= 5);
    assert_eq!(
        tally(&tallies, "Flagger, 60 s, threshold 5").found_within(0.5),
        Some(360)
    );
    let harmed = |name: &str| tally(&tallies, name).harmed_per_run();
    assert!(harmed(ERRORS_DEFAULT) * 20.0 < harmed("Flagger, 60 s, threshold 5"));
}

#[test]
fn a_restart_every_few_seconds_changes_nothing() {
    let calm = short(Scenario::regression(100.0, 0.1, 0.001, 0.02), 300);
    let restarted = Scenario {
        restart_every: Some(7),
        ..calm.clone()
    };
    let entries = &of_errors()[..2];
    assert_eq!(
        contest(&calm, entries, 40, 2),
        contest(&restarted, entries, 40, 2)
    );
}

#[test]
fn clustered_errors_break_the_bound_and_counting_clients_restores_it() {
    let scenarios = healthy();
    let rate = |needle: &str| {
        let scenario = scenarios
            .iter()
            .find(|scenario| scenario.name.contains(needle))
            .unwrap();
        let tallies = contest(&short(scenario.clone(), 1800), &of_errors()[1..2], 60, 2);
        tally(&tallies, ERRORS_STRICT).rate()
    };
    let (undone, done) = (rate("failures 3 times, nothing done"), rate("counted by client"));
    assert!(undone > 0.1 && done < 0.09, "{undone} {done}");
}

#[test]
fn the_page_names_each_goal_and_whether_it_is_met() {
    let scenario = short(Scenario::healthy("Poisson, independent errors"), 60);
    let tallies = contest(&scenario, &of_errors(), 8, 2);
    let measured = Measured {
        runs: 8,
        healthy: vec![Result { scenario, tallies }],
        ..Measured::default()
    };
    let found = goals(&measured);
    // Eight runs cannot show that fewer than one in a hundred fail.
    assert!(!found.is_empty() && found.iter().all(|goal| !goal.met));
    let page = page(&measured);
    assert!(
        page.contains("**missed**") && page.contains("Kayenta, every 10 min"),
        "{page}"
    );
}
