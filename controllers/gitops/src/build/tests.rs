use std::path::{Path, PathBuf};

use serde_json::Value;
use serin_crds::flux::kustomize::{
    BuildMetadata, CommonMetadata, Image, Kustomization, Patch, PostBuild, Selector,
};

use crate::source::tree_testing::snapshot;

use super::*;

fn key() -> Key {
    Key::new("flux-system", "podinfo")
}

fn run(
    files: &[(&str, &str)],
    spec: &KustomizationSpec,
    variables: Option<&Variables>,
) -> Result<Built, Error> {
    let (_dir, snapshot) = snapshot(files, None, &[]);
    build(&snapshot, &key(), spec, variables, None)
}

/// The objects as JSON, by `Kind/namespace/name`, without our owner labels.
fn plain(built: &Built) -> BTreeMap<String, Value> {
    built
        .objects
        .iter()
        .map(|o| {
            let mut value = o.value.clone();
            let labels = value["metadata"]["labels"].as_object_mut().unwrap();
            labels.remove(crate::plan::OWNER_NAME);
            labels.remove(crate::plan::OWNER_NAMESPACE);
            if labels.is_empty() {
                value["metadata"].as_object_mut().unwrap().remove("labels");
            }
            (o.id.to_string(), value)
        })
        .collect()
}

fn message(result: Result<Built, Error>) -> String {
    result
        .map(|b| format!("built {} objects", b.objects.len()))
        .unwrap_err()
        .to_string()
}

const MAP: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: a\ndata:\n  k: v\n";

#[test]
fn without_a_kustomization_file_all_yaml_files_below_the_path_are_taken() {
    let files = [
        ("apps/a.yaml", MAP),
        (
            "apps/sub/b.yml",
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: b\n",
        ),
        (
            "apps/own/kustomization.yaml",
            "namePrefix: p-\nresources: [c.yaml]\n",
        ),
        (
            "apps/own/c.yaml",
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: c\n",
        ),
        (
            "apps/own/ignored.yaml",
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: ignored\n",
        ),
        ("apps/readme.md", "# no"),
        ("other/d.yaml", MAP),
    ];
    let spec = KustomizationSpec {
        path: Some("./apps".into()),
        target_namespace: Some("prod".into()),
        ..Default::default()
    };
    let ids: Vec<String> = plain(&run(&files, &spec, None).unwrap()).into_keys().collect();
    assert_eq!(
        ids,
        ["ConfigMap/prod/a", "ConfigMap/prod/b", "ConfigMap/prod/p-c"]
    );
}

#[test]
fn build_metadata_of_the_spec_joins_that_of_the_repository() {
    let files = [
        (
            "deploy/kustomization.yaml",
            "resources: [map.yaml]\nbuildMetadata: [managedByLabel]\n",
        ),
        (
            "deploy/map.yaml",
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: a\n",
        ),
    ];
    let spec = KustomizationSpec {
        path: Some("deploy".into()),
        target_namespace: Some("prod".into()),
        build_metadata: vec![BuildMetadata::OriginAnnotations],
        ..Default::default()
    };
    let built = run(&files, &spec, None).unwrap();
    let metadata = &plain(&built)["ConfigMap/prod/a"]["metadata"];
    assert_eq!(
        metadata["annotations"]["config.kubernetes.io/origin"],
        "path: map.yaml\n"
    );
    let managed = metadata["labels"]["app.kubernetes.io/managed-by"].as_str();
    assert!(
        managed.is_some_and(|by| by.starts_with("kustomize-")),
        "{metadata}"
    );
}

#[test]
fn every_field_of_the_overlay_reaches_the_objects() {
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: web\nspec:\n  template:\n    spec:\n      containers:\n      - name: app\n        image: nginx:1.0\n";
    let component = "apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\npatches:\n- target: {kind: Deployment}\n  patch: |-\n    - op: add\n      path: /spec/replicas\n      value: 3\n";
    let files = [
        (
            "deploy/kustomization.yaml",
            "resources: [web.yaml]\nnamePrefix: old-\nimages:\n- name: nginx\n  digest: sha256:0000\n",
        ),
        ("deploy/web.yaml", deployment),
        ("scale/kustomization.yaml", component),
    ];
    let spec = KustomizationSpec {
        path: Some("deploy".into()),
        target_namespace: Some("prod".into()),
        name_prefix: Some("new-".into()),
        name_suffix: Some("-x".into()),
        images: vec![Image {
            name: "nginx".into(),
            new_name: Some("registry/nginx".into()),
            new_tag: Some("2.0".into()),
            digest: None,
        }],
        components: vec!["../scale".into(), "../absent".into()],
        ignore_missing_components: Some(true),
        patches: vec![Patch {
            patch: "- op: add\n  path: /metadata/annotations\n  value: {patched: \"yes\"}\n".into(),
            target: Some(Selector {
                kind: Some("Deployment".into()),
                ..Default::default()
            }),
        }],
        common_metadata: Some(CommonMetadata {
            labels: [("team".into(), "a".into())].into(),
            annotations: [("note".into(), "b".into())].into(),
        }),
        ..Default::default()
    };
    let built = run(&files, &spec, None).unwrap();
    let web = &plain(&built)["Deployment/prod/new-web-x"];
    assert_eq!(
        web["spec"]["template"]["spec"]["containers"][0]["image"],
        "registry/nginx:2.0"
    );
    assert_eq!(web["spec"]["replicas"], 3);
    assert_eq!(
        web["metadata"]["annotations"],
        serde_json::json!({"patched": "yes", "note": "b"})
    );
    assert_eq!(web["metadata"]["labels"], serde_json::json!({"team": "a"}));
    assert_eq!(
        web["spec"]["template"]["metadata"],
        Value::Null,
        "common metadata stays out of templates"
    );
}

