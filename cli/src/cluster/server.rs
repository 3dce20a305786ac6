//! What runs inside the server process: the API, the controllers, the mesh's control plane.
//!
//! The order is that of dependence: the API and its definitions first, then everything that watches, then the node,
//! then the gateway. Nothing waits for a time, only for what it needs. When the process is asked to stop, tasks end in
//! the reverse order; pods and their proxies stay for the next start to adopt.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use futures::future::try_join_all;
use kube::Client;
use serin_apiserver::{ApiServer, Certificates, Tokens};
use serin_kit::leader;
use serin_kit::metrics::Endpoint;
use serin_kit::metrics::prometheus_client::registry::Registry;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::admission::SidecarInjection;
use super::lock::{ClusterLock, Role};
use super::logs::NodeLogs;
use super::mesh::{LedgerLiveness, MeshMetrics};
use super::process::READY;
use super::{Cluster, private_directory};
use crate::commands::{apply, image};

/// The gateway's manifests; `${GATEWAY_PORT}` is the port on this machine.
const GATEWAY: &str = include_str!("../../manifests/gateway.yaml");
/// Name of the one node.
const NODE_NAME: &str = "serin";
/// How long the tasks may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Settings of a cluster.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Settings {
    /// Port on this machine that reaches the mesh's gateway
    #[arg(long, default_value_t = 8080)]
    pub(crate) gateway_port: u16,
    /// Port on this machine for kubectl; any free one if 0
    #[arg(long, default_value_t = 0)]
    pub(crate) api_port: u16,
    /// Port on this machine for the webhooks of Receivers [default: 9292, or any free one if that is taken]
    #[arg(long)]
    pub(crate) webhook_port: Option<u16>,
}

/// The port of the receiver in Flux's notification-controller.
const WEBHOOK_PORT: u16 = 9292;

impl Settings {
    /// The usual settings with another gateway port.
    pub(crate) fn with_gateway_port(gateway_port: u16) -> Self {
        Self {
            gateway_port,
            api_port: 0,
            webhook_port: None,
        }
    }

    /// The settings as they are typed.
    pub(crate) fn to_arguments(self) -> Vec<String> {
        let mut arguments = vec![
            format!("--gateway-port={}", self.gateway_port),
            format!("--api-port={}", self.api_port),
        ];
        arguments.extend(self.webhook_port.map(|port| format!("--webhook-port={port}")));
        arguments
    }
}

/// Runs the cluster until `cancel` fires. `say` hears each step and finally [`READY`].
pub(crate) async fn run(
    cluster: &Cluster,
    settings: &Settings,
    cancel: CancellationToken,
    say: impl Fn(&str),
) -> anyhow::Result<()> {
    start_log();
    let started = Instant::now();
    let _lock = match ClusterLock::inherited(cluster)? {
        Some(lock) => lock,
        None => ClusterLock::take(cluster, Role::Server).await?,
    };
    private_directory(&cluster.store())?;
    std::fs::create_dir_all(cluster.mesh()).context("make the directory of the mesh's socket")?;
    let step = |what: &str| {
        info!(what, after_ms = started.elapsed().as_millis() as u64, "started");
        say(what);
    };

    let injection = Arc::new(SidecarInjection::new(cluster));
    let api = ApiServer::builder()
        .directory(cluster.store())
        .admission(injection.clone())
        .pod_logs(Arc::new(NodeLogs::new(cluster)))
        .build()
        .await
        .context("open the store of the API server")?;
    let client = serin_kit::client::over_service(api.service());
    injection.connect(client.clone());
    serve(cluster, settings, &api).await?;
    define(&client).await?;
    image::write_built_in(&client).await?;
    step("kubernetes api");

    let mut tasks = Tasks {
        set: JoinSet::new(),
        cancel: cancel.child_token(),
    };
    let own_metrics = serin_canary::metrics::Metrics::default();
    start_metrics(cluster, &own_metrics, &mut tasks).await?;
    start_mesh_and_controllers(cluster, &client, &own_metrics, &mut tasks);
    serve_webhooks(cluster, settings, &client, &mut tasks).await?;
    step("mesh and controllers");

    start_node(cluster).await?;
    let gateway = GATEWAY.replace("${GATEWAY_PORT}", &settings.gateway_port.to_string());
    apply::apply_manifests(&client, &gateway, "gateway.yaml").await?;
    step("node and gateway");
    say(READY);

    let outcome = tasks.watch().await;
    tasks.stop().await;
    api.shutdown().await;
    for file in [
        cluster.api_socket(),
        cluster.xds_socket(),
        cluster.metrics_address(),
        cluster.webhooks(),
    ] {
        let _ = std::fs::remove_file(file);
    }
    outcome
}

