//! Services on the host's loopback: type LoadBalancer, and NodePort.
//!
//! A pod annotated `serin.dev/listeners: "8080"` (a gateway's proxy) gets the host's listening socket itself: it
//! accepts connections of the host although it lives in another network namespace, with nothing in between, and all
//! replicas share one socket, so that replacing a pod refuses nobody. For other pods a forwarder accepts.
//!
//! The host port is the Service's own port, or another one by the annotation `serin.dev/host-port: "80:8080"` on the
//! Service (several separated by commas).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{Patch, PatchParams};
use kube::{Api, Resource, ResourceExt};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::forward::Forwarder;
use super::rules::{SERVICE_NAME_LABEL, endpoints};
use super::slices_of;
use crate::mirror::{Change, Mirror};
use crate::node::broker::Broker;
use crate::node::context::Context;

/// Pod annotation: container ports whose listening sockets the pod wants.
pub(crate) const LISTENERS_ANNOTATION: &str = "serin.dev/listeners";
/// Service annotation: `port:hostPort`, several separated by commas.
pub(crate) const HOST_PORT_ANNOTATION: &str = "serin.dev/host-port";

/// Namespace, Service and Service port.
type SocketKey = (String, String, u16);

#[derive(Default)]
struct State {
    sockets: BTreeMap<SocketKey, HostSocket>,
    /// Which pods hold which sockets.
    holders: BTreeMap<String, BTreeSet<SocketKey>>,
    /// Sockets that pods of an earlier node hold, until their Service is seen: pod uid, namespace, container port.
    recovered: Vec<(String, String, u16, OwnedFd)>,
}

struct HostSocket {
    fd: OwnedFd,
    address: SocketAddr,
    forwarder: Option<Forwarder>,
}

/// The listening sockets of a node's Services.
pub(crate) struct Listeners {
    broker: Broker,
    services: Mirror<Service>,
    state: Mutex<State>,
    /// Serialises the making of sockets, so that two pods do not ask for the same port.
    making: tokio::sync::Mutex<()>,
    changed: watch::Sender<u64>,
}

/// The ports of [`LISTENERS_ANNOTATION`].
pub(crate) fn announced_ports(pod: &Pod) -> Vec<u16> {
    pod.annotations()
        .get(LISTENERS_ANNOTATION)
        .map(|text| {
            text.split(',')
                .filter_map(|port| port.trim().parse().ok())
                .collect()
        })
        .unwrap_or_default()
}

/// Whether a Service's selector matches a pod. One without a selector matches none.
fn selects(service: &Service, pod: &Pod) -> bool {
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| {
        !selector.is_empty()
            && selector
                .iter()
                .all(|(key, value)| pod.labels().get(key) == Some(value))
    })
}

fn is_load_balancer(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.type_.as_deref()) == Some("LoadBalancer")
}

/// The container port that a Service port leads to in a pod.
pub(crate) fn target_port(port: &ServicePort, pod: &Pod) -> Option<u16> {
    match &port.target_port {
        None => u16::try_from(port.port).ok(),
        Some(IntOrString::Int(number)) => u16::try_from(if *number == 0 { port.port } else { *number }).ok(),
        Some(IntOrString::String(name)) => {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let spec = pod.spec.as_ref()?;
            spec.containers
                .iter()
                .chain(
                    spec.init_containers
                        .iter()
                        .flatten()
                        .filter(|container| container.restart_policy.as_deref() == Some("Always")),
                )
                .flat_map(|container| container.ports.iter().flatten())
                .find(|candidate| {
                    candidate.name.as_deref() == Some(name)
                        && candidate.protocol.as_deref().unwrap_or("TCP") == protocol
                })
                .and_then(|candidate| u16::try_from(candidate.container_port).ok())
        }
    }
}

/// The host port of a Service port: by annotation, the node port, or the port itself.
fn host_port(service: &Service, port: &ServicePort) -> Option<u16> {
    let wanted = service
        .annotations()
        .get(HOST_PORT_ANNOTATION)
        .into_iter()
        .flat_map(|text| text.split(','));
    for pair in wanted {
        if let Some((from, to)) = pair.split_once(':')
            && from.trim().parse() == Ok(port.port)
        {
            return to.trim().parse().ok();
        }
    }
    let type_ = service.spec.as_ref().and_then(|spec| spec.type_.as_deref());
    let number = if type_ == Some("NodePort") {
        port.node_port?
    } else {
        port.port
    };
    u16::try_from(number).ok()
}

