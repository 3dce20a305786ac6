use proptest::prelude::*;

use super::*;

fn at(millis: i64) -> Timestamp {
    timestamp(1_000_000_000_000 + millis)
}

fn exit(code: i32, started: i64, finished: i64) -> Exit {
    Exit {
        code,
        signal: None,
        started_at: at(started).as_millisecond(),
        finished_at: at(finished).as_millisecond(),
    }
}

fn pod(policy: RestartPolicy, containers: &[(&str, Role)]) -> Pod {
    Pod {
        restart_policy: policy,
        containers: containers
            .iter()
            .map(|(name, role)| Container::new(name, *role))
            .collect(),
        initialized: false,
        deletion: None,
        grace: Duration::from_secs(30),
        finished: false,
    }
}

fn start(name: &str) -> Action {
    Action::Start(name.to_owned())
}

fn running(pod: &mut Pod, index: usize, now: i64) {
    pod.containers[index].on_started(at(now), false, false);
}

#[test]
fn init_containers_run_one_after_another_and_then_all_main_ones_start() {
    let mut pod = pod(
        RestartPolicy::Always,
        &[
            ("a", Role::Init),
            ("b", Role::Init),
            ("x", Role::Main),
            ("y", Role::Main),
        ],
    );
    assert_eq!(decide(&mut pod, at(0)).actions, [start("a")]);
    running(&mut pod, 0, 0);
    assert_eq!(decide(&mut pod, at(1)).actions, []);
    pod.containers[0].on_ended(exit(0, 0, 2));
    assert_eq!(decide(&mut pod, at(2)).actions, [start("b")]);
    running(&mut pod, 1, 2);
    pod.containers[1].on_ended(exit(0, 2, 3));
    assert_eq!(decide(&mut pod, at(3)).actions, [start("x"), start("y")]);
    assert_eq!(pod_phase(&pod), "Pending");
    running(&mut pod, 2, 3);
    assert_eq!(pod_phase(&pod), "Running");
}

#[test]
fn what_comes_after_a_sidecar_waits_until_its_startup_probe_has_passed() {
    let mut pod = pod(
        RestartPolicy::Always,
        &[("proxy", Role::Sidecar), ("x", Role::Main)],
    );
    assert_eq!(decide(&mut pod, at(0)).actions, [start("proxy")]);
    pod.containers[0].on_started(at(0), true, true);
    assert_eq!(decide(&mut pod, at(1)).actions, []);
    pod.containers[0].phase = Phase::Running {
        started_at: at(0),
        started: true,
        ready: false,
    };
    assert_eq!(decide(&mut pod, at(2)).actions, [start("x")]);
}

#[test]
fn a_sidecar_that_dies_later_is_restarted_without_stopping_the_main_containers() {
    let mut pod = pod(
        RestartPolicy::Never,
        &[("proxy", Role::Sidecar), ("x", Role::Main)],
    );
    decide(&mut pod, at(0));
    running(&mut pod, 0, 0);
    decide(&mut pod, at(1));
    running(&mut pod, 1, 1);
    pod.containers[0].on_ended(exit(1, 0, 5));
    assert_eq!(decide(&mut pod, at(5)).actions, [start("proxy")]);
}

#[test]
fn restarts_are_immediate_first_and_then_back_off_from_10_to_300_seconds() {
    let mut pod = pod(RestartPolicy::Always, &[("x", Role::Main)]);
    decide(&mut pod, at(0));
    let mut now = 0;
    let mut delays = Vec::new();
    for _ in 0..8 {
        running(&mut pod, 0, now);
        pod.containers[0].on_ended(exit(1, now, now + 5));
        now += 5;
        let decision = decide(&mut pod, at(now));
        let delay = decision
            .wake_at
            .map_or(0, |wake| wake.as_millisecond() - at(now).as_millisecond());
        assert_eq!(decision.actions.is_empty(), delay > 0);
        delays.push(delay / 1000);
        now += delay;
        assert_eq!(decide(&mut pod, at(now)).actions, [start("x")]);
    }
    assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300, 300]);
    assert_eq!(pod.containers[0].restarts, 7);
    // Ten minutes of running are forgiven.
    running(&mut pod, 0, now);
    pod.containers[0].on_ended(exit(1, now, now + 600_000));
    assert_eq!(decide(&mut pod, at(now + 600_000)).actions, [start("x")]);
}

#[test]
fn deletion_stops_main_containers_together_and_then_sidecars_in_reverse() {
    let mut pod = pod(
        RestartPolicy::Always,
        &[
            ("s1", Role::Sidecar),
            ("s2", Role::Sidecar),
            ("x", Role::Main),
            ("y", Role::Main),
        ],
    );
    for index in 0..4 {
        running(&mut pod, index, 0);
    }
    pod.initialized = true;
    let deadline = at(30_000);
    pod.deletion = Some(Deletion { deadline });
    let stop = |name: &str| Action::Stop(name.to_owned(), deadline);
    assert_eq!(decide(&mut pod, at(1)).actions, [stop("x"), stop("y")]);
    pod.containers[2].stopping = Some(deadline);
    pod.containers[3].stopping = Some(deadline);
    assert_eq!(decide(&mut pod, at(2)).actions, []);
    pod.containers[2].on_ended(exit(0, 0, 3));
    assert_eq!(decide(&mut pod, at(3)).actions, []);
    pod.containers[3].on_ended(exit(143, 0, 4));
    assert_eq!(decide(&mut pod, at(4)).actions, [stop("s2")]);
    pod.containers[1].stopping = Some(deadline);
    pod.containers[1].on_ended(exit(0, 0, 5));
    assert_eq!(decide(&mut pod, at(5)).actions, [stop("s1")]);
    pod.containers[0].stopping = Some(deadline);
    assert_eq!(
        decide(&mut pod, at(30_000)).actions,
        [Action::Kill("s1".to_owned())]
    );
    pod.containers[0].on_ended(exit(137, 0, 30_001));
    assert_eq!(decide(&mut pod, at(30_001)).actions, [Action::Finish]);
    assert_eq!(decide(&mut pod, at(30_002)), Decision::default());
}

