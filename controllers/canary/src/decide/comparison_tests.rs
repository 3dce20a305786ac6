//! Stories of the comparison: when a step goes on, what missing data does, what the planner tells.

use serde_json::json;
use serin_analysis::judges::Metric;
use serin_analysis::verdict::Policy;
use serin_crds::flagger::CanaryPhase;

use super::simulation::{Happening, World, initialized, plan, rolled_to};
use crate::plan::{Advance, ComparisonPlan};

/// At weight 25 of 25, 50; interval 10 s; only errors are compared.
fn world(change: impl FnOnce(&mut ComparisonPlan)) -> World {
    let mut world = rolled_to(25);
    let comparison = world.plan.comparison.as_mut().unwrap();
    comparison.options.metrics = vec![Metric::by_name("errors").unwrap()];
    change(comparison);
    world
}

/// Seconds until another weight, when each second has these requests and errors.
fn advanced_after(world: &mut World, canary: (u64, u64), primary: (u64, u64)) -> Option<u64> {
    let weight = world.weight();
    (1..200).find(|_| {
        world.happen(&Happening::Wait(1));
        world.happen(&Happening::Compare(canary, primary));
        world.step();
        world.weight() != weight
    })
}

#[test]
fn a_step_goes_on_early_late_or_at_its_interval_as_the_policy_says() {
    // Plenty of equal errors: shown to be within the tolerance after a few seconds.
    let (canary, primary) = ((4000, 20), (16_000, 80));
    let after = |advance, canary, primary| {
        advanced_after(&mut world(|plan| plan.advance = advance), canary, primary).unwrap()
    };
    assert_eq!(after(Advance::AtInterval, canary, primary), 10);
    let early = after(Advance::Early, canary, primary);
    assert!(early < 8, "{early} s");
    assert_eq!(after(Advance::WhenGood, canary, primary), 10);
    // Too few errors to show anything: it is waited for, and then time is up.
    let (canary, primary) = ((100, 0), (400, 0));
    assert_eq!(after(Advance::AtInterval, canary, primary), 10);
    assert_eq!(after(Advance::Early, canary, primary), 10);
    assert_eq!(
        after(Advance::WhenGood, canary, primary),
        40,
        "three intervals more"
    );
}

#[test]
fn missing_data_holds_prolongs_fails_or_passes_as_the_policy_says() {
    let none = |policy| {
        let mut world = world(|plan| plan.on_no_data = policy);
        let seconds = advanced_after(&mut world, (0, 0), (400, 0));
        (seconds, world.phase(), world.status.failed_checks)
    };
    let (held, phase, failed) = none(Policy::Hold);
    assert_eq!((held, phase, failed), (None, CanaryPhase::Progressing, Some(0)));
    assert_eq!(none(Policy::Pass).0, Some(10));
    // Two failed checks roll back.
    let (failed, phase, _) = none(Policy::Fail);
    assert_eq!((failed, phase), (Some(20), CanaryPhase::Failed));
    let (failed, phase, _) = none(Policy::Extend);
    assert_eq!((failed, phase), (Some(50), CanaryPhase::Failed));
}

#[test]
fn every_metric_of_the_comparison_is_in_the_status_with_its_alpha() {
    let mut world = world(|plan| plan.options = serin_analysis::Options::default());
    world.happen(&Happening::Wait(1));
    world.happen(&Happening::Compare((100, 1), (400, 4)));
    world.step();
    let metrics: Vec<(&str, &str, Option<f64>)> = world
        .status
        .metrics
        .iter()
        .map(|metric| (metric.name.as_str(), metric.verdict.as_str(), metric.alpha))
        .collect();
    assert_eq!(
        metrics[1..],
        [
            ("errors", "undecided", Some(0.0075)),
            ("latency-p99", "no data", None),
            ("comparison", "no data", Some(0.01)),
        ]
    );
    assert!(world.status.metrics[1].remaining_seconds.is_some());
}

