//! The figures of the engine.
//!
//! 1. Builds of 1,000, 4,000 and 16,000 objects with an ordinary overlay (namespace, prefix, labels, image, JSON patch,
//!    generator), and the peak memory of a process that builds 4,000.
//! 2. The real directories of the shared data: median over them, process start included.
//! 3. A monorepo of 1,000 directories in which one file changes: what is built again, by the read sets.
//!
//! `BENCH_KUBECTL=1` lets `kubectl kustomize` take part in the same run (it takes minutes).
//!
//! `cargo bench -p serin-kustomize`

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serin_kustomize::{LoadRestrictor, MemoryTree, Options, build, dir::DirTree};

/// Set for the children that build one directory, so that process start and memory are measured as a user meets them.
const CHILD: &str = "SERIN_BENCH_CHILD";

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

/// Builds one directory and prints it, as `serin build` does.
fn child(dir: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    let options = Options {
        load_restrictor: LoadRestrictor::None,
        ..Options::default()
    };
    let text = build(&DirTree::new("/"), dir.trim_start_matches('/'), &options)
        .map_err(|e| e.to_string())
        .and_then(|built| built.to_yaml().map_err(|e| e.to_string()));
    match text {
        Ok(text) => std::io::stdout().write_all(text.as_bytes()),
        Err(e) => Err(std::io::Error::other(e)),
    }
}

/// Seconds and peak resident KiB of a process; the latter is sampled while it runs.
fn measure(mut command: Command) -> Option<(f64, u64)> {
    let start = Instant::now();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        peak = peak.max(
            line.and_then(|l| l.trim().trim_end_matches(" kB").parse().ok())
                .unwrap_or(0),
        );
        if let Some(status) = child.try_wait().ok()? {
            return status.success().then(|| (start.elapsed().as_secs_f64(), peak));
        }
        std::thread::yield_now();
    }
}

fn ours(dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap_or_default());
    command.env(CHILD, dir);
    command
}

fn kubectl(dir: &Path) -> Command {
    let mut command = Command::new("kubectl");
    command
        .args(["kustomize", "--load-restrictor", "LoadRestrictionsNone"])
        .arg(dir);
    command
}

fn main() -> std::io::Result<()> {
    if let Ok(dir) = std::env::var(CHILD) {
        return child(&dir);
    }
    let with_kubectl = std::env::var_os("BENCH_KUBECTL").is_some();
    objects(with_kubectl)?;
    real_directories(with_kubectl)?;
    monorepo();
    Ok(())
}

fn objects(with_kubectl: bool) -> std::io::Result<()> {
    println!(
        "objects   build + print   per object   process   peak memory   kubectl kustomize   its peak memory"
    );
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
        let overlay = dir.path().join("overlay");
        let shown = |measured: Option<(f64, u64)>| match measured {
            Some((seconds, peak)) => (format!("{seconds:.3} s"), format!("{} MB", peak / 1024)),
            None => ("-".to_owned(), "-".to_owned()),
        };
        let (process, memory) = shown(measure(ours(&overlay)));
        let (theirs, their_memory) = if with_kubectl && objects <= 4_000 {
            shown(measure(kubectl(&overlay)))
        } else {
            shown(None)
        };
        println!(
            "{objects:>7}   {:>10.1} ms   {:>7.1} us   {process:>7}   {memory:>11}   {theirs:>17}   {their_memory:>15}",
            best * 1e3,
            best * 1e6 / objects as f64
        );
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Every fourth of the real directories: what a user waits for one build.
fn real_directories(with_kubectl: bool) -> std::io::Result<()> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/kustomize");
    let Ok(index) = std::fs::read_to_string(root.join("index.tsv")) else {
        println!("SKIPPED: real directories, ../shared is not here");
        return Ok(());
    };
    let root = root.canonicalize()?;
    let dirs: Vec<PathBuf> = (index.lines().skip(1))
        .filter(|line| !line.starts_with("t-"))
        .filter_map(|line| line.split('\t').nth(1))
        .step_by(4)
        .map(|dir| root.join(dir))
        .collect();
    let (mut mine, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for dir in &dirs {
        let runs = (0..3)
            .filter_map(|_| measure(ours(dir)))
            .map(|(seconds, _)| seconds);
        let one = median(runs.collect());
        mine.push(one);
        if with_kubectl && let Some((seconds, _)) = measure(kubectl(dir)) {
            theirs.push(seconds);
            ratios.push(seconds / one);
        }
    }
    println!(
        "{} real directories, process start included: median {:.1} ms",
        dirs.len(),
        median(mine) * 1e3
    );
    if !ratios.is_empty() {
        println!(
            "  kubectl kustomize: median {:.0} ms; median of the ratios {:.0}",
            median(theirs) * 1e3,
            median(ratios)
        );
    }
    Ok(())
}

/// 100 bases and 1,000 overlays, 10 of each base.
fn monorepo() {
    let mut tree = MemoryTree::new();
    for base in 0..100 {
        tree.add(
            format!("bases/{base}/kustomization.yaml"),
            "resources: [app.yaml]\n",
        );
        tree.add(format!("bases/{base}/app.yaml"), app(base));
    }
    for i in 0..1_000 {
        tree.add(
            format!("apps/{i}/kustomization.yaml"),
            format!(
                "resources: [../../bases/{}]\nnamePrefix: a{i}-\npatches: [{{path: p.yaml}}]\n",
                i % 100
            ),
        );
        tree.add(
            format!("apps/{i}/p.yaml"),
            format!(
                "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: app{}}}\nspec: {{replicas: {}}}\n",
                i % 100,
                i % 7
            ),
        );
    }
    let start = Instant::now();
    let built: Vec<_> = (0..1_000)
        .filter_map(|i| build(&tree, &format!("apps/{i}"), &Options::default()).ok())
        .collect();
    println!(
        "monorepo of {} directories: all in {:.0} ms",
        built.len(),
        start.elapsed().as_secs_f64() * 1e3
    );
    for (what, path) in [
        ("the patch of one", "apps/500/p.yaml"),
        ("a base of ten", "bases/7/app.yaml"),
        ("a file that nobody reads", "README.md"),
    ] {
        tree.add(
            path,
            if path.ends_with("app.yaml") {
                app(7)
            } else {
                "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: app0}\nspec: {replicas: 9}\n".into()
            },
        );
        let start = Instant::now();
        let again: Vec<usize> = (0..built.len())
            .filter(|i| {
                let read = &built[*i].read_set;
                read.files.contains(path) || read.missing.contains(path)
            })
            .collect();
        let builds = again
            .iter()
            .filter(|i| build(&tree, &format!("apps/{i}"), &Options::default()).is_ok())
            .count();
        println!(
            "  {what} changed: {builds} built again in {:.2} ms",
            start.elapsed().as_secs_f64() * 1e3
        );
    }
}
