//! A simulated world around `decide`: Deployments that become ready and unready, proxies that acknowledge late or refuse,
//! pods that die, pushes at any moment, controllers that die between acting and writing the status. Thousands of generated
//! histories are run through it, and the promises of the module documentation are checked at every step.

use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use serde_json::json;
use serin_analysis::judge::watch::Watch;
use serin_analysis::sample::{Counts, Histogram, Sample};
use serin_analysis::verdict::Policy;
use serin_crds::flagger::{CanaryPhase, CanaryStatus};

use super::{Action, DRAIN_DEADLINE, Decision, decide, watch};
use crate::observed::{DeadPod, Former, Measured, Observed, RouteState, Workload};
use crate::plan::{Advance, Plan};
use crate::traffic::{Liveness, Split};

pub(super) fn plan(analysis: serde_json::Value) -> Plan {
    let spec = json!({
        "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "app"},
        "progressDeadlineSeconds": 60,
        "service": {"port": 80},
        "analysis": analysis,
    });
    Plan::new(&serde_json::from_value(spec).unwrap())
}

pub(super) fn weighted() -> Plan {
    plan(json!({
        "interval": "10s", "threshold": 2, "stepWeight": 25, "maxWeight": 50,
        "metrics": [{"name": "request-success-rate", "thresholdRange": {"min": 99}}],
    }))
}

/// What can happen from outside.
#[derive(Clone, Debug)]
pub(super) enum Happening {
    /// Nothing but time.
    Wait(u64),
    /// The target's template changes to revision n.
    Push(u8),
    /// A tracked ConfigMap changes to content n.
    Configure(u8),
    /// A rolling update of the target finishes.
    TargetReady,
    /// All pods of the target become unavailable.
    TargetLost,
    /// A rolling update of the primary finishes.
    PrimaryReady,
    /// Pods of the primary become unavailable.
    PrimaryLost,
    /// The primary's Deployment gives up.
    PrimaryNever,
    /// All proxies acknowledge the route.
    Acknowledge,
    /// A proxy refuses the route.
    Refuse,
    /// A second of requests: canary (requests, errors).
    Measure(u64, u64),
    /// A second of requests to both: (requests, errors) of canary and primary.
    Compare((u64, u64), (u64, u64)),
    /// A second of requests to the primary alone: (requests, errors), after a promotion.
    Serve(u64, u64),
    /// A canary pod dies.
    Die,
    /// Somebody edits the route.
    Drift(i32),
    /// Somebody deletes the route.
    DeleteRoute,
    /// The controller dies after it acted and before it wrote the status.
    Crash,
    /// `spec.suspend` is switched.
    Suspend(bool),
}

pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) seen: Observed,
    pub(super) status: CanaryStatus,
    pub(super) now: Timestamp,
    crash: bool,
    acknowledged: i64,
    refused: i64,
    samples: Vec<Sample>,
    detector: Option<Watch>,
    run: Option<Timestamp>,
    window: Option<Timestamp>,
    pub(super) events: Vec<String>,
    pub(super) phases: Vec<CanaryPhase>,
}

impl World {
    pub(super) fn new(plan: Plan) -> Self {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let target = Workload {
            name: "app.ns".to_owned(),
            generation: 1,
            observed_generation: 1,
            replicas: 2,
            total: 2,
            updated: 2,
            available: 2,
            template_hash: "r1".to_owned(),
            ..Workload::default()
        };
        Self {
            seen: Observed {
                name: "app".to_owned(),
                namespace: "ns".to_owned(),
                generation: 1,
                target: Some(target),
                ..Observed::default()
            },
            plan,
            status: CanaryStatus::default(),
            now,
            crash: false,
            acknowledged: 0,
            refused: 0,
            samples: Vec::new(),
            detector: None,
            run: None,
            window: None,
            events: Vec::new(),
            phases: Vec::new(),
        }
    }

    pub(super) fn target(&mut self) -> &mut Workload {
        self.seen.target.as_mut().unwrap()
    }

    pub(super) fn weight(&self) -> i32 {
        self.seen
            .route
            .as_ref()
            .and_then(|route| route.split)
            .map_or(0, Split::canary)
    }

    pub(super) fn phase(&self) -> CanaryPhase {
        self.status.phase.clone().unwrap_or_default()
    }

