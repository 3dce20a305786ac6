//! The node: kubelet and kube-proxy in the API's eyes.
//!
//! It lives in a process of its own (`serin node`, see [`main`]) inside a network namespace of its own, and, where it
//! is not root, a user namespace. It outlives the process that started it: when `serin up` is killed, pods, DNS,
//! Services and the listeners of gateways stay; the next `serin up` finds the node running ([`spawn`]) and its
//! watches reconnect. When the node itself is killed, the shims keep the pods *and the node's namespaces* alive, and
//! the next node enters those and adopts the pods.

pub(crate) mod broker;
pub(crate) mod config;
pub(crate) mod context;
pub(crate) mod env;
pub(crate) mod lifecycle;
pub(crate) mod presence;
mod probes;
mod process;
pub(crate) mod record;
mod register;
mod run;
mod sandbox;
pub(crate) mod shim_client;
mod start;
mod status;
mod volumes;
mod worker;

pub use config::NodeConfig;
pub use process::{main, running, spawn};
pub use run::{HostSide, Node};
