//! Real manifests of the networking kinds: they parse, are written back the same, and the invalid ones are refused by rule.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::*;

fn shared(path: &str) -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../shared/data")
        .join(path);
    if dir.exists() {
        return Some(dir);
    }
    eprintln!("SKIPPED: ../shared is not here ({path})");
    None
}

fn files_below(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            files_below(&entry.path(), out);
        } else if kind.is_file()
            && entry
                .path()
                .extension()
                .is_some_and(|extension| extension == "yaml" || extension == "yml")
        {
            out.push(entry.path());
        }
    }
}

/// The documents of our kinds in one file; files that are not plain YAML (templates) are passed over.
fn documents(text: &str) -> Vec<Value> {
    let mut found = Vec::new();
    for document in serde_yaml::Deserializer::from_str(text) {
        let Ok(value) = Value::deserialize(document) else {
            return found;
        };
        let items = match value.get("items").and_then(Value::as_array) {
            Some(items) => items.clone(),
            None => vec![value],
        };
        found.extend(items.into_iter().filter(|item| {
            item["apiVersion"]
                .as_str()
                .is_some_and(|version| version.starts_with("networking.istio.io/"))
                && matches!(
                    item["kind"].as_str(),
                    Some("VirtualService" | "DestinationRule" | "Gateway" | "ServiceEntry" | "Sidecar")
                )
        }));
    }
    found
}

/// Equality up to what JSON cannot tell apart for Kubernetes: absent, null and empty lists and maps of strings; 50 and 50.0.
fn normal(value: &Value) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields
                .iter()
                .filter(|(_, value)| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()))
                .filter(|(name, value)| {
                    !matches!(
                        name.as_str(),
                        "labels"
                            | "headers"
                            | "selector"
                            | "set"
                            | "add"
                            | "sourceLabels"
                            | "ports"
                            | "withoutHeaders"
                    ) || value.as_object().is_none_or(|map| !map.is_empty())
                })
                .map(|(name, value)| {
                    let name = if name == "mirror_percent" {
                        "mirrorPercent"
                    } else {
                        name
                    };
                    (name.to_owned(), normal(value))
                })
                .collect(),
        ),
        Value::Array(items) => Value::Array(items.iter().map(normal).collect()),
        Value::Number(number) => Value::from(number.as_f64().unwrap()),
        other => other.clone(),
    }
}

fn round_trip<K: DeserializeOwned + Serialize>(document: &Value) -> Result<(), String> {
    let object: K = serde_json::from_value(document.clone()).map_err(|error| error.to_string())?;
    let written = serde_json::to_value(&object).map_err(|error| error.to_string())?;
    for part in ["spec", "status"] {
        let (read, written) = (normal(&document[part]), normal(&written[part]));
        let empty =
            |value: &Value| value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty);
        if read != written && !(empty(&read) && empty(&written)) {
            return Err(format!("{part} differs\n read    {read}\n written {written}"));
        }
    }
    if written["kind"] != document["kind"] || written["metadata"]["name"] != document["metadata"]["name"] {
        return Err("another object was written".to_owned());
    }
    Ok(())
}

fn round_trip_any(document: &Value) -> Result<(), String> {
    match document["kind"].as_str().unwrap() {
        "VirtualService" => round_trip::<VirtualService>(document),
        "DestinationRule" => round_trip::<DestinationRule>(document),
        "Gateway" => round_trip::<Gateway>(document),
        "ServiceEntry" => round_trip::<ServiceEntry>(document),
        "Sidecar" => round_trip::<Sidecar>(document),
        other => Err(format!("kind {other}")),
    }
}