fn key_of(service: &Service, port: u16) -> SocketKey {
    (service.namespace().unwrap_or_default(), service.name_any(), port)
}

impl Listeners {
    pub(crate) fn new(broker: Broker, services: Mirror<Service>) -> Self {
        Self {
            broker,
            services,
            state: Mutex::default(),
            making: tokio::sync::Mutex::default(),
            changed: watch::channel(0).0,
        }
    }

    /// The sockets for a pod's announced ports; waits until a Service of type LoadBalancer leads to every one of them.
    pub(crate) async fn hand_over(&self, pod: &Pod, ports: &[u16]) -> Result<Vec<(u16, OwnedFd)>, String> {
        let mut changes = self.services.changes();
        'again: loop {
            let services = self.services.in_namespace(&pod.namespace().unwrap_or_default());
            let mut found = Vec::new();
            for wanted in ports {
                let leading = services
                    .iter()
                    .filter(|service| is_load_balancer(service) && selects(service, pod))
                    .find_map(|service| {
                        let ports = service.spec.as_ref()?.ports.as_ref()?;
                        let port = ports
                            .iter()
                            .find(|port| target_port(port, pod) == Some(*wanted))?;
                        Some((service.clone(), port.clone()))
                    });
                match leading {
                    Some((service, port)) => found.push((*wanted, service, port)),
                    None => {
                        changes.next().await;
                        continue 'again;
                    }
                }
            }
            let mut sockets = Vec::new();
            for (wanted, service, port) in found {
                let key = self.ensure(&service, &port).await?;
                let mut state = self.state.lock();
                let socket = state.sockets.get(&key).ok_or("the Service is gone")?;
                let copy = socket.fd.try_clone().map_err(|error| error.to_string())?;
                sockets.push((wanted, copy));
                state
                    .holders
                    .entry(pod.uid().unwrap_or_default())
                    .or_default()
                    .insert(key);
            }
            self.changed.send_modify(|count| *count += 1);
            return Ok(sockets);
        }
    }

    /// Takes in the sockets that a pod of an earlier node holds.
    pub(crate) fn adopt(&self, pod: &Pod, sockets: &[(u16, OwnedFd)]) {
        let mut state = self.state.lock();
        for (port, fd) in sockets {
            if let Ok(copy) = fd.try_clone() {
                let owner = pod.uid().unwrap_or_default();
                state
                    .recovered
                    .push((owner, pod.namespace().unwrap_or_default(), *port, copy));
            }
        }
        drop(state);
        self.changed.send_modify(|count| *count += 1);
    }

    /// A pod is gone and holds nothing any more.
    pub(crate) fn forget_pod(&self, uid: &str) {
        let mut state = self.state.lock();
        state.holders.remove(uid);
        state.recovered.retain(|(owner, ..)| owner != uid);
        drop(state);
        self.changed.send_modify(|count| *count += 1);
    }

    /// Makes the socket of a Service port, or finds it.
    async fn ensure(&self, service: &Service, port: &ServicePort) -> Result<SocketKey, String> {
        let number = u16::try_from(port.port).map_err(|_| format!("{} is not a port", port.port))?;
        let key = key_of(service, number);
        let host = host_port(service, port).ok_or("it has no host port")?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, host));
        let _making = self.making.lock().await;
        {
            let mut state = self.state.lock();
            if state
                .sockets
                .get(&key)
                .is_some_and(|socket| socket.address == address)
            {
                return Ok(key);
            }
            state.sockets.remove(&key);
            // One that a pod brought along from an earlier node.
            let (namespace, _, _) = &key;
            let recovered: Vec<usize> = state
                .recovered
                .iter()
                .enumerate()
                .filter(|(_, (_, of, _, fd))| of == namespace && local_address(fd) == Some(address))
                .map(|(position, _)| position)
                .collect();
            let mut first = None;
            for position in recovered.into_iter().rev() {
                let (owner, _, _, fd) = state.recovered.swap_remove(position);
                state.holders.entry(owner).or_default().insert(key.clone());
                first = Some(fd);
            }
            if let Some(fd) = first {
                let socket = HostSocket {
                    fd,
                    address,
                    forwarder: None,
                };
                state.sockets.insert(key.clone(), socket);
                return Ok(key);
            }
        }
        let fd = self.broker.listen(address).await.map_err(|error| {
            format!(
                "listen on {address}: {error}; choose another host port with the annotation {HOST_PORT_ANNOTATION}: \"{}:PORT\" on the Service",
                port.port
            )
        })?;
        info!(service = %service.name_any(), %address, "listening");
        let socket = HostSocket {
            fd,
            address,
            forwarder: None,
        };
        self.state.lock().sockets.insert(key.clone(), socket);
        Ok(key)
    }

    fn update_forwarder(&self, key: &SocketKey, endpoints: BTreeSet<(Ipv4Addr, u16)>) {
        let mut state = self.state.lock();
        let held = state.holders.values().any(|keys| keys.contains(key));
        let Some(socket) = state.sockets.get_mut(key) else {
            return;
        };
        if held {
            socket.forwarder = None;
            return;
        }
        let endpoints = Arc::new(endpoints);
        match &socket.forwarder {
            Some(forwarder) => forwarder.set(endpoints),
            None => match socket
                .fd
                .try_clone()
                .and_then(|fd| Forwarder::start(fd, endpoints))
            {
                Ok(forwarder) => socket.forwarder = Some(forwarder),
                Err(error) => warn!(?key, %error, "start a forwarder"),
            },
        }
    }

    /// Closes the sockets of a Service that are no longer wanted.
    fn keep_only(&self, namespace: &str, service: &str, wanted: &BTreeSet<SocketKey>) {
        self.state
            .lock()
            .sockets
            .retain(|key, _| key.0 != namespace || key.1 != service || wanted.contains(key));
    }

    fn address(&self, key: &SocketKey) -> Option<SocketAddr> {
        self.state.lock().sockets.get(key).map(|socket| socket.address)
    }
}

