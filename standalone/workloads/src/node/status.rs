//! `PodStatus` from a pod's lifecycle, in kubelet's words. Pure.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    HostIP, Pod as PodObject, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::lifecycle::{Container, Phase, Pod, RestartPolicy, Role, pod_phase, timestamp};
use crate::shim::protocol::Exit;

/// Facts of a status that the lifecycle does not know.
#[derive(Debug, Clone, Default)]
pub(crate) struct StatusFacts {
    pub(crate) pod_ip: Option<String>,
    pub(crate) host_ip: String,
    pub(crate) started_at: Option<Timestamp>,
    /// Network and shim are there.
    pub(crate) sandbox_ready: bool,
    /// Names of fields that are read and not honoured, as a sentence; empty if there are none.
    pub(crate) not_honoured: String,
}

/// Seconds precision: what Kubernetes stores.
fn time(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// The status to publish. `previous` gives the times of conditions that did not change.
pub(crate) fn pod_status(
    object: &PodObject,
    pod: &Pod,
    facts: &StatusFacts,
    previous: &PodStatus,
    now: Timestamp,
) -> PodStatus {
    let phase = pod_phase(pod);
    let (mut init, mut main) = (Vec::new(), Vec::new());
    for container in &pod.containers {
        let status = container_status(object, pod, container);
        if container.role == Role::Main {
            main.push(status)
        } else {
            init.push(status)
        }
    }
    let done = matches!(phase, "Succeeded" | "Failed");
    let unready: Vec<&str> = pod
        .containers
        .iter()
        .filter(|container| container.role != Role::Init)
        .filter(|container| !is_ready(container))
        .map(|container| container.name.as_str())
        .collect();
    let incomplete: Vec<&str> = pod
        .containers
        .iter()
        .filter(|container| container.role != Role::Main && !pod.initialized)
        .filter(|container| match (&container.phase, container.role) {
            (Phase::Ended(exit), Role::Init) => exit.code != 0,
            (Phase::Running { started, .. }, Role::Sidecar) => !started,
            _ => true,
        })
        .map(|container| container.name.as_str())
        .collect();
    let (ready, reason, message) = if done {
        (false, "PodCompleted", String::new())
    } else if unready.is_empty() {
        (true, "", String::new())
    } else {
        let list = unready.join(" ");
        (
            false,
            "ContainersNotReady",
            format!("containers with unready status: [{list}]"),
        )
    };
    let gates_ready = object
        .spec
        .iter()
        .flat_map(|spec| spec.readiness_gates.iter().flatten())
        .all(|gate| {
            object
                .status
                .iter()
                .flat_map(|status| status.conditions.iter().flatten())
                .any(|condition| condition.type_ == gate.condition_type && condition.status == "True")
        });
    let mut conditions = Vec::new();
    let mut put = |type_: &str, status: bool, reason: &str, message: &str| {
        conditions.push(condition(previous, type_, status, reason, message, now));
    };
    put("PodReadyToStartContainers", facts.sandbox_ready && !done, "", "");
    if pod.initialized {
        put("Initialized", true, if done { "PodCompleted" } else { "" }, "");
    } else {
        let list = incomplete.join(" ");
        let message = format!("containers with incomplete status: [{list}]");
        put(
            "Initialized",
            incomplete.is_empty(),
            if incomplete.is_empty() {
                ""
            } else {
                "ContainersNotInitialized"
            },
            if incomplete.is_empty() { "" } else { &message },
        );
    }
    if ready && !gates_ready {
        put(
            "Ready",
            false,
            "ReadinessGatesNotReady",
            "the status of pod readiness gates is not \"True\"",
        );
    } else {
        put("Ready", ready, reason, &message);
    }
    put("ContainersReady", ready, reason, &message);
    put("PodScheduled", true, "", "");
    if !facts.not_honoured.is_empty() {
        put("FullyHonoured", false, "FieldsNotHonoured", &facts.not_honoured);
    }
    PodStatus {
        phase: Some(phase.to_owned()),
        conditions: Some(conditions),
        host_ip: Some(facts.host_ip.clone()),
        host_ips: Some(vec![HostIP {
            ip: facts.host_ip.clone(),
        }]),
        pod_ip: facts.pod_ip.clone(),
        pod_ips: facts.pod_ip.clone().map(|ip| vec![PodIP { ip }]),
        start_time: facts.started_at.map(time),
        init_container_statuses: (!init.is_empty()).then_some(init),
        container_statuses: Some(main),
        observed_generation: object.metadata.generation,
        ..PodStatus::default()
    }
}

fn is_ready(container: &Container) -> bool {
    matches!(container.phase, Phase::Running { ready: true, .. })
}

fn condition(
    previous: &PodStatus,
    type_: &str,
    status: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> PodCondition {
    let status = if status { "True" } else { "False" };
    let since = previous
        .conditions
        .iter()
        .flatten()
        .find(|known| known.type_ == type_ && known.status == status)
        .and_then(|known| known.last_transition_time.clone())
        .unwrap_or_else(|| time(now));
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: text(reason),
        message: text(message),
        last_transition_time: Some(since),
        ..PodCondition::default()
    }
}

fn container_status(object: &PodObject, pod: &Pod, container: &Container) -> ContainerStatus {
    let spec = object.spec.as_ref();
    let image = spec
        .into_iter()
        .flat_map(|spec| {
            spec.containers
                .iter()
                .chain(spec.init_containers.iter().flatten())
        })
        .find(|candidate| candidate.name == container.name)
        .and_then(|candidate| candidate.image.clone())
        .unwrap_or_default();
    let uid = object.metadata.uid.as_deref().unwrap_or_default();
    let id = format!("serin://{uid}/{}/{}", container.name, container.restarts);
    let mut last = container.last;
    let (state, started) = match &container.phase {
        Phase::Waiting { reason, message } => (
            ContainerState {
                waiting: Some(ContainerStateWaiting {
                    reason: Some(waiting_reason(pod, container, reason)),
                    message: message.clone(),
                }),
                ..ContainerState::default()
            },
            false,
        ),
        Phase::Starting => (
            ContainerState {
                waiting: Some(ContainerStateWaiting {
                    reason: Some("ContainerCreating".to_owned()),
                    message: None,
                }),
                ..ContainerState::default()
            },
            false,
        ),
        Phase::Running {
            started_at, started, ..
        } => (
            ContainerState {
                running: Some(ContainerStateRunning {
                    started_at: Some(time(*started_at)),
                }),
                ..ContainerState::default()
            },
            *started,
        ),
        Phase::Ended(exit) => {
            let back_off = container.current_back_off();
            if will_restart(pod, container, exit) && !back_off.is_zero() {
                last = Some(*exit);
                (
                    ContainerState {
                        waiting: Some(ContainerStateWaiting {
                            reason: Some("CrashLoopBackOff".to_owned()),
                            message: Some(format!(
                                "back-off {} restarting failed container={} pod={}_{}({uid})",
                                go_duration(back_off.as_secs()),
                                container.name,
                                object.metadata.name.as_deref().unwrap_or_default(),
                                object.metadata.namespace.as_deref().unwrap_or_default(),
                            )),
                        }),
                        ..ContainerState::default()
                    },
                    false,
                )
            } else {
                (terminated(exit, &id), false)
            }
        }
    };
    let ready = match (&container.phase, container.role) {
        (Phase::Ended(exit), Role::Init) => exit.code == 0,
        _ => is_ready(container),
    };
    ContainerStatus {
        name: container.name.clone(),
        image_id: image.clone(),
        image,
        ready,
        started: Some(started),
        restart_count: container.restarts as i32,
        container_id: container.started_once.then(|| id.clone()),
        last_state: Some(last.map(|exit| terminated(&exit, &id)).unwrap_or_default()),
        state: Some(state),
        ..ContainerStatus::default()
    }
}

/// Main containers of a pod that is still initialising say so.
fn waiting_reason(pod: &Pod, container: &Container, reason: &str) -> String {
    let has_init = pod
        .containers
        .iter()
        .any(|container| container.role != Role::Main);
    if container.role == Role::Main && !pod.initialized && has_init && reason == "ContainerCreating" {
        return "PodInitializing".to_owned();
    }
    reason.to_owned()
}

fn will_restart(pod: &Pod, container: &Container, exit: &Exit) -> bool {
    if pod.finished || pod.deletion.is_some() {
        return false;
    }
    match (container.role, pod.restart_policy) {
        (Role::Sidecar, _) => true,
        (Role::Init, RestartPolicy::Never) => false,
        (Role::Init, _) => exit.code != 0,
        (Role::Main, RestartPolicy::Always) => true,
        (Role::Main, RestartPolicy::OnFailure) => exit.code != 0,
        (Role::Main, RestartPolicy::Never) => false,
    }
}

fn terminated(exit: &Exit, id: &str) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: exit.code,
            signal: exit.signal,
            reason: Some(if exit.code == 0 { "Completed" } else { "Error" }.to_owned()),
            started_at: Some(time(timestamp(exit.started_at))),
            finished_at: Some(time(timestamp(exit.finished_at))),
            container_id: Some(id.to_owned()),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    }
}

