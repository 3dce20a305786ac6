//! A cluster with our kinds, the controllers running in it, and repositories to push to.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::runtime::watcher;
use kube::{Client, Resource};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use serin_apiserver::ApiServer;
use serin_crds::flux::kustomize::Kustomization;
use serin_crds::flux::source::GitRepository;
use serin_gitops::{Context, Moment};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// No step of a test takes nearly this long unless something is broken.
const DEADLINE: Duration = Duration::from_secs(30);
pub(crate) const NS: &str = "flux-system";

pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) moments: mpsc::Receiver<Moment>,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) writes: Arc<Mutex<Vec<String>>>,
    server: ApiServer,
    cancel: CancellationToken,
    controllers: Option<tokio::task::JoinHandle<Result<(), serin_gitops::Error>>>,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let server = ApiServer::builder().build().await.unwrap();
        let writes = Arc::<Mutex<Vec<String>>>::default();
        let noted = writes.clone();
        let client = client_of(&server, move |write| noted.lock().push(write));
        let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
        for definition in serin_crds::definitions() {
            let name = definition.metadata.name.clone().unwrap();
            crds.create(&PostParams::default(), &definition).await.unwrap();
            let established = await_condition(
                crds.clone(),
                &name,
                kube::runtime::conditions::is_crd_established(),
            );
            tokio::time::timeout(DEADLINE, established)
                .await
                .unwrap()
                .unwrap();
        }
        let namespaces: Api<Namespace> = Api::all(client.clone());
        for name in [NS, "prod"] {
            let namespace = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
            namespaces
                .create(&PostParams::default(), &namespace)
                .await
                .unwrap();
        }
        let (_, moments) = mpsc::channel(1);
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Self {
            client,
            moments,
            dir,
            writes,
            server,
            cancel: CancellationToken::new(),
            controllers: None,
        };
        cluster.start_controllers();
        cluster
    }

    pub(crate) fn start_controllers(&mut self) {
        let (timeline, moments) = mpsc::channel(1024);
        self.moments = moments;
        self.cancel = CancellationToken::new();
        let context = Context {
            client: self.client.clone(),
            cache_dir: self.dir.path().join("cache"),
            local_sources: true,
            timeline: Some(timeline),
        };
        self.controllers = Some(tokio::spawn(serin_gitops::run(context, self.cancel.clone())));
    }

    /// Stops the controllers as a crash would: nothing is written on the way out.
    pub(crate) async fn stop_controllers(&mut self) {
        self.cancel.cancel();
        if let Some(task) = self.controllers.take() {
            tokio::time::timeout(DEADLINE, task)
                .await
                .unwrap()
                .unwrap()
                .unwrap();
        }
    }

    pub(crate) async fn stop(mut self) {
        self.stop_controllers().await;
        self.server.shutdown().await;
    }

    /// Another client; `wrote` hears what it writes.
    pub(crate) fn another_client(&self, wrote: impl Fn(String) + Clone + Send + 'static) -> Client {
        client_of(&self.server, wrote)
    }

    pub(crate) fn repository(&self, name: &str) -> Repository {
        let path = self.dir.path().join(name);
        Repository {
            repo: git2::Repository::init_bare(&path).unwrap(),
        }
    }

    pub(crate) async fn create(&self, object: Value) {
        create(&self.client, object).await;
    }

    pub(crate) async fn source(&self, name: &str, repository: &Repository) {
        self.create(json!({
            "apiVersion": "source.toolkit.fluxcd.io/v1", "kind": "GitRepository",
            "metadata": {"name": name, "namespace": NS},
            "spec": {"url": repository.path().display().to_string(), "interval": "10m", "ref": {"branch": "main"}}}))
            .await;
    }

    /// A Kustomization of source `app`; `spec` overrides.
    pub(crate) async fn kustomization(&self, name: &str, spec: Value) {
        let mut all = json!({"interval": "10m", "prune": true, "path": "./deploy", "sourceRef": {"kind": "GitRepository", "name": "app"}});
        all.as_object_mut()
            .unwrap()
            .extend(spec.as_object().unwrap().clone());
        self.create(json!({
            "apiVersion": "kustomize.toolkit.fluxcd.io/v1", "kind": "Kustomization",
            "metadata": {"name": name, "namespace": NS}, "spec": all}))
            .await;
    }

    pub(crate) fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub(crate) async fn config_map(&self, name: &str) -> Option<ConfigMap> {
        self.api::<ConfigMap>("prod").get_opt(name).await.unwrap()
    }

    /// Waits for a state of a Kustomization and gives it.
    pub(crate) async fn ks(
        &self,
        name: &str,
        what: &str,
        done: impl Fn(&Kustomization) -> bool + Clone,
    ) -> Kustomization {
        until(self.api(NS), name, what, move |k: Option<&Kustomization>| {
            k.is_some_and(&done)
        })
        .await
        .unwrap()
    }

    /// Waits until a Kustomization is ready on a revision.
    pub(crate) async fn applied(&self, name: &str, revision: &str) -> Kustomization {
        let revision = revision.to_string();
        self.ks(name, &format!("Ready on {revision}"), move |k| {
            condition(k, "Ready").is_some_and(|(s, r, _)| s == "True" && r == "ReconciliationSucceeded")
                && k.status.as_ref().and_then(|s| s.last_applied_revision.as_deref()) == Some(&revision)
                && k.status.as_ref().and_then(|s| s.observed_generation) == k.metadata.generation
        })
        .await
    }

    /// Waits until a Kustomization is not ready for a reason and gives the message.
    pub(crate) async fn not_ready(&self, name: &str, reason: &str) -> String {
        let reason = reason.to_string();
        let ks = self
            .ks(name, &format!("not Ready with reason {reason}"), move |k| {
                condition(k, "Ready").is_some_and(|(s, r, _)| s == "False" && r == reason)
            })
            .await;
        condition(&ks, "Ready").unwrap().2
    }

    pub(crate) async fn git(
        &self,
        name: &str,
        what: &str,
        done: impl Fn(&GitRepository) -> bool + Clone,
    ) -> GitRepository {
        until(self.api(NS), name, what, move |k: Option<&GitRepository>| {
            k.is_some_and(&done)
        })
        .await
        .unwrap()
    }

    pub(crate) async fn merge<K>(&self, namespace: &str, name: &str, patch: Value) -> K
    where
        K: Resource<Scope = kube::core::NamespaceResourceScope> + DeserializeOwned + Clone + Debug,
        K::DynamicType: Default,
    {
        self.api::<K>(namespace)
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .unwrap()
    }

    /// The next moment of the timeline that fits.
    pub(crate) async fn moment(&mut self, what: &str, fits: impl Fn(&Moment) -> bool) -> Moment {
        let mut seen = Vec::new();
        let next = async {
            while let Some(moment) = self.moments.recv().await {
                if fits(&moment) {
                    return Some(moment);
                }
                seen.push(moment);
            }
            None
        };
        match tokio::time::timeout(DEADLINE, next).await {
            Ok(Some(moment)) => moment,
            _ => panic!("no moment '{what}'; seen: {seen:#?}"),
        }
    }
}

