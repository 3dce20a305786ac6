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

/// Small trees, each for something that a port gets wrong. `!` before a name: both must refuse it.
const CASES: &[(&str, &[(&str, &str)])] = &[
    (
        "a replacing directive at the top of a patch has no effect",
        &[
            (
                "kustomization.yaml",
                "resources: [r.yaml]\npatches: [{path: p.yaml}]\n",
            ),
            ("r.yaml", MAP),
            (
                "p.yaml",
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n$patch: replace\ndata: {z: \"1\"}\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {q: \"1\"}\n",
            ),
        ],
    ),
    (
        "!what one document of a patch deletes is gone for the next",
        &[
            (
                "kustomization.yaml",
                "resources: [r.yaml]\npatches: [{path: p.yaml}]\n",
            ),
            ("r.yaml", MAP),
            (
                "p.yaml",
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n$patch: delete\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {q: \"1\"}\n",
            ),
        ],
    ),
    (
        "!a patch may not take the name away",
        &[
            (
                "kustomization.yaml",
                "resources: [r.yaml]\npatches:\n- target: {kind: ConfigMap}\n  patch: '[{\"op\": \"remove\", \"path\": \"/metadata/name\"}]'\n",
            ),
            ("r.yaml", MAP),
        ],
    ),
    (
        "text that starts with a byte order mark is escaped in full",
        &[
            (
                "kustomization.yaml",
                "configMapGenerator:\n- {name: a, files: [f.txt]}\n",
            ),
            ("f.txt", "\u{feff}ab é\tc\"\\ x\n"),
        ],
    ),
    (
        "annotations set as a whole make names before them forgotten",
        &[
            (
                "kustomization.yaml",
                "resources: [base]\nnamePrefix: b-\npatches:\n- target: {kind: ConfigMap}\n  patch: |-\n    - {op: add, path: /metadata/annotations, value: {x: z}}\n",
            ),
            ("base/kustomization.yaml", "resources: [r.yaml]\nnamePrefix: a-\n"),
            (
                "base/r.yaml",
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, envFrom: [{configMapRef: {name: a}}]}]}\n",
            ),
        ],
    ),
    (
        "custom references, labels and images at places of a configuration",
        &[
            (
                "kustomization.yaml",
                "resources: [r.yaml]\nnamePrefix: p-\ncommonLabels: {q: w}\nimages: [{name: i, newTag: '2'}]\nconfigurations: [c.yaml]\n",
            ),
            (
                "r.yaml",
                "apiVersion: ex.com/v1\nkind: Custom\nmetadata: {name: a}\nspec: {secret: s, image: 'i:1', deep: {list: [{ref: s}]}}\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\n",
            ),
            (
                "c.yaml",
                "nameReference:\n- kind: Secret\n  fieldSpecs:\n  - {path: spec/secret, kind: Custom}\n  - {path: spec/deep/list/ref, kind: Custom}\nimages:\n- {path: spec/image, kind: Custom}\ncommonLabels:\n- {path: spec/labels, kind: Custom, create: true}\n",
            ),
        ],
    ),
];

const MAP: &str =
    "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, labels: {x: y}}\ndata: {k: v, h: i}\n";

/// Whether there is a kubectl, and what its kustomize makes of a directory.
fn kubectl(dir: &std::path::Path) -> Option<Result<String, String>> {
    let Ok(output) = Command::new("kubectl").arg("kustomize").arg(dir).output() else {
        eprintln!("SKIPPED: kubectl is not here");
        return None;
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    })
}

fn write(dir: &std::path::Path, files: &[(&str, &str)]) {
    for (path, content) in files {
        let full = dir.join(path);
        std::fs::create_dir_all(full.parent().unwrap()).unwrap();
        std::fs::write(full, content).unwrap();
    }
}

#[test]
fn kubectl_prints_and_refuses_the_same_in_cases_that_ports_get_wrong() {
    for (name, files) in CASES {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), files);
        let Some(theirs) = kubectl(dir.path()) else { return };
        let ours = build(&DirTree::new(dir.path()), "", &Options::default()).map(|b| b.to_yaml().unwrap());
        match (name.strip_prefix('!'), theirs, ours) {
            (None, Ok(theirs), Ok(ours)) => assert_eq!(ours, theirs, "{name}"),
            (Some(_), Err(_), Err(_)) => {}
            (_, theirs, ours) => panic!("{name}: kubectl gives {theirs:?}, we give {ours:?}"),
        }
    }
}

#[test]
fn kubectl_prints_the_same() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), FILES);
    let Some(theirs) = kubectl(&dir.path().join("overlay")) else {
        return;
    };
    let ours =
        build(&DirTree::new(dir.path()), "overlay", &Options::default()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(Ok(ours.to_yaml().unwrap()), theirs);
}
