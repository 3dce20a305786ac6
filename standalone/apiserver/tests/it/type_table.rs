//! `src/schema/builtin.tsv` is made from Kubernetes' OpenAPI documents: here it is compared with them, merge keys and types alike.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// `(type, field) → attributes` of our table.
fn table() -> BTreeMap<(String, String), String> {
    let mut out = BTreeMap::new();
    let mut current = String::new();
    for line in include_str!("../../src/schema/builtin.tsv").lines() {
        let mut columns = line.split('\t');
        let first = columns.next().unwrap_or_default();
        if first == "T" {
            current = columns.next().unwrap_or_default().to_owned();
        } else {
            let kind = columns.next().unwrap_or_default();
            let attributes = columns.next().unwrap_or_default();
            out.insert(
                (current.clone(), first.to_owned()),
                format!("{kind} {attributes}"),
            );
        }
    }
    out
}

fn short(name: &str) -> String {
    name.replace("io.k8s.api.", "")
        .replace("io.k8s.apimachinery.pkg.apis.", "")
        .replace("io.k8s.apiextensions-apiserver.pkg.apis.", "")
}

#[test]
fn merge_keys_list_types_and_patch_strategies_are_those_of_the_openapi_documents() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/kube-api/merge-keys.tsv");
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!("SKIPPED: the merge keys of Kubernetes' OpenAPI documents: ../shared is not here");
        return;
    };
    let table = table();
    let types: std::collections::BTreeSet<&str> = table.keys().map(|(t, _)| t.as_str()).collect();
    let mut compared = 0;
    for line in text.lines().skip(1) {
        let columns: Vec<&str> = line.split('\t').collect();
        let column = |i: usize| columns.get(i).copied().unwrap_or_default();
        let name = short(column(0));
        if column(1).is_empty() || !types.contains(name.as_str()) {
            continue;
        }
        let ours = table
            .get(&(name.clone(), column(1).to_owned()))
            .unwrap_or_else(|| panic!("{name}.{} is not in the table", column(1)));
        let words: Vec<&str> = ours.split(' ').collect();
        let expect = |word: String| {
            assert!(
                words.contains(&word.as_str()),
                "{name}.{}: {word} in {ours:?}",
                column(1)
            )
        };
        match column(2) {
            "map" => expect(format!("lt=map:{}", column(3))),
            "set" => expect("lt=set".to_owned()),
            _ => {}
        }
        if !column(4).is_empty() {
            expect(format!("ps={}", column(4)));
        }
        if !column(5).is_empty() {
            expect(format!("pk={}", column(5)));
        }
        compared += 1;
    }
    assert!(compared > 150, "only {compared} fields were compared");
}
