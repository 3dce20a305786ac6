//! Who may depend on whom, as the architecture says, read from `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// What each crate may depend on among ours. `serin` (the CLI) may know everybody.
const RULES: &[(&str, &[&str])] = &[
    ("serin-crds", &[]),
    ("serin-kit", &["serin-crds"]),
    ("serin-manifests", &[]),
    ("serin-kustomize", &["serin-manifests"]),
    ("serin-sops", &["serin-manifests"]),
    (
        "serin-gitops",
        &[
            "serin-kustomize",
            "serin-sops",
            "serin-manifests",
            "serin-kit",
            "serin-crds",
        ],
    ),
    (
        "serin-canary",
        &["serin-analysis", "serin-providers", "serin-kit", "serin-crds"],
    ),
    ("serin-model", &["serin-crds"]),
    ("serin-xds", &[]),
    (
        "serin-control",
        &["serin-model", "serin-xds", "serin-kit", "serin-crds"],
    ),
    ("serin-proxy", &["serin-xds"]),
    ("serin-analysis", &["serin-crds"]),
    // The edge of the analysis: a crate of its own, so that judges carry no HTTP. It reads Jobs as kubectl reads them.
    ("serin-providers", &["serin-crds", "serin-manifests"]),
    ("serin-simulation", &["serin-analysis"]),
    ("serin-apiserver", &[]),
    ("serin-workloads", &["serin-kit", "serin-crds"]),
    ("serin-example", &[]),
    ("serin-tests", &[]),
];

/// Libraries that only one crate of ours may import, so that the others stay quick to build.
const SOLE_IMPORTERS: &[(&str, &str)] = &[("envoy-types", "serin-xds"), ("git2", "serin-gitops")];

/// Crates in which nothing may reach for a network, a clock or an executor.
const PURE: &[&str] = &["serin-manifests", "serin-kustomize", "serin-sops", "serin-model"];
const IMPURE_LIBRARIES: &[&str] = &["tokio", "hyper", "reqwest", "kube", "tonic", "git2", "notify"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Name of each crate of ours → names of its normal dependencies.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--locked",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .expect("run cargo metadata");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            let normal = package["dependencies"].as_array().unwrap().iter();
            let normal = normal.filter(|dependency| dependency["kind"].is_null());
            (
                text(&package["name"]),
                normal.map(|dependency| text(&dependency["name"])).collect(),
            )
        })
        .collect()
}

#[test]
fn every_crate_depends_only_on_those_that_the_architecture_allows() {
    let mut wrong = Vec::new();
    for (name, found) in dependencies() {
        if name == "serin" {
            continue;
        }
        let Some((_, allowed)) = RULES.iter().find(|(crate_name, _)| *crate_name == name) else {
            wrong.push(format!("{name} is not in the table of rules"));
            continue;
        };
        for dependency in found.iter().filter(|dependency| dependency.starts_with("serin")) {
            if !allowed.contains(&dependency.as_str()) {
                wrong.push(format!("{name} must not depend on {dependency}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn heavy_libraries_have_one_importer() {
    let dependencies = dependencies();
    for (library, importer) in SOLE_IMPORTERS {
        for (name, found) in &dependencies {
            let allowed = name == importer || name == "serin";
            assert!(
                allowed || !found.contains(*library),
                "{name} must not import {library}; {importer} does"
            );
        }
    }
}

#[test]
fn pure_crates_import_nothing_that_has_effects() {
    let dependencies = dependencies();
    for name in PURE {
        for library in IMPURE_LIBRARIES {
            assert!(
                !dependencies[*name].contains(*library),
                "{name} is pure and must not import {library}"
            );
        }
    }
}

#[test]
fn ring_is_nowhere_in_the_tree() {
    // Cargo.lock names packages that no enabled feature uses; the tree names what is built.
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--workspace",
            "--edges=all",
            "--target=all",
            "--prefix=none",
            "--locked",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .expect("run cargo tree");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let tree = String::from_utf8(output.stdout).unwrap();
    assert!(
        tree.lines().any(|line| line.starts_with("aws-lc-rs ")),
        "cargo tree lists the tree"
    );
    assert!(
        !tree.lines().any(|line| line.starts_with("ring ")),
        "find who wants it with: cargo tree -i ring"
    );
}
