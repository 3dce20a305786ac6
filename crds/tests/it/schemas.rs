//! Our generated schemas against upstream's own: same fields, same types, same names, columns, defaults.

use crate::documents;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Fields that we have and upstream has not: ours, optional.
const OURS: &[&str] = &[
    ".spec.analysis.comparison",
    ".spec.comparison",
    ".status.observedGeneration",
    ".status.metrics",
    ".status.history",
    ".status.weightLive",
    ".status.run",
    ".status.watch",
    ".status.message",
    ".status.conditions[].observedGeneration",
];

/// Fields whose schema differs on purpose: kind, path, reason.
const DELIBERATE: &[(&str, &str, &str)] = &[
    (
        "source.toolkit.fluxcd.io_gitrepositories",
        ".spec.url",
        "local repositories are allowed: file:// and absolute paths",
    ),
    (
        "flagger.app_canaries",
        ".spec.service.mirror",
        "upstream puts `required` on the array, where it says nothing",
    ),
    (
        "flagger.app_metrictemplates",
        ".spec.provider.type",
        "ours has web and job besides",
    ),
];

/// Upstream definitions by `<group>_<plural>`.
fn upstream() -> Option<BTreeMap<String, Value>> {
    let root = documents::shared()?;
    let mut files = vec![root.join("flagger/artifacts/flagger/crd.yaml")];
    for controller in [
        "source-controller",
        "kustomize-controller",
        "notification-controller",
    ] {
        let folder = root.join("flux").join(controller).join("config/crd/bases");
        files.extend(
            std::fs::read_dir(folder)
                .unwrap()
                .map(|entry| entry.unwrap().path()),
        );
    }
    let mut definitions = BTreeMap::new();
    for file in files {
        let text = std::fs::read_to_string(file).unwrap();
        for document in serde_yaml::Deserializer::from_str(&text) {
            let value = Value::deserialize(document).unwrap();
            let spec = &value["spec"];
            let key = format!(
                "{}_{}",
                spec["group"].as_str().unwrap(),
                spec["names"]["plural"].as_str().unwrap()
            );
            definitions.insert(key, value);
        }
    }
    Some(definitions)
}

/// The facts of a schema that both sides must agree on, by path.
fn facts(schema: &Value, path: &str, out: &mut BTreeMap<String, String>) {
    // Flagger writes `number` where its Go type is an integer and refuses a fraction later; we say so in the schema.
    let kind = match schema["type"].as_str() {
        Some("integer") => "number",
        Some(kind) => kind,
        None => "any",
    };
    let mut fact = kind.to_owned();
    for key in [
        "default",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "maxItems",
        "minItems",
        "pattern",
        "x-kubernetes-validations",
    ] {
        if let Some(value) = schema.get(key) {
            let value = value
                .as_f64()
                .map_or_else(|| value.to_string(), |number| number.to_string());
            fact += &format!(" {key}={value}");
        }
    }
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        let mut values: Vec<String> = values.iter().map(Value::to_string).collect();
        values.sort();
        fact += &format!(" enum={}", values.join(","));
    }
    let mut required: Vec<String> = schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .map(Value::to_string)
        .collect();
    required.sort();
    if !required.is_empty() {
        fact += &format!(" required={}", required.join(","));
    }
    out.insert(path.to_owned(), fact);
    for (name, child) in schema["properties"].as_object().into_iter().flatten() {
        facts(child, &format!("{path}.{name}"), out);
    }
    if schema["items"].is_object() {
        facts(&schema["items"], &format!("{path}[]"), out);
    }
    if schema["additionalProperties"].is_object() {
        facts(&schema["additionalProperties"], &format!("{path}{{}}"), out);
    }
}

#[test]
fn generated_schemas_have_every_upstream_field_with_its_type_bounds_and_default() {
    let Some(upstream) = upstream() else { return };
    let mut failures = Vec::new();
    let mut compared = 0;
    for ours in serin_crds::definitions() {
        let key = format!("{}_{}", ours.spec.group, ours.spec.names.plural);
        let Some(theirs) = upstream.get(&key) else {
            continue;
        };
        compared += 1;
        let ours = serde_json::to_value(&ours).unwrap();
        for version in ours["spec"]["versions"].as_array().unwrap() {
            let name = &version["name"];
            let Some(their_version) = theirs["spec"]["versions"]
                .as_array()
                .unwrap()
                .iter()
                .find(|theirs| theirs["name"] == *name)
            else {
                continue;
            };
            let (mut left, mut right) = (BTreeMap::new(), BTreeMap::new());
            for part in ["spec", "status"] {
                // Flagger's MetricTemplate and AlertProvider have a status subresource without a schema.
                if their_version["schema"]["openAPIV3Schema"]["properties"][part].is_null() {
                    continue;
                }
                let schema =
                    |version: &Value| version["schema"]["openAPIV3Schema"]["properties"][part].clone();
                facts(&schema(version), &format!(".{part}"), &mut left);
                facts(&schema(their_version), &format!(".{part}"), &mut right);
            }
            for (path, fact) in &right {
                if DELIBERATE
                    .iter()
                    .any(|(kind, field, _)| *kind == key && field == path)
                {
                    continue;
                }
                if left.get(path) != Some(fact) {
                    failures.push(format!(
                        "{key} {path}\n   upstream {fact}\n   ours     {:?}",
                        left.get(path)
                    ));
                }
            }
            for path in left.keys().filter(|path| !right.contains_key(*path)) {
                if !OURS.iter().any(|ours| path.starts_with(ours)) {
                    failures.push(format!("{key} {path} is ours but not listed"));
                }
            }
        }
        for (what, pointer) in [("names", "/spec/names"), ("scope", "/spec/scope")] {
            let clean = |value: &Value| {
                let mut value = value.pointer(pointer).cloned().unwrap_or_default();
                if let Some(map) = value.as_object_mut() {
                    map.remove("listKind");
                    map.retain(|_, child| !child.as_array().is_some_and(Vec::is_empty));
                }
                value
            };
            if clean(&ours) != clean(theirs) {
                failures.push(format!(
                    "{key} {what}: upstream {}, ours {}",
                    clean(theirs),
                    clean(&ours)
                ));
            }
        }
        let columns = |value: &Value| {
            let columns = value["spec"]["versions"][0]["additionalPrinterColumns"].clone();
            columns.as_array().cloned().unwrap_or_default()
        };
        let mut our_columns = columns(&ours);
        for column in &mut our_columns {
            column
                .as_object_mut()
                .unwrap()
                .retain(|_, value| !value.is_null());
        }
        if our_columns != columns(theirs) {
            failures.push(format!(
                "{key} columns\n   upstream {:?}\n   ours     {our_columns:?}",
                columns(theirs)
            ));
        }
    }
    assert!(compared >= 8, "only {compared} definitions compared");
    assert!(failures.is_empty(), "{}\n{}", failures.len(), failures.join("\n"));
}
