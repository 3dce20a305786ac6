//! What a pod does next: pure. The worker tells what happened, [`decide`] says what to do and when to look again.
//!
//! The rules are kubelet's. Init containers run one after another; those with `restartPolicy: Always` (native
//! sidecars) stay, and the next one waits until theirs have *started* (startup probe passed, if there is one). Then
//! all main containers start. On deletion the main containers are stopped together, then the sidecars in reverse
//! order, all within one grace period. A container that ended is started again at once the first time and after
//! 10 s, 20 s, … 300 s from then on; ten minutes of running forget the past.

use std::time::Duration;

use jiff::Timestamp;

use crate::shim::protocol::Exit;

/// First delay between a container's end and its next start, once it has been restarted before; kubelet's.
pub(crate) const BACK_OFF_FIRST: Duration = Duration::from_secs(10);
/// The longest such delay; kubelet's.
pub(crate) const BACK_OFF_MAX: Duration = Duration::from_secs(300);
/// A container that ran this long starts over with no delay; kubelet's is twice the longest delay.
pub(crate) const BACK_OFF_RESET: Duration = Duration::from_secs(600);

/// `spec.restartPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

/// What kind of container it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Init,
    /// An init container with `restartPolicy: Always`.
    Sidecar,
    Main,
}

/// Where a container stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not started (again) yet. `reason` and `message` as Kubernetes shows them; an error is retried by back-off.
    Waiting {
        reason: String,
        message: Option<String>,
    },
    /// The shim was asked to start it.
    Starting,
    Running {
        started_at: Timestamp,
        /// Startup probe passed, or none.
        started: bool,
        /// Readiness probe passed, or none and started.
        ready: bool,
    },
    Ended(Exit),
}

/// A container with its history.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) phase: Phase,
    /// How often it was started again.
    pub(crate) restarts: u32,
    /// Whether it was ever started (the next start is then a restart).
    pub(crate) started_once: bool,
    /// Delay before the start after next; zero until the first restart.
    pub(crate) back_off: Duration,
    /// Not before.
    pub(crate) not_before: Option<Timestamp>,
    /// How the run before the current one ended.
    pub(crate) last: Option<Exit>,
    /// It was told to stop (deletion, failed liveness or startup probe) and when it will be killed.
    pub(crate) stopping: Option<Timestamp>,
    pub(crate) killed: bool,
}

impl Container {
    pub(crate) fn new(name: &str, role: Role) -> Self {
        Self {
            name: name.to_owned(),
            role,
            phase: Phase::Waiting {
                reason: if role == Role::Main {
                    "ContainerCreating"
                } else {
                    "PodInitializing"
                }
                .to_owned(),
                message: None,
            },
            restarts: 0,
            started_once: false,
            back_off: Duration::ZERO,
            not_before: None,
            last: None,
            stopping: None,
            killed: false,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. } | Phase::Starting)
    }

    fn succeeded(&self) -> bool {
        matches!(&self.phase, Phase::Ended(exit) if exit.code == 0)
    }

    /// It runs.
    pub(crate) fn on_started(&mut self, at: Timestamp, has_startup_probe: bool, has_readiness_probe: bool) {
        if self.started_once {
            self.restarts += 1;
        }
        self.started_once = true;
        self.not_before = None;
        self.killed = false;
        self.stopping = None;
        self.phase = Phase::Running {
            started_at: at,
            started: !has_startup_probe,
            ready: !has_startup_probe && !has_readiness_probe,
        };
    }

    /// It could not be started: kubelet's `CreateContainerConfigError`, `RunContainerError`, `ErrImagePull` …
    pub(crate) fn on_start_failed(&mut self, reason: &str, message: &str, now: Timestamp) {
        // Trying again at once would only fail again; the worker is woken when what is missing turns up.
        self.back_off = self.back_off.max(BACK_OFF_FIRST);
        self.delay(now);
        self.phase = Phase::Waiting {
            reason: reason.to_owned(),
            message: Some(message.to_owned()),
        };
    }

    /// It ended.
    pub(crate) fn on_ended(&mut self, exit: Exit) {
        let finished = timestamp(exit.finished_at);
        if exit.finished_at - exit.started_at >= BACK_OFF_RESET.as_millis() as i64 {
            self.back_off = Duration::ZERO;
        }
        self.delay(finished);
        self.stopping = None;
        self.killed = false;
        self.phase = Phase::Ended(exit);
    }

    fn delay(&mut self, from: Timestamp) {
        self.not_before = Some(from + self.back_off);
        self.back_off = if self.back_off.is_zero() {
            BACK_OFF_FIRST
        } else {
            (self.back_off * 2).min(BACK_OFF_MAX)
        };
    }

    /// The delay that the current wait is part of.
    pub(crate) fn current_back_off(&self) -> Duration {
        if self.back_off == BACK_OFF_FIRST {
            Duration::ZERO
        } else {
            self.back_off / 2
        }
    }
}

