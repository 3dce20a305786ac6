//! A cluster for one test: API server in this process, controllers, and a node process. Cleared up on drop.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, Namespace, Pod};
use kube::api::{Api, ListParams, PostParams};
use kube::runtime::wait::{Condition, await_condition};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use serin_apiserver::ApiServer;
use serin_workloads::image::ImageSpec;
use serin_workloads::node::NodeConfig;
use tokio_util::sync::CancellationToken;

/// The program that containers of these tests run.
pub const PROCESS: &str = env!("CARGO_BIN_EXE_serin-workloads-process");
/// How long anything may take on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);
pub const NAMESPACE: &str = "t";

pub struct Cluster {
    pub client: Client,
    server: Option<ApiServer>,
    pub state: PathBuf,
    pub config: NodeConfig,
    user: Option<u32>,
    directory: Option<tempfile::TempDir>,
    cancel: CancellationToken,
    controllers: tokio::task::JoinHandle<()>,
}

/// Why such tests cannot run here.
fn obstacle() -> Option<&'static str> {
    let works = std::process::Command::new("unshare")
        .args(["-Urn", "true"])
        .output()
        .is_ok_and(|output| output.status.success());
    (!works).then_some("network namespaces cannot be created here")
}

impl Cluster {
    /// None, with a line that says why, where the machine does not allow it.
    pub async fn start() -> Option<Self> {
        Self::start_as(None).await
    }

    /// With the node running as another user, which needs root for the test itself.
    pub async fn start_as(user: Option<u32>) -> Option<Self> {
        if user.is_some() && !nix::unistd::getuid().is_root() {
            eprintln!("SKIPPED: only root can start a node as another user");
            return None;
        }
        if let Some(reason) = obstacle() {
            eprintln!("SKIPPED: {reason}");
            return None;
        }
        let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".to_owned());
        let _ = tracing_subscriber::fmt()
            .with_test_writer()
            .with_env_filter(filter)
            .try_init();
        let directory = tempfile::Builder::new().prefix("serin-wl-").tempdir().unwrap();
        let state = directory.path().to_owned();
        // Another user need not be able to look into the directory that programs are built in.
        let process = match user {
            None => PROCESS.to_owned(),
            Some(_) => {
                let copy = state.join("process");
                std::fs::copy(PROCESS, &copy).unwrap();
                copy.display().to_string()
            }
        };
        let server = ApiServer::builder()
            .directory(state.join("api"))
            .build()
            .await
            .unwrap();
        let socket = state.join("api.sock");
        server.serve_unix(&socket).await.unwrap();
        let client = serin_kit::client::over_service(server.service());
        let namespaces: Api<Namespace> = Api::all(client.clone());
        create(&namespaces, json!({"metadata": {"name": NAMESPACE}})).await;
        let cancel = CancellationToken::new();
        let controllers = tokio::spawn({
            let (client, cancel) = (client.clone(), cancel.clone());
            async move {
                serin_workloads::controllers::run(client, cancel).await.unwrap();
            }
        });
        let mut config = NodeConfig::new(
            state.clone(),
            socket,
            "serin",
            vec![process.clone(), "shim".to_owned()],
        );
        config.images = vec![
            image("test/serve:*", &process, &["serve"]),
            image("test/sh:*", "/bin/sh", &["-c"]),
        ];
        let cluster = Self {
            client,
            server: Some(server),
            state,
            config,
            user,
            directory: Some(directory),
            cancel,
            controllers,
        };
        cluster.spawn_node();
        Some(cluster)
    }

    pub fn spawn_node(&self) -> i32 {
        let command = match self.user {
            None => vec![PROCESS.to_owned(), "node".to_owned()],
            Some(uid) => {
                let state = self.state.display();
                let script = format!(
                    "chown {uid}:{uid} {state} {state}/api.sock && chown -R {uid}:{uid} {state}/node && \
                     exec setpriv --reuid={uid} --regid={uid} --clear-groups {state}/process node \"$0\""
                );
                vec!["/bin/sh".to_owned(), "-c".to_owned(), script]
            }
        };
        serin_workloads::node::spawn(&self.config, &command, &self.state.join("node.log")).unwrap()
    }

