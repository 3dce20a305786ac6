//! The node's main task: watches pods bound to it and gives each a worker.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DynamicObject};
use kube::runtime::watcher;
use kube::{Resource, ResourceExt};
use serin_kit::events::Recorder;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::broker::Broker;
use super::config::NodeConfig;
use super::context::{Addresses, Context};
use super::presence::Presence;
use super::record::{Paths, read_pod};
use super::register;
use super::worker::{PodUpdate, Worker};
use crate::Error;
use crate::dns;
use crate::image::{self, Catalogue};
use crate::mirror::{Change, Mirror};
use crate::services::listeners::Listeners;
use crate::services::{Proxy, listeners};
use crate::sys::netns;

/// How long the API server may take to deliver the first lists.
const LIST_DEADLINE: Duration = Duration::from_secs(60);

/// The node's connection to the host's side (see [`super::main`]).
pub struct HostSide(pub(crate) OwnedFd);

/// Runs pods.
pub struct Node;

impl Node {
    /// Runs the node until `cancel`; pods stay then, for a later node to adopt. The calling process must already be
    /// in the node's network namespace.
    pub async fn run(
        config: NodeConfig,
        client: kube::Client,
        host: HostSide,
        cancel: CancellationToken,
    ) -> Result<(), Error> {
        netns::prepare_node(config.gateway(), config.pod_prefix, &[config.dns_address]).map_err(
            |source| Error::Kernel {
                action: "set up the node's bridge",
                source,
                remedy: "the kernel must support bridges and veth pairs, and /proc/sys/net must be writable",
            },
        )?;
        let broker = Broker::new(host.0).map_err(|source| Error::Kernel {
            action: "connect to the node's host side",
            source,
            remedy: "start the node again with `serin up`",
        })?;
        let paths = Paths::new(&config.state_dir);
        std::fs::create_dir_all(paths.pods()).map_err(|error| Error::file("create", paths.pods(), error))?;

        let everything = watcher::Config::default;
        let config_maps = Mirror::<ConfigMap>::start(
            Api::all(client.clone()),
            everything(),
            "configmaps",
            cancel.clone(),
        );
        let secrets =
            Mirror::<Secret>::start(Api::all(client.clone()), everything(), "secrets", cancel.clone());
        let services =
            Mirror::<Service>::start(Api::all(client.clone()), everything(), "services", cancel.clone());
        let slices = Mirror::<EndpointSlice>::start(
            Api::all(client.clone()),
            everything(),
            "endpointslices",
            cancel.clone(),
        );
        let mine = everything().fields(&format!("spec.nodeName={}", config.node_name));
        let pods = Mirror::<Pod>::start(Api::all(client.clone()), mine, "pods", cancel.clone());

        let addresses = Addresses::new(config.pod_network, config.pod_prefix);
        addresses.reserve(config.gateway());
        for (_, directory) in paths.pod_directories() {
            if let Ok(record) = read_pod(&directory) {
                addresses.reserve(record.address);
            }
        }
        let recorder = Recorder::start(client.clone(), "kubelet", cancel.clone());
        let fresh = paths.pod_directories().is_empty();
        let (presence, follow) = Presence::follow(config.api_socket.clone(), fresh, cancel.clone());
        let context = Arc::new(Context {
            catalogue: watch::channel(Catalogue::new([], config.images.clone())).0,
            config_changed: watch::channel(0).0,
            listeners: Listeners::new(broker.clone(), services.clone()),
            paths,
            client: client.clone(),
            cancel: cancel.clone(),
            recorder,
            presence,
            config_maps,
            secrets,
            services: services.clone(),
            addresses,
            config,
        });

        let mut tasks = JoinSet::new();
        tasks.spawn(follow);
        tasks.spawn(register::keep(context.clone()));
        tasks.spawn(watch_images(context.clone()));
        tasks.spawn(watch_configs(context.clone()));
        let zone = dns::Zone::new(&context.config.cluster_domain, services.clone(), slices.clone());
        tasks.spawn(dns::serve(
            context.config.dns_address,
            zone,
            broker,
            cancel.clone(),
        ));
        tasks.spawn(
            Proxy::new(services.clone(), slices.clone(), context.config.dns_address).run(cancel.clone()),
        );
        tasks.spawn(listeners::run(context.clone(), slices));

        for (what, ready) in [
            ("pods", pods.ready("pods", LIST_DEADLINE).await),
            ("services", services.ready("services", LIST_DEADLINE).await),
            (
                "configmaps",
                context.config_maps.ready("configmaps", LIST_DEADLINE).await,
            ),
            ("secrets", context.secrets.ready("secrets", LIST_DEADLINE).await),
        ] {
            if let Err(error) = ready {
                // The watches go on; pods of an earlier node keep running meanwhile.
                warn!(what, %error, "the node goes on with what it has");
            }
        }
        supervise(&context, &pods).await;
        tasks.shutdown().await;
        // The API server may have gone before the node: then this says so in the log, soon.
        context.recorder.flush().await;
        Ok(())
    }
}

