//! The figures that this crate has to reach, measured against an API server in the same process (whose CPU is counted
//! too): `cargo bench -p serin-gitops`. Prints medians of [`RUNS`] runs.

#![allow(clippy::unwrap_used, reason = "a measurement stops at the first surprise")]

use std::time::{Duration, Instant};

use kube::Api;
use kube::api::PostParams;
use serde_json::{Value, json};
use serin_apiserver::ApiServer;
use serin_gitops::{Context, Moment, What};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const RUNS: usize = 5;
const NS: &str = "flux-system";

/// User and system time of this process; Linux counts in hundredths of a second.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks: u64 = [11, 12]
        .iter()
        .filter_map(|i| fields.get(*i)?.parse::<u64>().ok())
        .sum();
    Duration::from_millis(ticks * 10)
}

fn median(mut values: Vec<Duration>) -> Duration {
    values.sort();
    values[values.len() / 2]
}

struct Bench {
    client: kube::Client,
    repo: git2::Repository,
    moments: mpsc::Receiver<Moment>,
    _dir: tempfile::TempDir,
    _stop: tokio_util::sync::DropGuard,
    _server: ApiServer,
}

impl Bench {
    async fn start() -> Self {
        let server = ApiServer::builder().build().await.unwrap();
        let client = serin_kit::client::over_service(server.service());
        let definitions = Api::all(client.clone());
        for definition in serin_crds::definitions() {
            definitions
                .create(&PostParams::default(), &definition)
                .await
                .unwrap();
            let name = definition.metadata.name.clone().unwrap();
            let established = kube::runtime::conditions::is_crd_established();
            kube::runtime::wait::await_condition(definitions.clone(), &name, established)
                .await
                .unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let repo = git2::Repository::init_bare(dir.path().join("repo")).unwrap();
        let (send, moments) = mpsc::channel(4096);
        let cancel = CancellationToken::new();
        let context = Context {
            timeline: Some(send),
            ..Context::new(client.clone(), dir.path().join("cache"))
        };
        tokio::spawn(serin_gitops::run(context, cancel.clone()));
        let bench = Self {
            client,
            repo,
            moments,
            _dir: dir,
            _stop: cancel.drop_guard(),
            _server: server,
        };
        for name in [NS, "prod"] {
            bench
                .create("v1", "Namespace", "namespaces", None, name, json!({}))
                .await;
        }
        bench
    }

    async fn create(
        &self,
        api_version: &str,
        kind: &str,
        plural: &str,
        namespace: Option<&str>,
        name: &str,
        rest: Value,
    ) {
        let mut object = json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": namespace}});
        object
            .as_object_mut()
            .unwrap()
            .extend(rest.as_object().unwrap().clone());
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let resource = kube::core::ApiResource {
            group: group.into(),
            version: version.into(),
            api_version: api_version.into(),
            kind: kind.into(),
            plural: plural.into(),
        };
        let api: Api<kube::core::DynamicObject> = match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        };
        api.create(&PostParams::default(), &serde_json::from_value(object).unwrap())
            .await
            .unwrap();
    }

    async fn source(&self) {
        let url = self.repo.path().display().to_string();
        let spec = json!({"spec": {"url": url, "interval": "1m", "ref": {"branch": "main"}}});
        self.create(
            "source.toolkit.fluxcd.io/v1",
            "GitRepository",
            "gitrepositories",
            Some(NS),
            "app",
            spec,
        )
        .await;
    }

    async fn kustomization(&self, name: &str, depends_on: Option<&str>) {
        let depends: Vec<Value> = depends_on.iter().map(|d| json!({"name": d})).collect();
        let spec = json!({"spec": {"interval": "1m", "prune": true, "path": format!("apps/{name}"), "dependsOn": depends,
            "sourceRef": {"kind": "GitRepository", "name": "app"}}});
        self.create(
            "kustomize.toolkit.fluxcd.io/v1",
            "Kustomization",
            "kustomizations",
            Some(NS),
            name,
            spec,
        )
        .await;
    }

    /// Commits four ConfigMaps per application; `changed` ones get a new value.
    fn push(&self, apps: usize, value: &dyn Fn(usize) -> usize) -> String {
        let mut index = git2::Index::new().unwrap();
        for app in 0..apps {
            for part in 0..4 {
                let content = format!(
                    "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: app-{app}-{part}\n  namespace: prod\ndata:\n  value: \"{}\"\n",
                    value(app)
                );
                let time = git2::IndexTime::new(0, 0);
                let id = self.repo.blob(content.as_bytes()).unwrap();
                let path = format!("apps/app-{app}/part-{part}.yaml").into_bytes();
                index
                    .add(&git2::IndexEntry {
                        ctime: time,
                        mtime: time,
                        dev: 0,
                        ino: 0,
                        mode: 0o100_644,
                        uid: 0,
                        gid: 0,
                        file_size: 0,
                        id,
                        flags: 0,
                        flags_extended: 0,
                        path,
                    })
                    .unwrap();
            }
        }
        let tree = self
            .repo
            .find_tree(index.write_tree_to(&self.repo).unwrap())
            .unwrap();
        let parent = self
            .repo
            .find_reference("refs/heads/main")
            .ok()
            .map(|r| r.peel_to_commit().unwrap());
        let parents: Vec<&git2::Commit<'_>> = parent.iter().collect();
        let who = git2::Signature::now("a", "a@b").unwrap();
        let id = self
            .repo
            .commit(Some("refs/heads/main"), &who, &who, "change", &tree, &parents)
            .unwrap();
        format!("main@sha1:{id}")
    }

