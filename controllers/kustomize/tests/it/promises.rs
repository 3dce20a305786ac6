//! Safety, the read set, remotes, traces: what callers rely on.

use std::sync::Arc;

use serin_kustomize::{
    Cause, Decrypt, EncryptedUse, LoadRestrictor, MemoryTree, Options, Remotes, Reorder, build, dir::DirTree,
};

use super::errors::{CONFIG, tree};

fn yaml(tree: &MemoryTree, root: &str) -> String {
    build(tree, root, &Options::default())
        .unwrap_or_else(|e| panic!("{e}"))
        .to_yaml()
        .unwrap()
}

#[test]
fn nothing_outside_the_tree_exists() {
    let files = |path: &str| {
        vec![(
            "app/kustomization.yaml".to_owned(),
            format!("resources: ['{path}']\n"),
        )]
    };
    for path in ["../../etc/passwd", "/etc/passwd", "../../../x", "a/../../../x"] {
        let tree: MemoryTree = files(path).into_iter().collect();
        let options = Options {
            load_restrictor: LoadRestrictor::None,
            ..Options::default()
        };
        let e = build(&tree, "app", &options).unwrap_err();
        assert!(
            matches!(
                *e.cause,
                Cause::OutsideTree { .. } | Cause::AbsolutePath { .. } | Cause::Missing { .. }
            ),
            "{path}: {e}"
        );
    }
}

#[test]
fn links_are_followed_inside_the_tree_and_refused_outside() {
    let mut inside = tree(&[
        ("kustomization.yaml", "resources: [base, link.yaml]\n"),
        (
            "real/kustomization.yaml",
            "namePrefix: p-\nresources: [cm.yaml]\n",
        ),
        ("real/cm.yaml", CONFIG),
    ]);
    inside
        .link("base", "real")
        .link("link.yaml", "real/../real/./cm.yaml");
    let built = build(&inside, "", &Options::default()).unwrap();
    assert_eq!(
        built.objects.iter().map(|o| o.name()).collect::<Vec<_>>(),
        ["p-settings", "settings"]
    );
    assert!(built.read_set.links.contains("base") && built.read_set.links.contains("link.yaml"));

    for target in ["../../secret", "/etc/passwd"] {
        let mut outside = tree(&[("kustomization.yaml", "resources: [x.yaml]\n")]);
        outside.link("x.yaml", target);
        let e = build(&outside, "", &Options::default()).unwrap_err();
        assert!(matches!(*e.cause, Cause::OutsideTree { .. }), "{target}: {e}");
    }
    let mut circle = tree(&[("kustomization.yaml", "resources: [x.yaml]\n")]);
    circle.link("x.yaml", "y.yaml").link("y.yaml", "x.yaml");
    let e = build(&circle, "", &Options::default()).unwrap_err();
    assert!(e.to_string().contains("too many levels of symbolic links"), "{e}");
}

#[test]
fn a_link_on_disk_that_leads_out_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("outside.yaml"), CONFIG).unwrap();
    let repo = dir.path().join("repo");
    std::fs::create_dir(&repo).unwrap();
    std::fs::write(repo.join("kustomization.yaml"), "resources: [x.yaml]\n").unwrap();
    std::os::unix::fs::symlink("../outside.yaml", repo.join("x.yaml")).unwrap();
    let e = build(&DirTree::new(&repo), "", &Options::default()).unwrap_err();
    assert!(matches!(*e.cause, Cause::OutsideTree { .. }), "{e}");
}

#[test]
fn the_load_restrictor_lets_files_lie_beside_only_when_told() {
    let t = tree(&[
        ("app/kustomization.yaml", "resources: [../cm.yaml]\n"),
        ("cm.yaml", CONFIG),
    ]);
    let e = build(&t, "app", &Options::default()).unwrap_err();
    assert!(matches!(*e.cause, Cause::OutsideRoot { .. }), "{e}");
    let options = Options {
        load_restrictor: "LoadRestrictionsNone".parse().unwrap(),
        ..Options::default()
    };
    assert_eq!(build(&t, "app", &options).unwrap().objects.len(), 1);
    assert!("None".parse::<LoadRestrictor>().is_err());
}

