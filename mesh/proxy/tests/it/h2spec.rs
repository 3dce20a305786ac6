//! The catalogue of h2spec, when the tool is there (`SERIN_H2SPEC`, or `h2spec` in the path).

use std::path::PathBuf;

use crate::fixture::*;

/// Cases of 145 that must pass. The two that may fail: an invalid preface on a port that also speaks HTTP/1 is read
/// as HTTP/1 and answered 400, and one race between a response and a reset.
const MUST: usize = 143;

fn tool() -> Option<PathBuf> {
    let given = std::env::var_os("SERIN_H2SPEC").map(PathBuf::from);
    let found = given.or_else(|| {
        std::env::split_paths(&std::env::var_os("PATH")?)
            .map(|folder| folder.join("h2spec"))
            .find(|path| path.is_file())
    });
    if found.is_none() {
        eprintln!("SKIPPED: h2spec is neither in SERIN_H2SPEC nor in the path");
    }
    found
}

#[tokio::test]
async fn h2spec_passes_at_least_143_of_its_145_cases() {
    let Some(tool) = tool() else { return };
    let harness = Harness::start();
    let backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let port = at.port().to_string();
    let output = tokio::process::Command::new(tool)
        .args(["-p", &port, "-o", "2"])
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(std::time::Duration::from_secs(120), output)
        .await
        .expect("h2spec ends")
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let summary = text.lines().find(|line| line.contains(" tests, ")).unwrap_or_default();
    let passed: usize = summary
        .split(", ")
        .find_map(|part| part.strip_suffix(" passed")?.parse().ok())
        .unwrap_or(0);
    let failures = text.split("Failures:").nth(1).unwrap_or_default();
    assert!(passed >= MUST, "{summary}\n{failures}");
}