    pub(super) fn happen(&mut self, happening: &Happening) {
        match happening {
            Happening::Wait(seconds) => {
                self.now = self
                    .now
                    .checked_add(SignedDuration::from_secs(i64::try_from(*seconds).unwrap()))
                    .unwrap();
            }
            Happening::Push(revision) => {
                let hash = format!("r{revision}");
                let target = self.target();
                if target.template_hash != hash {
                    target.template_hash = hash;
                    target.generation += 1;
                    target.updated = 0;
                }
            }
            Happening::Configure(content) => {
                self.seen.configs = [("configmap/c".to_owned(), content.to_string())].into();
            }
            Happening::TargetReady => settle(self.target()),
            Happening::TargetLost => self.target().available = 0,
            Happening::PrimaryReady => {
                if let Some(primary) = self.seen.primary.as_mut() {
                    settle(primary);
                }
            }
            Happening::PrimaryLost => {
                if let Some(primary) = self.seen.primary.as_mut() {
                    primary.available = 0;
                }
            }
            Happening::PrimaryNever => {
                if let Some(primary) = self.seen.primary.as_mut() {
                    primary.deadline_exceeded = primary.updated < primary.replicas;
                }
            }
            Happening::Acknowledge => {
                self.acknowledged = self.seen.route.as_ref().map_or(0, |route| route.generation);
            }
            Happening::Refuse => self.refused = self.seen.route.as_ref().map_or(0, |route| route.generation),
            Happening::Measure(requests, errors) => {
                let counts = |requests, errors| Counts {
                    requests,
                    errors,
                    latency: Histogram {
                        bounds_ms: vec![100.0],
                        counts: vec![requests, 0],
                    },
                    ..Counts::default()
                };
                self.samples.push(Sample {
                    at_ms: self.now.as_millisecond(),
                    from_ms: None,
                    canary: counts(*requests, *errors.min(requests)),
                    primary: counts(requests * 4, 0),
                });
            }
            Happening::Compare(canary, primary) => {
                let counts = |(requests, errors)| Counts {
                    requests,
                    errors,
                    ..Counts::default()
                };
                self.samples.push(Sample {
                    at_ms: self.now.as_millisecond(),
                    from_ms: None,
                    canary: counts(*canary),
                    primary: counts(*primary),
                });
            }
            Happening::Serve(requests, errors) => {
                let plan = self.plan.comparison.as_ref().and_then(|plan| plan.watch);
                if let Some(options) = plan.and_then(|plan| watch::options(&self.status, &plan)) {
                    let detector = self.detector.take().or_else(|| watch::detector(&self.status));
                    let mut detector = detector.unwrap_or_default();
                    detector.observe(*requests, *errors.min(requests), &options);
                    self.detector = Some(detector);
                }
            }
            Happening::Die => self.seen.dead_pods.push(DeadPod {
                name: "app-1".to_owned(),
                reason: "container app exited with code 1".to_owned(),
                at: Timestamp::from_second(self.now.as_second()).unwrap(),
            }),
            Happening::Drift(weight) => {
                if let Some(route) = self.seen.route.as_mut() {
                    route.generation += 1;
                    route.split = Some(Split::of_canary(*weight));
                }
            }
            Happening::DeleteRoute => self.seen.route = None,
            Happening::Crash => self.crash = true,
            Happening::Suspend(suspend) => self.plan.suspend = *suspend,
        }
    }

    /// As the shell does it: the window and the run decide which samples count.
    fn measure(&mut self) {
        let run = self.status.run.clone().unwrap_or_default();
        let started = run.started_at.map(|at| at.0);
        let window = run.window_started_at.map(|at| at.0);
        if started != self.run {
            self.run = started;
            self.samples.clear();
        }
        self.window = window;
        let mut measured = Measured::default();
        let mut counts = Counts::default();
        if let Some(comparison) = &self.plan.comparison {
            for sample in &self.samples {
                // One request in five, whatever the weight.
                measured.judges.observe(sample, 20.0, &comparison.options);
            }
        }
        if let Some(window) = self.window {
            for sample in self
                .samples
                .iter()
                .filter(|sample| sample.at_ms >= window.as_millisecond())
            {
                counts.add(&sample.canary);
            }
        }
        if self
            .status
            .watch
            .as_ref()
            .is_none_or(|watch| watch.evidence.is_none())
        {
            self.detector = None;
        }
        measured.watch = self.detector.clone();
        measured.step_requests = counts.requests;
        for sample in &self.samples {
            let traffic = &mut measured.traffic;
            traffic.requests += sample.canary.requests + sample.primary.requests;
            traffic.primary += sample.primary.requests;
            traffic.primary_errors += sample.primary.errors;
            traffic.milliseconds = sample.at_ms - self.samples[0].at_ms;
        }
        measured.windows = vec![counts; self.plan.metrics.len()];
        self.seen.measured = measured;
        self.seen.liveness = self.seen.route.as_ref().map(|route| Liveness {
            generation: route.generation,
            known: true,
            needed: 3,
            sent: 3,
            acked: if self.acknowledged == route.generation {
                3
            } else {
                1
            },
            refused: u32::from(self.refused == route.generation),
            reason: None,
        });
    }

