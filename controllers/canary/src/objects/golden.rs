//! What we generate against what Flagger wrote, object by object and phase by phase.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
use serde_json::{Value, json};
use serin_crds::flagger::Canary;
use serin_crds::istio::VirtualService;

use super::configs::{self, Tracked};
use super::{Blueprint, Options, covers, split_of};
use crate::golden;
use crate::traffic::Split;

/// Cases whose objects are compared.
const CASES: &[&str] = &[
    "istio-weights",
    "istio-stepweights",
    "istio-stepweight-promotion",
    "istio-http-options",
    "istio-gateways-hosts",
    "istio-delegation",
    "istio-traffic-policy",
    "istio-metadata",
    "istio-pod-spec",
    "istio-config-tracking",
    "istio-new-revision-mid",
    "istio-suspend",
    "istio-deadline",
    "istio-restore-after-failed",
    "istio-ready-thresholds",
    "istio-promotion-failed",
    "istio-promotion-stuck",
    "istio-skip-analysis",
    "istio-no-steps",
    "istio-revert",
    "istio-revert-existing",
    "istio-webhooks",
    "istio-alerts",
    "istio-event-webhook",
    "istio-metric-templates",
    "istio-metric-deprecated",
    "flags-slack",
    "flags-teams",
    "flags-leader",
    "flags-interval",
];

/// The options that a recording's flags stand for.
fn options_of(case: &Value) -> Options {
    let mut options = Options::default();
    for flag in case["flags"].as_array().into_iter().flatten() {
        let list = |text: &str| text.split(',').map(str::to_owned).collect();
        match flag.as_str().unwrap().split_once('=').unwrap() {
            ("-selector-labels", labels) => options.selector_labels = list(labels),
            ("-include-label-prefix", prefixes) => options.include_label_prefixes = list(prefixes),
            ("-enable-config-tracking", on) => options.config_tracking = on == "true",
            _ => {}
        }
    }
    options
}

/// The state of the cluster as far as a case has come.
#[derive(Default)]
struct Cluster {
    objects: BTreeMap<String, Value>,
}

impl Cluster {
    fn typed<K: serde::de::DeserializeOwned>(&self, key: &str) -> Option<K> {
        let mut object = self.objects.get(key)?.clone();
        without_symbols(&mut object);
        Some(serde_json::from_value(object).unwrap_or_else(|error| panic!("{key}: {error}")))
    }
}

/// Times and addresses are normalised in the recordings.
fn without_symbols(object: &mut Value) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("creationTimestamp");
    }
    if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut)
        && spec.get("clusterIP").is_some_and(|ip| ip == "<ip>")
    {
        spec.remove("clusterIP");
        spec.remove("clusterIPs");
    }
}

struct Compared {
    failures: Vec<String>,
    count: usize,
}

impl Compared {
    fn same(&mut self, what: &str, ours: &Value, theirs: &Value) {
        self.count += 1;
        if ours != theirs {
            self.failures
                .push(format!("{what}\n  ours   {ours}\n  theirs {theirs}"));
        }
    }

    /// Kinds without defaults of an API server: everything must be equal. Ours is another version of the same API.
    fn exactly(&mut self, what: &str, ours: &Value, theirs: &Value) {
        let normal = |object: &Value| {
            let mut object = object.clone();
            without_symbols(&mut object);
            object["apiVersion"] = json!("networking.istio.io");
            object
        };
        self.same(what, &normal(ours), &normal(theirs));
    }

    /// Kinds with defaults: all that is ours is there, and nothing else in the parts that carry meaning.
    fn with_defaults(&mut self, what: &str, ours: &Value, theirs: &Value, exact: &[&str]) {
        self.count += 1;
        let mut theirs = theirs.clone();
        if ours["spec"].get("clusterIP").is_none() {
            without_symbols(&mut theirs);
        }
        if !covers(&theirs, ours) {
            self.failures
                .push(format!("{what}: not covered\n  ours   {ours}\n  theirs {theirs}"));
        }
        for pointer in exact {
            let empty = Value::Null;
            let part = |object: &Value| object.pointer(pointer).unwrap_or(&empty).clone();
            self.same(&format!("{what} {pointer}"), &part(ours), &part(&theirs));
        }
    }
}