#[test]
fn a_revision_is_rebuilt_exactly_when_something_that_was_read_changed() {
    let spec = KustomizationSpec {
        path: Some("apps".into()),
        ..Default::default()
    };
    let before = [
        ("apps/kustomization.yaml", "resources: [a.yaml]\n"),
        ("apps/a.yaml", MAP),
        ("apps/unread.yaml", "x: 1"),
        ("other.txt", "1"),
    ];
    let built = run(&before, &spec, None).unwrap();
    assert!(built.reads.len() >= 2);
    let holds = |files: &[(&str, &str)]| {
        let (_dir, snapshot) = snapshot(files, None, &[]);
        built.reads.holds(&snapshot).unwrap()
    };
    let mut same = before;
    same[2].1 = "x: 2";
    same[3].1 = "2";
    assert!(holds(&same), "files that the build did not look at");
    let mut changed = before;
    changed[1].1 = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: b\n";
    assert!(!holds(&changed));
    assert!(!holds(&before[1..]), "the kustomization file is gone");

    let free = run(&[("apps/a.yaml", MAP)], &spec, None).unwrap();
    let (_dir, more) = snapshot(&[("apps/a.yaml", MAP), ("apps/new.yaml", MAP)], None, &[]);
    assert!(
        !free.reads.holds(&more).unwrap(),
        "a file came into a directory that was listed"
    );
    let (_dir, ignored) = snapshot(
        &[("apps/a.yaml", MAP), ("apps/.sourceignore", "a.yaml")],
        None,
        &[],
    );
    assert!(
        !free.reads.holds(&ignored).unwrap(),
        "a file that was read is ignored now"
    );
}

#[test]
fn what_goes_into_a_build_beside_the_files_is_in_its_recipe() {
    let spec = KustomizationSpec::default();
    let base = recipe(&key(), &spec, None, None);
    assert_eq!(
        recipe(
            &key(),
            &KustomizationSpec {
                interval: "1h".into(),
                prune: true,
                ..Default::default()
            },
            None,
            None
        ),
        base
    );
    assert_ne!(
        recipe(
            &key(),
            &KustomizationSpec {
                name_prefix: Some("x".into()),
                ..Default::default()
            },
            None,
            None
        ),
        base
    );
    assert_ne!(
        recipe(
            &key(),
            &spec,
            Some(&Variables([("a".into(), "b".into())].into())),
            None
        ),
        base
    );
    assert_ne!(recipe(&Key::new("other", "podinfo"), &spec, None, None), base);
}

#[test]
fn bad_input_is_told_with_file_and_reason() {
    let spec = KustomizationSpec {
        path: Some("apps".into()),
        ..Default::default()
    };
    let cases: &[(&[(&str, &str)], &[&str])] = &[
        (&[("apps/a.yaml", "a: [1\n")], &["apps/a.yaml"]),
        (&[("apps/a.yaml", MAP), ("apps/b.yaml", MAP)], &["ConfigMap", "a"]),
        (
            &[("apps/kustomization.yaml", "resources: [../missing]\n")],
            &["missing"],
        ),
        (
            &[(
                "apps/kustomization.yaml",
                "resources: [https://example.com/x.yaml]\n",
            )],
            &["https://example.com/x.yaml"],
        ),
        (
            &[
                ("apps/kustomization.yaml", "resources: [../loop]\n"),
                ("loop/kustomization.yaml", "resources: [../apps]\n"),
            ],
            &["loop"],
        ),
        (
            &[(
                "apps/s.yaml",
                "apiVersion: v1\nkind: Secret\nmetadata:\n  name: s\nsops: {mac: x}\n",
            )],
            &["SOPS encrypted", "apps/s.yaml"],
        ),
        (&[("elsewhere.yaml", MAP)], &["kustomization path not found"]),
    ];
    for (files, parts) in cases {
        let got = message(run(files, &spec, None));
        for part in *parts {
            assert!(got.contains(part), "'{part}' is not in: {got}");
        }
    }
    let outside = KustomizationSpec {
        path: Some("../..".into()),
        ..Default::default()
    };
    assert!(message(run(&[("a.yaml", MAP)], &outside, None)).contains("leads out of the repository"));
}