    /// One decision, checked, with its actions done.
    pub(super) fn step(&mut self) -> Decision {
        self.measure();
        let decision = decide(&self.seen, &self.plan, &self.status, self.now);
        self.check(&decision);
        for action in &decision.actions {
            self.act(action);
        }
        if decision.status.phase == Some(CanaryPhase::Progressing) && !self.plan.suspend {
            assert_eq!(
                Some(self.weight()),
                decision.status.canary_weight,
                "the route carries what the status says"
            );
        }
        if self.crash {
            // The next controller starts from the status as it was; what it measured is gone.
            self.crash = false;
            self.samples.clear();
            self.detector = None;
            return decision;
        }
        self.status = decision.status.clone();
        if self.phases.last() != Some(&self.phase()) {
            self.phases.push(self.phase());
        }
        self.events
            .extend(decision.events.iter().map(|event| event.message.clone()));
        decision
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::SetWeight(split) => {
                let generation = self.seen.route.as_ref().map_or(0, |route| route.generation);
                if self
                    .seen
                    .route
                    .as_ref()
                    .is_none_or(|route| route.split != Some(*split) || !route.in_place)
                {
                    self.seen.route = Some(RouteState {
                        generation: generation + 1,
                        split: Some(*split),
                        in_place: true,
                    });
                }
            }
            Action::ScaleTarget(replicas) => {
                let target = self.target();
                if target.replicas != *replicas {
                    target.generation += 1;
                    target.replicas = *replicas;
                }
                if *replicas == 0 {
                    settle(target);
                }
            }
            Action::CreatePrimary { id, replicas } | Action::PromotePrimary { id, replicas } => {
                let target = self.target().clone();
                let existing = self.seen.primary.clone().unwrap_or_default();
                if existing.promoted_id.as_deref() != Some(id) {
                    self.seen.primary = Some(Workload {
                        name: format!("{}.{}", self.plan.primary(), self.seen.namespace),
                        generation: existing.generation + 1,
                        replicas: *replicas,
                        updated: 0,
                        deadline_exceeded: false,
                        template_hash: target.template_hash,
                        promoted_id: Some(id.clone()),
                        ..existing
                    });
                }
            }
            Action::KeepFormer { former, replaced_by } => {
                let primary = self.seen.primary.as_ref();
                if primary.and_then(|primary| primary.promoted_id.as_ref()) == Some(former) {
                    self.seen.former = Some(Former {
                        id: former.clone(),
                        replaced_by: replaced_by.clone(),
                    });
                }
            }
            Action::RestorePrimary { id } => {
                assert_eq!(
                    self.seen.former.as_ref().map(|former| &former.id),
                    Some(id),
                    "it is kept"
                );
                let primary = self.seen.primary.get_or_insert_default();
                primary.promoted_id = Some(id.clone());
                primary.generation += 1;
                primary.updated = 0;
            }
            Action::ApplyServices => self.seen.services_in_place = true,
            Action::ApplyApex => self.seen.apex_in_place = true,
            Action::ApplyRules => self.seen.rules_in_place = true,
            Action::AddFinalizer => self.seen.has_finalizer = true,
            Action::RemoveFinalizer => self.seen.has_finalizer = false,
            Action::RevertApex | Action::RevertRoute => {}
        }
    }

    fn check(&self, decision: &Decision) {
        let before = &self.status;
        let (old, new) = (self.phase(), decision.status.phase.clone().unwrap_or_default());
        let told = || {
            format!(
                "{old} -> {new}: {:#?}\nseen {:#?}\nstatus {before:#?}",
                decision.actions, self.seen
            )
        };
        let weights: Vec<(usize, Split)> = decision
            .actions
            .iter()
            .enumerate()
            .filter_map(|(index, action)| match action {
                Action::SetWeight(split) => Some((index, *split)),
                _ => None,
            })
            .collect();
        assert!(weights.len() <= 1, "two weights in one decision\n{}", told());

        if old == CanaryPhase::Progressing && new == CanaryPhase::Failed {
            assert_eq!(
                decision.actions.first(),
                Some(&Action::SetWeight(Split::PRIMARY)),
                "abort sets weight 0 first\n{}",
                told()
            );
        }
        let target = self.seen.target.as_ref().unwrap();
        if let Some((_, split)) = weights.first()
            && split.canary() > self.weight()
        {
            let repaired = new == CanaryPhase::Failed && old == CanaryPhase::Failed;
            assert!(
                target.can_serve(self.plan.canary_ready_percent)
                    || (target.available > 0 && (repaired || old == CanaryPhase::Promoting)),
                "weight is only given to what is ready\n{}",
                told()
            );
        }
        if decision.actions.contains(&Action::ScaleTarget(0)) {
            let route = self.seen.route.as_ref().expect("a route");
            let since = before
                .run
                .as_ref()
                .and_then(|run| run.step_started_at.as_ref())
                .map(|at| at.0);
            let waited = since.is_some_and(|since| self.now.duration_since(since) >= drain());
            assert_eq!(
                route.split,
                Some(Split::PRIMARY),
                "scaled down with traffic\n{}",
                told()
            );
            assert!(
                self.acknowledged == route.generation || waited,
                "scaled down while proxies still send\n{}",
                told()
            );
        }
        let same_run = before.last_applied_spec == decision.status.last_applied_spec
            && before.tracked_configs == decision.status.tracked_configs
            && old == CanaryPhase::Progressing
            && new == CanaryPhase::Progressing
            && before.run.as_ref().and_then(|run| run.started_at.clone())
                == decision
                    .status
                    .run
                    .as_ref()
                    .and_then(|run| run.started_at.clone());
        let restored = decision
            .actions
            .iter()
            .any(|action| matches!(action, Action::RestorePrimary { .. }));
        if restored {
            assert_eq!(new, CanaryPhase::Failed, "a promotion was taken back\n{}", told());
            assert!(
                old == CanaryPhase::Succeeded || self.seen.primary.is_none(),
                "only a promotion is taken back\n{}",
                told()
            );
        }
        let policies = self.plan.comparison.as_ref();
        if same_run {
            let (from, to) = (
                before.canary_weight.unwrap_or(0),
                decision.status.canary_weight.unwrap_or(0),
            );
            let withdrawn =
                self.plan.is_refused() || self.seen.blocked.is_some() || self.seen.rival.is_some();
            assert!(from <= to || withdrawn, "the share fell within a run\n{}", told());
            if from > 0 && to > from {
                let step = before.history.last().expect("a step");
                let live = step.live_at.as_ref().expect("the weight was live").0;
                let window = SignedDuration::try_from(self.plan.interval).unwrap();
                let early = policies.is_some_and(|policies| policies.advance == Advance::Early);
                assert!(
                    early || self.now.duration_since(live) >= window,
                    "advanced before its window\n{}",
                    told()
                );
                let counts = &self.seen.measured.windows[0];
                let passed = policies.is_some_and(|policies| policies.on_no_data == Policy::Pass);
                assert!(passed || counts.requests > 0, "advanced without data\n{}", told());
            }
            let failed = |status: &CanaryStatus| status.failed_checks.unwrap_or(0);
            if failed(&decision.status) > failed(before) {
                let counted = policies
                    .is_some_and(|policies| matches!(policies.on_no_data, Policy::Fail | Policy::Extend));
                assert!(
                    counted || self.seen.measured.windows[0].errors > 0,
                    "a failed check without data\n{}",
                    told()
                );
            }
        }
        if let Some(at) = decision.wake_at {
            assert!(
                at > self.now,
                "it would wake at once, again and again\n{}",
                told()
            );
        }
    }
}

