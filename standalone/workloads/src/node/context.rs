//! What the workers of a node share.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Service};
use kube::ResourceExt;
use parking_lot::Mutex;
use serin_kit::events::Recorder;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::config::NodeConfig;
use super::env::References;
use super::presence::Presence;
use super::record::Paths;
use crate::image::Catalogue;
use crate::mirror::Mirror;
use crate::services::listeners::Listeners;

/// How long a pod that asks for a listener waits for the Service that defines it.
const LISTENER_WAIT: Duration = Duration::from_secs(3);

pub(crate) struct Context {
    pub(crate) config: NodeConfig,
    pub(crate) paths: Paths,
    pub(crate) client: kube::Client,
    pub(crate) cancel: CancellationToken,
    pub(crate) recorder: Recorder,
    pub(crate) presence: Presence,
    pub(crate) catalogue: watch::Sender<Catalogue>,
    /// Bumped when a ConfigMap or Secret changes.
    pub(crate) config_changed: watch::Sender<u64>,
    pub(crate) config_maps: Mirror<ConfigMap>,
    pub(crate) secrets: Mirror<Secret>,
    pub(crate) services: Mirror<Service>,
    pub(crate) addresses: Addresses,
    pub(crate) listeners: Listeners,
}

impl Context {
    pub(crate) fn references(&self, pod: &Pod) -> InNamespace<'_> {
        InNamespace {
            context: self,
            namespace: pod.namespace().unwrap_or_default(),
        }
    }

    /// Waits for a shim to be reaped; it has ended or is about to.
    pub(crate) fn reap(&self, mut child: std::process::Child) {
        tokio::task::spawn_blocking(move || {
            let _ = child.wait();
        });
    }

    pub(crate) fn remove_logs(&self, pod: &Pod) {
        let directory = self.paths.pod_logs(
            &pod.namespace().unwrap_or_default(),
            &pod.name_any(),
            &pod.uid().unwrap_or_default(),
        );
        if let Err(error) = std::fs::remove_dir_all(&directory)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(directory = %directory.display(), %error, "remove a pod's logs");
        }
    }

    /// The listening sockets that a pod asks for by its annotation. Waits a little for the Service that says where to
    /// listen; without one the pod starts without, and what listens inside is reached by forwarding.
    pub(crate) async fn listeners_for(&self, pod: &Pod) -> Result<Vec<(u16, OwnedFd)>, String> {
        let ports = crate::services::listeners::announced_ports(pod);
        if ports.is_empty() {
            return Ok(Vec::new());
        }
        match tokio::time::timeout(LISTENER_WAIT, self.listeners.hand_over(pod, &ports)).await {
            Ok(result) => result,
            Err(_) => Ok(Vec::new()),
        }
    }
}

/// The objects that a pod may refer to.
pub(crate) struct InNamespace<'a> {
    context: &'a Context,
    namespace: String,
}

impl References for InNamespace<'_> {
    fn config_map(&self, name: &str) -> Option<Arc<ConfigMap>> {
        self.context.config_maps.get(&self.namespace, name)
    }

    fn secret(&self, name: &str) -> Option<Arc<Secret>> {
        self.context.secrets.get(&self.namespace, name)
    }

    fn services(&self) -> Vec<Arc<Service>> {
        let mut services = self.context.services.in_namespace(&self.namespace);
        if self.namespace != "default" {
            services.extend(self.context.services.get("default", "kubernetes"));
        }
        services
    }
}

/// The addresses of the pods' network.
#[derive(Debug)]
pub(crate) struct Addresses {
    network: Ipv4Addr,
    prefix: u8,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    addresses: BTreeSet<u32>,
    /// Where the next search begins: an address is not given again at once, when others may still think of its
    /// predecessor.
    next: u32,
}

impl Addresses {
    /// The first two addresses of the network are kept: its own and the gateway's.
    pub(crate) fn new(network: Ipv4Addr, prefix: u8) -> Self {
        Self {
            network,
            prefix,
            taken: Mutex::new(Taken {
                addresses: BTreeSet::new(),
                next: 2,
            }),
        }
    }

    fn size(&self) -> u32 {
        1_u32.checked_shl(32 - u32::from(self.prefix)).unwrap_or(u32::MAX)
    }

    pub(crate) fn take(&self) -> Option<Ipv4Addr> {
        let size = self.size();
        let usable = size.checked_sub(3)?;
        let mut taken = self.taken.lock();
        for step in 0..usable {
            let offset = 2 + (taken.next - 2 + step) % usable;
            if taken.addresses.insert(offset) {
                taken.next = 2 + (offset - 1) % usable;
                return Some(Ipv4Addr::from(u32::from(self.network) + offset));
            }
        }
        None
    }

    /// Marks an address that a running pod has.
    pub(crate) fn reserve(&self, address: Ipv4Addr) {
        let offset = u32::from(address).wrapping_sub(u32::from(self.network));
        if offset < self.size() {
            self.taken.lock().addresses.insert(offset);
        }
    }

    pub(crate) fn release(&self, address: Ipv4Addr) {
        let offset = u32::from(address).wrapping_sub(u32::from(self.network));
        self.taken.lock().addresses.remove(&offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_unique_reused_late_and_finite() {
        let addresses = Addresses::new(Ipv4Addr::new(10, 0, 0, 0), 29);
        addresses.reserve(Ipv4Addr::new(10, 0, 0, 3));
        let first = addresses.take().unwrap();
        assert_eq!(first, Ipv4Addr::new(10, 0, 0, 2));
        assert_eq!(addresses.take().unwrap(), Ipv4Addr::new(10, 0, 0, 4));
        addresses.release(first);
        assert_eq!(addresses.take().unwrap(), Ipv4Addr::new(10, 0, 0, 5));
        assert_eq!(addresses.take().unwrap(), Ipv4Addr::new(10, 0, 0, 6));
        assert_eq!(addresses.take().unwrap(), first);
        assert_eq!(addresses.take(), None);
    }
}
