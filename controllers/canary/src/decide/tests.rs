//! Stories of single rollouts. The promises that hold in every story are checked in `simulation`.

use serin_crds::flagger::{CanaryPhase, StepOutcome};

use super::simulation::{Happening, World, finished, initialized, plan, rolled_to, weighted};
use super::{Action, revision_id};
use crate::traffic::Split;
use serde_json::json;

#[test]
fn a_good_release_goes_through_flaggers_phases_and_tells_flaggers_story() {
    let mut world = World::new(weighted());
    initialized(&mut world);
    world.happen(&Happening::Push(2));
    finished(&mut world);
    use CanaryPhase::*;
    assert_eq!(
        world.phases,
        [
            Initializing,
            Initialized,
            Progressing,
            Promoting,
            Finalising,
            Succeeded
        ]
    );
    assert_eq!(
        world.events,
        [
            "Initialization done! app.ns",
            "New revision detected! Scaling up app.ns",
            "Starting canary analysis for app.ns",
            "Advance app.ns canary weight 25",
            "Advance app.ns canary weight 50",
            "Copying app.ns template spec to app-primary.ns",
            "Routing all traffic to primary",
            "Promotion completed! Scaling down app.ns",
        ]
    );
    let weights: Vec<(i32, Option<StepOutcome>)> = world
        .status
        .history
        .iter()
        .map(|step| (step.weight, step.outcome.clone()))
        .collect();
    assert_eq!(
        weights,
        [
            (25, Some(StepOutcome::Passed)),
            (50, Some(StepOutcome::Passed)),
            (0, Some(StepOutcome::Passed))
        ]
    );
    assert!(
        world
            .status
            .history
            .iter()
            .all(|step| step.live_at.is_some() && step.ended_at.is_some())
    );
}

#[test]
fn the_first_weight_is_given_as_soon_as_the_canary_is_ready_and_not_before() {
    let mut world = World::new(weighted());
    initialized(&mut world);
    world.happen(&Happening::Push(2));
    world.step();
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Progressing, 0));
    assert_eq!(world.target().replicas, 2, "as many as the primary has");
    world.step();
    assert_eq!(world.weight(), 0);
    world.happen(&Happening::TargetReady);
    world.step();
    assert_eq!(world.weight(), 25);
}

#[test]
fn a_canary_without_ready_endpoints_gets_no_weight() {
    let mut world = World::new(weighted());
    initialized(&mut world);
    world.seen.canary_endpoints = Some(0);
    world.happen(&Happening::Push(2));
    world.step();
    world.happen(&Happening::TargetReady);
    world.step();
    assert_eq!(world.weight(), 0);
    world.seen.canary_endpoints = Some(2);
    world.step();
    assert_eq!(world.weight(), 25);
}

#[test]
fn the_measurement_starts_when_the_weight_is_live() {
    let mut world = World::new(weighted());
    initialized(&mut world);
    world.happen(&Happening::Push(2));
    world.step();
    world.happen(&Happening::TargetReady);
    world.step();
    // Half a minute without the last proxy's acknowledgement: no window, no step, whatever was measured.
    for _ in 0..30 {
        world.happen(&Happening::Wait(1));
        world.happen(&Happening::Measure(50, 0));
        world.step();
    }
    assert_eq!(world.weight(), 25);
    assert_eq!(
        world.status.message.as_deref(),
        Some("weight 25 is live in 1 of 3 proxies")
    );
    world.happen(&Happening::Acknowledge);
    world.step();
    let live = world.status.history[0].live_at.clone().unwrap();
    assert_eq!(live.0, world.now);
    world.happen(&Happening::Wait(9));
    world.happen(&Happening::Measure(50, 0));
    world.step();
    assert_eq!(world.weight(), 25, "the window is ten seconds long");
    world.happen(&Happening::Wait(1));
    world.step();
    assert_eq!(world.weight(), 50);
}

