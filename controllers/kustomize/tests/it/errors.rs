//! What the original refuses is refused for the same reason; and the message tells where, how it came there, what helps.

use serin_kustomize::{Budget, Cause, Error, LoadRestrictor, MemoryTree, Options, build, dir::DirTree};

/// For each recorded failure, words that the message must contain: the reason and the objects, not the wording.
const REASONS: &[(&str, &[&str])] = &[
    ("f-absolute-path", &["/nonexistent/cm.yaml", "cannot be absolute"]),
    ("f-bases-and-missing", &["nope", "no such file or directory"]),
    ("f-component-missing", &["nope", "no such file or directory"]),
    ("f-configurations-unknown-field", &["unknown field \"nonsense\""]),
    ("f-crds-missing", &["nope.json", "no such file"]),
    ("f-cycle-self", &["cycle detected"]),
    (
        "f-diamond-conflict",
        &["already registered id: ConfigMap.v1.[noGrp]/settings.[noNs]"],
    ),
    (
        "f-duplicate-file-entry",
        &["already registered id: ConfigMap.v1.[noGrp]/settings.[noNs]"],
    ),
    ("f-empty-kustomization", &["kustomization.yaml is empty"]),
    (
        "f-gen-create-exists",
        &["ConfigMap", "exists; behavior must be merge or replace"],
    ),
    ("f-gen-env-file-missing", &["nope.env", "no such file"]),
    ("f-gen-file-missing", &["nope.txt", "no such file"]),
    (
        "f-gen-merge-no-base",
        &["does not exist; cannot merge or replace"],
    ),
    (
        "f-gen-replace-no-base",
        &["Secret", "does not exist; cannot merge or replace"],
    ),
    (
        "f-json6902-add-missing-parent",
        &["add operation does not apply", "\"/spec/a/b\""],
    ),
    (
        "f-json6902-remove-missing-path",
        &["remove", "nonexistent key: ghost"],
    ),
    ("f-json6902-test-fails", &["testing value /spec/replicas failed"]),
    (
        "f-json6902-without-target",
        &["must specify a target for JSON patch"],
    ),
    ("f-kustomization-no-content", &["kustomization.yaml is empty"]),
    ("f-labels-nonstring", &["number", "commonLabels", "string"]),
    ("f-missing-file", &["nope.yaml", "no such file"]),
    (
        "f-no-kustomization-file",
        &["unable to find one of 'kustomization.yaml'"],
    ),
    ("f-only-comments-kustomization", &["kustomization.yaml is empty"]),
    ("f-openapi-unknown-version", &["OpenAPI version is not built in"]),
    ("f-outside-root-patch", &["security; file", "is not in or below"]),
    (
        "f-patch-bad-labelselector",
        &["unable to parse requirement: found '', expected: ',' or ')'"],
    ),
    (
        "f-patch-bad-yaml",
        &["unable to parse SM or JSON patch from [patch: \"a: [b\"]"],
    ),
    ("f-patch-file-missing", &["p.yaml", "no such file"]),
    (
        "f-patch-target-missing",
        &["no matches for Id Deployment.v1.apps/ghost.[noNs]"],
    ),
    ("f-replacement-file-missing", &["nope.yaml", "no such file"]),
    (
        "f-replacement-no-select",
        &["target must specify resources to select"],
    ),
    (
        "f-replacement-source-many",
        &["multiple matches for selector ConfigMap"],
    ),
    (
        "f-replacement-target-field-missing",
        &["unable to find field \"metadata.labels.ghost\""],
    ),
    (
        "f-resource-duplicate-key",
        &["mapping key \"x\" already defined at line 6"],
    ),
    ("f-resource-no-kind", &["missing kind"]),
    ("f-resource-scalar-document", &["missing Resource metadata"]),
    ("f-resources-generateName", &["missing metadata.name", "Job"]),
    (
        "f-sortoptions-fifo-with-legacy-options",
        &["sortOptions.legacySortOptions", "fifo"],
    ),
    ("f-transformer-external", &["external plugin 'DatePrefixer'"]),
    (
        "f-two-kustomization-files",
        &["Found multiple kustomization files"],
    ),
    ("f-vars-duplicate", &["var 'V' already encountered"]),
    (
        "f-wrong-apiversion",
        &["apiVersion for Kustomization should be kustomize.config.k8s.io/v1beta1"],
    ),
    (
        "f-yaml-syntax-kustomization",
        &["mapping values are not allowed in this context", ":3:"],
    ),
    (
        "f-yaml-tab-indent",
        &["found character that cannot start any token", ":4:"],
    ),
    ("f-yaml11-bool-namespace", &["boolean", "namespace", "string"]),
];