/// Sends the log of this process to standard error, which is the cluster's log file. Starts no thread.
pub(crate) fn start_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("SERIN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A second start in the same process keeps the first log.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        // The log is a file: on a full disk its lines are lost. To say so on the same stream would panic.
        .log_internal_errors(false)
        .try_init();
}

/// Opens the Unix socket for us and TLS for kubectl, and writes the kubeconfig.
async fn serve(cluster: &Cluster, settings: &Settings, api: &ApiServer) -> anyhow::Result<()> {
    let socket = cluster.api_socket();
    let _ = std::fs::remove_file(&socket);
    api.serve_unix(&socket).await.context("open the API's socket")?;
    let loopback = Ipv4Addr::LOCALHOST;
    let certificates =
        Certificates::generate(cluster.name(), &[loopback.into()]).context("make the API's certificate")?;
    let token = uuid_token();
    let address = api
        .serve_tls(
            SocketAddr::from((loopback, settings.api_port)),
            &certificates,
            Tokens::admin(&token),
        )
        .await
        .with_context(|| format!("serve the API on port {}", settings.api_port))?;
    let text = serin_apiserver::kubeconfig(cluster.name(), address, &certificates.authority_pem, &token);
    write_private(&cluster.kubeconfig(), &text)
}

/// 244 random bits, as two UUIDs without dashes.
fn uuid_token() -> String {
    format!(
        "{}{}",
        uuid::Uuid::new_v4().simple(),
        uuid::Uuid::new_v4().simple()
    )
}

fn write_private(path: &std::path::Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("write {}", path.display()))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("write {}", path.display()))
}

/// Applies every CustomResourceDefinition.
async fn define(client: &Client) -> anyhow::Result<()> {
    let definitions = serin_crds::definitions();
    let writes = definitions.iter().map(|definition| async move {
        let name = definition.metadata.name.as_deref().unwrap_or_default();
        apply::define(client, definition)
            .await
            .with_context(|| format!("define {name}"))
    });
    try_join_all(writes).await.map(|_| ())
}

/// Opens the endpoint of the controllers' own metrics on a free port of loopback, and writes down where it is.
async fn start_metrics(
    cluster: &Cluster,
    own_metrics: &serin_canary::metrics::Metrics,
    tasks: &mut Tasks,
) -> anyhow::Result<()> {
    let mut registry = Registry::default();
    own_metrics.register(&mut registry);
    let endpoint = Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into(), registry).await?;
    write_private(
        &cluster.metrics_address(),
        &format!("http://{}/metrics\n", endpoint.address()),
    )?;
    let cancel = tasks.cancel.clone();
    tasks.set.spawn(async move {
        endpoint.run(cancel).await;
        Ok(())
    });
    Ok(())
}

fn start_mesh_and_controllers(
    cluster: &Cluster,
    client: &Client,
    own_metrics: &serin_canary::metrics::Metrics,
    tasks: &mut Tasks,
) {
    let options = serin_control::ControlOptions {
        socket: Some(cluster.xds_socket()),
        ..Default::default()
    };
    let control = serin_control::Control::new(options);

    let liveness = Arc::new(LedgerLiveness::new(control.ledger().clone()));
    let canary = serin_canary::Context {
        client: client.clone(),
        namespace: None,
        traffic: Arc::new(serin_canary::traffic::KubeTraffic::new(client.clone(), liveness)),
        metrics: Arc::new(MeshMetrics::new(control.telemetry().clone())),
        options: serin_canary::objects::Options::default(),
        own_metrics: own_metrics.clone(),
    };
    let gitops = serin_gitops::Context::new(client.clone(), cluster.git_cache());
    let cancel = &tasks.cancel;
    tasks
        .set
        .spawn(named("mesh control", control.run(client.clone(), cancel.clone())));
    // One process: it leads without a Lease.
    let leads = leader::always();
    let (leading, stop) = (leads.clone(), cancel.clone());
    tasks.set.spawn(named("canary controller", async move {
        leader::while_leading(leading, &stop, |term| serin_canary::run(canary.clone(), term)).await
    }));
    let stop = cancel.clone();
    tasks.set.spawn(named("gitops controller", async move {
        leader::while_leading(leads, &stop, |term| serin_gitops::run(gitops.clone(), term)).await
    }));
    tasks.set.spawn(named(
        "workload controllers",
        serin_workloads::controllers::run(client.clone(), cancel.clone()),
    ));
}