#[test]
fn failed_checks_halt_and_at_the_threshold_roll_back_without_another_interval() {
    let mut world = rolled_to(25);
    // The comparison with a primary that never fails would have stopped it within seconds.
    world.plan.comparison = None;
    for second in 1..=20 {
        world.happen(&Happening::Wait(1));
        world.happen(&Happening::Measure(1000, 14));
        world.step();
        let expected = i32::from(second >= 10);
        if second < 20 {
            assert_eq!(world.status.failed_checks, Some(expected), "second {second}");
        }
    }
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Failed, 0));
    let halted = world
        .events
        .iter()
        .filter(|event| *event == "Halt app.ns advancement success rate 98.60% < 99%");
    assert_eq!(halted.count(), 2);
    assert!(
        world
            .events
            .contains(&"Rolling back app.ns failed checks threshold reached 2".to_owned())
    );
    assert!(
        world
            .events
            .contains(&"Canary failed! Scaling down app.ns".to_owned())
    );
    let metric = &world.status.metrics[0];
    assert_eq!(
        (metric.verdict.as_str(), metric.bound, metric.samples),
        ("bad", Some(99.0), Some(20_000))
    );
}

#[test]
fn a_statistical_verdict_stops_the_run_without_waiting_for_the_interval() {
    let mut world = rolled_to(25);
    world.happen(&Happening::Wait(1));
    world.happen(&Happening::Measure(10, 1));
    world.step();
    assert_eq!(world.phase(), CanaryPhase::Progressing, "one error may be chance");
    world.happen(&Happening::Wait(1));
    world.happen(&Happening::Measure(30, 11));
    let decision = world.step();
    assert_eq!(world.phase(), CanaryPhase::Failed);
    assert_eq!(decision.actions, [Action::SetWeight(Split::PRIMARY)]);
    let text = world.status.message.clone().unwrap();
    assert!(text.contains("canary fails 30 % of 40 requests"), "{text}");
    assert!(
        world
            .status
            .metrics
            .iter()
            .any(|metric| metric.name == "comparison" && metric.verdict == "bad")
    );
}

#[test]
fn a_dead_pod_stops_the_run_at_once_and_one_from_before_the_traffic_does_not() {
    let mut world = World::new(weighted());
    initialized(&mut world);
    world.happen(&Happening::Push(2));
    world.step();
    world.happen(&Happening::Die);
    world.happen(&Happening::Wait(5));
    world.happen(&Happening::TargetReady);
    world.step();
    assert_eq!(world.weight(), 25, "it died before it had traffic");
    world.happen(&Happening::Wait(1));
    world.happen(&Happening::Die);
    world.step();
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Failed, 0));
    let text = world.status.message.clone().unwrap();
    assert_eq!(
        text,
        "rolled back: pod app-1 died: container app exited with code 1"
    );
}

#[test]
fn a_canary_that_loses_all_its_pods_loses_its_traffic_at_once() {
    let mut world = rolled_to(50);
    world.happen(&Happening::TargetLost);
    let decision = world.step();
    assert_eq!(decision.actions[0], Action::SetWeight(Split::PRIMARY));
    assert_eq!(world.phase(), CanaryPhase::Failed);
}

#[test]
fn a_canary_that_somebody_scales_to_zero_loses_its_traffic_at_once() {
    let mut world = rolled_to(50);
    world.target().replicas = 0;
    let decision = world.step();
    assert_eq!(decision.actions, [Action::SetWeight(Split::PRIMARY)]);
    assert_eq!(
        world.status.message.as_deref(),
        Some("rolled back: app.ns was scaled to zero")
    );
}

#[test]
fn a_target_that_is_deleted_loses_its_traffic_at_once() {
    let mut world = rolled_to(50);
    world.seen.target = None;
    let seen = world.seen.clone();
    let decision = super::decide(&seen, &world.plan, &world.status, world.now);
    assert_eq!(decision.actions, [Action::SetWeight(Split::PRIMARY)]);
}

