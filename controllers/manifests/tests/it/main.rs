//! Reading and writing YAML, checked against kubectl's table, against recorded output, and by properties.

// A test that cannot go on says so by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::PathBuf;

use proptest::prelude::*;
use serin_manifests::yaml::{
    ReadOptions, compare_keys, parse_document, split_documents, write_map, write_value,
};
use serin_manifests::{Dialect, Error, Limits, Map, Object, Value, parse_documents, parse_documents_within};

fn read(text: &str, dialect: Dialect) -> Result<Option<Value>, Error> {
    let limits = Limits::default();
    parse_document(
        text,
        &ReadOptions {
            file: "t.yaml",
            line_offset: 0,
            dialect,
            limits: &limits,
        },
    )
}

/// The value of `k` in a ConfigMap as kubectl would send it.
fn kubectl_value(text: &str) -> Result<serde_json::Value, String> {
    let document = format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c}}\nk: {text}\n");
    let objects = parse_documents(&document, "t.yaml").map_err(|e| e.to_string())?;
    Ok(objects[0].to_json().map_err(|e| e.to_string())?["k"].clone())
}

#[test]
fn scalars_are_read_as_kubectl_reads_them() {
    let cases = [
        ("0644", "420"),
        ("[yes, on, y]", "[true,true,true]"),
        ("[no, off, n]", "[false,false,false]"),
        ("[1_000, 0b11]", "[1000,3]"),
        ("!!binary aGk=", "\"hi\""),
        ("!foo 1", "\"1\""),
        ("1e3", "1000"),
        ("tRue", "\"tRue\""),
        ("0o17", "15"),
        ("2020-01-01", "\"2020-01-01T00:00:00Z\""),
        ("1.10", "1.1"),
        ("~", "null"),
        ("\"yes\"", "\"yes\""),
        ("12:30", "\"12:30\""),
        ("&a [x]", "[\"x\"]"),
    ];
    for (text, want) in cases {
        assert_eq!(kubectl_value(text).unwrap().to_string(), want, "{text}");
    }
    assert!(kubectl_value(".inf").is_err());
}

#[test]
fn merge_keys_are_applied_and_the_last_of_equal_keys_wins() {
    let text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\nbase: &b {p: 1, q: 2}\nd:\n  <<: *b\n  q: 3\ne: 1\ne: 2\n";
    let json = parse_documents(text, "t.yaml").unwrap()[0].to_json().unwrap();
    assert_eq!(json["d"].to_string(), "{\"p\":1,\"q\":3}");
    assert_eq!(json["e"], 2);
    let error = read("a: 1\nb:\n  c: 1\n  c: 2\n", Dialect::Kustomize).unwrap_err();
    assert_eq!(
        error.to_string(),
        "mapping key \"c\" already defined at line 3\n  at t.yaml:4:3\n     4 |   c: 2\n       |   ^"
    );
}

#[test]
fn a_file_gives_all_its_objects_with_lists_taken_apart() {
    let text = "# first\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: A, metadata: {name: a}}\n- {apiVersion: v1, kind: B, metadata: {name: b}}\n---\n---\n# nothing\n---\napiVersion: v1\nkind: C\nmetadata: {generateName: c-}\n";
    let objects = parse_documents(text, "f.yaml").unwrap();
    let kinds: Vec<(&str, usize)> = objects
        .iter()
        .map(|o| (o.kind(), o.source().unwrap().line))
        .collect();
    assert_eq!(kinds, [("A", 5), ("B", 6), ("C", 11)]);
}

#[test]
fn what_is_no_object_is_refused_with_its_place() {
    for (text, message) in [
        ("just text\n", "expected an object, found a string"),
        ("a: b\n", "Object 'Kind' is missing"),
        ("kind: X\n", "Object 'apiVersion' is missing in X"),
        ("apiVersion: v1\nkind: X\n", "metadata.name is missing in X"),
        ("a: [b\n", "did not find expected ',' or ']'"),
        ("a: *b\n", "unknown anchor 'b' referenced"),
        ("a: \u{1}\n", "control characters are not allowed"),
        ("a: &x [*x]\n", "contains itself"),
    ] {
        let error = parse_documents(text, "f.yaml").unwrap_err().to_string();
        assert!(
            error.contains(message) && error.contains("f.yaml"),
            "{text}: {error}"
        );
    }
}

#[test]
fn a_budget_that_is_passed_is_named() {
    let tight = Limits {
        max_file_bytes: 40,
        max_depth: 4,
        max_nodes: 10,
        max_aliases: 1,
        max_documents: 2,
    };
    for (budget, text) in [
        (
            "bytes",
            "a: 0123456789012345678901234567890123456789\n".to_owned(),
        ),
        ("depth", "a: [[[[[x]]]]]\n".to_owned()),
        ("nodes", "a: [1,1,1,1,1,1,1,1,1,1]\n".to_owned()),
        ("aliases", "a: &a 1\nb: [*a, *a]\n".to_owned()),
        ("documents", "---\n---\na: 1\n---\nb: 1\n---\n".to_owned()),
    ] {
        match parse_documents_within(&text, "f", &tight) {
            Err(Error::Budget { budget: found, .. }) => assert_eq!(found, budget),
            other => panic!("{budget}: {other:?}"),
        }
    }
}