pub(crate) fn timestamp(millis: i64) -> Timestamp {
    Timestamp::from_millisecond(millis).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// A deletion in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Deletion {
    /// When what still runs is killed.
    pub(crate) deadline: Timestamp,
}

/// Everything that [`decide`] looks at.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    pub(crate) restart_policy: RestartPolicy,
    /// In the order of the manifest: init containers and sidecars, then main ones.
    pub(crate) containers: Vec<Container>,
    /// All init containers were through once; never goes back.
    pub(crate) initialized: bool,
    pub(crate) deletion: Option<Deletion>,
    /// `spec.terminationGracePeriodSeconds`: what sidecars get when the main containers have completed.
    pub(crate) grace: Duration,
    /// No container runs or will run again.
    pub(crate) finished: bool,
}

/// What the worker is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start it (again). The worker sets [`Phase::Starting`].
    Start(String),
    /// preStop, then SIGTERM; SIGKILL at the deadline.
    Stop(String, Timestamp),
    Kill(String),
    /// Nothing runs any more and nothing will.
    Finish,
}

/// Actions to take now, and when to decide again if nothing happens before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) actions: Vec<Action>,
    pub(crate) wake_at: Option<Timestamp>,
}

impl Decision {
    fn wake(&mut self, at: Timestamp) {
        self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
    }
}

/// What to do now. Changes only the latches `initialized` and `finished`.
pub(crate) fn decide(pod: &mut Pod, now: Timestamp) -> Decision {
    let mut decision = Decision::default();
    if pod.finished {
        return decision;
    }
    // Whoever was told to stop is killed at its deadline, whatever the reason was.
    for container in &pod.containers {
        if let (Some(deadline), true, false) = (container.stopping, container.is_running(), container.killed)
        {
            if now >= deadline {
                decision.actions.push(Action::Kill(container.name.clone()));
            } else {
                decision.wake(deadline);
            }
        }
    }
    if let Some(deletion) = pod.deletion {
        stop_all(pod, deletion.deadline, &mut decision);
        if pod.containers.iter().all(|container| !container.is_running()) {
            pod.finished = true;
            decision.actions.push(Action::Finish);
        }
        return decision;
    }
    if failed_for_good(pod) || completed(pod) {
        stop_all(pod, now + pod.grace, &mut decision);
        if pod.containers.iter().all(|container| !container.is_running()) {
            pod.finished = true;
            decision.actions.push(Action::Finish);
        }
        return decision;
    }
    run_init(pod, now, &mut decision);
    if pod.initialized {
        for container in pod
            .containers
            .iter()
            .filter(|container| container.role == Role::Main)
        {
            start_if_due(container, pod.restart_policy, now, &mut decision);
        }
    }
    decision
}