#[test]
fn the_read_set_holds_what_was_read_and_what_was_missed() {
    let t = tree(&[
        (
            "app/kustomization.yaml",
            "resources: [../base]\nconfigMapGenerator: [{name: g, files: [f.txt]}]\n",
        ),
        ("app/f.txt", "x"),
        ("app/unused.yaml", "x"),
        ("base/kustomization.yml", "resources: [cm.yaml]\n"),
        ("base/cm.yaml", CONFIG),
    ]);
    let set = build(&t, "app", &Options::default()).unwrap().read_set;
    let files: Vec<&str> = set.files.iter().map(String::as_str).collect();
    assert_eq!(
        files,
        [
            "app/f.txt",
            "app/kustomization.yaml",
            "base/cm.yaml",
            "base/kustomization.yml"
        ]
    );
    for missing in [
        "app/Kustomization",
        "app/kustomization.yml",
        "base/kustomization.yaml",
        "base/Kustomization",
    ] {
        assert!(set.missing.contains(missing), "{missing}");
    }
}

/// A tree that keeps a log of what is asked of it.
struct Spy<'a>(&'a MemoryTree, std::cell::RefCell<Vec<String>>);

impl serin_kustomize::FileTree for Spy<'_> {
    fn entry(&self, path: &str) -> Result<serin_kustomize::TreeEntry, String> {
        self.1.borrow_mut().push(path.to_owned());
        self.0.entry(path)
    }

    fn read(&self, path: &str) -> Result<Arc<[u8]>, String> {
        self.1.borrow_mut().push(path.to_owned());
        self.0.read(path)
    }
}

#[test]
fn nothing_is_asked_of_the_tree_that_the_read_set_does_not_tell() {
    let t = tree(&[
        (
            "o/kustomization.yaml",
            "namePrefix: a-\nresources: [../base]\ncomponents: [../comp]\npatches: [{path: p.yaml}]\n",
        ),
        (
            "o/p.yaml",
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {x: y}\n",
        ),
        ("base/kustomization.yaml", "resources: [cm.yaml]\n"),
        ("base/cm.yaml", CONFIG),
        (
            "comp/kustomization.yaml",
            "apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\nnameSuffix: -z\n",
        ),
    ]);
    let spy = Spy(&t, std::cell::RefCell::new(Vec::new()));
    let set = build(&spy, "o", &Options::default()).unwrap().read_set;
    for path in spy.1.into_inner() {
        let told = set.files.contains(&path)
            || set.missing.contains(&path)
            || set.links.contains(&path)
            || set.directories.contains(&path);
        assert!(told, "{path} is in none of {set:?}");
    }
}

struct Fetched;

impl Remotes for Fetched {
    fn file(&self, url: &str) -> Option<Arc<[u8]>> {
        (url == "https://example.com/cm.yaml").then(|| CONFIG.as_bytes().into())
    }

    fn directory(&self, url: &str) -> Option<String> {
        (url == "https://github.com/org/repo//base?ref=v1").then(|| "vendored/base".to_owned())
    }
}

#[test]
fn remotes_that_the_caller_provides_are_used() {
    let t = tree(&[
        (
            "kustomization.yaml",
            "namePrefix: p-\nresources:\n- https://example.com/cm.yaml\n- https://github.com/org/repo//base?ref=v1\n",
        ),
        (
            "vendored/base/kustomization.yaml",
            "nameSuffix: -v\nresources: [cm.yaml]\n",
        ),
        ("vendored/base/cm.yaml", CONFIG),
    ]);
    let built = build(
        &t,
        "",
        &Options {
            remotes: Some(&Fetched),
            ..Options::default()
        },
    )
    .unwrap();
    assert_eq!(
        built.objects.iter().map(|o| o.name()).collect::<Vec<_>>(),
        ["p-settings", "p-settings-v"]
    );
}

