//! Properties that must hold for every input.

use proptest::prelude::*;
use serin_kustomize::{MemoryTree, Options, Reorder, build};

/// A small application: ConfigMaps and Secrets, and Deployments that refer to some of them by name.
#[derive(Debug, Clone)]
struct App {
    configs: Vec<String>,
    secrets: Vec<String>,
    /// For each deployment, the names it refers to.
    deployments: Vec<(String, Vec<String>)>,
    prefix: String,
    suffix: String,
    namespace: Option<String>,
    generated: bool,
}

fn name() -> impl Strategy<Value = String> {
    "[a-d][a-e0-2]{0,2}"
}

fn names() -> impl Strategy<Value = Vec<String>> {
    prop::collection::btree_set(name(), 0..5).prop_map(|s| s.into_iter().collect())
}

fn app() -> impl Strategy<Value = App> {
    let deployments = prop::collection::btree_map(name(), prop::collection::vec(name(), 0..4), 0..4);
    (
        names(),
        names(),
        deployments,
        "[x-z]{0,2}",
        "[x-z]{0,2}",
        prop::option::of("ns[a-c]"),
        any::<bool>(),
    )
        .prop_map(
            |(configs, secrets, deployments, prefix, suffix, namespace, generated)| App {
                configs,
                secrets,
                deployments: deployments.into_iter().collect(),
                prefix,
                suffix,
                namespace,
                generated,
            },
        )
}

impl App {
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        for c in self.configs.iter().filter(|_| !self.generated) {
            files.push(format!(
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {c}}}\ndata: {{k: v}}\n"
            ));
        }
        for s in &self.secrets {
            files.push(format!("apiVersion: v1\nkind: Secret\nmetadata: {{name: {s}}}\n"));
        }
        for (d, refs) in &self.deployments {
            let from: String = refs
                .iter()
                .map(|r| {
                    format!("        - configMapRef: {{name: {r}}}\n        - secretRef: {{name: {r}}}\n")
                })
                .collect();
            files.push(format!(
                "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: {d}}}\nspec:\n  template:\n    spec:\n      containers:\n      - name: c\n        image: i:1\n        envFrom:\n{from}"
            ));
        }
        files
    }

    fn tree(&self, order: &[usize]) -> MemoryTree {
        let files = self.files();
        let mut tree = MemoryTree::new();
        let mut base = String::from("metadata: {name: base}\nresources:\n");
        for (i, text) in files.iter().enumerate() {
            tree.add(format!("base/{i}.yaml"), text);
        }
        for i in order {
            base.push_str(&format!("- {i}.yaml\n"));
        }
        if self.generated {
            base.push_str("configMapGenerator:\n");
            for c in &self.configs {
                base.push_str(&format!("- name: {c}\n  literals: [k=v]\n"));
            }
        }
        tree.add("base/kustomization.yaml", base);
        let namespace = self
            .namespace
            .as_ref()
            .map_or(String::new(), |n| format!("namespace: {n}\n"));
        let overlay = format!(
            "namePrefix: '{}'\nnameSuffix: '{}'\n{namespace}resources: [../base]\n",
            self.prefix, self.suffix
        );
        tree.add("overlay/kustomization.yaml", overlay);
        tree
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_reference_points_to_an_object_or_is_untouched(app in app()) {
        let order: Vec<usize> = (0..app.files().len()).collect();
        let built = build(&app.tree(&order), "overlay", &Options::default()).unwrap();
        for kind in ["ConfigMap", "Secret"] {
            let field = if kind == "ConfigMap" { "configMapRef" } else { "secretRef" };
            let existing: Vec<&str> = built.objects.iter().filter(|o| o.kind() == kind).map(|o| o.name()).collect();
            let known = if kind == "ConfigMap" { &app.configs } else { &app.secrets };
            for object in built.objects.iter().filter(|o| o.kind() == "Deployment") {
                let json = object.to_json().unwrap();
                let original: &Vec<String> = &app.deployments.iter().find(|(d, _)| {
                    object.name() == format!("{}{d}{}", app.prefix, app.suffix)
                }).unwrap().1;
                let from = json.pointer("/spec/template/spec/containers/0/envFrom").and_then(|v| v.as_array()).cloned().unwrap_or_default();
                let found: Vec<&str> = from.iter().filter_map(|e| e.get(field)?.get("name")?.as_str()).collect();
                prop_assert_eq!(found.len(), original.len());
                for (now, before) in found.iter().zip(original) {
                    if known.contains(before) {
                        prop_assert!(existing.contains(now), "{} became {}, which is none of {:?}", before, now, existing);
                    } else {
                        prop_assert_eq!(now, before);
                    }
                }
            }
        }
    }

    #[test]
    fn the_order_of_independent_files_does_not_matter(app in app(), seed in any::<u64>()) {
        let mut order: Vec<usize> = (0..app.files().len()).collect();
        let straight = build(&app.tree(&order), "overlay", &Options::default()).unwrap().to_yaml().unwrap();
        // A shuffle by a small generator, so that the case can be replayed.
        let mut state = seed | 1;
        for i in (1..order.len()).rev() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            order.swap(i, (state >> 33) as usize % (i + 1));
        }
        let shuffled = build(&app.tree(&order), "overlay", &Options::default()).unwrap().to_yaml().unwrap();
        prop_assert_eq!(straight, shuffled);
    }

    #[test]
    fn a_build_of_a_build_is_the_build(app in app()) {
        let order: Vec<usize> = (0..app.files().len()).collect();
        let once = build(&app.tree(&order), "overlay", &Options::default()).unwrap().to_yaml().unwrap();
        let mut tree = MemoryTree::new();
        tree.add("kustomization.yaml", "resources: [all.yaml]\n").add("all.yaml", &once);
        let twice = build(&tree, "", &Options { reorder: Reorder::None, ..Options::default() }).unwrap();
        prop_assert_eq!(twice.to_yaml().unwrap(), once);
    }

    #[test]
    fn no_kustomization_makes_the_build_panic(kustomization in "[a-zA-Z0-9:\\[\\]{}&*!|>'\"%@`,?# \n-]{0,200}", resource in "\\PC{0,200}") {
        let mut tree = MemoryTree::new();
        tree.add("kustomization.yaml", &kustomization).add("r.yaml", &resource);
        let _ = build(&tree, "", &Options::default());
        tree.add("kustomization.yaml", "resources: [r.yaml]\npatches: [{path: r.yaml}]\nconfigurations: [r.yaml]\n");
        let _ = build(&tree, "", &Options::default());
        tree.add("kustomization.yaml", "transformers: [r.yaml]\ncrds: [r.yaml]\nreplacements: [{path: r.yaml}]\nopenapi: {path: r.yaml}\n");
        let _ = build(&tree, "", &Options::default());
    }
}