#[test]
fn substitution_is_strict_keeps_types_and_spares_objects_that_opt_out() {
    let text = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: ${name}\nimmutable: ${flag}\ndata:\n  quoted: \"${number}\"\n  kept: $${name}\n---\napiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: raw\n  annotations:\n    kustomize.toolkit.fluxcd.io/substitute: disabled\ndata:\n  script: ${undefined}\n";
    let spec = KustomizationSpec {
        post_build: Some(PostBuild::default()),
        ..Default::default()
    };
    let variables = |pairs: &[(&str, &str)]| {
        Variables(
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_string(), (*v).to_string()))
                .collect(),
        )
    };
    let all = variables(&[("name", "one"), ("flag", "true"), ("number", "5")]);
    let built = run(&[("a.yaml", text)], &spec, Some(&all)).unwrap();
    let objects = plain(&built);
    assert_eq!(objects["ConfigMap/one"]["immutable"], Value::Bool(true));
    assert_eq!(objects["ConfigMap/one"]["data"]["kept"], "${name}");
    assert_eq!(objects["ConfigMap/raw"]["data"]["script"], "${undefined}");
    let got = message(run(
        &[("a.yaml", text)],
        &spec,
        Some(&variables(&[("name", "one")])),
    ));
    assert!(
        got.contains(
            "envsubst error: variable substitution failed: variable not set (strict mode): \"number\""
        ) || got.contains("\"flag\""),
        "{got}"
    );
    assert!(got.contains("a.yaml:1"), "{got}");
    let untouched = run(&[("a.yaml", text)], &spec, Some(&Variables::default())).unwrap();
    assert!(
        plain(&untouched).contains_key("ConfigMap/${name}"),
        "without variables nothing is substituted"
    );
}

/// Encrypted with the real sops; the values and the key are those of the tests of `serin-sops`.
fn encrypted(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../sops/tests/data")
        .join(name);
    std::fs::read_to_string(&path).unwrap()
}

#[test]
fn encrypted_objects_files_and_patches_are_opened_with_the_keys_of_the_secret() {
    let secret = encrypted("regex.yaml");
    let nested = base64::Engine::encode(
        &base64::engine::general_purpose::STANDARD,
        encrypted("values.json"),
    );
    let holder = format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: holder}}\ndata: {{conf.json: {nested}, plain: dg==}}\n"
    );
    let env = encrypted("values.env");
    let files = [
        (
            "kustomization.yaml",
            "namespace: prod\ncommonLabels: {team: web}\nresources: [secret.yaml, holder.yaml]\nsecretGenerator:\n- {name: env, envs: [values.env], options: {disableNameSuffixHash: true}}\n",
        ),
        ("secret.yaml", secret.as_str()),
        ("holder.yaml", holder.as_str()),
        ("values.env", env.as_str()),
    ];
    let (_dir, snapshot) = snapshot(&files, None, &[]);
    let spec = KustomizationSpec::default();
    let key_file = encrypted("key.txt");
    let decryption = decryption::Decryption::from_secret([
        ("one.agekey", key_file.as_bytes()),
        ("note", b"\xff".as_slice()),
    ])
    .unwrap();
    let built = build(&snapshot, &key(), &spec, None, Some(&decryption)).unwrap();
    let objects = plain(&built);
    let creds = &objects["Secret/prod/creds"];
    assert_eq!(creds["data"]["user"], "YWRtaW4=");
    assert_eq!(
        creds["metadata"]["namespace"], "prod",
        "kustomize may change what is not encrypted"
    );
    assert!(creds.get("sops").is_none());
    assert_eq!(objects["Secret/prod/env"]["data"]["A"], "MQ==");
    let conf = objects["Secret/prod/holder"]["data"]["conf.json"]
        .as_str()
        .unwrap();
    let conf = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, conf).unwrap();
    assert!(String::from_utf8(conf).unwrap().contains("\"plain\""));
    assert_eq!(objects["Secret/prod/holder"]["data"]["plain"], "dg==");

    let without = message(build(&snapshot, &key(), &spec, None, None));
    assert!(
        without.contains("configuring decryption is required for this secret"),
        "{without}"
    );
    let none = decryption::Decryption::default();
    let wrong = message(build(&snapshot, &key(), &spec, None, Some(&none)));
    assert!(wrong.contains("it is encrypted for age1"), "{wrong}");
    assert_ne!(
        recipe(&key(), &spec, None, Some(&decryption)),
        recipe(&key(), &spec, None, Some(&none)),
        "other keys, another build"
    );
}

