//! Stories of the watch after a promotion.

use serde_json::json;
use serin_crds::flagger::CanaryPhase;

use super::Action;
use super::simulation::{Happening, World, finished, initialized, plan};

fn watched(watch: serde_json::Value) -> World {
    let mut world = World::new(plan(json!({
        "interval": "10s", "threshold": 2, "stepWeight": 25, "maxWeight": 50,
        "metrics": [{"name": "request-success-rate", "thresholdRange": {"min": 99}}],
        "comparison": {"watch": watch},
    })));
    initialized(&mut world);
    world.happen(&Happening::Push(2));
    world
}

/// A second in which all goes well.
fn good_second(world: &mut World) {
    for happening in [
        Happening::TargetReady,
        Happening::PrimaryReady,
        Happening::Acknowledge,
        Happening::Wait(1),
        Happening::Measure(200, 0),
    ] {
        world.happen(&happening);
    }
}

fn promote(world: &mut World) {
    for _ in 0..400 {
        good_second(world);
        world.step();
        if world.phase() == CanaryPhase::Succeeded && world.status.run.is_none() {
            return;
        }
    }
    panic!("never promoted: {:#?}", world.status);
}

/// Revision 2 is promoted, and watched.
fn promoted(watch: serde_json::Value) -> World {
    let mut world = watched(watch);
    promote(&mut world);
    world
}

fn five_minutes() -> World {
    promoted(json!({"duration": "5m"}))
}

/// The second in which the Canary failed.
fn failed_after(world: &mut World, requests: u64, errors: u64) -> Option<u64> {
    (1..400).find(|_| {
        world.happen(&Happening::Wait(1));
        world.happen(&Happening::Serve(requests, errors));
        world.step();
        world.phase() == CanaryPhase::Failed
    })
}

fn primary_id(world: &World) -> Option<String> {
    world.seen.primary.as_ref().unwrap().promoted_id.clone()
}

#[test]
fn a_promotion_that_fails_more_than_before_is_taken_back_within_seconds() {
    let mut world = five_minutes();
    let watch = world.status.watch.clone().unwrap();
    assert_eq!(watch.former_spec.as_deref(), Some("r1"));
    assert!(watch.former.normal_error_rate.unwrap() < 0.5, "{watch:?}");
    assert_ne!(primary_id(&world), watch.former.former_id);
    let found = failed_after(&mut world, 500, 25).unwrap();
    assert!(found <= 3, "{found} s");
    assert_eq!(
        primary_id(&world),
        watch.former.former_id,
        "the primary is what it was"
    );
    assert_eq!(world.status.last_promoted_spec.as_deref(), Some("r1"));
    assert_eq!(world.weight(), 0);
    let told = world.events.last().unwrap();
    assert!(
        told.starts_with(
            "Rolling back app-primary.ns to the revision before its promotion: 5 % of the last "
        ),
        "{told}"
    );
    // It stays so, and says why.
    world.happen(&Happening::PrimaryReady);
    let quiet = world.step();
    assert_eq!(quiet.actions, []);
    let message = quiet.status.message.unwrap();
    assert!(
        message.starts_with("rolled back after the promotion: "),
        "{message}"
    );
    assert!(quiet.status.watch.unwrap().alarmed_at.is_some());
}

#[test]
fn a_promotion_that_serves_as_before_is_left_alone_and_the_watch_ends() {
    let mut world = five_minutes();
    assert_eq!(failed_after(&mut world, 500, 0), None);
    assert_eq!(world.phase(), CanaryPhase::Succeeded);
    let watch = world.status.watch.clone().unwrap();
    assert!(
        watch.evidence.is_none() && watch.alarmed_at.is_none(),
        "{watch:?}"
    );
    assert!(watch.message.unwrap().starts_with("nothing unusual in "));
    assert_eq!(world.step().wake_at, None);
    // What happens later is nobody's promotion.
    assert_eq!(failed_after(&mut world, 500, 250), None);
}

