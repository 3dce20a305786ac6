//! Who may depend on whom, as the architecture says, and on which licences, read from `cargo metadata`.

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

/// What `cargo metadata` says, with these further arguments.
fn metadata(arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("run cargo metadata");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Name of each crate of ours → names of its normal dependencies.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata(&["--no-deps"]);
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

/// Whether an SPDX expression can be met with these licences. `/` is how old crates write OR.
fn is_met(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let expression = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = expression.split_whitespace().collect();
    let (met, rest) = any_of(&words, allowed);
    assert!(rest.is_empty(), "{expression} is no licence expression");
    met
}

fn any_of<'a, 'b>(words: &'a [&'b str], allowed: &BTreeSet<String>) -> (bool, &'a [&'b str]) {
    let (mut met, mut rest) = all_of(words, allowed);
    while let ["OR", after @ ..] = rest {
        let (other, after) = all_of(after, allowed);
        (met, rest) = (met || other, after);
    }
    (met, rest)
}

fn all_of<'a, 'b>(words: &'a [&'b str], allowed: &BTreeSet<String>) -> (bool, &'a [&'b str]) {
    let (mut met, mut rest) = one(words, allowed);
    while let ["AND", after @ ..] = rest {
        let (other, after) = one(after, allowed);
        (met, rest) = (met && other, after);
    }
    (met, rest)
}

fn one<'a, 'b>(words: &'a [&'b str], allowed: &BTreeSet<String>) -> (bool, &'a [&'b str]) {
    match words {
        ["(", inside @ ..] => match any_of(inside, allowed) {
            (met, [")", rest @ ..]) => (met, rest),
            (_, rest) => panic!("no closing parenthesis before {rest:?}"),
        },
        [licence, "WITH", exception, rest @ ..] => {
            (allowed.contains(&format!("{licence} WITH {exception}")), rest)
        }
        [licence, rest @ ..] => (allowed.contains(*licence), rest),
        [] => panic!("an expression ends too early"),
    }
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

#[test]
fn what_is_linked_has_a_licence_that_is_allowed_and_comes_from_the_registry() {
    let rules = std::fs::read_to_string(root().join("deny.toml")).unwrap();
    let (_, list) = rules.split_once("allow = [").expect("deny.toml lists licences");
    let (list, _) = list.split_once(']').unwrap();
    let allowed: BTreeSet<String> = list.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    assert!(allowed.contains("MIT") && allowed.contains("Apache-2.0 WITH LLVM-exception"));

    let mut wrong = Vec::new();
    let metadata = metadata(&["--filter-platform", "x86_64-unknown-linux-gnu"]);
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or_default();
        if licence.is_empty() || !is_met(licence, &allowed) {
            wrong.push(format!(
                "{name}: licence {licence:?} is not among those of deny.toml"
            ));
        }
        let registry = package["source"]
            .as_str()
            .is_none_or(|source| source.starts_with("registry+"));
        if !registry {
            wrong.push(format!("{name} comes from {}", package["source"]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn licence_expressions_are_read_as_spdx_does() {
    let allowed: BTreeSet<String> = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"]
        .map(str::to_owned)
        .into();
    for (expression, met) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0/MIT", true),
        ("MIT AND GPL-3.0", false),
        ("GPL-3.0 OR MIT AND ISC", true),
        ("(GPL-3.0 OR MIT) AND GPL-3.0", false),
        ("ISC AND (GPL-3.0 OR MIT)", true),
        ("Apache-2.0", false),
        ("Apache-2.0 WITH LLVM-exception", true),
    ] {
        assert_eq!(is_met(expression, &allowed), met, "{expression}");
    }
}