#[test]
fn a_weight_that_a_proxy_refuses_is_taken_back() {
    let mut world = rolled_to(25);
    world.happen(&Happening::Refuse);
    world.step();
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Failed, 0));
}

#[test]
fn the_pods_of_a_failed_canary_stay_until_no_proxy_sends_to_them() {
    let mut world = rolled_to(25);
    world.happen(&Happening::Die);
    world.step();
    assert_eq!(world.target().replicas, 2);
    world.step();
    assert_eq!(world.target().replicas, 2, "weight 0 is not acknowledged");
    world.happen(&Happening::Acknowledge);
    world.step();
    assert_eq!(world.target().replicas, 0);
    let last = world.status.history.last().unwrap();
    assert_eq!((last.weight, last.live_at.is_some()), (0, true));
    assert!(
        world
            .status
            .message
            .as_deref()
            .unwrap()
            .starts_with("rolled back: "),
        "the reason stays"
    );
}

#[test]
fn no_data_halts_and_is_neither_a_failed_check_nor_a_passed_one() {
    let mut world = rolled_to(25);
    for _ in 0..100 {
        world.happen(&Happening::Wait(1));
        world.step();
    }
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Progressing, 25));
    assert_eq!(world.status.failed_checks, Some(0));
    let text = world.status.message.clone().unwrap();
    assert!(
        text.starts_with("halted, not enough data") || text.starts_with("measuring"),
        "{text}"
    );
    assert_eq!(world.status.metrics[0].verdict, "no data");
}

#[test]
fn a_source_that_cannot_be_asked_halts_too() {
    let mut world = rolled_to(25);
    world.happen(&Happening::Wait(20));
    world.step();
    assert_eq!(world.status.failed_checks, Some(0));
    assert_eq!(world.weight(), 25);
}

#[test]
fn a_revision_pushed_in_the_middle_restarts_the_analysis_from_weight_zero() {
    let mut world = rolled_to(50);
    world.happen(&Happening::Push(3));
    let decision = world.step();
    assert_eq!(decision.actions[0], Action::SetWeight(Split::PRIMARY));
    assert_eq!(
        world.events.last().unwrap(),
        "New revision detected! Restarting analysis for app.ns"
    );
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Progressing, 0));
    assert_eq!(world.status.last_applied_spec.as_deref(), Some("r3"));
    finished(&mut world);
    assert_eq!(world.status.last_promoted_spec.as_deref(), Some("r3"));
}

#[test]
fn a_changed_config_map_alone_starts_a_run() {
    let mut world = World::new(weighted());
    world.happen(&Happening::Configure(1));
    initialized(&mut world);
    world.happen(&Happening::Configure(2));
    world.step();
    assert_eq!(world.phase(), CanaryPhase::Progressing);
    finished(&mut world);
    assert_eq!(world.phase(), CanaryPhase::Succeeded);
    assert_eq!(world.status.tracked_configs.as_ref().unwrap()["configmap/c"], "2");
}

#[test]
fn after_a_failure_the_promoted_revision_changes_nothing_and_the_bad_one_again_is_a_new_run() {
    let mut world = rolled_to(25);
    world.happen(&Happening::Die);
    world.step();
    finished(&mut world);
    assert_eq!(world.phase(), CanaryPhase::Failed);
    world.step();
    world.happen(&Happening::Push(1));
    world.step();
    assert_eq!(world.phase(), CanaryPhase::Failed);
    world.happen(&Happening::Push(2));
    world.step();
    assert_eq!(world.phase(), CanaryPhase::Progressing);
}

#[test]
fn a_canary_that_never_becomes_ready_fails_at_its_deadline() {
    let mut world = World::new(weighted());
    initialized(&mut world);
    world.happen(&Happening::Push(2));
    let decision = world.step();
    let _ = decision;
    let waiting = world.step();
    assert!(waiting.wake_at.is_some());
    world.happen(&Happening::Wait(59));
    world.step();
    assert_eq!(world.phase(), CanaryPhase::Progressing);
    world.happen(&Happening::Wait(1));
    world.step();
    assert_eq!(world.phase(), CanaryPhase::Failed);
    let texts: Vec<_> = world.events.iter().rev().take(2).collect();
    assert_eq!(texts[0], "Canary failed! Scaling down app.ns");
    assert!(
        texts[1].starts_with("canary deployment app.ns not ready: waiting for rollout to finish: "),
        "{texts:?}"
    );
}