/// Seconds as Go writes a duration: `10s`, `1m20s`, `5m0s`.
fn go_duration(seconds: u64) -> String {
    if seconds < 60 {
        format!("{seconds}s")
    } else {
        format!("{}m{}s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object() -> PodObject {
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u-1"},
            "spec": {"initContainers": [{"name": "i", "image": "init:1"}], "containers": [{"name": "c", "image": "app:1"}]}}))
        .unwrap()
    }

    fn pod(containers: Vec<Container>) -> Pod {
        Pod {
            restart_policy: RestartPolicy::Always,
            containers,
            initialized: false,
            deletion: None,
            grace: std::time::Duration::from_secs(30),
            finished: false,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000_000 + second).unwrap()
    }

    fn status(pod: &Pod, previous: &PodStatus, now: i64) -> PodStatus {
        let facts = StatusFacts {
            host_ip: "10.244.0.1".into(),
            pod_ip: Some("10.244.0.9".into()),
            sandbox_ready: true,
            ..StatusFacts::default()
        };
        pod_status(&object(), pod, &facts, previous, at(now))
    }

    fn shown(status: &PodStatus, type_: &str) -> (String, String, String) {
        let found = status
            .conditions
            .iter()
            .flatten()
            .find(|condition| condition.type_ == type_)
            .unwrap();
        (
            found.status.clone(),
            found.reason.clone().unwrap_or_default(),
            found.message.clone().unwrap_or_default(),
        )
    }

    fn three(a: &str, b: &str, c: &str) -> (String, String, String) {
        (a.into(), b.into(), c.into())
    }

    #[test]
    fn a_new_pod_is_worded_as_kubelet_words_it() {
        let pod = pod(vec![
            Container::new("i", Role::Init),
            Container::new("c", Role::Main),
        ]);
        let status = status(&pod, &PodStatus::default(), 0);
        assert_eq!(status.phase.as_deref(), Some("Pending"));
        assert_eq!(
            shown(&status, "Initialized"),
            three(
                "False",
                "ContainersNotInitialized",
                "containers with incomplete status: [i]"
            )
        );
        assert_eq!(
            shown(&status, "Ready"),
            three(
                "False",
                "ContainersNotReady",
                "containers with unready status: [c]"
            )
        );
        let main = &status.container_statuses.as_ref().unwrap()[0];
        assert_eq!(
            main.state
                .as_ref()
                .unwrap()
                .waiting
                .as_ref()
                .unwrap()
                .reason
                .as_deref(),
            Some("PodInitializing")
        );
    }

    #[test]
    fn a_crash_loop_shows_the_back_off_and_how_the_last_run_ended() {
        let mut container = Container::new("c", Role::Main);
        let exit = Exit {
            code: 1,
            signal: None,
            started_at: at(0).as_millisecond(),
            finished_at: at(1).as_millisecond(),
        };
        container.on_started(at(0), false, false);
        container.on_ended(exit);
        container.on_started(at(1), false, false);
        container.on_ended(exit);
        let mut pod = pod(vec![container]);
        pod.initialized = true;
        let status = status(&pod, &PodStatus::default(), 2);
        let shown = &status.container_statuses.as_ref().unwrap()[0];
        assert_eq!(shown.restart_count, 1);
        let waiting = shown.state.as_ref().unwrap().waiting.as_ref().unwrap();
        assert_eq!(waiting.reason.as_deref(), Some("CrashLoopBackOff"));
        assert_eq!(
            waiting.message.as_deref(),
            Some("back-off 10s restarting failed container=c pod=p_n(u-1)")
        );
        let last = shown.last_state.as_ref().unwrap().terminated.as_ref().unwrap();
        assert_eq!((last.exit_code, last.reason.as_deref()), (1, Some("Error")));
    }

    #[test]
    fn the_time_of_a_condition_moves_only_with_its_status() {
        let mut container = Container::new("c", Role::Main);
        container.on_started(at(0), false, true);
        let mut pod = pod(vec![container]);
        pod.initialized = true;
        let before = status(&pod, &PodStatus::default(), 5);
        let same = status(&pod, &before, 9);
        assert_eq!(before, same);
        if let Phase::Running { ready, .. } = &mut pod.containers[0].phase {
            *ready = true;
        }
        let after = status(&pod, &same, 20);
        let since = |status: &PodStatus, type_: &str| {
            status
                .conditions
                .iter()
                .flatten()
                .find(|c| c.type_ == type_)
                .unwrap()
                .last_transition_time
                .clone()
                .unwrap()
                .0
        };
        assert_eq!(since(&after, "Ready"), at(20));
        assert_eq!(since(&after, "PodScheduled"), at(5));
        assert_eq!(shown(&after, "Ready").0, "True");
    }

    #[test]
    fn durations_are_written_as_go_writes_them() {
        assert_eq!(
            [go_duration(10), go_duration(80), go_duration(300)],
            ["10s", "1m20s", "5m0s"]
        );
    }
}