#[test]
fn steps_that_can_find_nothing_are_told_by_condition_and_event() {
    let told = |canary, primary| {
        let mut world = world(|_| {});
        for _ in 0..8 {
            world.happen(&Happening::Wait(1));
            world.happen(&Happening::Compare(canary, primary));
            world.step();
        }
        let condition = world
            .status
            .conditions
            .iter()
            .find(|condition| condition.r#type == "StepsLongEnough")
            .cloned()
            .unwrap();
        let events = world
            .events
            .iter()
            .filter(|event| event.contains("too short"))
            .count();
        (condition.status, condition.message.unwrap(), events)
    };
    let (status, message, events) = told((1, 0), (4, 0));
    assert_eq!((status.as_str(), events), ("False", 1), "{message}");
    assert!(message.contains("steps of 10 s are too short"), "{message}");
    let (status, message, events) = told((500, 5), (2000, 20));
    assert_eq!((status.as_str(), events), ("True", 0), "{message}");
}

#[test]
fn a_restarted_run_waits_until_no_proxy_sends_to_the_former_revision() {
    let mut world = rolled_to(25);
    world.happen(&Happening::Push(3));
    world.step();
    let run = world.status.run.clone().unwrap();
    assert_eq!(run.former_traffic_until.unwrap().0, world.now);
    // The new pods are ready before the last proxy knows the weight 0.
    world.happen(&Happening::Wait(2));
    world.happen(&Happening::TargetReady);
    world.step();
    assert_eq!(world.weight(), 0);
    assert_eq!(
        world.status.message.as_deref(),
        Some("traffic leaves the former revision")
    );
    let run = world.status.run.clone().unwrap();
    assert_eq!(run.former_traffic_until.unwrap().0, world.now);
    world.happen(&Happening::Wait(1));
    world.happen(&Happening::Acknowledge);
    world.step();
    assert_eq!(world.weight(), 25);
    // A run that begins from rest has no former revision to wait for.
    let mut fresh = World::new(plan(json!({"stepWeight": 50})));
    initialized(&mut fresh);
    fresh.happen(&Happening::Push(2));
    fresh.step();
    assert_eq!(fresh.status.run.clone().unwrap().former_traffic_until, None);
}

#[test]
fn a_push_right_after_a_rollback_or_a_promotion_knows_until_when_the_former_canary_had_traffic() {
    let mut world = rolled_to(25);
    world.happen(&Happening::Push(3));
    world.step();
    let began = world.now;
    world.happen(&Happening::Wait(1));
    world.happen(&Happening::TargetReady);
    world.happen(&Happening::Acknowledge);
    world.step();
    world.happen(&Happening::Acknowledge);
    world.happen(&Happening::Wait(1));
    world.happen(&Happening::Die);
    world.step();
    assert_eq!(world.status.phase, Some(CanaryPhase::Failed));
    world.happen(&Happening::Wait(1));
    world.happen(&Happening::Acknowledge);
    world.step();
    let left = world.now;
    world.happen(&Happening::Wait(60));
    world.happen(&Happening::Push(4));
    world.step();
    assert_eq!(world.status.phase, Some(CanaryPhase::Progressing));
    let until = world.status.run.clone().unwrap().former_traffic_until.unwrap().0;
    assert!(
        until > began && until <= left,
        "{until} is after {began} and no later than {left}"
    );
}

#[test]
fn a_split_that_is_not_the_configured_one_is_told_once_and_stops_nothing() {
    let mut world = world(|_| {});
    for _ in 0..8 {
        world.happen(&Happening::Wait(1));
        // Weight 25, and the canary gets three quarters.
        world.happen(&Happening::Compare((750, 7), (250, 3)));
        world.step();
    }
    let wrong = |world: &World| {
        let conditions = world.status.conditions.iter();
        conditions
            .filter(|condition| condition.r#type == "SplitAsConfigured" && condition.status == "False")
            .count()
    };
    assert_eq!(wrong(&world), 1);
    let events = world
        .events
        .iter()
        .filter(|event| event.contains("which is not what is configured"));
    assert_eq!(events.count(), 1);
    assert_eq!(world.phase(), CanaryPhase::Progressing);
}
