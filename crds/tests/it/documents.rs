//! Every Kubernetes object in a folder of test data, whatever file it stands in.

use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The folder with other projects' data, or `None` (said on stderr) where it is not there.
pub(crate) fn shared() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    if !path.is_dir() {
        eprintln!("SKIPPED: real manifests: ../shared is not here");
        return None;
    }
    Some(path)
}

/// All objects of the wanted groups below `root`: YAML streams, lists, and JSON files that hold objects somewhere.
/// Files that are not YAML (templates) are left out.
pub(crate) fn objects(root: &Path, wanted: impl Fn(&str, &str) -> bool) -> Vec<(PathBuf, Value)> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let mut entries: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        entries.sort();
        for path in entries {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let extension = path.extension().and_then(|extension| extension.to_str());
            if !matches!(extension, Some("yaml" | "yml" | "json" | "golden")) {
                continue;
            }
            let Ok(text) = std::fs::read_to_string(&path) else {
                continue;
            };
            // Parsing 50 MB of YAML to look for a hundred objects would take longer than everything else.
            if !["flagger.app", "toolkit.fluxcd.io"]
                .iter()
                .any(|group| text.contains(group))
            {
                continue;
            }
            let documents: Vec<Value> = if extension == Some("json") {
                serde_json::from_str(&text).into_iter().collect()
            } else {
                serde_yaml::Deserializer::from_str(&text)
                    .map_while(|document| Value::deserialize(document).ok())
                    .collect()
            };
            let mut hits = Vec::new();
            for document in documents {
                collect(document, &wanted, &mut hits);
            }
            found.extend(hits.into_iter().map(|hit| (path.clone(), hit)));
        }
    }
    found
}

fn collect(value: Value, wanted: &impl Fn(&str, &str) -> bool, hits: &mut Vec<Value>) {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
    if value.get("metadata").is_some_and(Value::is_object) && wanted(text("apiVersion"), text("kind")) {
        hits.push(value);
        return;
    }
    match value {
        Value::Object(map) => map
            .into_iter()
            .for_each(|(_, child)| collect(child, wanted, hits)),
        Value::Array(items) => items.into_iter().for_each(|item| collect(item, wanted, hits)),
        _ => {}
    }
}
