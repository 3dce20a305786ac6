//! Byte for byte what the original prints, over real and tiny directories.

use std::collections::BTreeMap;

use serin_kustomize::{LoadRestrictor, Options, build, dir::DirTree};
use serin_manifests::parse_documents;

struct Case {
    id: String,
    dir: String,
    objects: usize,
    restrictor: LoadRestrictor,
}

fn cases(index: &str) -> Vec<Case> {
    let rows = index
        .lines()
        .skip(1)
        .map(|line| line.split('\t').collect::<Vec<_>>());
    rows.map(|c| Case {
        id: c[0].into(),
        dir: c[1].into(),
        objects: c[4].parse().unwrap(),
        restrictor: if c[5] == "none" {
            LoadRestrictor::None
        } else {
            LoadRestrictor::RootOnly
        },
    })
    .collect()
}

/// `None` when equal, otherwise `bytes` or `values` with a first difference.
fn compare(case: &Case, data: &std::path::Path) -> Option<(&'static str, String)> {
    let expected = std::fs::read_to_string(data.join("expected").join(format!("{}.yaml", case.id))).unwrap();
    let options = Options {
        load_restrictor: case.restrictor,
        ..Options::default()
    };
    let result = match build(&DirTree::new(data), &case.dir, &options) {
        Ok(result) => result,
        Err(e) => return Some(("values", e.to_string())),
    };
    if result.objects.len() != case.objects {
        return Some((
            "values",
            format!("{} objects instead of {}", result.objects.len(), case.objects),
        ));
    }
    let found = result.to_yaml().unwrap();
    if found == expected {
        return None;
    }
    let first = found
        .lines()
        .zip(expected.lines())
        .enumerate()
        .find(|(_, (a, b))| a != b);
    let detail = first.map_or("one is longer".to_owned(), |(n, (a, b))| {
        format!("line {}: {a:?} instead of {b:?}", n + 1)
    });
    let same = parse_documents(&found, "found").unwrap() == parse_documents(&expected, "expected").unwrap();
    Some((if same { "bytes" } else { "values" }, detail))
}

#[test]
fn every_recorded_directory_builds_to_the_recorded_bytes() {
    let Some(data) = super::shared("kustomize") else {
        return;
    };
    let known: BTreeMap<&str, &str> = include_str!("expectations.txt")
        .lines()
        .filter(|l| !l.starts_with('#') && !l.is_empty())
        .map(|l| {
            let mut words = l.splitn(3, ' ');
            (words.next().unwrap(), words.next().unwrap())
        })
        .collect();
    let cases = cases(&std::fs::read_to_string(data.join("index.tsv")).unwrap());
    let chunk = cases.len().div_ceil(4);
    let results: Vec<(String, Option<(&'static str, String)>)> = std::thread::scope(|scope| {
        let data = &data;
        let workers: Vec<_> = cases
            .chunks(chunk)
            .map(|part| {
                scope.spawn(move || {
                    part.iter()
                        .map(|c| (c.id.clone(), compare(c, data)))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().flat_map(|w| w.join().unwrap()).collect()
    });
    assert!(results.len() >= 386, "only {} cases", results.len());
    let mut complaints = Vec::new();
    for (id, result) in &results {
        match (result, known.get(id.as_str())) {
            (None, None) => {}
            (None, Some(_)) => complaints.push(format!("{id}: agrees now; take it off expectations.txt")),
            (Some((kind, _)), Some(listed)) if kind == listed => {}
            (Some((kind, detail)), _) => complaints.push(format!("{id}: differs in {kind}: {detail}")),
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn building_what_was_built_changes_nothing() {
    let Some(data) = super::shared("kustomize") else {
        return;
    };
    let index = std::fs::read_to_string(data.join("index.tsv")).unwrap();
    let mut checked = 0;
    // Every sixth: the property holds for each alone, the rest adds only time.
    for case in cases(&index).iter().step_by(6).filter(|c| c.objects > 0) {
        let text = std::fs::read_to_string(data.join("expected").join(format!("{}.yaml", case.id))).unwrap();
        // Names may be equal in different files but not within one: kinds that differ in scope only by a CRD.
        let mut tree = serin_kustomize::MemoryTree::new();
        tree.add("kustomization.yaml", "resources: [all.yaml]\n")
            .add("all.yaml", &text);
        // A list among the results would be taken apart, and notes of a build are taken out by the next.
        if text.contains("\nkind: List\n") || text.contains("alpha.config.kubernetes.io/transformations") {
            continue;
        }
        let options = Options {
            reorder: serin_kustomize::Reorder::None,
            ..Options::default()
        };
        let again = build(&tree, "", &options).unwrap_or_else(|e| panic!("{}: {e}", case.id));
        assert_eq!(again.to_yaml().unwrap(), text, "{}", case.id);
        checked += 1;
    }
    assert!(checked > 50);
}
