//! What the documents promise: tests that are named exist, commands that are shown are there, links lead somewhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use regex::Regex;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Every file below the root that git would keep, by extension.
fn files(extension: &str) -> Vec<PathBuf> {
    fn walk(directory: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with(".git") {
                walk(&path, extension, found);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(root(), extension, &mut found);
    found
}

#[test]
fn what_is_honoured_names_its_test_and_every_test_named_in_the_lists_exists() {
    // A test is a function, or a row `name: "case"` of a macro that makes functions.
    let function = Regex::new(r#"(?:fn\s+|(?m:^)\s+)([a-z0-9_]+)(?:[(<]|: ")"#).unwrap();
    let mut functions = BTreeSet::new();
    for file in files("rs") {
        let text = std::fs::read_to_string(&file).unwrap();
        functions.extend(function.captures_iter(&text).map(|found| found[1].to_owned()));
    }
    let quoted = Regex::new(r"`([a-z0-9_:]+)`").unwrap();
    let mut missing = Vec::new();
    let mut rows = 0;
    for file in files("md")
        .into_iter()
        .filter(|file| file.starts_with(root().join("docs/supported")))
    {
        let text = std::fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate() {
            let Some(cell) = line
                .trim()
                .strip_suffix('|')
                .and_then(|line| line.rsplit_once('|'))
            else {
                continue;
            };
            let state = line.split('|').nth(2).unwrap_or_default().trim();
            if state.starts_with("honoured") && !quoted.is_match(cell.1) {
                missing.push(format!(
                    "{}:{}: what is honoured names no test",
                    file.display(),
                    number + 1
                ));
            }
            for name in quoted.captures_iter(cell.1) {
                rows += 1;
                let name = name[1].rsplit("::").next().unwrap_or_default().to_owned();
                if !functions.contains(&name) {
                    missing.push(format!(
                        "{}:{}: no test is called {name}",
                        file.display(),
                        number + 1
                    ));
                }
            }
        }
    }
    assert!(rows > 0, "docs/supported names no tests");
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn links_between_documents_lead_to_files_that_exist() {
    let link = Regex::new(r"\]\(([^)#:]+)(#[^)]*)?\)").unwrap();
    let mut broken = Vec::new();
    for file in files("md") {
        let text = std::fs::read_to_string(&file).unwrap();
        for found in link.captures_iter(&text) {
            let target = file.parent().unwrap().join(&found[1]);
            if !target.exists() {
                broken.push(format!("{}: {}", file.display(), &found[1]));
            }
        }
    }
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
}

#[test]
fn every_make_target_in_the_documents_exists() {
    let makefile = std::fs::read_to_string(root().join("Makefile")).unwrap();
    let target = Regex::new(r"`make ([a-z]+)").unwrap();
    for file in files("md") {
        let text = std::fs::read_to_string(&file).unwrap();
        for found in target.captures_iter(&text) {
            let line = format!("\n{}:", &found[1]);
            assert!(
                makefile.contains(&line),
                "{}: make {} is not in the Makefile",
                file.display(),
                &found[1]
            );
        }
    }
}