fn drain() -> SignedDuration {
    SignedDuration::try_from(DRAIN_DEADLINE).unwrap()
}

fn settle(workload: &mut Workload) {
    workload.observed_generation = workload.generation;
    workload.total = workload.replicas;
    workload.updated = workload.replicas;
    workload.available = workload.replicas;
    workload.deadline_exceeded = false;
}

fn happenings() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (1..40u64).prop_map(Happening::Wait),
        2 => (1..5u8).prop_map(Happening::Push),
        1 => (1..4u8).prop_map(Happening::Configure),
        5 => Just(Happening::TargetReady),
        1 => Just(Happening::TargetLost),
        5 => Just(Happening::PrimaryReady),
        1 => Just(Happening::PrimaryLost),
        1 => Just(Happening::PrimaryNever),
        5 => Just(Happening::Acknowledge),
        1 => Just(Happening::Refuse),
        5 => (0..200u64, 0..2u64).prop_map(|(requests, errors)| Happening::Measure(requests, errors)),
        1 => (1..200u64, 0..100u64).prop_map(|(requests, errors)| Happening::Measure(requests, errors)),
        2 => (0..2000u64, 0..3u64).prop_map(|(requests, errors)| Happening::Serve(requests, errors)),
        1 => Just(Happening::Serve(2000, 1000)),
        1 => Just(Happening::Die),
        1 => (0..100i32).prop_map(Happening::Drift),
        1 => Just(Happening::DeleteRoute),
        2 => Just(Happening::Crash),
        1 => any::<bool>().prop_map(Happening::Suspend),
    ]
}

