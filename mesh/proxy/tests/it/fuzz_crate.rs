//! The crate of the fuzz targets is outside of the workspace, since it needs a nightly compiler. What it is made of is
//! compiled here all the same: a target is a call of a function of [`crate::harness`] and nothing else, which this checks,
//! and the crate depends on what the harness uses.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::harness;

/// What a target calls, and what it is called.
const TARGETS: [(&str, fn(&[u8])); 10] = [
    ("bootstrap", harness::bootstrap),
    ("first_bytes", harness::first_bytes),
    ("formats", harness::formats),
    ("http1", harness::http1),
    ("matchers", harness::matchers),
    ("path", harness::path),
    ("proxy_header", harness::proxy_header),
    ("tokens", harness::tokens),
    ("uri_template", harness::uri_template),
    ("xds", harness::xds),
];

/// A target's whole text.
const TEXT: &str = r#"//! See the harness: the suite runs it as well.
#![no_main]
#![allow(dead_code, deprecated)]

#[path = "../../tests/it/fixture.rs"]
mod fixture;
#[path = "../../tests/it/harness.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::NAME(data));
"#;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn names(folder: &Path) -> BTreeSet<String> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            path.file_stem().unwrap().to_str().unwrap().to_owned()
        })
        .collect()
}

#[test]
fn every_fuzz_target_is_a_function_of_the_harness_that_this_suite_compiles() {
    let known: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&folder().join("fuzz_targets")), known, "files");
    assert_eq!(names(&folder().join("corpus")), known, "corpora");
    for (name, run) in TARGETS {
        let text = std::fs::read_to_string(folder().join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert_eq!(text, TEXT.replace("NAME", name), "{name}");
        run(b"");
    }
    let manifest = std::fs::read_to_string(folder().join("Cargo.toml")).unwrap();
    for name in &known {
        assert!(
            manifest.contains(&format!("name = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"")),
            "{name} is no program of the crate"
        );
    }
}

#[test]
fn the_crate_of_the_fuzz_targets_depends_on_what_they_use() {
    let manifest = std::fs::read_to_string(folder().join("Cargo.toml")).unwrap();
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    for file in ["fixture.rs", "harness.rs"] {
        let text = std::fs::read_to_string(tests.join(file)).unwrap();
        let used = text
            .lines()
            .filter_map(|line| line.strip_prefix("use "))
            .filter_map(|path| path.split([':', ';', ' ']).next())
            .filter(|name| !["std", "core", "crate", "super"].contains(name));
        for name in used {
            let package = name.replace('_', "-");
            let depends = manifest.lines().any(|line| {
                [name, &package]
                    .iter()
                    .any(|name| line.starts_with(&format!("{name} = ")))
            });
            assert!(depends, "{file} uses {name}, which the crate does not depend on");
        }
    }
}

#[test]
fn saved_corpora_stay_small() {
    let mut bytes = 0;
    for (name, _) in TARGETS {
        for entry in std::fs::read_dir(folder().join("corpus").join(name)).unwrap() {
            bytes += entry.unwrap().metadata().unwrap().len();
        }
    }
    assert!(bytes < 1 << 20, "{bytes} bytes");
}