/// Opens the port at which git servers tell of pushes. Only this machine reaches it; a tunnel or a proxy in front of it
/// makes it public, and each call is authenticated by its Receiver.
async fn serve_webhooks(
    cluster: &Cluster,
    settings: &Settings,
    client: &Client,
    tasks: &mut Tasks,
) -> anyhow::Result<()> {
    let on = |port| tokio::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let listener = match settings.webhook_port {
        Some(port) => on(port).await.with_context(|| {
            format!("take webhooks on port {port}; choose another one with --webhook-port")
        })?,
        None => match on(WEBHOOK_PORT).await {
            Ok(listener) => listener,
            Err(_) => on(0).await.context("find a free port for webhooks")?,
        },
    };
    let address = listener.local_addr().context("read the port for webhooks")?;
    std::fs::write(cluster.webhooks(), format!("http://{address}\n"))
        .with_context(|| format!("write {}", cluster.webhooks().display()))?;
    let receivers = serin_gitops::Receivers::new(client.clone(), tasks.cancel.clone());
    let router = receivers.router();
    let stop = tasks.cancel.clone();
    let serving = async move {
        axum::serve(listener, router)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await
    };
    tasks.set.spawn(named("webhook server", serving));
    let stop = tasks.cancel.clone();
    let watching = async move {
        receivers.run(stop).await;
        anyhow::Ok(())
    };
    tasks.set.spawn(named("receiver controller", watching));
    Ok(())
}

/// Starts the process that runs pods, or keeps the one that survived an earlier server.
async fn start_node(cluster: &Cluster) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("find this program")?;
    let program = program
        .to_str()
        .context("this program's path is not UTF-8")?
        .to_owned();
    let config = serin_workloads::node::NodeConfig::new(
        cluster.directory().to_owned(),
        cluster.api_socket(),
        NODE_NAME,
        vec![program.clone(), "shim".to_owned()],
    );
    let log = cluster.log();
    tokio::task::spawn_blocking(move || {
        serin_workloads::node::spawn(&config, &[program, "node".to_owned()], &log)
    })
    .await?
    .context("start the node")?;
    Ok(())
}

/// The long-running parts. When one ends by itself, the cluster cannot go on.
struct Tasks {
    set: JoinSet<anyhow::Result<()>>,
    cancel: CancellationToken,
}

async fn named<E>(name: &'static str, task: impl Future<Output = Result<(), E>>) -> anyhow::Result<()>
where
    E: Into<anyhow::Error>,
{
    task.await
        .map_err(Into::into)
        .with_context(|| format!("the {name} ended"))
}

impl Tasks {
    /// Waits until it is time to stop, or until a part ends by itself.
    async fn watch(&mut self) -> anyhow::Result<()> {
        let ended = tokio::select! {
            () = self.cancel.cancelled() => return Ok(()),
            ended = self.set.join_next() => ended,
        };
        if self.cancel.is_cancelled() {
            return Ok(());
        }
        match ended {
            None => Ok(()),
            Some(Ok(Ok(()))) => anyhow::bail!("a part of the cluster ended by itself"),
            Some(Ok(Err(error))) => {
                error!("{error:#}");
                Err(error)
            }
            Some(Err(error)) => Err(error).context("a part of the cluster failed"),
        }
    }

    async fn stop(&mut self) {
        self.cancel.cancel();
        let all = async { while self.set.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_TIMEOUT, all).await.is_err() {
            self.set.abort_all();
        }
    }
}