fn local_address(fd: &OwnedFd) -> Option<SocketAddr> {
    socket2::SockRef::from(fd).local_addr().ok()?.as_socket()
}

/// Keeps sockets, forwarders and `status.loadBalancer` equal to what the Services say, until cancelled.
pub(crate) async fn run(context: Arc<Context>, slices: Mirror<EndpointSlice>) {
    let listeners = &context.listeners;
    let mut services = context.services.changes();
    let mut changed_slices = slices.changes();
    let mut changed_holders = listeners.changed.subscribe();
    let mut retry: BTreeSet<(String, String)> = BTreeSet::new();
    loop {
        let mut dirty: BTreeSet<(String, String)> = BTreeSet::new();
        let key = |service: &Service| (service.namespace().unwrap_or_default(), service.name_any());
        let everything = || {
            context
                .services
                .all()
                .iter()
                .map(|service| key(service))
                .collect::<BTreeSet<_>>()
        };
        tokio::select! {
            () = context.cancel.cancelled() => return,
            change = services.next() => match change {
                Change::Applied(service) | Change::Deleted(service) => {
                    dirty.insert(key(&service));
                }
                Change::Resync => dirty = everything(),
            },
            change = changed_slices.next() => match change {
                Change::Applied(slice) | Change::Deleted(slice) => {
                    if let Some(name) = slice.labels().get(SERVICE_NAME_LABEL) {
                        dirty.insert((slice.namespace().unwrap_or_default(), name.clone()));
                    }
                }
                Change::Resync => dirty = everything(),
            },
            _ = changed_holders.changed() => {
                dirty = listeners.state.lock().sockets.keys().map(|key| (key.0.clone(), key.1.clone())).collect();
                // A port that was taken may be free now that a pod is gone.
                dirty.append(&mut retry);
            }
        }
        for (namespace, name) in dirty {
            if let Err(reason) = sync(&context, &slices, &namespace, &name).await {
                retry.insert((namespace, name));
                debug!(reason, "a Service has no listener");
            }
        }
    }
}