#[test]
fn a_trace_tells_who_gave_a_field_its_value() {
    let t = tree(&[
        (
            "o/kustomization.yaml",
            "namespace: prod\nresources: [../base]\npatches:\n- target: {kind: ConfigMap}\n  patch: '[{op: replace, path: /data/a, value: c}]'\n",
        ),
        (
            "base/kustomization.yaml",
            "namePrefix: p-\nresources: [cm.yaml]\n",
        ),
        ("base/cm.yaml", CONFIG),
    ]);
    let built = build(
        &t,
        "o",
        &Options {
            trace: true,
            ..Options::default()
        },
    )
    .unwrap();
    let trace = built.trace.unwrap();
    let id = built.objects[0].id();
    let who = |path: &str| -> Vec<(String, String)> {
        let (_, steps) = trace.explain(&id, path).unwrap();
        steps
            .iter()
            .map(|s| (s.transformer.clone(), s.kustomization.clone()))
            .collect()
    };
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(
        who("metadata.name"),
        [pair("PrefixTransformer", "base/kustomization.yaml")]
    );
    assert_eq!(
        who("metadata.namespace"),
        [pair("NamespaceTransformer", "o/kustomization.yaml")]
    );
    assert_eq!(who("data.a"), [pair("PatchTransformer", "o/kustomization.yaml")]);
    assert_eq!(who("kind"), []);
    assert_eq!(
        trace.explain(&id, "kind").unwrap().0.source,
        Some(("base/cm.yaml".to_owned(), 1))
    );
}

#[test]
fn objects_know_the_file_and_line_they_were_read_from() {
    let two = format!("{CONFIG}---\n# second\napiVersion: v1\nkind: Secret\nmetadata: {{name: s}}\n");
    let t = tree(&[("kustomization.yaml", "resources: [r.yaml]\n"), ("r.yaml", &two)]);
    let built = build(&t, "", &Options::default()).unwrap();
    let sources: Vec<_> = built
        .objects
        .iter()
        .map(|o| (o.kind(), o.source().unwrap().line))
        .collect();
    assert_eq!(sources, [("ConfigMap", 1), ("Secret", 9)]);
}

#[test]
fn origins_are_annotated_on_request() {
    let t = tree(&[
        ("o/kustomization.yaml", "resources: [../base]\n"),
        ("base/kustomization.yaml", "resources: [cm.yaml]\n"),
        ("base/cm.yaml", CONFIG),
    ]);
    let built = build(
        &t,
        "o",
        &Options {
            origin: true,
            ..Options::default()
        },
    )
    .unwrap();
    assert_eq!(
        built.objects[0].annotation("config.kubernetes.io/origin"),
        Some("path: ../base/cm.yaml\n")
    );
}

#[test]
fn who_manages_an_object_is_labelled_on_request() {
    let t = tree(&[
        ("kustomization.yaml", "resources: [cm.yaml]\n"),
        ("cm.yaml", CONFIG),
    ]);
    let label = |managed_by: bool| {
        let options = Options {
            managed_by,
            ..Options::default()
        };
        let yaml = build(&t, "", &options).unwrap().to_yaml().unwrap();
        yaml.lines()
            .find_map(|line| line.trim().strip_prefix("app.kubernetes.io/managed-by: "))
            .map(str::to_owned)
    };
    assert_eq!(label(false), None);
    assert!(label(true).is_some_and(|by| by.starts_with("kustomize-")));
}