#[test]
fn a_primary_that_is_lost_in_the_middle_of_a_run_is_waited_for_until_the_deadline() {
    let mut world = rolled_to(25);
    world.happen(&Happening::PrimaryLost);
    let waiting = world.step();
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Progressing, 25));
    assert!(waiting.wake_at.is_some(), "a wait has a deadline");
    world.happen(&Happening::Wait(59));
    world.step();
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Progressing, 25));
    world.happen(&Happening::Wait(1));
    world.step();
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Failed, 0));
    let texts: Vec<_> = world.events.iter().rev().take(2).collect();
    assert!(
        texts[1].starts_with(
            "Rolling back app.ns app-primary.ns not ready: waiting for rollout to finish: 0 of 2"
        ),
        "{texts:?}"
    );
}

#[test]
fn a_primary_that_comes_back_or_still_serves_does_not_use_up_the_deadline() {
    let mut world = rolled_to(25);
    for _ in 0..3 {
        world.happen(&Happening::PrimaryLost);
        world.step();
        world.happen(&Happening::Wait(50));
        world.step();
        world.happen(&Happening::PrimaryReady);
        world.happen(&Happening::Measure(50, 0));
        world.step();
        assert_eq!(world.phase(), CanaryPhase::Progressing);
    }
    // One of two pods serves: the primary's own Deployment decides when that is too long.
    let mut world = rolled_to(25);
    world.seen.primary.as_mut().unwrap().available = 1;
    for _ in 0..10 {
        world.happen(&Happening::Wait(30));
        world.step();
        assert_eq!((world.phase(), world.weight()), (CanaryPhase::Progressing, 25));
    }
    let primary = world.seen.primary.as_mut().unwrap();
    primary.deadline_exceeded = true;
    world.step();
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Failed, 0));
}

#[test]
fn suspension_keeps_everything_where_it_is_and_what_was_measured_meanwhile_does_not_count() {
    let mut world = rolled_to(25);
    world.happen(&Happening::Suspend(true));
    for _ in 0..60 {
        world.happen(&Happening::Wait(1));
        let decision = world.step();
        assert_eq!(decision.actions, []);
    }
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Progressing, 25));
    world.happen(&Happening::Suspend(false));
    world.step();
    let run = world.status.run.clone().unwrap();
    assert_eq!(run.window_started_at.unwrap().0, world.now, "a new window");
}

#[test]
fn skipped_analysis_promotes_without_giving_the_canary_any_traffic() {
    let mut world = World::new(weighted());
    initialized(&mut world);
    world.plan.skip_analysis = true;
    world.happen(&Happening::Push(2));
    for _ in 0..10 {
        for happening in [
            Happening::TargetReady,
            Happening::PrimaryReady,
            Happening::Acknowledge,
        ] {
            world.happen(&happening);
        }
        world.step();
        assert_eq!(world.weight(), 0);
    }
    assert_eq!(world.phase(), CanaryPhase::Succeeded);
    assert_eq!(
        world.events.last().unwrap(),
        "Promotion completed! Canary analysis was skipped for app.ns"
    );
}

#[test]
fn step_weight_promotion_moves_the_traffic_back_step_by_step() {
    let mut world = World::new(plan(json!({
        "interval": "10s", "threshold": 2, "stepWeight": 30, "maxWeight": 60, "stepWeightPromotion": 40,
        "metrics": [{"name": "request-success-rate", "thresholdRange": {"min": 99}}]})));
    initialized(&mut world);
    world.happen(&Happening::Push(2));
    finished(&mut world);
    assert_eq!(
        world.events[2..],
        [
            "Starting canary analysis for app.ns",
            "Advance app.ns canary weight 30",
            "Advance app.ns canary weight 60",
            "Copying app.ns template spec to app-primary.ns",
            "Advance app.ns primary weight 80",
            "Advance app.ns primary weight 100",
            "Promotion completed! Scaling down app.ns",
        ]
    );
}

