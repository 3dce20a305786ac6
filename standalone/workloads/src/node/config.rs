//! What a node is told.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::image::ImageSpec;

/// Configuration of a node; a file of it is the argument of the node process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeConfig {
    /// Directory of the cluster; the node keeps everything below `node/` in it.
    pub state_dir: PathBuf,
    /// Unix socket of the API server.
    pub api_socket: PathBuf,
    /// Bearer token for it, if it wants one.
    #[serde(default)]
    pub api_token: Option<String>,
    /// Name of the Node object.
    pub node_name: String,
    /// Command line that becomes a pod's shim when its configuration is appended: `["/path/serin", "shim"]`.
    pub shim_command: Vec<String>,
    /// Built-in entries of the image catalogue.
    #[serde(default)]
    pub images: Vec<ImageSpec>,
    /// First address of the pods' network; its gateway is the next one.
    #[serde(default = "default_pod_network")]
    pub pod_network: Ipv4Addr,
    /// Length of the pods' network prefix in bits.
    #[serde(default = "default_pod_prefix")]
    pub pod_prefix: u8,
    /// Address of the DNS server, in the Services' range.
    #[serde(default = "default_dns_address")]
    pub dns_address: Ipv4Addr,
    /// Domain of the cluster.
    #[serde(default = "default_cluster_domain")]
    pub cluster_domain: String,
    /// Set by the node itself: it runs inside a user namespace with one mapped id.
    #[serde(default, skip_deserializing)]
    pub(crate) unprivileged: bool,
}

fn default_pod_network() -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 0, 0)
}

fn default_pod_prefix() -> u8 {
    16
}

fn default_dns_address() -> Ipv4Addr {
    Ipv4Addr::new(10, 96, 0, 10)
}

fn default_cluster_domain() -> String {
    "cluster.local".to_owned()
}

impl NodeConfig {
    /// A configuration with Kubernetes' usual addresses: pods in 10.244.0.0/16, DNS at 10.96.0.10, `cluster.local`.
    pub fn new(state_dir: PathBuf, api_socket: PathBuf, node_name: &str, shim_command: Vec<String>) -> Self {
        Self {
            state_dir,
            api_socket,
            api_token: None,
            node_name: node_name.to_owned(),
            shim_command,
            images: Vec::new(),
            pod_network: default_pod_network(),
            pod_prefix: default_pod_prefix(),
            dns_address: default_dns_address(),
            cluster_domain: default_cluster_domain(),
            unprivileged: false,
        }
    }

    /// The node's own address in the pods' network.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.pod_network) + 1)
    }
}
