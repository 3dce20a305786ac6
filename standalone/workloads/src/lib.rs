//! Workloads of the standalone cluster: Deployment → ReplicaSet → Pod → processes in network namespaces, with
//! Services, DNS, logs and the image catalogue. What kube-controller-manager, kube-scheduler, kubelet, kube-proxy and
//! CoreDNS do on a real cluster, as far as one machine needs it, over the same API.
//!
//! ```text
//! serin up ── controllers::run     Deployment, ReplicaSet, EndpointSlice, scheduler (in process, over kube::Client)
//!    └─ serin node (node::spawn)   its own network (and, not being root, user) namespace; outlives `serin up`
//!          ├─ host side            the forked half that stays outside and hands sockets in
//!          ├─ bridge, nftables, DNS, forwarders
//!          └─ serin shim           one per pod: holds its namespaces, runs its containers, writes its logs
//! ```
//!
//! Entry points: [`controllers::run`], [`node::spawn`] and [`node::main`], [`shim::main()`], [`teardown`],
//! [`logs::PodLogs`], [`image`]. `node::main` and `shim::main` fork and enter namespaces: the program must call them
//! before it starts a thread.
//!
//! Nothing is created in the host's own namespaces but the listening sockets of LoadBalancer and NodePort Services. So
//! what must be ended is processes, all of them recorded in the state directory, and with them everything is gone.
//!
//! Limits, said where they matter to the user: no images are pulled (see [`image`]), resource limits are not enforced,
//! one node, IPv4 only. `docs/supported/workloads.md` lists every field.

pub mod controllers;
mod dns;
mod error;
pub mod image;
pub mod logs;
mod mirror;
pub mod node;
mod services;
pub mod shim;
mod sys;
mod teardown;

pub use error::Error;
pub use teardown::teardown;