/// The reason in a recorded message of a real directory, reduced to what both say.
fn recorded_reason(text: &str) -> Vec<String> {
    for marker in [
        "no matches for Id ",
        "nothing selected by ",
        "Found multiple kustomization files",
        "unknown field ",
    ] {
        if let Some(at) = text.find(marker) {
            let rest = &text[at..];
            let end = rest.find([';', '\n']).unwrap_or(rest.len());
            let words = rest[..end].trim_end_matches(['\'', '"']);
            return vec![words.split(" under").next().unwrap_or(words).to_owned()];
        }
    }
    if text.contains("no such file or directory") {
        let file = text
            .rsplit("lstat ")
            .next()
            .unwrap_or("")
            .split(':')
            .next()
            .unwrap_or("");
        return vec![
            file.rsplit('/').next().unwrap_or("").to_owned(),
            "no such file or directory".to_owned(),
        ];
    }
    Vec::new()
}

#[test]
fn what_the_original_refuses_is_refused_for_the_same_reason() {
    let Some(data) = super::shared("kustomize") else {
        return;
    };
    let index = std::fs::read_to_string(data.join("errors.tsv")).unwrap();
    let mut complaints = Vec::new();
    let mut count = 0;
    for line in index.lines().skip(1) {
        let columns: Vec<&str> = line.split('\t').collect();
        let (id, dir) = (columns[0], columns[1]);
        let restrictor = if columns[4] == "none" {
            LoadRestrictor::None
        } else {
            LoadRestrictor::RootOnly
        };
        let options = Options {
            load_restrictor: restrictor,
            ..Options::default()
        };
        count += 1;
        let message = match build(&DirTree::new(&data), dir, &options) {
            Ok(_) => {
                complaints.push(format!("{id}: accepted"));
                continue;
            }
            Err(e) => e.to_string(),
        };
        let wanted: Vec<String> = match REASONS.iter().find(|(known, _)| *known == id) {
            Some((_, words)) => words.iter().map(|w| (*w).to_owned()).collect(),
            None => {
                let path = data.join("expected-errors").join(format!("{id}.txt"));
                recorded_reason(&std::fs::read_to_string(path).unwrap())
            }
        };
        if wanted.is_empty() {
            complaints.push(format!("{id}: no reason is known to compare with"));
        }
        complaints.extend(
            wanted
                .iter()
                .filter(|w| !message.contains(w.as_str()))
                .map(|w| format!("{id}: {w:?} is not in\n{message}")),
        );
    }
    assert!(count >= 64, "only {count} cases");
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

pub(crate) fn tree(files: &[(&str, &str)]) -> MemoryTree {
    files.iter().map(|(path, content)| (*path, *content)).collect()
}

pub(crate) const CONFIG: &str =
    "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: settings\ndata:\n  a: b\n";

fn failure(files: &[(&str, &str)], root: &str) -> Error {
    build(&tree(files), root, &Options::default()).unwrap_err()
}

#[test]
fn a_mistyped_field_is_pointed_at_and_the_right_one_named() {
    let e = failure(&[("kustomization.yaml", "resources: []\nnameprefx: x-\n")], "");
    let place = e.place.as_ref().unwrap();
    assert_eq!(
        (place.file.as_str(), place.line, place.column),
        ("kustomization.yaml", 2, 1)
    );
    assert!(e.to_string().contains("did you mean 'namePrefix'?"), "{e}");
}

#[test]
fn a_mistyped_patch_target_gets_the_nearest_name() {
    let patch = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: setings}\n";
    let e = failure(
        &[
            (
                "kustomization.yaml",
                "resources: [cm.yaml]\npatches: [{path: p.yaml}]\n",
            ),
            ("cm.yaml", CONFIG),
            ("p.yaml", patch),
        ],
        "",
    );
    assert!(matches!(*e.cause, Cause::NoPatchTarget { .. }), "{e}");
    assert_eq!(e.place.as_ref().unwrap().file, "p.yaml");
    assert_eq!(e.help.as_deref(), Some("did you mean ConfigMap 'settings'?"));
}