fn compare(name: &str, compared: &mut Compared) -> Option<()> {
    let case = golden::case(name)?;
    let mut canary = golden::input(&case, "Canary").clone();
    canary["metadata"]["uid"] = json!("<uid>");
    let canary: Canary = serde_json::from_value(canary).unwrap();
    let options = options_of(&case);
    let mut cluster = Cluster::default();
    // What existed before anything of ours: it is taken over.
    let first = case["objects_by_phase"][0]["objects"]
        .as_object()
        .unwrap()
        .clone();
    let inputs = case["inputs"].as_array().unwrap();
    let taken = |kind: &str, name: &str| {
        inputs
            .iter()
            .any(|input| input["kind"] == kind && input["metadata"]["name"] == name)
    };
    for entry in case["objects_by_phase"].as_array().unwrap() {
        if entry["phase"] == "Terminating" {
            break;
        }
        let changed = entry["objects"].as_object().unwrap();
        cluster.objects.extend(changed.clone());
        let target: Deployment = cluster
            .typed("Deployment/podinfo")
            .or_else(|| {
                first
                    .get("Deployment/podinfo")
                    .map(|target| serde_json::from_value(target.clone()).unwrap())
            })
            .unwrap();
        let blueprint = Blueprint::new(&canary, &target, &options).unwrap();
        let apex = blueprint.apex_name().to_owned();
        let what = |key: &str| format!("{name} at {} {}: {key}", entry["phase"], entry["weight"]);

        for (kind, object) in changed {
            let key = kind.as_str();
            match key.split_once('/').unwrap() {
                ("Service", service) if service == apex && taken("Service", service) => {
                    if entry["phase"] == "Initializing" {
                        continue;
                    }
                    let before: Service =
                        serde_json::from_value(json!({"metadata": {}, "spec": {}})).unwrap();
                    let patch = blueprint.apex_takeover(&before);
                    compared.same(
                        &what(key),
                        &patch["spec"]["selector"],
                        &object["spec"]["selector"],
                    );
                    compared.same(&what(key), &patch["spec"]["ports"], &object["spec"]["ports"]);
                }
                ("Service", service) => {
                    let ours = blueprint.services().into_iter().chain([blueprint.apex()]);
                    let ours = ours
                        .into_iter()
                        .find(|ours| ours["metadata"]["name"] == service)
                        .unwrap();
                    // Flagger wipes what others add to its Services a tick later; server-side apply leaves it alone.
                    let foreign = object["metadata"]["labels"].get("third").is_some();
                    let exact: &[&str] = if foreign {
                        &["/spec/selector", "/spec/ports"]
                    } else {
                        &[
                            "/metadata/labels",
                            "/metadata/annotations",
                            "/spec/selector",
                            "/spec/ports",
                        ]
                    };
                    compared.with_defaults(&what(key), &ours, object, exact);
                }
                ("DestinationRule", rule) => {
                    let ours = blueprint.rules();
                    let ours = ours.iter().find(|ours| ours["metadata"]["name"] == rule).unwrap();
                    compared.exactly(&what(key), ours, object);
                }
                ("VirtualService", _) if taken("VirtualService", &apex) => {
                    if entry["phase"] == "Initializing" {
                        continue;
                    }
                    let before = inputs
                        .iter()
                        .find(|input| input["kind"] == "VirtualService")
                        .unwrap();
                    let before: VirtualService = serde_json::from_value(before.clone()).unwrap();
                    let split = split_of(&object["spec"], &apex).unwrap();
                    let ours = blueprint.route(split, Some(&before));
                    compared.same(&what(key), &ours["spec"], &object["spec"]);
                    compared.same(&what(key), &ours["metadata"]["ownerReferences"], &Value::Null);
                }
                ("VirtualService", _) => {
                    let split = split_of(&object["spec"], &apex).unwrap();
                    compared.same(
                        &what("weight"),
                        &json!(split.canary()),
                        &json!(shown_weight(entry)),
                    );
                    compared.exactly(&what(key), &blueprint.route(split, None), object);
                }
                ("Deployment", "podinfo-primary") => {
                    let tracked = tracked(&cluster, &target, &options);
                    let annotations = &object["spec"]["template"]["metadata"]["annotations"];
                    let id = annotations["flagger-id"].as_str().unwrap();
                    let creating = entry["phase"] == "Initializing";
                    // The target may have gone to zero within the same entry; the count was copied before.
                    let replicas = object["spec"]["replicas"].as_i64().unwrap();
                    let ours = blueprint.primary(&tracked, id, i32::try_from(replicas).unwrap(), creating);
                    compared.with_defaults(
                        &what(key),
                        &ours,
                        object,
                        &[
                            "/metadata/labels",
                            "/metadata/annotations",
                            "/metadata/ownerReferences",
                            "/spec",
                        ],
                    );
                }
                (kind @ ("ConfigMap" | "Secret"), copy) if copy.ends_with("-primary") => {
                    let ours = blueprint.config_copies(&tracked(&cluster, &target, &options));
                    let mut ours = ours
                        .into_iter()
                        .map(|(_, ours)| ours)
                        .find(|ours| ours["kind"] == kind && ours["metadata"]["name"] == copy)
                        .unwrap();
                    // Flagger loses it.
                    ours.as_object_mut().unwrap().remove("binaryData");
                    let mut object = object.clone();
                    without_symbols(&mut object);
                    compared.same(&what(key), &ours, &object);
                }
                _ => {}
            }
        }
    }
    Some(())
}

