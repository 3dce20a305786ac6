//! Recorded rollouts, told again by `decide`: the same actions from outside, each at the same point of the story, must
//! lead through the same phases and weights and tell the same events.
//!
//! Times are not compared: nothing here waits for a tick. Left out of the comparison are events that a controller which
//! does not poll has no occasion for (see [`is_of_polling`]).

use serde_json::{Map, Value};
use serin_crds::flagger::CanaryPhase;

use super::simulation::{Happening, World};
use crate::golden;
use crate::plan::Plan;

/// Told on every tick of Flagger while it waits; here the status says it.
fn is_of_polling(message: &str) -> bool {
    message == "all the metrics providers are available!"
        || message.contains("observed deployment generation less than desired generation")
        || message == "skipping canary run as object is suspended"
}

/// No events, only logged: objects created or changed.
fn is_written(message: &str) -> bool {
    let plain = [
        "Service ",
        "Deployment ",
        "DestinationRule ",
        "VirtualService ",
        "Scaling down Deployment ",
        "Terminat",
    ];
    plain.iter().any(|start| message.starts_with(start))
}

/// A place in the story.
type Place = (String, i64);

fn place_of(status: &Value) -> Place {
    (
        status["phase"].as_str().unwrap_or_default().to_owned(),
        status["canaryWeight"].as_i64().unwrap_or(0),
    )
}

fn merge(into: &mut Value, patch: &Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(
                    into.entry(key.clone()).or_insert(Value::Object(Map::new())),
                    value,
                );
            }
        }
        (into, patch) => *into = patch.clone(),
    }
}

struct Story {
    world: World,
    spec: Value,
    template: Value,
    success_percent: f64,
    stuck: bool,
    places: Vec<Place>,
}

impl Story {
    fn begin(name: &str, case: &Value) -> Self {
        let spec = golden::input(case, "Canary")["spec"].clone();
        let target = golden::input(case, "Deployment");
        let mut world = World::new(plan(&spec));
        world.seen.name = "podinfo".to_owned();
        world.seen.namespace = name.to_owned();
        world.target().name = format!("podinfo.{name}");
        let replicas = i32::try_from(target["spec"]["replicas"].as_i64().unwrap()).unwrap();
        let workload = world.target();
        (workload.replicas, workload.total) = (replicas, replicas);
        (workload.updated, workload.available) = (replicas, replicas);
        Self {
            world,
            spec,
            template: Value::Null,
            success_percent: 100.0,
            stuck: false,
            places: Vec::new(),
        }
    }

    fn act(&mut self, action: &Value) {
        let patch = &action["patch"];
        match patch["kind"].as_str() {
            Some("Deployment") => {
                let template = &patch["body"]["spec"]["template"];
                if self.template.is_null() {
                    self.template = Value::Object(Map::new());
                }
                merge(&mut self.template, template);
                self.stuck = self.template.pointer("/spec/nodeSelector").is_some();
                let image = self
                    .template
                    .pointer("/spec/containers/0/image")
                    .and_then(Value::as_str);
                let only_image = self
                    .template
                    .as_object()
                    .is_some_and(|template| template.len() == 1)
                    && !self.stuck;
                // The image that the case began with is the revision that was there from the start.
                let hash = match image {
                    Some("podinfo:1.0.0") if only_image => "r1".to_owned(),
                    _ => self.template.to_string(),
                };
                let target = self.world.target();
                target.template_hash = hash;
                target.generation += 1;
                target.updated = 0;
            }
            Some("Canary") => {
                merge(&mut self.spec, &patch["body"]["spec"]);
                self.world.plan = plan(&self.spec);
            }
            // Foreign metadata on our Services is theirs.
            Some("Service") => {}
            Some(other) => panic!("no such action: {other}"),
            None => {}
        }
        if let Some(rate) = action["metrics"]["sr"].as_f64() {
            self.success_percent = rate;
        }
    }

    fn second(&mut self) {
        let world = &mut self.world;
        if self.stuck {
            // Scheduled nowhere: rolled out and not available.
            let target = world.target();
            target.observed_generation = target.generation;
            (target.updated, target.total, target.available) = (target.replicas, target.replicas, 0);
        } else {
            world.happen(&Happening::TargetReady);
        }
        let errors = ((100.0 - self.success_percent) * 10.0).round();
        for happening in [
            Happening::PrimaryReady,
            Happening::Acknowledge,
            Happening::Wait(1),
            Happening::Measure(1000, errors as u64),
        ] {
            world.happen(&happening);
        }
        world.step();
        let place = self.place();
        if self.places.last() != Some(&place) {
            self.places.push(place);
        }
    }