#[test]
fn the_order_of_the_files_is_kept_on_request() {
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n";
    let t = tree(&[
        ("kustomization.yaml", "resources: [cm.yaml, ns.yaml]\n"),
        ("cm.yaml", CONFIG),
        ("ns.yaml", namespace),
    ]);
    let kinds = |reorder| {
        let built = build(
            &t,
            "",
            &Options {
                reorder,
                ..Options::default()
            },
        )
        .unwrap();
        built
            .objects
            .iter()
            .map(|o| o.kind().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(kinds(Reorder::Legacy), ["Namespace", "ConfigMap"]);
    assert_eq!(kinds(Reorder::None), ["ConfigMap", "Namespace"]);
}

#[test]
fn a_number_patched_over_quoted_text_becomes_text() {
    let deployment =
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec:\n  x: \"80\"\n  y: 80\n";
    let patch = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec:\n  x: 81\n  y: \"81\"\n";
    let t = tree(&[
        (
            "kustomization.yaml",
            "resources: [d.yaml]\npatches: [{path: p.yaml}]\n",
        ),
        ("d.yaml", deployment),
        ("p.yaml", patch),
    ]);
    assert!(
        yaml(&t, "").ends_with("spec:\n  x: \"81\"\n  \"y\": \"81\"\n"),
        "{}",
        yaml(&t, "")
    );
}

#[test]
fn source_values_of_replacements_are_copied() {
    let t = tree(&[
        (
            "kustomization.yaml",
            "resources: [cm.yaml]\nreplacements:\n- sourceValue: new\n  targets:\n  - select: {kind: ConfigMap}\n    fieldPaths: [data.a]\n",
        ),
        ("cm.yaml", CONFIG),
    ]);
    assert!(yaml(&t, "").contains("a: new"));
}

#[test]
fn deprecated_fields_are_named_with_what_replaces_them() {
    let t = tree(&[
        ("kustomization.yaml", "bases: [b]\ncommonLabels: {a: b}\n"),
        ("b/kustomization.yaml", "resources: [cm.yaml]\n"),
        ("b/cm.yaml", CONFIG),
    ]);
    let warnings = build(&t, "", &Options::default()).unwrap().warnings;
    assert_eq!(
        warnings,
        [
            "kustomization.yaml: 'bases' is deprecated; use 'resources'",
            "kustomization.yaml: 'commonLabels' is deprecated; use 'labels'",
        ]
    );
}

#[test]
fn a_label_put_into_several_places_is_changed_in_all_of_them() {
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec: {template: {spec: {containers: []}}}\n";
    let patch = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, labels: {app: new}}\n";
    let t = tree(&[
        (
            "o/kustomization.yaml",
            "resources: [../base]\npatches: [{path: p.yaml}]\n",
        ),
        ("o/p.yaml", patch),
        (
            "base/kustomization.yaml",
            "commonLabels: {app: web}\nresources: [d.yaml]\n",
        ),
        ("base/d.yaml", deployment),
    ]);
    assert_eq!(yaml(&t, "o").matches("app: new").count(), 3, "{}", yaml(&t, "o"));
}

/// Opens what starts with `locked:`; refuses `broken`.
struct Opener;

impl Decrypt for Opener {
    fn open(&self, _: &str, content: &[u8], wanted: EncryptedUse) -> Result<Option<Vec<u8>>, String> {
        if content == b"broken" {
            return Err(format!("no key for a file wanted as {wanted:?}"));
        }
        Ok(content.strip_prefix(b"locked:").map(<[u8]>::to_vec))
    }
}

#[test]
fn encrypted_files_are_opened_for_secrets_and_patches_and_for_nothing_else() {
    let files = [
        (
            "kustomization.yaml",
            "resources: [cm.yaml]\nsecretGenerator:\n- name: s\n  files: [a.txt, plain.txt]\n  envs: [e.env]\nconfigMapGenerator:\n- name: c\n  files: [a.txt]\npatches: [{path: p.yaml}]\n",
        ),
        ("cm.yaml", CONFIG),
        ("a.txt", "locked:one"),
        ("plain.txt", "two"),
        ("e.env", "locked:K=three\n"),
        (
            "p.yaml",
            "locked:apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {p: four}\n",
        ),
    ];
    let options = Options {
        decrypt: Some(&Opener),
        ..Options::default()
    };
    let built = build(&tree(&files), "", &options).unwrap();
    let json = |kind: &str, start: &str| {
        let found = built
            .objects
            .iter()
            .find(|o| o.kind() == kind && o.name().starts_with(start));
        found.unwrap().to_json().unwrap()
    };
    let secret = json("Secret", "s-");
    assert_eq!(secret["data"]["a.txt"], "b25l");
    assert_eq!(secret["data"]["plain.txt"], "dHdv");
    assert_eq!(secret["data"]["K"], "dGhyZWU=");
    assert_eq!(json("ConfigMap", "c-")["data"]["a.txt"], "locked:one");
    assert_eq!(json("ConfigMap", "settings")["data"]["p"], "four");
    let mut broken = tree(&files);
    broken.add("e.env", "broken");
    let error = build(&broken, "", &options).unwrap_err().to_string();
    assert!(
        error.contains("decrypting 'e.env': no key for a file wanted as Env"),
        "{error}"
    );
}