#[test]
fn every_real_manifest_is_written_back_as_it_was_read() {
    let mut checked = 0;
    let mut failures = Vec::new();
    for set in ["istio", "istiod-recorded", "flagger", "flux", "flagger-recorded"] {
        let Some(dir) = shared(set) else { return };
        let mut files = Vec::new();
        files_below(&dir, &mut files);
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            if !text.contains("networking.istio.io/")
                || file.ends_with("crd-all.gen.yaml")
                || text.contains("_err:")
            {
                continue;
            }
            for document in documents(&text) {
                // Recorded refusals are invalid by design.
                if file.parent().is_some_and(|dir| dir.join("rejected.txt").exists()) {
                    continue;
                }
                checked += 1;
                if let Err(error) = round_trip_any(&document) {
                    failures.push(format!(
                        "{} {}: {error}",
                        file.display(),
                        document["metadata"]["name"]
                    ));
                }
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {checked} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(checked > 300, "only {checked} manifests found");
}

fn violations(document: &Value) -> Vec<String> {
    fn check<K: DeserializeOwned>(
        document: &Value,
        rules: impl Fn(&K) -> Vec<validate::Violation>,
    ) -> Vec<String> {
        match serde_json::from_value::<K>(document.clone()) {
            Ok(object) => rules(&object).iter().map(ToString::to_string).collect(),
            Err(error) => vec![error.to_string()],
        }
    }
    match document["kind"].as_str().unwrap() {
        "VirtualService" => {
            check::<VirtualService>(document, |object| validate::virtual_service(&object.spec))
        }
        "DestinationRule" => {
            check::<DestinationRule>(document, |object| validate::destination_rule(&object.spec))
        }
        "Gateway" => check::<Gateway>(document, |object| validate::gateway(&object.spec)),
        "ServiceEntry" => check::<ServiceEntry>(document, |object| validate::service_entry(&object.spec)),
        "Sidecar" => check::<Sidecar>(document, |object| validate::sidecar(&object.spec)),
        other => vec![format!("kind {other}")],
    }
}

#[test]
fn invalid_documents_are_refused_and_valid_ones_accepted() {
    let Some(dir) = shared("istio/crd-validation") else {
        return;
    };
    for kind in ["destinationrule", "serviceentry"] {
        for verdict in ["valid", "invalid"] {
            let text = std::fs::read_to_string(dir.join(format!("{kind}-{verdict}.yaml"))).unwrap();
            for document in documents(&text) {
                let found = violations(&document);
                let name = &document["metadata"]["name"];
                assert_eq!(found.is_empty(), verdict == "valid", "{kind} {name}: {found:?}");
            }
        }
    }
}

#[test]
fn accepted_examples_break_no_rule() {
    let Some(dir) = shared("istio/validation-accepted") else {
        return;
    };
    let mut files = Vec::new();
    files_below(&dir, &mut files);
    if let Some(samples) = shared("istio/samples") {
        files_below(&samples, &mut files);
    }
    let mut checked = 0;
    for file in files {
        for document in documents(&std::fs::read_to_string(&file).unwrap()) {
            checked += 1;
            assert_eq!(violations(&document), Vec::<String>::new(), "{}", file.display());
        }
    }
    assert!(checked > 40, "only {checked} manifests found");
}

fn virtual_service(http: Value) -> Value {
    serde_json::json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "v"},
        "spec": {"hosts": ["reviews"], "http": [http]}
    })
}

#[test]
fn bad_routes_are_refused_with_the_rule_named() {
    let two = |first: Value, second: Value| serde_json::json!({"route": [first, second]});
    let to = |weight: i32| serde_json::json!({"destination": {"host": "reviews", "subset": "v1"}, "weight": weight});
    for (route, rule) in [
        (
            two(to(0), to(0)),
            "spec.http[0].route: total destination weight = 0",
        ),
        (
            two(to(-1), to(2)),
            "spec.http[0].route: weight cannot be negative",
        ),
        (
            serde_json::json!({"route": [{"destination": {"host": ""}}]}),
            "spec.http[0].route[0].destination.host: host is required",
        ),
        (
            serde_json::json!({"route": [{"destination": {}}]}),
            "missing field `host`",
        ),
        (
            serde_json::json!({}),
            "spec.http[0]: HTTP route, redirect, direct_response or delegate is required",
        ),
        (
            serde_json::json!({"route": [{"destination": {"host": "a"}}], "redirect": {"uri": "/"}}),
            "spec.http[0]: HTTP route cannot contain more than one of",
        ),
        (
            serde_json::json!({"route": [{"destination": {"host": "a"}}], "timeout": "0s"}),
            "spec.http[0].timeout: must be a valid duration greater than 1ms",
        ),
        (
            serde_json::json!({"route": [{"destination": {"host": "a"}}], "timeout": "soon"}),
            "spec.http[0].timeout: invalid duration \"soon\"",
        ),
    ] {
        let found = violations(&virtual_service(route.clone()));
        assert!(
            found.iter().any(|violation| violation.starts_with(rule)),
            "{route}: {found:?} lacks {rule:?}"
        );
    }
    assert_eq!(
        violations(&virtual_service(two(to(0), to(1)))),
        Vec::<String>::new()
    );
}