#[test]
fn the_next_revision_after_a_promotion_was_taken_back_is_compared_with_what_was_brought_back() {
    let mut world = five_minutes();
    failed_after(&mut world, 500, 50).unwrap();
    world.happen(&Happening::PrimaryReady);
    world.happen(&Happening::Push(3));
    world.step();
    assert_eq!(
        (world.phase(), &world.status.watch),
        (CanaryPhase::Progressing, &None)
    );
    finished(&mut world);
    assert_eq!(world.phase(), CanaryPhase::Succeeded);
    assert_eq!(world.status.last_promoted_spec.as_deref(), Some("r3"));
}

#[test]
fn a_controller_that_dies_when_it_took_a_promotion_back_comes_to_the_same_end() {
    let mut world = five_minutes();
    let former = world.status.watch.clone().unwrap().former.former_id;
    world.happen(&Happening::Wait(1));
    world.happen(&Happening::Serve(5000, 2500));
    world.happen(&Happening::Crash);
    world.step();
    // It acted, and its status says nothing of it.
    assert_eq!(
        (world.phase(), primary_id(&world)),
        (CanaryPhase::Succeeded, former.clone())
    );
    world.step();
    assert_eq!((world.phase(), primary_id(&world)), (CanaryPhase::Failed, former));
    assert_eq!(world.status.last_promoted_spec.as_deref(), Some("r1"));
}

#[test]
fn a_controller_that_dies_during_the_promotion_still_knows_what_was_before() {
    let mut world = watched(json!({"duration": "5m"}));
    let seconds = (0..400).find(|_| {
        good_second(&mut world);
        world.step();
        world.seen.former.is_some()
    });
    // The same again, and in that second it dies after it acted.
    let mut world = watched(json!({"duration": "5m"}));
    let first = primary_id(&world);
    for _ in 0..seconds.unwrap() {
        good_second(&mut world);
        world.step();
    }
    good_second(&mut world);
    world.happen(&Happening::Crash);
    world.step();
    assert_eq!(world.phase(), CanaryPhase::Progressing);
    assert_ne!(primary_id(&world), first, "the primary is overwritten");
    promote(&mut world);
    let watch = world.status.watch.clone().unwrap();
    assert_eq!(
        (watch.former.former_id, watch.former_spec.as_deref()),
        (first, Some("r1"))
    );
}

#[test]
fn an_alarm_is_only_told_where_it_may_not_or_cannot_roll_back() {
    let mut world = promoted(json!({"duration": "5m", "rollback": false}));
    assert_eq!(failed_after(&mut world, 500, 50), None);
    let alarms = |world: &World, why: &str| world.events.iter().filter(|event| event.ends_with(why)).count();
    assert_eq!(alarms(&world, "not taken back: watch.rollback is false"), 1);
    assert!(world.status.watch.clone().unwrap().alarmed_at.is_some());

    let mut world = five_minutes();
    world.seen.former = None;
    assert_eq!(failed_after(&mut world, 500, 50), None);
    assert_eq!(
        alarms(&world, "not taken back: what it served before is not kept"),
        1
    );
}

#[test]
fn a_primary_that_is_lost_after_its_promotion_was_taken_back_comes_back_as_it_was() {
    let mut world = five_minutes();
    failed_after(&mut world, 500, 50).unwrap();
    let id = primary_id(&world).unwrap();
    world.seen.primary = None;
    let decision = world.step();
    assert!(
        decision.actions.contains(&Action::RestorePrimary { id }),
        "{:?}",
        decision.actions
    );
}

#[test]
fn without_a_watch_nothing_is_kept_and_nothing_is_watched() {
    let mut world = World::new(super::simulation::weighted());
    initialized(&mut world);
    world.happen(&Happening::Push(2));
    finished(&mut world);
    assert_eq!((&world.status.watch, &world.seen.former), (&None, &None));
}