/// The weight that the recorded status shows: a finished promotion and a failed one say 0 and 100.
fn shown_weight(entry: &Value) -> i64 {
    entry["weight"].as_i64().unwrap()
}

fn tracked(
    cluster: &Cluster,
    target: &Deployment,
    options: &Options,
) -> BTreeMap<configs::Reference, Tracked> {
    if !options.config_tracking {
        return BTreeMap::new();
    }
    configs::tracked(
        &target.spec.as_ref().unwrap().template,
        |name| {
            cluster
                .typed::<ConfigMap>(&format!("ConfigMap/{name}"))
                .map(Arc::new)
        },
        |name| cluster.typed::<Secret>(&format!("Secret/{name}")).map(Arc::new),
    )
    .unwrap()
}

#[test]
fn generated_objects_are_those_that_flagger_writes() {
    let mut compared = Compared {
        failures: Vec::new(),
        count: 0,
    };
    for name in CASES {
        if compare(name, &mut compared).is_none() {
            return;
        }
    }
    assert!(compared.count > 200, "only {} comparisons", compared.count);
    assert!(
        compared.failures.is_empty(),
        "{} of {}:\n{}",
        compared.failures.len(),
        compared.count,
        compared.failures.join("\n")
    );
}

#[test]
fn checksums_of_tracked_configs_are_flaggers() {
    let Some(case) = golden::case("istio-config-tracking") else {
        return;
    };
    let mut cluster = Cluster::default();
    cluster.objects.extend(
        case["objects_by_phase"][0]["objects"]
            .as_object()
            .unwrap()
            .clone(),
    );
    let target: Deployment = cluster.typed("Deployment/podinfo").unwrap();
    let initialized = case["status_sequence"]
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["status"]["phase"] == "Initialized")
        .unwrap();
    let ours: BTreeMap<String, String> = tracked(&cluster, &target, &Options::default())
        .iter()
        .map(|(reference, object)| (reference.key(), object.checksum()))
        .collect();
    for (key, checksum) in initialized["status"]["trackedConfigs"].as_object().unwrap() {
        // The one with binaryData counts it as content.
        if key != "configmap/bin" {
            assert_eq!(ours[key], checksum.as_str().unwrap(), "{key}");
        }
    }
    assert_eq!(ours.len(), 8);
}

#[test]
fn a_route_that_was_there_before_is_remembered_whole() {
    let Some(case) = golden::case("istio-revert-existing") else {
        return;
    };
    let before: VirtualService =
        serde_json::from_value(golden::input(&case, "VirtualService").clone()).unwrap();
    let canary: Canary = serde_json::from_value(golden::input(&case, "Canary").clone()).unwrap();
    let target: Deployment = serde_json::from_value(golden::input(&case, "Deployment").clone()).unwrap();
    let options = Options::default();
    let blueprint = Blueprint::new(&canary, &target, &options).unwrap();
    let route = blueprint.route(Split::PRIMARY, Some(&before));
    let remembered: Value = serde_json::from_str(
        route["metadata"]["annotations"][super::ORIGINAL]
            .as_str()
            .unwrap(),
    )
    .unwrap();
    assert_eq!(remembered, serde_json::to_value(&before.spec).unwrap());
}