#[test]
fn an_object_survives_the_way_through_json() {
    let text = "apiVersion: v1\nkind: X\nmetadata: {name: x, labels: {a: b}}\nn: [1, 1.5, true, null, '1', 18446744073709551615]\n";
    let object = parse_documents(text, "f").unwrap().remove(0);
    let again = Object::from_json(&object.to_json().unwrap()).unwrap();
    assert_eq!(again.to_yaml().unwrap(), object.to_yaml().unwrap());
    assert_eq!(again.id(), object.id());
    assert_eq!(object.label("a"), Some("b"));
}

#[test]
fn recorded_output_is_written_back_byte_for_byte() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/kustomize/expected");
    let Ok(entries) = std::fs::read_dir(&dir) else {
        eprintln!("SKIPPED: kustomize/expected: ../shared is not here");
        return;
    };
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    paths.sort();
    // Every third file: the rest says nothing new and a debug build is slow.
    for path in paths.iter().step_by(3) {
        let text = std::fs::read_to_string(path).unwrap();
        let mut out = String::new();
        let limits = Limits::default();
        for (line_offset, part) in split_documents(&text, "expected", &limits).unwrap() {
            let options = ReadOptions {
                file: "expected",
                line_offset,
                dialect: Dialect::Kustomize,
                limits: &limits,
            };
            if let Some(Value::Map(map)) = parse_document(part, &options).unwrap() {
                if !out.is_empty() {
                    out.push_str("---\n");
                }
                write_map(&map, &mut out).unwrap();
            }
        }
        assert!(out == text, "{} is written differently", path.display());
    }
}

/// Any tree of values.
fn value() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        "\\PC{0,12}",
        "[ -~]{0,120}",
        "[a-z \\n\\t:#'\"-]{0,30}",
        Just("yes".to_owned()),
        Just("0x1F".to_owned()),
        Just("2020-01-01".to_owned()),
        Just("~".to_owned()),
        Just("1:2".to_owned()),
        Just(String::new()),
    ];
    let leaf = prop_oneof![
        text.prop_map(Value::string),
        any::<i64>().prop_map(Value::int),
        any::<bool>().prop_map(Value::bool),
        Just(Value::null()),
        prop::num::f64::NORMAL.prop_map(|f| Value::from_json(&serde_json::json!(f))),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map("\\PC{0,10}", inner, 0..6).prop_map(|entries| {
                let mut map = Map::new();
                for (k, v) in entries {
                    map.entries.push(serin_manifests::Entry {
                        key: serin_manifests::Scalar::string(k),
                        value: v,
                    });
                }
                Value::Map(map)
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_is_written_reads_back_as_the_same_value(value in value()) {
        // A next-line character is a line break to the reader that kustomize prints through, so it cannot survive.
        let written = write_value(&value).ok();
        let lost = |text: &str| text.contains("\\N") || format!("{value:?}").contains("\\u{85}") || text.contains("<<");
        // A key `<<` is taken out by kustomize's reader.
        if let Some(text) = written.filter(|t| !lost(t)) {
            for dialect in [Dialect::Kustomize, Dialect::Kubectl] {
                let again = read(&text, dialect).unwrap().unwrap_or_else(Value::null);
                prop_assert_eq!(again.to_json().unwrap(), value.to_json().unwrap(), "{:?}\n{}", dialect, text);
            }
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "[a-z0-9 \\n\\t:#'\"\\[\\]{}&*!|>%@`,?~<.-]{0,120}", any in "\\PC{0,60}") {
        for text in [&text, &any] {
            let _ = read(text, Dialect::Kustomize);
            let _ = read(text, Dialect::Kubectl);
            let _ = parse_documents(text, "f");
        }
    }

    #[test]
    fn what_is_read_can_be_written_or_says_why(text in "[a-c0-9 \\n:#'\"\\[\\]{}|>,~-]{0,60}") {
        if let Ok(Some(value)) = read(&text, Dialect::Kustomize)
            && let Ok(written) = write_value(&value)
        {
            let again = read(&written, Dialect::Kustomize).unwrap().unwrap_or_else(Value::null);
            prop_assert_eq!(again.to_json().unwrap(), value.to_json().unwrap(), "{}", written);
        }
    }

    #[test]
    fn the_order_of_keys_contradicts_itself_for_no_pair(a in "\\PC{0,6}|[a-z0-9.]{0,8}", b in "\\PC{0,6}|[a-z0-9.]{0,8}") {
        prop_assert_eq!(compare_keys(&a, &b), compare_keys(&b, &a).reverse());
    }
}
