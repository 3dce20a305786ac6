//! `serin wait`: until an object is live, ready, or in a condition. Watched, not polled.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use futures::StreamExt as _;
use kube::api::{Api, DynamicObject};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event};

use super::kinds::{Kind, parse_target};
use super::parse_duration;
use crate::cluster::Cluster;

/// Options of `serin wait`.
#[derive(Debug, Args)]
#[command(
    after_help = "FOR is `live` (every proxy that needs the route has acknowledged its newest generation), `ready`,\n`deleted`, `phase=NAME` (a Canary's phase), or `condition=TYPE[=STATUS]`.\nExit code 1 when the time is up or the object can no longer get there.\n\nExamples:\n  serin wait vs/reviews --for=live\n  serin wait canary/podinfo -n demo --for=phase=Succeeded --timeout 2m\n  serin wait ks/apps -n flux-system --for=ready"
)]
pub(crate) struct Options {
    /// Kind and name, for example vs/reviews
    target: String,
    /// What to wait for
    #[arg(long = "for", default_value = "ready")]
    goal: String,
    /// Namespace of the object
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// How long to wait
    #[arg(long, value_parser = parse_duration, default_value = "60s")]
    timeout: Duration,
}

/// What is waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Goal {
    Condition { type_: String, status: String },
    Phase(String),
    Deleted,
}

impl Goal {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let holds = |type_: &str| Self::Condition {
            type_: type_.to_owned(),
            status: "True".to_owned(),
        };
        Ok(match text.split_once('=') {
            None => match text.to_lowercase().as_str() {
                "live" => holds("Live"),
                "ready" => holds("Ready"),
                "available" => holds("Available"),
                "deleted" | "delete" => Self::Deleted,
                _ => bail!("--for={text}: say live, ready, deleted, phase=NAME or condition=TYPE[=STATUS]"),
            },
            Some(("phase", phase)) => Self::Phase(phase.to_owned()),
            Some(("condition", condition)) => match condition.split_once('=') {
                None => holds(condition),
                Some((type_, status)) => Self::Condition {
                    type_: type_.to_owned(),
                    status: status.to_owned(),
                },
            },
            Some(_) => bail!("--for={text}: say live, ready, deleted, phase=NAME or condition=TYPE[=STATUS]"),
        })
    }

    /// Whether an object is there. A condition that speaks of an older generation does not count.
    fn reached_by(&self, object: &DynamicObject) -> bool {
        let status = &object.data["status"];
        match self {
            Self::Deleted => false,
            Self::Phase(phase) => status["phase"].as_str() == Some(phase),
            Self::Condition {
                type_,
                status: wanted,
            } => {
                let generation = object.metadata.generation;
                let conditions = status["conditions"].as_array();
                conditions.into_iter().flatten().any(|condition| {
                    let observed = condition["observedGeneration"]
                        .as_i64()
                        .or_else(|| status["observedGeneration"].as_i64());
                    let current = observed.is_none() || generation.is_none() || observed >= generation;
                    current
                        && condition["type"]
                            .as_str()
                            .is_some_and(|found| found.eq_ignore_ascii_case(type_))
                        && condition["status"]
                            .as_str()
                            .is_some_and(|found| found.eq_ignore_ascii_case(wanted))
                })
            }
        }
    }
}

/// Why an object is not there yet, in its own words.
fn why_not(object: &DynamicObject) -> String {
    let status = &object.data["status"];
    let conditions = status["conditions"].as_array();
    let mut words: Vec<String> = conditions
        .into_iter()
        .flatten()
        .map(|condition| {
            let text = |name: &str| condition[name].as_str().unwrap_or("").to_owned();
            format!("{}={} {}", text("type"), text("status"), text("message"))
        })
        .collect();
    if let Some(phase) = status["phase"].as_str() {
        words.insert(0, format!("phase {phase}"));
    }
    if words.is_empty() {
        "it has no conditions".to_owned()
    } else {
        words.join("; ")
    }
}

/// Waits, and says what it waited for in vain when the time is up.
pub(crate) async fn run(cluster: &Cluster, options: &Options) -> anyhow::Result<ExitCode> {
    let (kind, name) = parse_target(&options.target)?;
    let goal = Goal::parse(&options.goal)?;
    let client = cluster.client()?;
    let mut last = None;
    let wait = until(client, kind, &options.namespace, &name, &goal, &mut last);
    match tokio::time::timeout(options.timeout, wait).await {
        Ok(outcome) => outcome?,
        Err(_) => {
            let state = last
                .as_ref()
                .map_or_else(|| "it does not exist".to_owned(), why_not);
            bail!(
                "{}/{name} in namespace {} is not {} after {} s: {state}",
                kind.plural,
                options.namespace,
                options.goal,
                options.timeout.as_secs()
            );
        }
    }
    println!("{}/{name} is {}", kind.plural, options.goal);
    Ok(ExitCode::SUCCESS)
}

async fn until(
    client: kube::Client,
    kind: Kind,
    namespace: &str,
    name: &str,
    goal: &Goal,
    last: &mut Option<DynamicObject>,
) -> anyhow::Result<()> {
    let resource = kind.resource();
    let api: Api<DynamicObject> = if kind.namespaced {
        Api::namespaced_with(client, namespace, &resource)
    } else {
        Api::all_with(client, &resource)
    };
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut events = watcher::watcher(api, config).default_backoff().boxed();
    let mut seen = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(object) | Event::InitApply(object)) => {
                seen = true;
                let reached = goal.reached_by(&object);
                *last = Some(object);
                if reached {
                    return Ok(());
                }
            }
            Ok(Event::Delete(_)) if *goal == Goal::Deleted => return Ok(()),
            Ok(Event::InitDone) if *goal == Goal::Deleted && !seen => return Ok(()),
            Ok(Event::Delete(_)) => *last = None,
            Ok(Event::Init | Event::InitDone) => {}
            Err(error) => tracing::debug!(%error, "watch interrupted"),
        }
    }
    bail!("the watch of {} ended", kind.plural)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(generation: i64, observed: i64, status: &str) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": {"name": "a", "generation": generation},
            "status": {"conditions": [{"type": "Live", "status": status, "observedGeneration": observed, "message": "1/2"}]},
        }))
        .unwrap()
    }

    #[test]
    fn a_condition_of_an_older_generation_does_not_count() {
        let goal = Goal::parse("live").unwrap();
        assert!(goal.reached_by(&object(2, 2, "True")));
        assert!(!goal.reached_by(&object(3, 2, "True")));
        assert!(!goal.reached_by(&object(2, 2, "False")));
    }

    #[test]
    fn goals_are_read_as_kubectl_writes_them() {
        let wanted = Goal::Condition {
            type_: "Promoted".to_owned(),
            status: "False".to_owned(),
        };
        assert_eq!(Goal::parse("condition=Promoted=False").unwrap(), wanted);
        assert_eq!(
            Goal::parse("phase=Succeeded").unwrap(),
            Goal::Phase("Succeeded".to_owned())
        );
        assert!(Goal::parse("sometime").is_err());
    }

    #[test]
    fn a_wait_in_vain_says_what_the_object_says() {
        assert_eq!(why_not(&object(1, 1, "False")), "Live=False 1/2");
    }
}