fn run_init(pod: &mut Pod, now: Timestamp, decision: &mut Decision) {
    for container in pod
        .containers
        .iter()
        .filter(|container| container.role != Role::Main)
    {
        let through = match (container.role, &container.phase) {
            (Role::Sidecar, Phase::Running { started, .. }) => *started,
            (Role::Init, Phase::Ended(_)) => container.succeeded(),
            _ => false,
        };
        if through {
            continue;
        }
        // After initialisation only sidecars are started again; an init container has done its work.
        if !(pod.initialized && container.role == Role::Init) {
            let policy = match (container.role, pod.restart_policy) {
                (Role::Sidecar, _) => RestartPolicy::Always,
                (_, RestartPolicy::Never) => RestartPolicy::Never,
                _ => RestartPolicy::OnFailure,
            };
            start_if_due(container, policy, now, decision);
        }
        if !pod.initialized {
            return;
        }
    }
    pod.initialized = true;
}

fn start_if_due(container: &Container, policy: RestartPolicy, now: Timestamp, decision: &mut Decision) {
    let wanted = match &container.phase {
        Phase::Waiting { .. } => true,
        Phase::Ended(_) => match policy {
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => !container.succeeded(),
            RestartPolicy::Never => false,
        },
        Phase::Starting | Phase::Running { .. } => false,
    };
    if !wanted {
        return;
    }
    match container.not_before {
        Some(at) if now < at => decision.wake(at),
        _ => decision.actions.push(Action::Start(container.name.clone())),
    }
}

/// An init container has failed and may not be retried.
fn failed_for_good(pod: &Pod) -> bool {
    pod.restart_policy == RestartPolicy::Never
        && pod.containers.iter().any(|container| {
            container.role == Role::Init && matches!(&container.phase, Phase::Ended(exit) if exit.code != 0)
        })
}

/// All main containers have ended and none may be started again.
fn completed(pod: &Pod) -> bool {
    let mut mains = pod
        .containers
        .iter()
        .filter(|container| container.role == Role::Main)
        .peekable();
    mains.peek().is_some()
        && mains.all(|container| match (&container.phase, pod.restart_policy) {
            (Phase::Ended(_), RestartPolicy::Never) => true,
            (Phase::Ended(exit), RestartPolicy::OnFailure) => exit.code == 0,
            _ => false,
        })
}

/// Main and init containers together, then the sidecars from the last to the first, one at a time.
fn stop_all(pod: &Pod, deadline: Timestamp, decision: &mut Decision) {
    let mut waiting = false;
    for container in pod
        .containers
        .iter()
        .filter(|container| container.role != Role::Sidecar)
    {
        if container.is_running() {
            waiting = true;
            stop(container, deadline, decision);
        }
    }
    if waiting {
        return;
    }
    if let Some(last) = pod
        .containers
        .iter()
        .rev()
        .find(|container| container.role == Role::Sidecar && container.is_running())
    {
        stop(last, deadline, decision);
    }
}

fn stop(container: &Container, deadline: Timestamp, decision: &mut Decision) {
    // A deadline that came closer (deleted again with less grace) is a new order.
    if container.stopping.is_none_or(|known| deadline < known) {
        decision
            .actions
            .push(Action::Stop(container.name.clone(), deadline));
        decision.wake(deadline);
    }
}

/// `status.phase`.
pub(crate) fn pod_phase(pod: &Pod) -> &'static str {
    if failed_for_good(pod) {
        return "Failed";
    }
    if pod.finished {
        let clean = pod
            .containers
            .iter()
            .filter(|container| container.role == Role::Main)
            .all(Container::succeeded);
        return if clean { "Succeeded" } else { "Failed" };
    }
    let any_main_was_started = pod
        .containers
        .iter()
        .any(|container| container.role == Role::Main && container.started_once);
    if pod.initialized && any_main_was_started {
        "Running"
    } else {
        "Pending"
    }
}

#[cfg(test)]
mod tests;