/// A client in this process; `wrote` hears method and path of each request that may write.
fn client_of(server: &ApiServer, wrote: impl Fn(String) + Clone + Send + 'static) -> Client {
    let service = tower::ServiceBuilder::new()
        .map_request(move |request: http::Request<kube::client::Body>| {
            if request.method() != http::Method::GET {
                wrote(format!("{} {}", request.method(), request.uri().path()));
            }
            request
        })
        .service(server.service());
    serin_kit::client::over_service(service)
}

pub(crate) async fn create(client: &Client, object: Value) {
    let object: kube::core::DynamicObject = serde_json::from_value(object).unwrap();
    let types = object.types.clone().unwrap();
    let gvk = kube::core::GroupVersionKind::try_from(&types).unwrap();
    let (resource, _) = kube::discovery::pinned_kind(client, &gvk).await.unwrap();
    let api: Api<kube::core::DynamicObject> = match &object.metadata.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    api.create(&PostParams::default(), &object).await.unwrap();
}

/// Status, reason and message of a condition.
pub(crate) fn condition<K: Conditions>(object: &K, type_: &str) -> Option<(String, String, String)> {
    let found = object.conditions().iter().find(|c| c.type_ == type_)?;
    Some((found.status.clone(), found.reason.clone(), found.message.clone()))
}