// ---- Flux's own test data ----

fn shared(path: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/data/flux")
        .join(path);
    if !root.exists() {
        eprintln!("SKIPPED: Flux's build data {path}, ../shared is not here");
        return None;
    }
    Some(root)
}

fn files_below(root: &Path) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                out.push((path.strip_prefix(root).unwrap().display().to_string(), text));
            }
        }
    }
    out
}

fn build_shared(
    root: &Path,
    path: &str,
    spec: &KustomizationSpec,
    variables: Option<&Variables>,
) -> Result<Built, Error> {
    let files = files_below(root);
    let files: Vec<(&str, &str)> = files.iter().map(|(p, t)| (p.as_str(), t.as_str())).collect();
    let spec = KustomizationSpec {
        path: Some(path.into()),
        ..spec.clone()
    };
    run(&files, &spec, variables)
}

fn documents(text: &str) -> BTreeMap<String, Value> {
    let objects = serin_manifests::parse_documents(text, "expected").unwrap();
    objects
        .iter()
        .map(|o| (o.id().to_string(), o.to_json().unwrap()))
        .collect()
}

fn spec_of(text: &str) -> KustomizationSpec {
    let text = text.trim_start_matches("---\n");
    let objects = serin_manifests::parse_documents(text, "kustomization").unwrap();
    let mut value = objects[0].to_json().unwrap();
    value["apiVersion"] = "kustomize.toolkit.fluxcd.io/v1".into();
    serde_json::from_value::<Kustomization>(value).unwrap().spec
}

#[test]
fn builds_of_fluxs_kustomize_package_give_its_expected_objects() {
    let Some(root) = shared("pkg/kustomize/testdata") else {
        return;
    };
    let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap();
    let expected = documents(&read("kustomization_expected.yaml"));
    assert_eq!(
        plain(&build_shared(&root, "resources", &spec_of(&read("kustomization.yaml")), None).unwrap()),
        expected
    );

    let spec = spec_of(&read("kustomization_varsub.yaml"));
    let mut variables: BTreeMap<String, String> = documents(&read("configmap.yaml")).values().next().unwrap()
        ["data"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(k, v)| (k.clone(), v.as_str().unwrap().to_string()))
        .collect();
    variables.extend(spec.post_build.clone().unwrap().substitute);
    let expected = documents(&read("kustomization_varsub_expected.yaml"));
    assert_eq!(
        plain(&build_shared(&root, "resources", &spec, Some(&Variables(variables))).unwrap()),
        expected
    );

    let partial = Variables([("cluster_region".into(), "eu".into())].into());
    let with = KustomizationSpec {
        post_build: Some(PostBuild::default()),
        ..Default::default()
    };
    let got = message(build_shared(&root, "varsubstrict", &with, Some(&partial)));
    assert!(
        got.contains("variable not set (strict mode): \"missing\""),
        "{got}"
    );
    let always = KustomizationSpec {
        post_build: Some(PostBuild {
            substitute_strategy: Some(SubstituteStrategy::Always),
            ..Default::default()
        }),
        ..Default::default()
    };
    let built = build_shared(&root, "varsubalways", &always, Some(&Variables::default())).unwrap();
    assert_eq!(
        plain(&built)["ConfigMap/apps/app-vars-always"]["data"]["region"],
        "eu-central-1"
    );
    assert!(
        build_shared(&root, "noResources", &with, None).is_err()
            || build_shared(&root, "noResources", &with, None)
                .unwrap()
                .objects
                .is_empty()
    );
}

#[test]
fn builds_of_the_flux_cli_give_its_recorded_results() {
    let Some(root) = shared("flux2/cmd/flux/testdata/build-kustomization") else {
        return;
    };
    let spec = spec_of(
        &std::fs::read_to_string(root.join("podinfo-kustomization.yaml"))
            .unwrap()
            .replace("{{ .fluxns }}", "flux-system"),
    );
    let variables = Variables(spec.post_build.clone().unwrap().substitute);
    // The other directories need files that are not part of the test data (encrypted ones, cluster.json).
    let expected = std::fs::read_to_string(root.join("podinfo-without-service-result.yaml")).unwrap();
    let built = build_shared(&root, "delete-service", &spec, Some(&variables)).unwrap();
    let got: BTreeMap<String, Value> = built
        .objects
        .iter()
        .map(|o| (o.id.to_string(), o.value.clone()))
        .collect();
    assert_eq!(got, documents(&expected.replace("{{ .fluxns }}", "flux-system")));
}