    fn place(&self) -> Place {
        (
            self.world.phase().to_string(),
            i64::from(self.world.status.canary_weight.unwrap_or(0)),
        )
    }
}

/// Flagger knows no comparison; its rules alone are told here.
fn plan(spec: &Value) -> Plan {
    let mut plan = Plan::new(&serde_json::from_value(spec.clone()).unwrap());
    plan.comparison = None;
    plan
}

/// The last event of a kind that repeats itself while nothing changes stands for all of them.
fn once(messages: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut told: Vec<String> = Vec::new();
    for message in messages.into_iter().filter(|message| !is_of_polling(message)) {
        let waiting = message.starts_with("canary deployment ");
        if !(waiting && told.last() == Some(&message)) {
            told.push(message);
        }
    }
    told
}

fn tell_again(name: &str) {
    let Some(case) = golden::case(name) else { return };
    let statuses = case["status_sequence"].as_array().unwrap();
    let mut story = Story::begin(name, &case);
    for action in case["actions"].as_array().unwrap().iter().skip(1) {
        if action["action"]
            .as_str()
            .is_some_and(|text| text.starts_with("delete"))
        {
            break;
        }
        let at = action["t"].as_f64().unwrap();
        let place = statuses
            .iter()
            .take_while(|status| status["t"].as_f64().unwrap() < at)
            .map(|status| place_of(&status["status"]))
            .last()
            .unwrap();
        let mut seconds = 0;
        while story.place() != place {
            story.second();
            seconds += 1;
            assert!(
                seconds < 600,
                "{name}: never at {place:?}, but {:?}: {:#?}",
                story.place(),
                story.world.status
            );
        }
        story.act(action);
        story.second();
    }
    for _ in 0..600 {
        story.second();
    }
    let mut recorded: Vec<Place> = Vec::new();
    for status in statuses.iter().map(|status| &status["status"]) {
        let place = place_of(status);
        if !place.0.is_empty() && place.0 != "Terminating" && recorded.last() != Some(&place) {
            recorded.push(place);
        }
    }
    assert_eq!(story.places, recorded, "{name}");

    let logged = case["log"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| line["message"].as_str().unwrap().to_owned());
    let recorded = once(logged.filter(|message| !is_written(message)));
    assert_eq!(once(story.world.events.clone()), recorded, "{name}");
    assert!(
        matches!(story.world.phase(), CanaryPhase::Succeeded | CanaryPhase::Failed),
        "{name} ends in {}",
        story.world.phase()
    );
}

/// Each once, in the order of its first appearance.
fn unique<T: PartialEq>(all: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut seen = Vec::new();
    for one in all {
        if !seen.contains(&one) {
            seen.push(one);
        }
    }
    seen
}

/// What was recorded of one Canary: its places and its events.
fn recording(case: &Value, other: &str) -> (Vec<Place>, Vec<String>) {
    let places = case["status_sequence"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|status| status["canary"] != other)
        .map(|status| place_of(&status["status"]))
        .filter(|place| !place.0.is_empty());
    let events = case["log"].as_array().unwrap().iter();
    let events = events
        .map(|line| line["message"].as_str().unwrap().to_owned())
        .filter(|text| !is_written(text) && !is_of_polling(text))
        .filter(|text| !text.starts_with("Bad things will happen!") && !text.contains(&format!(" {other}.")));
    (unique(places), unique(events))
}