#[test]
fn a_primary_that_cannot_take_the_revision_over_leaves_the_traffic_with_the_canary() {
    let mut world = rolled_to(50);
    while world.phase() == CanaryPhase::Progressing {
        world.happen(&Happening::Wait(1));
        world.happen(&Happening::Measure(50, 0));
        world.step();
    }
    assert_eq!(world.phase(), CanaryPhase::Promoting);
    world.happen(&Happening::PrimaryNever);
    world.seen.primary.as_mut().unwrap().observed_generation = 99;
    world.step();
    assert_eq!((world.phase(), world.weight()), (CanaryPhase::Failed, 100));
    world.step();
    assert_eq!(
        (world.phase(), world.weight()),
        (CanaryPhase::Failed, 100),
        "until a person repairs it"
    );
    assert!(
        world
            .events
            .last()
            .unwrap()
            .starts_with("Promotion of app.ns failed, primary not ready: ")
    );
}

#[test]
fn a_revision_pushed_during_the_promotion_gets_no_traffic_before_it_is_judged() {
    let mut world = rolled_to(50);
    while world.phase() == CanaryPhase::Progressing {
        world.happen(&Happening::Wait(1));
        world.happen(&Happening::Measure(50, 0));
        world.step();
    }
    world.happen(&Happening::Push(3));
    let decision = world.step();
    assert_eq!(decision.actions[0], Action::SetWeight(Split::PRIMARY));
    finished(&mut world);
    assert_eq!(world.status.last_promoted_spec.as_deref(), Some("r3"));
}

#[test]
fn a_refused_spec_takes_the_traffic_from_a_canary_that_nobody_would_watch() {
    let mut world = rolled_to(25);
    world.plan = plan(json!({"interval": "10s", "threshold": 1, "iterations": 5}));
    let decision = world.step();
    assert_eq!(decision.actions, [Action::SetWeight(Split::PRIMARY)]);
    let condition = world
        .status
        .conditions
        .iter()
        .find(|condition| condition.r#type == "FullyHonoured")
        .unwrap();
    assert!(
        condition
            .message
            .as_deref()
            .unwrap()
            .contains("spec.analysis.iterations")
    );
    assert_eq!(world.step().actions, []);
}

#[test]
fn of_two_canaries_for_one_target_the_younger_does_nothing() {
    let mut world = World::new(weighted());
    world.seen.rival = Some("ns/older".to_owned());
    assert_eq!(world.step().actions, []);
    assert!(world.status.message.as_deref().unwrap().contains("ns/older"));
}

#[test]
fn deletion_with_revert_brings_the_target_back_before_it_gives_anything_away() {
    let mut world = World::new(weighted());
    world.plan.revert_on_deletion = true;
    initialized(&mut world);
    assert!(world.seen.has_finalizer);
    world.seen.deleting = true;
    assert_eq!(world.step().actions, [Action::ScaleTarget(2)]);
    assert_eq!(world.step().actions, []);
    world.happen(&Happening::TargetReady);
    assert_eq!(
        world.step().actions,
        [Action::RevertApex, Action::RevertRoute, Action::RemoveFinalizer]
    );
    assert_eq!(world.phase(), CanaryPhase::Terminating);
}

#[test]
fn the_id_of_a_revision_is_a_uuid_that_tells_config_changes_apart() {
    let configs = |value: &str| [("configmap/a".to_owned(), value.to_owned())].into();
    let id = revision_id("app", "r1", &configs("1"));
    assert_eq!(id, revision_id("app", "r1", &configs("1")));
    assert_ne!(id, revision_id("app", "r1", &configs("2")));
    assert_eq!(id.len(), 36);
}