pub(crate) trait Conditions {
    fn conditions(&self) -> &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition];
}

impl Conditions for Kustomization {
    fn conditions(&self) -> &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition] {
        self.status
            .as_ref()
            .map(|s| s.conditions.as_slice())
            .unwrap_or_default()
    }
}

impl Conditions for GitRepository {
    fn conditions(&self) -> &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition] {
        self.status
            .as_ref()
            .map(|s| s.conditions.as_slice())
            .unwrap_or_default()
    }
}

/// Waits on a watch until an object is in a state, and prints the last state seen if that never comes.
pub(crate) async fn until<K>(
    api: Api<K>,
    name: &str,
    what: &str,
    done: impl Fn(Option<&K>) -> bool,
) -> Option<K>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let mut last: Option<K> = None;
    let mut watch = std::pin::pin!(watcher::watch_object(api, name));
    let wait = async {
        while let Some(event) = watch.next().await {
            if let Ok(object) = event {
                last = object;
                if done(last.as_ref()) {
                    return true;
                }
            }
        }
        false
    };
    match tokio::time::timeout(DEADLINE, wait).await {
        Ok(true) => last,
        _ => panic!("{name} never was {what}; last seen: {last:#?}"),
    }
}

/// A repository that a test pushes to.
pub(crate) struct Repository {
    repo: git2::Repository,
}

impl Repository {
    pub(crate) fn path(&self) -> &Path {
        self.repo.path()
    }

    /// Commits exactly these files onto `main`; gives the revision.
    pub(crate) fn push(&self, files: &[(&str, &str)]) -> String {
        let mut index = git2::Index::new().unwrap();
        for (path, content) in files {
            let time = git2::IndexTime::new(0, 0);
            let id = self.repo.blob(content.as_bytes()).unwrap();
            let path = path.as_bytes().to_vec();
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
        let who = git2::Signature::now("Ada", "ada@example.com").unwrap();
        let id = self
            .repo
            .commit(Some("refs/heads/main"), &who, &who, "a change", &tree, &parents)
            .unwrap();
        format!("main@sha1:{id}")
    }
}

/// A ConfigMap in `prod` as a manifest.
pub(crate) fn config_map(name: &str, value: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {name}\n  namespace: prod\ndata:\n  key: \"{value}\"\n"
    )
}

/// A Deployment in `prod` as a manifest. Nothing here makes it ready but [`settle`].
pub(crate) fn deployment(name: &str, image: &str) -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: {name}\n  namespace: prod\nspec:\n  selector:\n    matchLabels: {{app: {name}}}\n  template:\n    metadata:\n      labels: {{app: {name}}}\n    spec:\n      containers:\n      - name: app\n        image: {image}\n"
    )
}

/// Plays the workload controllers: the Deployment's current generation is rolled out.
pub(crate) async fn settle(cluster: &Cluster, name: &str) {
    use k8s_openapi::api::apps::v1::Deployment;
    let api: Api<Deployment> = cluster.api("prod");
    let deployment = api.get(name).await.unwrap();
    let status = json!({"status": {"observedGeneration": deployment.metadata.generation, "replicas": 1, "updatedReplicas": 1,
        "readyReplicas": 1, "availableReplicas": 1, "conditions": [
            {"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable"},
            {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}]}});
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(status))
        .await
        .unwrap();
}
