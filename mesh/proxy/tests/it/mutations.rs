//! The fuzz targets' harness over their saved corpora and mutations of them, a bounded number of runs each, so that the
//! suite keeps what fuzzing has shown. Seeded: a failure comes back, and prints its input.
//!
//! `SERIN_FUZZ_CASES` asks for more runs than the suite makes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::fuzz::Random;
use crate::harness;

/// Runs of each target in the suite.
const CASES: usize = 400;

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{target} has a corpus");
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

fn run(target: &str, check: fn(&[u8]), share: usize) {
    let seeds = corpus(target);
    let cases = std::env::var("SERIN_FUZZ_CASES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(CASES)
        * share;
    let mut random = Random::new(target.len() as u64);
    for round in 0..seeds.len() + cases {
        let input = match seeds.get(round) {
            Some(seed) => seed.clone(),
            None => {
                let other = &seeds[random.below(seeds.len())];
                random.mutate(&seeds[round % seeds.len()], other)
            }
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| check(&input)));
        assert!(
            outcome.is_ok(),
            "{target}, run {round}: {:?}",
            input.escape_ascii().to_string()
        );
    }
}

#[test]
fn mutated_http1_streams_are_judged_alike_however_they_are_cut() {
    run("http1", harness::http1, 4);
}

#[test]
fn mutated_proxy_headers_are_read_whole_or_not_at_all() {
    run("proxy_header", harness::proxy_header, 8);
}

#[test]
fn mutated_first_bytes_name_no_false_protocol() {
    run("first_bytes", harness::first_bytes, 8);
}

#[test]
fn mutated_resources_of_every_type_are_taken_or_refused() {
    run("xds", harness::xds, 3);
}

#[test]
fn mutated_matchers_do_what_they_say() {
    run("matchers", harness::matchers, 1);
}

#[test]
fn mutated_formats_are_taken_or_refused() {
    run("formats", harness::formats, 2);
}

#[test]
fn mutated_uri_templates_match_without_a_panic() {
    run("uri_template", harness::uri_template, 4);
}

#[test]
fn mutated_paths_are_normalised_once_and_for_all() {
    run("path", harness::path, 8);
}

#[test]
fn mutated_bootstrap_files_are_taken_or_refused() {
    run("bootstrap", harness::bootstrap, 1);
}

#[test]
fn mutated_tokens_keys_and_trace_contexts_are_taken_or_refused() {
    run("tokens", harness::tokens, 4);
}