#[test]
fn drift_is_repaired_as_with_flagger_but_an_edit_does_not_cost_the_weight() {
    let Some(case) = golden::case("istio-drift") else {
        return;
    };
    let mut story = Story::begin("istio-drift", &case);
    let run_to = |story: &mut Story, phase: &str, weight: i64| {
        let place = (phase.to_owned(), weight);
        for _ in 0..600 {
            if story.place() == place {
                return;
            }
            story.second();
        }
        panic!("never at {place:?}, but at {:?}", story.place());
    };
    for action in case["actions"].as_array().unwrap().iter().skip(1) {
        match action["action"].as_str().unwrap() {
            "delete the VirtualService at rest" => {
                run_to(&mut story, "Initialized", 0);
                story.world.happen(&Happening::DeleteRoute);
                story.second();
                assert!(story.world.seen.route.is_some(), "made again");
            }
            "point the apex Service at the target by hand" => {
                story.world.seen.apex_in_place = false;
                story.second();
                assert!(story.world.seen.apex_in_place, "pointed back");
            }
            "change spec.service.timeout at weight 50" => {
                run_to(&mut story, "Progressing", 50);
                story.act(action);
                story.world.seen.route.as_mut().unwrap().in_place = false;
                story.second();
                assert!(story.world.seen.route.as_ref().unwrap().in_place, "rewritten");
                assert_eq!(story.world.weight(), 50, "Flagger starts again from 0 here");
            }
            // Metadata of the user's: nothing of ours is touched. Flagger takes it for drift and starts again from 0.
            "user adds a label and an annotation to the VirtualService" => {}
            "delete the primary Deployment at rest" => {
                run_to(&mut story, "Succeeded", 0);
                story.world.seen.primary = None;
                story.second();
                assert!(story.world.seen.primary.is_some(), "made again");
            }
            _ => story.act(action),
        }
    }
    for _ in 0..60 {
        story.second();
    }
    let (places, events) = recording(&case, "");
    assert_eq!(
        story.places, places,
        "each place once: the weight never falls back"
    );
    assert_eq!(once(story.world.events.clone()), events);
}

#[test]
fn of_two_canaries_for_one_target_the_older_goes_as_with_flagger_and_the_younger_does_nothing() {
    let Some(case) = golden::case("istio-two-canaries") else {
        return;
    };
    let mut older = Story::begin("istio-two-canaries", &case);
    let mut younger = Story::begin("istio-two-canaries", &case);
    younger.world.seen.name = "second".to_owned();
    younger.world.seen.rival = Some("podinfo".to_owned());
    for _ in 0..60 {
        older.second();
        younger.second();
    }
    let push = &case["actions"][1];
    older.act(push);
    younger.act(push);
    for _ in 0..600 {
        older.second();
        younger.second();
    }
    let (places, events) = recording(&case, "second");
    assert_eq!(older.places, places);
    assert_eq!(once(older.world.events.clone()), events);
    assert!(younger.world.events.is_empty() && younger.world.seen.route.is_none());
    let message = younger.world.status.message.clone().unwrap_or_default();
    assert!(message.contains("podinfo rolls out the same target"), "{message}");
}

macro_rules! stories {
    ($($test:ident: $case:literal,)*) => {
        $(#[test]
        fn $test() {
            tell_again($case);
        })*
    };
}

stories! {
    a_good_and_a_bad_release_go_as_with_flagger: "istio-weights",
    a_ladder_of_weights_goes_as_with_flagger: "istio-stepweights",
    a_stepwise_promotion_goes_as_with_flagger: "istio-stepweight-promotion",
    a_revision_in_the_middle_goes_as_with_flagger: "istio-new-revision-mid",
    suspension_and_resumption_go_as_with_flagger: "istio-suspend",
    a_canary_that_is_never_ready_goes_as_with_flagger: "istio-deadline",
    restoring_and_retrying_after_a_failure_go_as_with_flagger: "istio-restore-after-failed",
    ready_thresholds_go_as_with_flagger: "istio-ready-thresholds",
    gateways_and_hosts_go_as_with_flagger: "istio-gateways-hosts",
    a_delegate_goes_as_with_flagger: "istio-delegation",
    http_options_go_as_with_flagger: "istio-http-options",
    a_traffic_policy_goes_as_with_flagger: "istio-traffic-policy",
    pod_spec_details_go_as_with_flagger: "istio-pod-spec",
    a_canary_with_revert_on_deletion_goes_as_with_flagger: "istio-revert",
    a_taken_over_service_goes_as_with_flagger: "istio-revert-existing",
    own_names_and_metadata_go_as_with_flagger: "istio-metadata",
    a_bad_release_without_gates_goes_as_with_flagger: "flags-slack",
    a_single_step_goes_as_with_flagger: "flags-leader",
    a_changed_interval_goes_as_with_flagger: "flags-interval",
}