async fn sync(
    context: &Context,
    slices: &Mirror<EndpointSlice>,
    namespace: &str,
    name: &str,
) -> Result<(), String> {
    let listeners = &context.listeners;
    let service = context.services.get(namespace, name);
    let wanted_type = |service: &Service| {
        matches!(
            service.spec.as_ref().and_then(|spec| spec.type_.as_deref()),
            Some("LoadBalancer" | "NodePort")
        )
    };
    let Some(service) = service.filter(|service| wanted_type(service)) else {
        listeners.keep_only(namespace, name, &BTreeSet::new());
        return Ok(());
    };
    let slices = slices_of(slices, namespace, name);
    let mut wanted = BTreeSet::new();
    let mut failed = None;
    let mut shown = Vec::new();
    for port in service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()) {
        if port.protocol.as_deref().unwrap_or("TCP") != "TCP" {
            failed = Some(format!(
                "port {}: only TCP ports are reachable from the host",
                port.port
            ));
            continue;
        }
        match listeners.ensure(&service, port).await {
            Ok(key) => {
                let all = endpoints(&slices, port.name.as_deref().unwrap_or_default(), "tcp");
                listeners.update_forwarder(&key, all);
                if let Some(address) = listeners.address(&key) {
                    shown.push(json!({"port": address.port(), "protocol": "TCP"}));
                }
                wanted.insert(key);
            }
            Err(reason) => failed = Some(format!("port {}: {reason}", port.port)),
        }
    }
    listeners.keep_only(namespace, name, &wanted);
    if is_load_balancer(&service) {
        write_status(context, &service, &shown).await;
    }
    match failed {
        None => Ok(()),
        Some(reason) => {
            let about = service.object_ref(&());
            context
                .recorder
                .warning(&about, "SyncLoadBalancerFailed", "Listen", &reason);
            Err(reason)
        }
    }
}

async fn write_status(context: &Context, service: &Service, ports: &[serde_json::Value]) {
    let ingress = if ports.is_empty() {
        json!([])
    } else {
        json!([{"ip": "127.0.0.1", "ipMode": "Proxy", "ports": ports}])
    };
    let known = service
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref())
        .and_then(|balancer| balancer.ingress.as_ref())
        .and_then(|ingress| serde_json::to_value(ingress).ok())
        .unwrap_or_else(|| json!([]));
    if known == ingress {
        return;
    }
    let api: Api<Service> = Api::namespaced(context.client.clone(), &service.namespace().unwrap_or_default());
    let patch = Patch::Merge(json!({"status": {"loadBalancer": {"ingress": ingress}}}));
    match api
        .patch_status(&service.name_any(), &PatchParams::default(), &patch)
        .await
    {
        Ok(written) => context.services.note(written),
        Err(error) => debug!(service = %service.name_any(), %error, "write the load balancer's status"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(spec: serde_json::Value, annotation: Option<&str>) -> Service {
        let annotations: BTreeMap<&str, &str> = annotation
            .into_iter()
            .map(|text| (HOST_PORT_ANNOTATION, text))
            .collect();
        serde_json::from_value(
            json!({"metadata": {"name": "s", "namespace": "n", "annotations": annotations}, "spec": spec}),
        )
        .unwrap()
    }

    #[test]
    fn the_host_port_is_the_services_own_unless_the_annotation_says_otherwise() {
        let spec = json!({"type": "LoadBalancer", "ports": [{"port": 80}, {"port": 443}]});
        let ports = |service: &Service| -> Vec<Option<u16>> {
            service
                .spec
                .as_ref()
                .unwrap()
                .ports
                .iter()
                .flatten()
                .map(|port| host_port(service, port))
                .collect()
        };
        assert_eq!(ports(&service(spec.clone(), None)), [Some(80), Some(443)]);
        assert_eq!(
            ports(&service(spec, Some("80:8080, 443:8443"))),
            [Some(8080), Some(8443)]
        );
        let node = service(
            json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]}),
            None,
        );
        assert_eq!(ports(&node), [Some(30080)]);
    }

    #[test]
    fn a_target_port_is_a_number_a_name_or_the_port_itself() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {}, "spec": {"containers": [
            {"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]}}))
        .unwrap();
        let port = |value: serde_json::Value| target_port(&serde_json::from_value(value).unwrap(), &pod);
        assert_eq!(port(json!({"port": 80})), Some(80));
        assert_eq!(port(json!({"port": 80, "targetPort": 9090})), Some(9090));
        assert_eq!(port(json!({"port": 80, "targetPort": "http"})), Some(8080));
        assert_eq!(port(json!({"port": 80, "targetPort": "other"})), None);
    }
}