    /// What `kill -9` of `serin up` is to the node: the API server and the controllers are gone from one moment to the
    /// next. They come back over the same directory.
    pub async fn restart_server(&mut self) {
        self.cancel.cancel();
        if let Some(server) = self.server.take() {
            server.shutdown().await;
        }
        let server = ApiServer::builder()
            .directory(self.state.join("api"))
            .build()
            .await
            .unwrap();
        server.serve_unix(&self.state.join("api.sock")).await.unwrap();
        self.client = serin_kit::client::over_service(server.service());
        self.server = Some(server);
        self.cancel = CancellationToken::new();
        let (client, cancel) = (self.client.clone(), self.cancel.clone());
        self.controllers = tokio::spawn(async move {
            serin_workloads::controllers::run(client, cancel).await.unwrap();
        });
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// Creates a pod and returns it once a condition holds.
    pub async fn pod(&self, name: &str, spec: Value, until: impl Condition<Pod>) -> Pod {
        let api: Api<Pod> = self.api();
        create(
            &api,
            json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": spec}),
        )
        .await;
        self.until(&api, name, until).await
    }

    /// Waits for a condition of an object; a failure prints what there is.
    pub async fn until<K>(&self, api: &Api<K>, name: &str, condition: impl Condition<K>) -> K
    where
        K: Resource + Clone + Debug + Send + Sync + DeserializeOwned + serde::Serialize + 'static,
        K::DynamicType: Default,
    {
        let waiting = await_condition(api.clone(), name, condition);
        match tokio::time::timeout(DEADLINE, waiting).await {
            Ok(Ok(Some(object))) => object,
            Ok(Ok(None)) => panic!("{name} is gone"),
            Ok(Err(error)) => panic!("wait for {name}: {error}"),
            Err(_) => {
                let object = api.get(name).await;
                let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(self.client.clone());
                eprintln!(
                    "{}",
                    serde_json::to_string(&nodes.list(&ListParams::default()).await.unwrap()).unwrap()
                );
                panic!(
                    "{name} did not come to what was waited for:\n{}\nevents:\n{}\nnode's log:\n{}",
                    object
                        .map(|o| serde_json::to_string_pretty(&o).unwrap())
                        .unwrap_or_else(|e| e.to_string()),
                    self.events().await,
                    std::fs::read_to_string(self.state.join("node.log")).unwrap_or_default()
                )
            }
        }
    }

    pub async fn gone<K>(&self, api: &Api<K>, name: &str)
    where
        K: Resource + Clone + Debug + Send + DeserializeOwned + 'static,
        K::DynamicType: Default,
    {
        let waiting = await_condition(api.clone(), name, |object: Option<&K>| object.is_none());
        let gone = tokio::time::timeout(DEADLINE, waiting).await.is_ok();
        let log = std::fs::read_to_string(self.state.join("node.log")).unwrap_or_default();
        assert!(gone, "{name} is still there:\n{}\n{log}", self.events().await);
    }

    pub async fn events(&self) -> String {
        let events: Api<Event> = self.api();
        let list = events.list(&ListParams::default()).await.unwrap();
        let lines: Vec<String> = list
            .items
            .iter()
            .map(|event| {
                format!(
                    "{}/{} {} {}",
                    event.involved_object.kind.clone().unwrap_or_default(),
                    event.involved_object.name.clone().unwrap_or_default(),
                    event.reason.clone().unwrap_or_default(),
                    event.message.clone().unwrap_or_default()
                )
            })
            .collect();
        lines.join("\n")
    }

    /// Runs a shell command in the node's network namespace.
    pub fn in_node(&self, command: &str) -> (bool, String) {
        let pid = serin_workloads::node::running(&self.state).expect("the node runs");
        let mut nsenter = std::process::Command::new("nsenter");
        nsenter.args(["-t", &pid.to_string(), "-n"]);
        if !nix::unistd::getuid().is_root() {
            nsenter.args(["-U", "--preserve-credentials"]);
        }
        let output = nsenter.args(["/bin/sh", "-c", command]).output().unwrap();
        (
            output.status.success(),
            format!(
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            ),
        )
    }

    pub async fn log(&self, pod: &Pod, container: &str) -> String {
        use futures::StreamExt;
        let logs = serin_workloads::logs::PodLogs::new(&self.state);
        let target = serin_workloads::logs::LogTarget {
            namespace: NAMESPACE.to_owned(),
            pod: pod.name_any(),
            uid: pod.uid().unwrap(),
            container: container.to_owned(),
        };
        let Ok(mut stream) = logs.open(&target, serin_workloads::logs::LogOptions::default()) else {
            return String::new();
        };
        let mut text = Vec::new();
        while let Some(chunk) = stream.next().await {
            text.extend_from_slice(&chunk.unwrap());
        }
        String::from_utf8(text).unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.controllers.abort();
        serin_workloads::teardown(&self.state).unwrap();
        if std::thread::panicking() {
            // Kept for who has to find out why.
            if let Some(directory) = self.directory.take() {
                eprintln!("state kept in {}", directory.keep().display());
            }
        }
    }
}

fn image(reference: &str, program: &str, args: &[&str]) -> ImageSpec {
    ImageSpec {
        reference: reference.to_owned(),
        program: program.to_owned(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        ..ImageSpec::default()
    }
}

pub async fn create<K>(api: &Api<K>, object: Value) -> K
where
    K: Clone + Debug + DeserializeOwned + serde::Serialize,
{
    let object: K = serde_json::from_value(object).unwrap();
    api.create(&PostParams::default(), &object).await.unwrap()
}

/// A pod's condition by type.
pub fn condition(type_: &'static str) -> impl Condition<Pod> {
    move |pod: Option<&Pod>| {
        pod.is_some_and(|pod| {
            pod.status
                .iter()
                .flat_map(|status| status.conditions.iter().flatten())
                .any(|condition| condition.type_ == type_ && condition.status == "True")
        })
    }
}

pub fn phase(wanted: &'static str) -> impl Condition<Pod> {
    move |pod: Option<&Pod>| {
        pod.and_then(|pod| pod.status.as_ref()?.phase.as_deref())
            .is_some_and(|phase| phase == wanted)
    }
}

/// The processes whose network namespace is not ours and whose command line or environment names a path.
pub fn processes_of(state: &Path) -> Vec<i32> {
    let marker = state.display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        if pid == std::process::id() as i32 {
            continue;
        }
        let text = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mounts = std::fs::read(entry.path().join("mountinfo")).unwrap_or_default();
        let names = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains(&marker);
        if names(&text) || names(&mounts) {
            found.push(pid);
        }
    }
    found
}
