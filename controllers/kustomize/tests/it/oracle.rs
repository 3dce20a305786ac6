//! The kustomize that is built into kubectl, where it is installed, as a second opinion on a tree with a bit of everything.

use std::process::Command;

use serin_kustomize::{Options, build, dir::DirTree};

/// Features whose output is the same from kustomize 5.0 on.
const FILES: &[(&str, &str)] = &[
    (
        "overlay/kustomization.yaml",
        "namespace: prod\nnamePrefix: p-\nnameSuffix: -s\nresources: [../base]\ncommonAnnotations: {note: \"true\"}\n\
         labels:\n- pairs: {team: web}\n  includeSelectors: true\nimages:\n- {name: nginx, newTag: \"2\"}\nreplicas:\n- {name: web, count: 4}\n\
         secretGenerator:\n- {name: creds, literals: [u=v]}\npatches:\n- path: p.yaml\n- target: {kind: Service}\n  patch: |-\n    - {op: add, path: /spec/ports/0/port, value: 81}\n\
         replacements:\n- source: {kind: ConfigMap, name: settings, fieldPath: data.host}\n  targets:\n  - select: {kind: Deployment}\n    fieldPaths: [spec.template.spec.containers.*.env.0.value]\n",
    ),
    (
        "overlay/p.yaml",
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  template:\n    spec:\n      containers:\n      - name: side\n        image: busybox\n        env: [{name: H, value: x}]\n      - name: web\n        args: [\"--x\"]\n",
    ),
    (
        "base/kustomization.yaml",
        "resources: [all.yaml]\nconfigMapGenerator:\n- name: settings\n  literals: [host=h.example.com, long=yes]\n",
    ),
    (
        "base/all.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {app: web}\n  ports: [{port: 80}]\n---\n\
         apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  selector: {matchLabels: {app: web}}\n  template:\n    metadata: {labels: {app: web}}\n    spec:\n      serviceAccountName: sa\n      containers:\n      - name: web\n        image: nginx:1\n        env: [{name: H, value: x}]\n        envFrom: [{configMapRef: {name: settings}}, {secretRef: {name: creds}}]\n---\n\
         apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: sa}\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {name: rb}\nroleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}\nsubjects:\n- {kind: ServiceAccount, name: sa, namespace: default}\n- {kind: ServiceAccount, name: default, namespace: x}\n",
    ),
];

#[test]
fn kubectl_prints_the_same() {
    if Command::new("kubectl")
        .args(["version", "--client"])
        .output()
        .is_err()
    {
        eprintln!("SKIPPED: kubectl is not here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (path, content) in FILES {
        let full = dir.path().join(path);
        std::fs::create_dir_all(full.parent().unwrap()).unwrap();
        std::fs::write(full, content).unwrap();
    }
    let output = Command::new("kubectl")
        .arg("kustomize")
        .arg(dir.path().join("overlay"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let ours =
        build(&DirTree::new(dir.path()), "overlay", &Options::default()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(ours.to_yaml().unwrap(), String::from_utf8_lossy(&output.stdout));
}