/// The pods being worked on, by uid.
struct Workers {
    context: Arc<Context>,
    updates: HashMap<String, Tracked>,
    tasks: JoinSet<String>,
}

/// A pod that has a worker.
struct Tracked {
    updates: watch::Sender<PodUpdate>,
    /// The worker was told that the pod is gone, and ends whatever else it is told.
    leaving: bool,
    /// The pod as it came back meanwhile. A watch shows writes a moment before they are durable: a binding that an API
    /// server took with it when it was killed is made again, of the same pod.
    back: Option<Arc<Pod>>,
}

impl Tracked {
    fn new(update: PodUpdate) -> (Self, watch::Receiver<PodUpdate>) {
        let leaving = matches!(update, PodUpdate::Gone);
        let (updates, receiver) = watch::channel(update);
        let tracked = Self {
            updates,
            leaving,
            back: None,
        };
        (tracked, receiver)
    }

    fn present(&mut self, pod: Arc<Pod>) {
        if self.leaving {
            self.back = Some(pod);
        } else {
            self.updates.send_replace(PodUpdate::Present(pod));
        }
    }

    fn gone(&mut self) {
        self.leaving = true;
        self.back = None;
        self.updates.send_replace(PodUpdate::Gone);
    }
}

async fn supervise(context: &Arc<Context>, pods: &Mirror<Pod>) {
    let mut changes = pods.changes();
    let mut workers = Workers {
        context: context.clone(),
        updates: HashMap::new(),
        tasks: JoinSet::new(),
    };
    workers.resync(pods);
    workers.adopt_orphans(pods);
    info!(node = %context.config.node_name, "node is running");
    loop {
        tokio::select! {
            () = context.cancel.cancelled() => break,
            change = changes.next() => match change {
                Change::Applied(pod) => workers.present(&pod),
                Change::Deleted(pod) => workers.gone(&pod.uid().unwrap_or_default()),
                Change::Resync => workers.resync(pods),
            },
            Some(ended) = workers.tasks.join_next() => {
                if let Ok(uid) = ended {
                    let tracked = workers.updates.remove(&uid);
                    context.listeners.forget_pod(&uid);
                    if let Some(pod) = tracked.and_then(|tracked| tracked.back) {
                        workers.present(&pod);
                    }
                }
            }
        }
    }
    while workers.tasks.join_next().await.is_some() {}
}

impl Workers {
    fn present(&mut self, pod: &Arc<Pod>) {
        let Some(uid) = pod.uid() else { return };
        if let Some(tracked) = self.updates.get_mut(&uid) {
            tracked.present(pod.clone());
            return;
        }
        self.start(&uid, pod.clone(), PodUpdate::Present(pod.clone()));
    }

    fn start(&mut self, uid: &str, pod: Arc<Pod>, update: PodUpdate) {
        let (tracked, receiver) = Tracked::new(update);
        self.updates.insert(uid.to_owned(), tracked);
        let worker = Worker::new(self.context.clone(), pod);
        let uid = uid.to_owned();
        self.tasks.spawn(async move {
            Box::pin(worker.run(receiver)).await;
            uid
        });
    }