fn plans() -> impl Strategy<Value = Plan> {
    let metrics = json!([{"name": "request-success-rate", "thresholdRange": {"min": 99}}]);
    prop_oneof![
        Just(json!({"interval": "10s", "threshold": 2, "stepWeight": 25, "maxWeight": 50})),
        Just(json!({"interval": "2s", "threshold": 1, "stepWeights": [1, 5, 60]})),
        Just(json!({"interval": "2s", "threshold": 1, "stepWeight": 50,
                    "comparison": {"watch": {"duration": "30s"}}})),
        Just(json!({"interval": "10s", "threshold": 3, "stepWeight": 30, "stepWeightPromotion": 40})),
        Just(
            json!({"interval": "5s", "threshold": 1, "stepWeight": 50, "canaryReadyThreshold": 50,
                    "comparison": {"enabled": false}})
        ),
    ]
    .prop_map(move |mut analysis| {
        analysis["metrics"] = metrics.clone();
        plan(analysis)
    })
}

/// Everything goes well from here on.
fn good_times(world: &mut World) {
    world.plan.suspend = false;
    world.refused = 0;
    world.seen.dead_pods.clear();
    for _ in 0..400 {
        for happening in [
            Happening::TargetReady,
            Happening::PrimaryReady,
            Happening::Acknowledge,
            Happening::Wait(1),
            Happening::Measure(50, 0),
        ] {
            world.happen(&happening);
        }
        let phase = world.phase();
        let decision = world.step();
        if phase == world.phase()
            && decision.actions.is_empty()
            && decision.wake_at.is_none()
            && world.status.run.is_none()
        {
            return;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_history_breaks_a_promise_and_good_times_end_in_a_promotion(
        plan in plans(),
        history in proptest::collection::vec(happenings(), 1..120),
    ) {
        let mut world = World::new(plan);
        for happening in &history {
            world.happen(happening);
            world.step();
            // What was decided is done: the same world decides the same, and asks for nothing that is there.
            let again = world.step();
            prop_assert!(again.actions.len() <= 4);
        }
        good_times(&mut world);
        // Whatever happened before, a new revision comes through.
        world.happen(&Happening::Push(9));
        good_times(&mut world);
        prop_assert_eq!(world.phase(), CanaryPhase::Succeeded, "{:#?}", world.status);
        prop_assert_eq!(world.status.last_promoted_spec.as_deref(), Some("r9"));
        prop_assert_eq!(world.weight(), 0);
        prop_assert_eq!(world.target().replicas, 0);
        let quiet = world.step();
        prop_assert_eq!(quiet.actions, vec![]);
        prop_assert_eq!(quiet.wake_at, None);
        prop_assert_eq!(quiet.status, world.status.clone());
    }
}

/// A plain rollout up to the given weight.
pub(super) fn rolled_to(weight: i32) -> World {
    let mut world = World::new(weighted());
    initialized(&mut world);
    world.happen(&Happening::Push(2));
    for _ in 0..200 {
        for happening in [
            Happening::TargetReady,
            Happening::PrimaryReady,
            Happening::Acknowledge,
        ] {
            world.happen(&happening);
        }
        world.step();
        if world.status.canary_weight == Some(weight) && world.status.run.is_some() {
            world.happen(&Happening::Acknowledge);
            world.step();
            return world;
        }
        world.happen(&Happening::Wait(1));
        world.happen(&Happening::Measure(50, 0));
    }
    panic!("never at {weight}: {:#?}", world.status);
}

/// A Canary at rest after its initialisation.
pub(super) fn initialized(world: &mut World) {
    for _ in 0..6 {
        for happening in [
            Happening::TargetReady,
            Happening::PrimaryReady,
            Happening::Acknowledge,
        ] {
            world.happen(&happening);
        }
        world.step();
    }
    assert_eq!(world.phase(), CanaryPhase::Initialized, "{:#?}", world.status);
}

/// Lets time pass with good measurements until nothing is left to do.
pub(super) fn finished(world: &mut World) {
    good_times(world);
}
