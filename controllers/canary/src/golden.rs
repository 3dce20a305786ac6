//! Recordings of a real Flagger 1.44 on a real API server (`../shared/data/flagger-recorded`), as tests.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// The recorded cases by name, or `None` (said on stderr) where the recordings are not there.
pub(crate) fn case(name: &str) -> Option<Value> {
    let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/flagger-recorded");
    if !folder.is_dir() {
        eprintln!("SKIPPED: recorded Flagger cases: ../shared is not here");
        return None;
    }
    let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
    Some(serde_json::from_str(&text).unwrap())
}

/// The input of a kind.
pub(crate) fn input<'c>(case: &'c Value, kind: &str) -> &'c Value {
    case["inputs"]
        .as_array()
        .unwrap()
        .iter()
        .find(|input| input["kind"] == kind)
        .unwrap()
}