    fn gone(&mut self, uid: &str) {
        if let Some(tracked) = self.updates.get_mut(uid) {
            tracked.gone();
        }
    }

    fn resync(&mut self, pods: &Mirror<Pod>) {
        let all = pods.all();
        let known: Vec<String> = self.updates.keys().cloned().collect();
        for uid in known {
            if !all.iter().any(|pod| pod.uid().as_deref() == Some(uid.as_str())) {
                self.gone(&uid);
            }
        }
        for pod in &all {
            self.present(pod);
        }
    }

    /// Pods that an earlier node started and that were deleted while no node was there.
    fn adopt_orphans(&mut self, pods: &Mirror<Pod>) {
        for (uid, directory) in self.context.paths.pod_directories() {
            if self.updates.contains_key(&uid) {
                continue;
            }
            match read_pod(&directory) {
                Ok(record) => self.start(&uid, Arc::new(record.pod), PodUpdate::Gone),
                Err(_) => super::sandbox::clear(&directory),
            }
        }
        let _ = pods;
    }
}

async fn watch_images(context: Arc<Context>) {
    let resource = image::api_resource();
    let api: Api<DynamicObject> = Api::all_with(context.client.clone(), &resource);
    let mirror = DynamicMirror { api, resource };
    mirror.run(&context).await;
}

/// Images are few and of a kind without a Rust type here: any change re-reads them all.
struct DynamicMirror {
    api: Api<DynamicObject>,
    resource: kube::api::ApiResource,
}

impl DynamicMirror {
    async fn run(self, context: &Context) {
        use futures::StreamExt;
        use kube::runtime::WatchStreamExt;
        let mut events = watcher::watcher(self.api, watcher::Config::default())
            .default_backoff()
            .boxed();
        let mut objects: HashMap<String, DynamicObject> = HashMap::new();
        let mut failing = false;
        loop {
            let event = tokio::select! {
                () = context.cancel.cancelled() => return,
                event = events.next() => event,
            };
            match event {
                None => return,
                Some(Err(error)) => {
                    if !failing {
                        warn!(kind = %self.resource.kind, %error, "watch failed; the built-in images stay");
                    }
                    failing = true;
                    continue;
                }
                Some(Ok(event)) => match event {
                    watcher::Event::Init => {
                        objects.clear();
                        continue;
                    }
                    watcher::Event::InitApply(object) => {
                        objects.insert(object.name_any(), object);
                        continue;
                    }
                    watcher::Event::Apply(object) => {
                        objects.insert(object.name_any(), object);
                    }
                    watcher::Event::Delete(object) => {
                        objects.remove(&object.name_any());
                    }
                    watcher::Event::InitDone => failing = false,
                },
            }
            let user = objects.values().filter_map(|object| {
                image::from_object(object)
                    .inspect_err(|error| {
                        let about = object.object_ref(&self.resource);
                        context
                            .recorder
                            .warning(&about, "InvalidImage", "Read", &error.to_string());
                    })
                    .ok()
            });
            context
                .catalogue
                .send_replace(Catalogue::new(user, context.config.images.clone()));
        }
    }
}

async fn watch_configs(context: Arc<Context>) {
    let mut config_maps = context.config_maps.changes();
    let mut secrets = context.secrets.changes();
    loop {
        tokio::select! {
            () = context.cancel.cancelled() => return,
            _ = config_maps.next() => {}
            _ = secrets.next() => {}
        }
        context.config_changed.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_comes_back_while_its_worker_clears_it_away_gets_another_worker() {
        let pod = Arc::new(Pod::default());
        let (mut tracked, updates) = Tracked::new(PodUpdate::Present(pod.clone()));
        tracked.present(pod.clone());
        assert!(tracked.back.is_none(), "the worker that is there goes on");

        tracked.gone();
        tracked.present(pod.clone());
        assert!(
            matches!(*updates.borrow(), PodUpdate::Gone),
            "the worker still ends"
        );
        assert!(tracked.back.is_some(), "and the pod is not forgotten");

        tracked.gone();
        assert!(tracked.back.is_none(), "a pod that went again does not come back");
    }
}
