//! What people have written for Flux and Flagger is read, and written back unchanged.

use crate::documents;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serin_crds::{flagger, flux};

/// What is neither a loss nor a gain: `null`, and empty lists and maps, which Go's `omitempty` drops upstream too.
fn normal(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.values_mut().for_each(normal);
            map.retain(|_, child| {
                !(child.is_null()
                    || child.as_array().is_some_and(Vec::is_empty)
                    || child.as_object().is_some_and(serde_json::Map::is_empty))
            });
        }
        Value::Array(items) => items.iter_mut().for_each(normal),
        _ => {}
    }
}

/// Paths at which two values differ.
fn differences(path: &str, left: &Value, right: &Value, out: &mut Vec<String>) {
    match (left, right) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))) {
                let empty = Value::Null;
                let (x, y) = (a.get(key).unwrap_or(&empty), b.get(key).unwrap_or(&empty));
                differences(&format!("{path}.{key}"), x, y, out);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (x, y)) in a.iter().zip(b).enumerate() {
                differences(&format!("{path}[{index}]"), x, y, out);
            }
        }
        _ if left == right => {}
        _ => out.push(format!("{path}: {left} became {right}")),
    }
}

fn round_trip<K: DeserializeOwned + Serialize>(value: &Value) -> Result<(), String> {
    let typed: K = serde_json::from_value(value.clone()).map_err(|error| error.to_string())?;
    let mut written = serde_json::to_value(&typed).map_err(|error| error.to_string())?;
    let mut read = value.clone();
    normal(&mut written);
    normal(&mut read);
    let mut lost = Vec::new();
    differences("", &read, &written, &mut lost);
    if lost.is_empty() {
        Ok(())
    } else {
        Err(lost.join("\n    "))
    }
}

fn by_kind(api_version: &str, kind: &str) -> Option<fn(&Value) -> Result<(), String>> {
    Some(match (api_version, kind) {
        ("flagger.app/v1beta1", "Canary") => round_trip::<flagger::Canary>,
        ("flagger.app/v1beta1", "MetricTemplate") => round_trip::<flagger::MetricTemplate>,
        ("flagger.app/v1beta1", "AlertProvider") => round_trip::<flagger::AlertProvider>,
        ("source.toolkit.fluxcd.io/v1", "GitRepository") => round_trip::<flux::source::GitRepository>,
        ("kustomize.toolkit.fluxcd.io/v1", "Kustomization") => round_trip::<flux::kustomize::Kustomization>,
        ("notification.toolkit.fluxcd.io/v1beta3", "Provider") => round_trip::<flux::notification::Provider>,
        ("notification.toolkit.fluxcd.io/v1beta3", "Alert") => round_trip::<flux::notification::Alert>,
        ("notification.toolkit.fluxcd.io/v1", "Receiver") => round_trip::<flux::notification::Receiver>,
        _ => return None,
    })
}

/// Fields that upstream's schemas require. Documents without them are patches, or inputs of a command line tool; no API
/// server would store them. (`spec` itself: two fixtures that test the default of `status`.)
const REQUIRED_UPSTREAM: &[&str] = &["analysis", "interval", "spec"];

fn is_incomplete(reason: &str) -> bool {
    REQUIRED_UPSTREAM
        .iter()
        .any(|field| reason == format!("missing field `{field}`"))
}

#[test]
fn every_real_manifest_is_read_and_written_back_as_the_same_object() {
    let Some(root) = documents::shared() else { return };
    let found = documents::objects(&root, |api_version, kind| by_kind(api_version, kind).is_some());
    let mut failures = Vec::new();
    for (path, value) in &found {
        let text = |key: &str| value[key].as_str().unwrap_or_default();
        let check = by_kind(text("apiVersion"), text("kind")).unwrap();
        if let Err(reason) = check(value)
            && !is_incomplete(&reason)
        {
            failures.push(format!(
                "{}: {} {}\n    {reason}",
                path.display(),
                text("kind"),
                value["metadata"]["name"]
            ));
        }
    }
    assert!(found.len() > 200, "only {} objects found", found.len());
    assert!(
        failures.is_empty(),
        "{} of {}:\n{}",
        failures.len(),
        found.len(),
        failures.join("\n")
    );
}

#[test]
fn every_recorded_canary_status_is_read_and_written_back_unchanged() {
    let Some(root) = documents::shared() else { return };
    let mut seen = 0;
    for entry in std::fs::read_dir(root.join("flagger-recorded")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        // Times are normalised to `<time>` in the recordings; any time will do here.
        let text = std::fs::read_to_string(&path)
            .unwrap()
            .replace("<time>", "2026-01-01T00:00:00Z");
        let case: Value = serde_json::from_str(&text).unwrap();
        for entry in case["status_sequence"].as_array().unwrap() {
            let Some(status) = entry.get("status").filter(|status| status.is_object()) else {
                continue;
            };
            seen += 1;
            if let Err(reason) = round_trip::<flagger::CanaryStatus>(status) {
                panic!("{}: {status}\n    {reason}", path.display());
            }
        }
    }
    assert!(seen > 300, "only {seen} statuses found");
}

#[test]
fn a_value_that_a_newer_upstream_added_is_kept_and_not_an_error() {
    let provider: flagger::Provider = serde_json::from_value(Value::from("warp-drive")).unwrap();
    assert_eq!(provider, flagger::Provider::Other("warp-drive".to_owned()));
    assert_eq!(serde_json::to_value(&provider).unwrap(), "warp-drive");
}
