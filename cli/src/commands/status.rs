//! `serin status`: sources, rollouts, and how live the routes are.

use std::process::ExitCode;

use clap::Args;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DynamicObject, ListParams};
use kube::{Client, ResourceExt as _};
use serde::Serialize;
use serde_json::Value;

use super::kinds::Kind;
use crate::cluster::{Cluster, process};
use crate::output::{Format, Mood, cell, paint, print_structured, table};

/// Options of `serin status`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  serin status\n  serin status -n demo -o json")]
pub(crate) struct Options {
    /// Only this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Everything that the command shows.
#[derive(Debug, Serialize)]
struct Status {
    cluster: String,
    running: bool,
    /// Where the controllers' own metrics are served.
    metrics: Option<String>,
    /// Where webhooks of Receivers are taken; a Receiver's `status.webhookPath` goes behind it.
    webhooks: Option<String>,
    sources: Vec<Source>,
    canaries: Vec<Canary>,
    routes: Vec<Route>,
}

/// A GitRepository or a Kustomization.
#[derive(Debug, Serialize)]
struct Source {
    kind: &'static str,
    namespace: String,
    name: String,
    ready: String,
    revision: String,
    message: String,
}

/// A rollout.
#[derive(Debug, Serialize)]
struct Canary {
    namespace: String,
    name: String,
    phase: String,
    weight_wanted: i64,
    weight_live: Option<i64>,
    acked: Option<i64>,
    needed: Option<i64>,
    failed_checks: i64,
    metrics: Vec<String>,
    seconds_in_phase: Option<i64>,
    message: String,
}

/// A route object and how many proxies have it.
#[derive(Debug, Serialize)]
struct Route {
    kind: &'static str,
    namespace: String,
    name: String,
    live: String,
    message: String,
}

/// Prints the status.
pub(crate) async fn run(cluster: &Cluster, options: &Options) -> anyhow::Result<ExitCode> {
    let client = cluster.client()?;
    let namespace = options.namespace.as_deref();
    let mut status = Status {
        cluster: cluster.name().to_owned(),
        running: process::running(cluster)?.is_some(),
        metrics: std::fs::read_to_string(cluster.metrics_address())
            .ok()
            .map(|url| url.trim().to_owned()),
        webhooks: cluster.webhook_address(),
        sources: Vec::new(),
        canaries: Vec::new(),
        routes: Vec::new(),
    };
    for kind in ["GitRepository", "Kustomization"] {
        for object in list(&client, kind, namespace).await? {
            status.sources.push(source(Kind::find(kind)?.kind, &object));
        }
    }
    for object in list(&client, "Canary", namespace).await? {
        status.canaries.push(canary(&object, Timestamp::now()));
    }
    for kind in ["VirtualService", "DestinationRule", "Gateway"] {
        for object in list(&client, kind, namespace).await? {
            status.routes.push(route(Kind::find(kind)?.kind, &object));
        }
    }
    if !print_structured(&status, options.output)? {
        print(&status);
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(client: &Client, kind: &str, namespace: Option<&str>) -> anyhow::Result<Vec<DynamicObject>> {
    let resource = Kind::find(kind)?.resource();
    let api: Api<DynamicObject> = match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let mut objects = api.list(&ListParams::default()).await?.items;
    objects.sort_by_key(|object| (object.namespace(), object.name_any()));
    Ok(objects)
}

fn condition<'a>(object: &'a DynamicObject, type_: &str) -> Option<&'a Value> {
    let conditions = object.data["status"]["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == type_)
}

fn word(value: Option<&Value>, field: &str) -> String {
    value
        .and_then(|value| value[field].as_str())
        .unwrap_or("")
        .to_owned()
}

fn source(kind: &'static str, object: &DynamicObject) -> Source {
    let status = &object.data["status"];
    let revision = status["lastAppliedRevision"]
        .as_str()
        .or_else(|| status["artifact"]["revision"].as_str());
    let ready = condition(object, "Ready");
    let mut message = word(ready, "message");
    if let Some(unhonoured) = condition(object, serin_kit::unhonoured::CONDITION) {
        message = format!("{message} ({})", word(Some(unhonoured), "message"));
    }
    Source {
        kind,
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        ready: ready.map_or_else(|| "Unknown".to_owned(), |ready| word(Some(ready), "status")),
        revision: revision.unwrap_or("").to_owned(),
        message,
    }
}

fn canary(object: &DynamicObject, now: Timestamp) -> Canary {
    let status = &object.data["status"];
    let live = &status["weightLive"];
    let since = status["lastTransitionTime"]
        .as_str()
        .and_then(|time| time.parse::<Timestamp>().ok());
    let metrics = status["metrics"].as_array().into_iter().flatten().map(|metric| {
        let name = metric["name"].as_str().unwrap_or("");
        let verdict = metric["verdict"].as_str().unwrap_or("");
        // A judge's value is its evidence, a number that says nothing beside the verdict.
        match metric["value"].as_f64().filter(|_| metric["alpha"].is_null()) {
            Some(value) => format!("{name} {value:.2} {verdict}"),
            None => format!("{name} {verdict}"),
        }
    });
    Canary {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        phase: status["phase"].as_str().unwrap_or("").to_owned(),
        weight_wanted: status["canaryWeight"].as_i64().unwrap_or(0),
        weight_live: (live["live"] == true).then(|| live["weight"].as_i64()).flatten(),
        acked: live["acked"].as_i64(),
        needed: live["needed"].as_i64(),
        failed_checks: status["failedChecks"].as_i64().unwrap_or(0),
        metrics: metrics.collect(),
        seconds_in_phase: since.map(|since| now.duration_since(since).as_secs()),
        message: status["message"]
            .as_str()
            .map_or_else(|| word(condition(object, "Promoted"), "message"), str::to_owned),
    }
}

fn route(kind: &'static str, object: &DynamicObject) -> Route {
    let live = condition(object, "Live");
    Route {
        kind,
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        live: live.map_or_else(|| "-".to_owned(), |live| word(Some(live), "status")),
        message: word(live, "message"),
    }
}

/// `main@sha1:47ee2543` for a revision with its whole digest, as Flux shows it.
fn short_revision(revision: &str) -> &str {
    const DIGITS: usize = 8;
    let digest = revision.rfind(':').map_or(0, |colon| colon + 1);
    match revision.get(digest..digest + DIGITS) {
        Some(_) => &revision[..digest + DIGITS],
        None => revision,
    }
}

fn print(status: &Status) {
    let running = if status.running {
        paint("running", Mood::Good)
    } else {
        paint("API answers, but the server's lock is free", Mood::Bad)
    };
    println!("cluster {}: {running}", status.cluster);
    if let Some(metrics) = &status.metrics {
        println!("metrics {metrics}");
    }
    if let Some(address) = &status.webhooks {
        println!("webhooks at {address}");
    }
    if !status.sources.is_empty() {
        let mut sources = table(&["KIND", "NAMESPACE", "NAME", "READY", "REVISION", "MESSAGE"]);
        for source in &status.sources {
            let mood = match source.ready.as_str() {
                "True" => Mood::Good,
                "False" => Mood::Bad,
                _ => Mood::Busy,
            };
            sources.add_row([
                cell(source.kind, Mood::Plain),
                cell(&source.namespace, Mood::Plain),
                cell(&source.name, Mood::Plain),
                cell(&source.ready, mood),
                cell(short_revision(&source.revision), Mood::Plain),
                cell(&source.message, Mood::Plain),
            ]);
        }
        println!("\n{sources}");
    }
    if !status.canaries.is_empty() {
        let mut canaries = table(&[
            "NAMESPACE",
            "CANARY",
            "PHASE",
            "WEIGHT",
            "LIVE",
            "METRICS",
            "MESSAGE",
        ]);
        for canary in &status.canaries {
            let mood = match canary.phase.as_str() {
                "Succeeded" | "Initialized" => Mood::Good,
                "Failed" => Mood::Bad,
                _ => Mood::Busy,
            };
            let live = match (canary.acked, canary.needed) {
                (Some(acked), Some(needed)) => format!("{acked}/{needed}"),
                _ => "-".to_owned(),
            };
            canaries.add_row([
                cell(&canary.namespace, Mood::Plain),
                cell(&canary.name, Mood::Plain),
                cell(&canary.phase, mood),
                cell(canary.weight_wanted.to_string(), Mood::Plain),
                cell(live, Mood::Plain),
                cell(canary.metrics.join(", "), Mood::Plain),
                cell(&canary.message, Mood::Plain),
            ]);
        }
        println!("\n{canaries}");
    }
    if !status.routes.is_empty() {
        let mut routes = table(&["KIND", "NAMESPACE", "NAME", "LIVE", "PROXIES"]);
        for route in &status.routes {
            let mood = match route.live.as_str() {
                "True" => Mood::Good,
                "False" => Mood::Bad,
                _ => Mood::Busy,
            };
            routes.add_row([
                cell(route.kind, Mood::Plain),
                cell(&route.namespace, Mood::Plain),
                cell(&route.name, Mood::Plain),
                cell(&route.live, mood),
                cell(&route.message, Mood::Plain),
            ]);
        }
        println!("\n{routes}");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_canary_shows_the_weight_that_is_wanted_beside_the_one_that_is_live() {
        let object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "flagger.app/v1beta1", "kind": "Canary", "metadata": {"name": "podinfo", "namespace": "demo"},
            "status": {
                "phase": "Progressing", "canaryWeight": 30, "failedChecks": 0,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
                "weightLive": {"weight": 30, "generation": 4, "needed": 3, "acked": 2, "live": false},
                "metrics": [
                    {"name": "request-success-rate", "value": 99.5, "verdict": "good"},
                    {"name": "errors", "value": 57649.7, "alpha": 0.0075, "verdict": "bad"},
                ],
            },
        }))
        .unwrap();
        let shown = canary(&object, "2026-01-01T00:00:05Z".parse().unwrap());
        assert_eq!((shown.weight_wanted, shown.weight_live), (30, None));
        assert_eq!((shown.acked, shown.needed), (Some(2), Some(3)));
        assert_eq!(shown.metrics, ["request-success-rate 99.50 good", "errors bad"]);
        assert_eq!(shown.seconds_in_phase, Some(5));
    }

    #[test]
    fn a_revision_is_shown_with_eight_digits_of_its_digest() {
        assert_eq!(
            short_revision("main@sha1:47ee254358b7931d3ee6cc4385b880493c6626fb"),
            "main@sha1:47ee2543"
        );
        assert_eq!(short_revision("main@sha1:47e"), "main@sha1:47e");
        assert_eq!(short_revision("v1.2.3"), "v1.2.3");
        assert_eq!(short_revision(""), "");
    }

    #[test]
    fn a_source_without_a_condition_is_unknown() {
        let object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "source.toolkit.fluxcd.io/v1", "kind": "GitRepository", "metadata": {"name": "a"},
        }))
        .unwrap();
        assert_eq!(source("GitRepository", &object).ready, "Unknown");
    }
}