#[test]
fn a_subset_without_labels_is_refused() {
    let rule = serde_json::json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": "d"},
        "spec": {"host": "reviews", "subsets": [{"name": "v1"}]}
    });
    assert_eq!(
        violations(&rule),
        ["spec.subsets[0].labels: subset v1 has no labels"]
    );
}

#[test]
fn durations_are_read_as_go_reads_them() {
    for (text, millis) in [
        ("1s", Some(1000)),
        ("1.5s", Some(1500)),
        ("1h2m3.5s", Some(3_723_500)),
        ("300ms", Some(300)),
        ("0", Some(0)),
        ("0.3s", Some(300)),
        (".5s", Some(500)),
    ] {
        assert_eq!(
            Duration::from(text).parse().ok().map(|d| d.as_millis()),
            millis,
            "{text}"
        );
    }
    for text in ["", "5", "1x", "-1s", "1.2.3s", "s", "ten"] {
        assert!(Duration::from(text).parse().is_err(), "{text}");
    }
}

#[test]
fn every_kind_is_served_in_three_versions_with_one_stored() {
    let crds = crds();
    assert_eq!(crds.len(), 5);
    for crd in crds {
        let versions: Vec<_> = crd
            .spec
            .versions
            .iter()
            .map(|version| (version.name.as_str(), version.served, version.storage))
            .collect();
        assert_eq!(
            versions,
            [
                ("v1", true, true),
                ("v1beta1", true, false),
                ("v1alpha3", true, false)
            ],
            "{:?}",
            crd.metadata.name
        );
    }
}

/// Property names below `schema`, with their paths, so that two schemas can be compared field by field.
fn paths(schema: &Value, prefix: &str, out: &mut std::collections::BTreeSet<String>) {
    if let Some(properties) = schema["properties"].as_object() {
        for (name, property) in properties {
            let path = format!("{prefix}.{name}");
            out.insert(format!("{path}:{}", property["type"].as_str().unwrap_or("any")));
            paths(property, &path, out);
        }
    }
    if schema["items"].is_object() {
        paths(&schema["items"], &format!("{prefix}[]"), out);
    }
    if schema["additionalProperties"].is_object() {
        paths(&schema["additionalProperties"], &format!("{prefix}{{}}"), out);
    }
}

#[test]
fn our_definitions_have_exactly_the_fields_of_istios() {
    let Some(file) = shared("istio/crds/crd-all.gen.yaml") else {
        return;
    };
    let text = std::fs::read_to_string(file).unwrap();
    let mut compared = 0;
    for document in text.split("\n---\n") {
        let Some(ours) = crds()
            .into_iter()
            .find(|crd| document.contains(&format!("  name: {}\n", crd.metadata.name.as_deref().unwrap())))
        else {
            continue;
        };
        let theirs: Value = serde_yaml::from_str(document).unwrap();
        let ours = serde_json::to_value(&ours).unwrap();
        let spec = |crd: &Value| {
            let mut found = std::collections::BTreeSet::new();
            paths(
                &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"],
                "spec",
                &mut found,
            );
            // The schema lists the deprecated spelling besides; we read it and write the new one.
            found.remove("spec.http[].mirror_percent:integer");
            found
        };
        let (mine, upstream) = (spec(&ours), spec(&theirs));
        let differing: Vec<_> = mine.symmetric_difference(&upstream).collect();
        assert!(
            differing.is_empty(),
            "{}: {differing:#?}",
            ours["metadata"]["name"]
        );
        assert_eq!(ours["spec"]["names"], theirs["spec"]["names"]);
        compared += 1;
    }
    assert_eq!(compared, 5);
}