#[test]
fn a_pod_that_never_restarts_succeeds_or_fails_with_its_main_containers() {
    for (code, phase) in [(0, "Succeeded"), (3, "Failed")] {
        let mut pod = pod(
            RestartPolicy::Never,
            &[("proxy", Role::Sidecar), ("x", Role::Main)],
        );
        running(&mut pod, 0, 0);
        decide(&mut pod, at(0));
        running(&mut pod, 1, 0);
        pod.containers[1].on_ended(exit(code, 0, 10));
        assert!(matches!(&decide(&mut pod, at(10)).actions[..], [Action::Stop(name, _)] if name == "proxy"));
        pod.containers[0].on_ended(exit(0, 0, 11));
        assert_eq!(decide(&mut pod, at(11)).actions, [Action::Finish]);
        assert_eq!(pod_phase(&pod), phase);
    }
}

#[test]
fn a_failed_init_container_fails_a_pod_that_never_restarts_and_is_retried_otherwise() {
    let mut never = pod(RestartPolicy::Never, &[("a", Role::Init), ("x", Role::Main)]);
    running(&mut never, 0, 0);
    never.containers[0].on_ended(exit(1, 0, 1));
    assert_eq!(decide(&mut never, at(1)).actions, [Action::Finish]);
    assert_eq!(pod_phase(&never), "Failed");
    let mut always = pod(RestartPolicy::Always, &[("a", Role::Init), ("x", Role::Main)]);
    running(&mut always, 0, 0);
    always.containers[0].on_ended(exit(1, 0, 1));
    assert_eq!(decide(&mut always, at(1)).actions, [start("a")]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever the order of ends and probe results: no main container is ever started before all init containers
    /// are through, nothing is started once the pod is being deleted, and a deleted pod always comes to its end.
    #[test]
    fn generated_histories_keep_the_order_of_containers_and_always_end(
        sidecar in prop::collection::vec(any::<bool>(), 0..4),
        mains in 1_usize..4,
        steps in prop::collection::vec((0_u8..4, 0_usize..8, 0_i32..2), 1..60),
    ) {
        let mut containers: Vec<(String, Role)> = sidecar
            .iter()
            .enumerate()
            .map(|(i, sidecar)| (format!("i{i}"), if *sidecar { Role::Sidecar } else { Role::Init }))
            .collect();
        containers.extend((0..mains).map(|i| (format!("m{i}"), Role::Main)));
        let named: Vec<(&str, Role)> = containers.iter().map(|(name, role)| (name.as_str(), *role)).collect();
        let mut pod = pod(RestartPolicy::Always, &named);
        let mut now = 0;
        let apply = |pod: &mut Pod, now: i64| {
            let decision = decide(pod, at(now));
            for action in &decision.actions {
                match action {
                    Action::Start(name) => {
                        assert!(pod.deletion.is_none(), "started during deletion");
                        let role = pod.containers.iter().find(|c| &c.name == name).unwrap().role;
                        if role == Role::Main {
                            assert!(pod.initialized, "main container before init was through");
                        }
                        let container = pod.containers.iter_mut().find(|c| &c.name == name).unwrap();
                        assert!(!container.is_running());
                        container.on_started(at(now), container.role == Role::Sidecar, false);
                    }
                    Action::Stop(name, deadline) => {
                        pod.containers.iter_mut().find(|c| &c.name == name).unwrap().stopping = Some(*deadline);
                    }
                    Action::Kill(name) => {
                        let container = pod.containers.iter_mut().find(|c| &c.name == name).unwrap();
                        container.killed = true;
                        container.on_ended(exit(137, now, now));
                    }
                    Action::Finish => assert!(pod.containers.iter().all(|c| !c.is_running())),
                }
            }
            decision
        };
        for (kind, index, code) in steps {
            now += 3_000;
            let index = index % pod.containers.len();
            match kind {
                0 if pod.containers[index].is_running() => pod.containers[index].on_ended(exit(code, now, now)),
                1 => if let Phase::Running { started, .. } = &mut pod.containers[index].phase { *started = true },
                2 if now % 7 == 0 && pod.deletion.is_none() => pod.deletion = Some(Deletion { deadline: at(now + 10_000) }),
                _ => {}
            }
            apply(&mut pod, now);
        }
        pod.deletion.get_or_insert(Deletion { deadline: at(now + 10_000) });
        for _ in 0..20 {
            now += 30_000;
            apply(&mut pod, now);
        }
        prop_assert!(pod.finished);
    }
}