#[test]
fn a_patch_for_another_version_says_so() {
    let patch = "apiVersion: v2\nkind: ConfigMap\nmetadata: {name: settings}\n";
    let e = failure(
        &[
            (
                "kustomization.yaml",
                "resources: [cm.yaml]\npatches: [{path: p.yaml}]\n",
            ),
            ("cm.yaml", CONFIG),
            ("p.yaml", patch),
        ],
        "",
    );
    assert!(
        e.help
            .as_deref()
            .unwrap()
            .contains("apiVersion of the patch differs"),
        "{e}"
    );
}

#[test]
fn a_conflict_names_both_files() {
    let e = failure(
        &[
            ("kustomization.yaml", "resources: [a.yaml, b.yaml]\n"),
            ("a.yaml", CONFIG),
            ("b.yaml", CONFIG),
        ],
        "",
    );
    let help = e.help.as_deref().unwrap();
    assert!(help.contains("a.yaml:1") && help.contains("b.yaml:1"), "{e}");
}

#[test]
fn a_cycle_is_shown_whole() {
    let e = failure(
        &[
            ("a/kustomization.yaml", "resources: [../b]\n"),
            ("b/kustomization.yaml", "resources: [../c]\n"),
            ("c/kustomization.yaml", "resources: [../a]\n"),
        ],
        "a",
    );
    assert!(matches!(*e.cause, Cause::Cycle { .. }), "{e}");
    assert_eq!(e.help.as_deref(), Some("the cycle is a -> b -> c -> a"));
}

#[test]
fn the_chain_of_kustomizations_leads_to_the_place() {
    let e = failure(
        &[
            ("top/kustomization.yaml", "resources: [../mid]\n"),
            ("mid/kustomization.yaml", "resources: [../low]\n"),
            ("low/kustomization.yaml", "resources: [missing.yaml]\n"),
        ],
        "top",
    );
    assert_eq!(
        e.chain,
        [
            "top/kustomization.yaml",
            "mid/kustomization.yaml",
            "low/kustomization.yaml"
        ]
    );
    assert_eq!(e.place.as_ref().unwrap().file, "low/kustomization.yaml");
}

#[test]
fn charts_and_programs_are_refused_with_what_to_do_instead() {
    let e = failure(
        &[(
            "kustomization.yaml",
            "helmCharts:\n- name: redis\n  repo: https://example.com\n",
        )],
        "",
    );
    assert!(matches!(&*e.cause, Cause::Helm(name) if name == "redis"));
    assert!(e.help.as_deref().unwrap().contains("helm template"), "{e}");
    let plugin = "apiVersion: example.com/v1\nkind: Sed\nmetadata: {name: x}\n";
    let e = failure(
        &[
            ("kustomization.yaml", "generators: [g.yaml]\n"),
            ("g.yaml", plugin),
        ],
        "",
    );
    assert!(
        matches!(&*e.cause, Cause::ExternalPlugin(kind) if kind == "Sed"),
        "{e}"
    );
}

#[test]
fn remote_resources_are_refused() {
    for url in [
        "https://example.com/x.yaml",
        "github.com/org/repo//base?ref=v1",
        "git@github.com:org/repo.git",
        "ssh://h/x",
    ] {
        let e = failure(&[("kustomization.yaml", &format!("resources: ['{url}']\n"))], "");
        assert!(matches!(&*e.cause, Cause::Remote { url: u } if u == url), "{e}");
    }
}

