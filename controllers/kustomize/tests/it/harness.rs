//! What fuzz targets do with their bytes; the suite runs the same functions over mutated corpora ([`super::mutations`]).
//!
//! A tree of files is one text: a line `=== path` starts a file.

use std::collections::BTreeMap;

use serin_kustomize::{Budget, LoadRestrictor, MemoryTree, Options, build};
use serin_manifests::yaml::{ReadOptions, parse_document, write_value};
use serin_manifests::{Dialect, Limits};

/// Small enough for thousands of runs a second, large enough for every path of the code.
fn limits() -> Limits {
    Limits {
        max_file_bytes: 64 << 10,
        max_depth: 64,
        max_nodes: 20_000,
        max_aliases: 200,
        max_documents: 64,
    }
}

/// The files of a text.
pub(crate) fn files(text: &str) -> Vec<(String, String)> {
    let mut files: Vec<(String, String)> = Vec::new();
    for line in text.split_inclusive('\n') {
        match line.strip_prefix("=== ") {
            Some(path) => files.push((path.trim().to_owned(), String::new())),
            None => {
                if let Some((_, content)) = files.last_mut() {
                    content.push_str(line);
                }
            }
        }
    }
    files
}

/// Builds a tree within small budgets. Whatever it says, it says; what must not happen is a panic, or a result that
/// cannot be printed or depends on anything but the tree.
pub(crate) fn build_tree(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut tree = MemoryTree::new();
    for (path, content) in files(&text) {
        match content.strip_prefix("-> ") {
            Some(target) => tree.link(path, target.trim()),
            None => tree.add(path, content),
        };
    }
    let options = Options {
        load_restrictor: if data.len() % 2 == 0 {
            LoadRestrictor::None
        } else {
            LoadRestrictor::RootOnly
        },
        budget: Budget {
            max_files: 64,
            max_bytes: 256 << 10,
            max_kustomization_depth: 8,
            max_kustomizations: 32,
            max_resources: 500,
            max_regex_bytes: 16 << 10,
            max_steps: 300_000,
            document: limits(),
        },
        origin: data.len() % 3 == 0,
        trace: data.len() % 5 == 0,
        ..Options::default()
    };
    let once = build(&tree, "", &options).map(|built| built.to_yaml());
    let again = build(&tree, "", &options).map(|built| built.to_yaml());
    assert_eq!(once, again, "two builds of one tree differ");
    if let Err(error) = once {
        assert!(!error.to_string().is_empty());
    }
}

/// Reads a document in both dialects; what can be written must read back as the same value.
pub(crate) fn read_document(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let limits = limits();
    for dialect in [Dialect::Kustomize, Dialect::Kubectl] {
        let options = ReadOptions {
            file: "fuzz.yaml",
            line_offset: 0,
            dialect,
            limits: &limits,
        };
        let Ok(Some(value)) = parse_document(text, &options) else {
            continue;
        };
        let (Ok(json), Ok(written)) = (value.to_json(), write_value(&value)) else {
            continue;
        };
        let options = ReadOptions {
            dialect: Dialect::Kustomize,
            ..options
        };
        // The writer is go-yaml's, with its one defect: a block of text that starts with a tab does not read back.
        if let Ok(Some(back)) = parse_document(&written, &options) {
            assert_eq!(back.to_json().ok(), Some(json), "{text:?} became {written:?}");
        }
    }
}

/// Substitutes in a text and in the objects that it holds.
pub(crate) fn substitute(data: &[u8]) {
    let variables = BTreeMap::from([
        ("a".to_owned(), "x/y".to_owned()),
        ("b".to_owned(), "[1, {c: d}]".to_owned()),
        ("c".to_owned(), "é".to_owned()),
    ]);
    for strict in [false, true] {
        let _ = serin_kustomize::substitute::text(data, &variables, strict);
        let Ok(text) = std::str::from_utf8(data) else {
            continue;
        };
        for object in serin_manifests::parse_documents_within(text, "x", &limits()).unwrap_or_default() {
            let _ = serin_kustomize::substitute::object(&object, &variables, strict);
        }
    }
}