    /// When the first moment of a kind came for a revision.
    async fn when(&mut self, revision: &str, fits: impl Fn(&Moment) -> bool) -> Instant {
        while let Some(moment) = self.moments.recv().await {
            if moment.revision == revision && fits(&moment) {
                return Instant::now();
            }
        }
        unreachable!("the controllers ended")
    }

    async fn ready(&mut self, revision: &str, count: usize) -> Instant {
        let mut at = Instant::now();
        for _ in 0..count {
            at = self.when(revision, |m| m.what == What::Ready).await;
        }
        at
    }
}

async fn one() {
    let mut bench = Bench::start().await;
    let first = bench.push(1, &|_| 0);
    bench.source().await;
    bench.kustomization("app-0", None).await;
    bench.ready(&first, 1).await;
    let (mut seen, mut applied) = (Vec::new(), Vec::new());
    for run in 1..=RUNS {
        let revision = bench.push(1, &|_| run);
        let start = Instant::now();
        seen.push(
            bench
                .when(&revision, |m| matches!(m.what, What::RevisionSeen { .. }))
                .await
                - start,
        );
        applied.push(
            bench
                .when(&revision, |m| matches!(m.what, What::Applied { .. }))
                .await
                - start,
        );
        bench.ready(&revision, 1).await;
    }
    println!(
        "push -> revision seen                      {:>9.1?}   (goal 100 ms)",
        median(seen)
    );
    println!(
        "push -> applied, one Kustomization         {:>9.1?}   (goal 150 ms)",
        median(applied)
    );
}

async fn one_of_many(many: usize) {
    let mut bench = Bench::start().await;
    let first = bench.push(many, &|_| 0);
    bench.source().await;
    let start = Instant::now();
    for app in 0..many {
        bench.kustomization(&format!("app-{app}"), None).await;
    }
    let all = bench.ready(&first, many).await - start;
    println!("{many} x 4 objects from nothing              {all:>9.1?}");
    let (mut applied, mut used, mut noted) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=RUNS {
        let revision = bench.push(many, &|app| if app == many - 1 { run } else { 0 });
        let (start, before) = (Instant::now(), cpu());
        let mut ready = 0;
        while ready < many {
            let Some(moment) = bench.moments.recv().await else {
                break;
            };
            match &moment.what {
                What::Applied { configured, .. } if !configured.is_empty() => applied.push(start.elapsed()),
                What::Ready if moment.revision == revision => ready += 1,
                _ => {}
            }
        }
        noted.push(start.elapsed());
        used.push(cpu().saturating_sub(before));
    }
    println!(
        "push, 1 of {many} changes -> applied          {:>9.1?}   (goal 250 ms)",
        median(applied)
    );
    println!(
        "  CPU of it, all noted, API server included {:>8.1?}   (goal 200 ms)",
        median(used)
    );
    println!(
        "  all {many} say the new revision            {:>9.1?}",
        median(noted)
    );
    let before = cpu();
    let window = Duration::from_secs(65);
    tokio::time::sleep(window).await;
    let share = (cpu().saturating_sub(before)).as_secs_f64() / window.as_secs_f64() * 100.0;
    println!("{many} at rest, interval 1 m                 {share:>8.2} %   (goal 1 %)");
}

async fn chain() {
    let mut bench = Bench::start().await;
    let first = bench.push(5, &|_| 0);
    bench.source().await;
    for app in 0..5usize {
        let before = app.checked_sub(1).map(|b| format!("app-{b}"));
        bench
            .kustomization(&format!("app-{app}"), before.as_deref())
            .await;
    }
    bench.ready(&first, 5).await;
    let mut times = Vec::new();
    for run in 1..=RUNS {
        let revision = bench.push(5, &|_| run);
        let start = Instant::now();
        times.push(bench.ready(&revision, 5).await - start);
    }
    println!(
        "chain of 5 by dependsOn, all applied       {:>9.1?}   (goal 1 s)",
        median(times)
    );
}

#[tokio::main]
async fn main() {
    one().await;
    chain().await;
    one_of_many(200).await;
}