#[test]
fn an_unquoted_boolean_is_explained() {
    let e = failure(&[("kustomization.yaml", "namespace: on\n")], "");
    assert!(
        e.to_string().contains("namespace: on") && e.to_string().contains("put it in quotes"),
        "{e}"
    );
}

#[test]
fn an_error_names_the_budget_that_was_passed() {
    let many: String = (0..50)
        .map(|i| format!("---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c{i}}}\n"))
        .collect();
    let bomb = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\na: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n\
                c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n\
                f: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g]\n";
    let deep = format!(
        "apiVersion: v1\nkind: X\nmetadata: {{name: x}}\na: {}{}\n",
        "[".repeat(5000),
        "]".repeat(5000)
    );
    let chain: Vec<(String, String)> = (0..80)
        .map(|i| {
            (
                format!("d{i}/kustomization.yaml"),
                format!("resources: [../d{}]\n", i + 1),
            )
        })
        .collect();
    let mut chain: Vec<(&str, &str)> = chain.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    chain.push(("kustomization.yaml", "resources: [d0]\n"));
    let root = ("kustomization.yaml", "resources: [r.yaml]\n");
    let tight = |f: fn(&mut Budget)| {
        let mut budget = Budget::default();
        f(&mut budget);
        budget
    };
    let cases: Vec<(&str, Vec<(&str, &str)>, Budget)> = vec![
        (
            "resources",
            vec![root, ("r.yaml", &many)],
            tight(|b| b.max_resources = 10),
        ),
        (
            "bytes",
            vec![root, ("r.yaml", &many)],
            tight(|b| b.max_bytes = 100),
        ),
        ("files", vec![root, ("r.yaml", &many)], tight(|b| b.max_files = 1)),
        (
            "steps",
            vec![
                ("kustomization.yaml", "namespace: x\nresources: [r.yaml]\n"),
                ("r.yaml", &many),
            ],
            tight(|b| b.max_steps = 5),
        ),
        ("nodes", vec![root, ("r.yaml", bomb)], Budget::default()),
        ("depth", vec![root, ("r.yaml", &deep)], Budget::default()),
        ("depth", chain, Budget::default()),
    ];
    for (name, files, budget) in cases {
        let e = build(
            &tree(&files),
            "",
            &Options {
                budget,
                ..Options::default()
            },
        )
        .unwrap_err();
        assert!(
            matches!(&*e.cause, Cause::Budget { budget, .. } if *budget == name),
            "{name}: {e}"
        );
    }
}

#[test]
fn an_error_inside_of_a_base_points_into_the_base() {
    let files = [
        ("kustomization.yaml", "resources:\n- base\n"),
        (
            "base/kustomization.yaml",
            "resources: [cm.yaml]\npatches:\n- target: {kind: ConfigMap}\n  patch: |-\n    - {op: remove, path: /data/gone}\n",
        ),
        ("base/cm.yaml", CONFIG),
    ];
    let e = build(&tree(&files), "", &Options::default()).unwrap_err();
    let place = e.place.as_ref().unwrap();
    assert_eq!(
        (place.file.as_str(), place.line),
        ("base/kustomization.yaml", 3),
        "{e}"
    );
    assert_eq!(e.chain, ["kustomization.yaml", "base/kustomization.yaml"]);

    let mut generated = tree(&files);
    generated
        .add(
            "base/kustomization.yaml",
            "resources: [cm.yaml]\ngenerators: [g.yaml]\n",
        )
        .add(
            "base/g.yaml",
            "apiVersion: builtin\nkind: ConfigMapGenerator\nmetadata: {name: x}\nbehavior: merge\nliterals: [a=b]\n",
        );
    let e = build(&generated, "", &Options::default()).unwrap_err();
    assert_eq!(e.place.as_ref().unwrap().file, "base/g.yaml", "{e}");
}
