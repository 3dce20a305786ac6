//! Builds of 1,000, 4,000 and 16,000 objects with an ordinary overlay (namespace, prefix, labels, image, JSON patch, generator),
//! and, where kubectl is installed and asked for (`BENCH_KUBECTL=1`: it takes minutes), `kubectl kustomize` over the same
//! files in the same run. The peak memory of the whole process is printed last.
//!
//! `cargo bench -p serin-kustomize`

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serin_kustomize::{Options, build, dir::DirTree};

fn app(i: usize) -> String {
    let mut out = String::new();
    let _ = write!(
        out,
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: app{i}}}\nspec:\n  replicas: 2\n  selector: {{matchLabels: {{app: app{i}}}}}\n\
         \x20 template:\n    metadata: {{labels: {{app: app{i}}}}}\n    spec:\n      serviceAccountName: app{i}\n      containers:\n      - name: main\n\
         \x20       image: registry.example.com/team/app:1.0\n        args: [--listen, \":8080\"]\n        ports: [{{containerPort: 8080, name: http}}]\n\
         \x20       env:\n        - name: COLOR\n          valueFrom: {{configMapKeyRef: {{name: app{i}, key: color}}}}\n\
         \x20       envFrom: [{{configMapRef: {{name: app{i}}}}}]\n        resources: {{limits: {{cpu: 100m, memory: 128Mi}}}}\n\
         \x20       volumeMounts: [{{name: conf, mountPath: /etc/conf}}]\n      volumes: [{{name: conf, configMap: {{name: app{i}}}}}]\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: app{i}}}\nspec:\n  selector: {{app: app{i}}}\n  ports: [{{port: 80, targetPort: http}}]\n---\n\
         apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: app{i}}}\n---\n\
         apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: app{i}}}\ndata:\n  color: green\n  conf: |\n    line one\n    line two: {i}\n"
    );
    out
}

const OVERLAY: &str = "resources: [../base]\nnamePrefix: prod-\nnamespace: prod\nlabels:\n- pairs: {team: web}\n  includeSelectors: true\n\
images:\n- {name: registry.example.com/team/app, newTag: \"2.0\"}\npatches:\n- target: {kind: Deployment}\n  patch: |-\n    - {op: replace, path: /spec/replicas, value: 3}\n\
configMapGenerator:\n- {name: extra, literals: [a=b]}\n";

fn write_tree(dir: &Path, objects: usize) -> std::io::Result<()> {
    std::fs::create_dir_all(dir.join("base"))?;
    std::fs::create_dir_all(dir.join("overlay"))?;
    let mut list = String::from("resources:\n");
    for i in 0..objects / 4 {
        std::fs::write(dir.join(format!("base/app{i}.yaml")), app(i))?;
        let _ = writeln!(list, "- app{i}.yaml");
    }
    std::fs::write(dir.join("base/kustomization.yaml"), list)?;
    std::fs::write(dir.join("overlay/kustomization.yaml"), OVERLAY)
}

fn main() -> std::io::Result<()> {
    let with_kubectl = std::env::var_os("BENCH_KUBECTL").is_some();
    println!("objects   build + print   per object   kubectl kustomize");
    for objects in [1_000, 4_000, 16_000] {
        let dir = tempfile::tempdir()?;
        write_tree(dir.path(), objects)?;
        let tree = DirTree::new(dir.path());
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let start = Instant::now();
            let text = build(&tree, "overlay", &Options::default()).map(|b| b.to_yaml().map(|t| t.len()));
            assert!(
                matches!(text, Ok(Ok(n)) if n > 0),
                "the benchmark tree must build"
            );
            best = best.min(start.elapsed().as_secs_f64());
        }
        let kubectl = if with_kubectl && objects <= 4_000 {
            let start = Instant::now();
            match Command::new("kubectl")
                .arg("kustomize")
                .arg(dir.path().join("overlay"))
                .output()
            {
                Ok(out) if out.status.success() => format!("{:.2} s", start.elapsed().as_secs_f64()),
                _ => "-".into(),
            }
        } else {
            "-".into()
        };
        println!(
            "{objects:>7}   {:>10.1} ms   {:>7.1} us   {kubectl}",
            best * 1e3,
            best * 1e6 / objects as f64
        );
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines().filter(|l| l.starts_with("VmHWM")) {
        println!("{line}");
    }
    Ok(())
}
