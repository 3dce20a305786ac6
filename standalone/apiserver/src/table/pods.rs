//! The row of a pod: the one whose STATUS says what is going on.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{meta, time};

pub(crate) fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let total_inits = meta::list_at(pod, "spec.initContainers");
    let containers = meta::list_at(pod, "spec.containers");
    let sidecar = |name: &str| {
        total_inits
            .iter()
            .any(|c| meta::str_at(c, "name") == name && meta::str_at(c, "restartPolicy") == "Always")
    };
    let mut total = containers.len()
        + total_inits
            .iter()
            .filter(|c| meta::str_at(c, "restartPolicy") == "Always")
            .count();
    let phase = meta::str_at(pod, "status.phase");
    let mut reason = match meta::str_at(pod, "status.reason") {
        "" => phase.to_owned(),
        reason => reason.to_owned(),
    };
    for condition in meta::list_at(pod, "status.conditions") {
        if meta::str_at(condition, "type") == "PodScheduled"
            && meta::str_at(condition, "reason") == "SchedulingGated"
        {
            reason = "SchedulingGated".to_owned();
        }
    }
    let mut restarts = 0;
    let mut sidecar_restarts = 0;
    let mut last_restart: Option<Timestamp> = None;
    let mut last_sidecar_restart: Option<Timestamp> = None;
    let mut ready = 0;
    let mut initializing = false;
    let finished = |status: &Value| time::parse(meta::str_at(status, "lastState.terminated.finishedAt"));
    let inits = meta::list_at(pod, "status.initContainerStatuses");
    for (i, status) in inits.iter().enumerate() {
        let count = meta::int_at(status, "restartCount").unwrap_or(0);
        restarts += count;
        last_restart = last_restart.max(finished(status));
        let is_sidecar = sidecar(meta::str_at(status, "name"));
        if is_sidecar {
            sidecar_restarts += count;
            last_sidecar_restart = last_sidecar_restart.max(finished(status));
        }
        let terminated = meta::at(status, "state.terminated");
        if terminated.is_some_and(|t| meta::int_at(t, "exitCode") == Some(0)) {
            continue;
        }
        if is_sidecar && status.get("started") == Some(&Value::Bool(true)) {
            ready += i64::from(status.get("ready") == Some(&Value::Bool(true)));
            continue;
        }
        reason = if let Some(t) = terminated {
            match (meta::str_at(t, "reason"), meta::int_at(t, "signal").unwrap_or(0)) {
                ("", 0) => format!("Init:ExitCode:{}", meta::int_at(t, "exitCode").unwrap_or(0)),
                ("", signal) => format!("Init:Signal:{signal}"),
                (r, _) => format!("Init:{r}"),
            }
        } else {
            match meta::str_at(status, "state.waiting.reason") {
                "" | "PodInitializing" => format!("Init:{i}/{}", total_inits.len()),
                r => format!("Init:{r}"),
            }
        };
        initializing = true;
        break;
    }
    let initialized = meta::list_at(pod, "status.conditions")
        .iter()
        .any(|c| meta::str_at(c, "type") == "Initialized" && meta::str_at(c, "status") == "True");
    if !initializing || initialized {
        restarts = sidecar_restarts;
        last_restart = last_sidecar_restart;
        let mut has_running = false;
        for status in meta::list_at(pod, "status.containerStatuses").iter().rev() {
            restarts += meta::int_at(status, "restartCount").unwrap_or(0);
            last_restart = last_restart.max(finished(status));
            let terminated = meta::at(status, "state.terminated");
            let waiting = meta::str_at(status, "state.waiting.reason");
            if !waiting.is_empty() {
                waiting.clone_into(&mut reason);
            } else if let Some(t) = terminated {
                reason = match (meta::str_at(t, "reason"), meta::int_at(t, "signal").unwrap_or(0)) {
                    ("", 0) => format!("ExitCode:{}", meta::int_at(t, "exitCode").unwrap_or(0)),
                    ("", signal) => format!("Signal:{signal}"),
                    (r, _) => r.to_owned(),
                };
            } else if status.get("ready") == Some(&Value::Bool(true))
                && meta::at(status, "state.running").is_some()
            {
                has_running = true;
                ready += 1;
            }
        }
        if reason == "Completed" && has_running {
            let is_ready = meta::list_at(pod, "status.conditions")
                .iter()
                .any(|c| meta::str_at(c, "type") == "Ready" && meta::str_at(c, "status") == "True");
            if is_ready { "Running" } else { "NotReady" }.clone_into(&mut reason);
        }
    }
    if meta::is_terminating(pod) && meta::str_at(pod, "status.reason") == "NodeLost" {
        "Unknown".clone_into(&mut reason);
    } else if meta::is_terminating(pod) && !matches!(phase, "Succeeded" | "Failed") {
        "Terminating".clone_into(&mut reason);
    }
    let restarts_text = match last_restart {
        Some(at) if restarts != 0 => format!(
            "{restarts} ({} ago)",
            time::human((now.as_second() - at.as_second()).max(0))
        ),
        _ => restarts.to_string(),
    };
    let none = |text: &str| {
        if text.is_empty() {
            "<none>".to_owned()
        } else {
            text.to_owned()
        }
    };
    let gates = meta::list_at(pod, "spec.readinessGates");
    let gates_text = if gates.is_empty() {
        "<none>".to_owned()
    } else {
        let conditions = meta::list_at(pod, "status.conditions");
        let met = gates
            .iter()
            .filter(|g| {
                conditions
                    .iter()
                    .any(|c| c.get("type") == g.get("conditionType") && meta::str_at(c, "status") == "True")
            })
            .count();
        format!("{met}/{}", gates.len())
    };
    let age = time::parse(meta::text(pod, "creationTimestamp")).map_or_else(
        || "<unknown>".to_owned(),
        |at| time::human((now.as_second() - at.as_second()).max(0)),
    );
    total = total.max(containers.len());
    let ip = match meta::list_at(pod, "status.podIPs")
        .first()
        .map(|i| meta::str_at(i, "ip"))
    {
        Some(ip) => ip,
        None => meta::str_at(pod, "status.podIP"),
    };
    vec![
        json!(meta::name(pod)),
        json!(format!("{ready}/{total}")),
        json!(reason),
        json!(restarts_text),
        json!(age),
        json!(none(ip)),
        json!(none(meta::str_at(pod, "spec.nodeName"))),
        json!(none(meta::str_at(pod, "status.nominatedNodeName"))),
        json!(gates_text),
    ]
}

/// Rows of pods that have ended are marked, so that `kubectl get` can tell.
pub(crate) fn row_conditions(pod: &Value) -> Option<Value> {
    let (reason, message) = match meta::str_at(pod, "status.phase") {
        "Succeeded" => ("Succeeded", "The pod has completed successfully."),
        "Failed" => ("Failed", "The pod failed."),
        _ => return None,
    };
    Some(json!([{"type": "Completed", "status": "True", "reason": reason, "message": message}]))
}
