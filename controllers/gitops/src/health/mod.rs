//! Is an object settled? The rules of kstatus as Flux uses them, as a pure function over the object's JSON.
//!
//! Deliberate differences to plain kstatus, all as Flux has them: a Job is settled when it has completed (or is
//! suspended), not when it has started. One of our own: a Pod in phase `Failed` has failed (kstatus calls it current).

pub(crate) mod expressions;
mod workloads;

use jiff::Timestamp;
use serde_json::Value;

/// How an object stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    /// Settled as asked for.
    Current,
    /// On its way.
    InProgress,
    /// Not getting there on its own.
    Failed,
    /// Being deleted.
    Terminating,
    /// Not there.
    NotFound,
}

impl State {
    /// kstatus' word.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Current => "Current",
            Self::InProgress => "InProgress",
            Self::Failed => "Failed",
            Self::Terminating => "Terminating",
            Self::NotFound => "NotFound",
        }
    }
}

/// A state with its reason in a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Health {
    pub(crate) state: State,
    pub(crate) message: String,
    /// When the verdict may change although the object does not (an unschedulable Pod gets some patience).
    pub(crate) look_again: Option<Timestamp>,
}

impl Health {
    pub(crate) fn current() -> Self {
        Self::new(State::Current, "settled")
    }

    pub(crate) fn new(state: State, message: impl Into<String>) -> Self {
        Self {
            state,
            message: message.into(),
            look_again: None,
        }
    }

    pub(crate) fn progress(message: impl Into<String>) -> Self {
        Self::new(State::InProgress, message)
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(State::Failed, message)
    }
}

/// One entry of `status.conditions`.
#[derive(Debug, Clone, Copy)]
struct ConditionRef<'a> {
    status: &'a str,
    reason: &'a str,
    message: &'a str,
    since: Option<Timestamp>,
}

fn condition<'a>(object: &'a Value, type_: &str) -> Option<ConditionRef<'a>> {
    let found = object
        .pointer("/status/conditions")?
        .as_array()?
        .iter()
        .find(|c| c["type"] == type_)?;
    let text = |field: &str| found[field].as_str().unwrap_or_default();
    Some(ConditionRef {
        status: text("status"),
        reason: text("reason"),
        message: text("message"),
        since: text("lastTransitionTime").parse().ok(),
    })
}

fn number(object: &Value, pointer: &str) -> Option<i64> {
    object.pointer(pointer).and_then(Value::as_i64)
}

/// Judges one object.
pub(crate) fn assess(object: &Value, now: Timestamp) -> Health {
    if object
        .pointer("/metadata/deletionTimestamp")
        .is_some_and(|v| !v.is_null())
    {
        return Health::new(State::Terminating, "being deleted");
    }
    if let Some(early) = generic(object) {
        return early;
    }
    let group = object["apiVersion"]
        .as_str()
        .map_or("", |v| crate::key::group_version(v).0);
    let kind = object["kind"].as_str().unwrap_or_default();
    match (group, kind) {
        ("apps" | "extensions", "Deployment") => workloads::deployment(object),
        ("apps" | "extensions", "ReplicaSet") => workloads::replica_set(object),
        ("apps", "StatefulSet") => workloads::stateful_set(object),
        ("apps" | "extensions", "DaemonSet") => workloads::daemon_set(object),
        ("", "Pod") => workloads::pod(object, now),
        ("batch", "Job") => workloads::job(object),
        ("", "PersistentVolumeClaim") => match object.pointer("/status/phase").and_then(Value::as_str) {
            Some("Bound") => Health::current(),
            phase => Health::progress(format!("phase is {}, not Bound", phase.unwrap_or("unknown"))),
        },
        ("", "Service") => service(object),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => custom_resource_definition(object),
        ("", "ConfigMap" | "Secret" | "Namespace" | "ServiceAccount")
        | ("policy", "PodDisruptionBudget")
        | ("batch", "CronJob") => Health::current(),
        _ => custom(object),
    }
}

/// What holds for every kind: generation, `Reconciling`, `Stalled`.
fn generic(object: &Value) -> Option<Health> {
    let generation = number(object, "/metadata/generation");
    let observed = number(object, "/status/observedGeneration");
    if let (Some(generation), Some(observed)) = (generation, observed)
        && generation != observed
    {
        return Some(Health::progress(format!(
            "generation {generation} is not observed yet ({observed} is)"
        )));
    }
    if let Some(c) = condition(object, "Reconciling")
        && c.status == "True"
    {
        return Some(Health::progress(said(&c, "reconciling")));
    }
    if let Some(c) = condition(object, "Stalled")
        && c.status == "True"
    {
        return Some(Health::failed(said(&c, "stalled")));
    }
    None
}

fn said(c: &ConditionRef<'_>, otherwise: &str) -> String {
    match (c.message, c.reason) {
        ("", "") => otherwise.to_string(),
        ("", reason) => reason.to_string(),
        (message, _) => message.to_string(),
    }
}

fn custom(object: &Value) -> Health {
    match condition(object, "Ready") {
        None => Health::current(),
        Some(c) if c.status == "True" => Health::current(),
        Some(c) => Health::progress(said(&c, "not ready")),
    }
}

fn service(object: &Value) -> Health {
    let type_ = object
        .pointer("/spec/type")
        .and_then(Value::as_str)
        .unwrap_or("ClusterIP");
    let has_address = object
        .pointer("/spec/clusterIP")
        .and_then(Value::as_str)
        .is_some_and(|ip| !ip.is_empty());
    if type_ == "LoadBalancer" && !has_address {
        Health::progress("no cluster IP yet")
    } else {
        Health::current()
    }
}

fn custom_resource_definition(object: &Value) -> Health {
    if let Some(c) = condition(object, "NamesAccepted")
        && c.status == "False"
    {
        return Health::failed(said(&c, "its names are not accepted"));
    }
    match condition(object, "Established") {
        Some(c) if c.status == "True" => Health::current(),
        Some(c) if c.status == "False" && c.reason != "Installing" => {
            Health::failed(said(&c, "not established"))
        }
        _ => Health::progress("not established yet"),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
