//! A small Kubernetes API server in one process: storage, watch, apply, custom resources, discovery, admission.
//!
//! **What for.** `serin up` runs on it, every test runs on it, and any operator author can: build one, hand
//! [`ApiServer::service`] to `kube::Client::new`, and talk to something that behaves like Kubernetes on the wire, without a socket.
//! [`ApiServer::serve_tls`] serves kubectl.
//!
//! **What not.** No scheduler, no kubelet, no workload controllers (other crates, over the API). No RBAC evaluation: a token is an
//! administrator. No conversion or admission webhooks, no exec or port-forward: those are refused with a message.
//! What is there is listed in `docs/supported/kubernetes-api.md`, with the test that shows it.
//!
//! **How data flows.** `http` turns a request into a target (kind, version, namespace, name) and a change; `http::write` computes the new
//! object with the pure parts: `schema` (types), `patch`, `apply` (field ownership), `crd`, `defaults`, `strategy`, `validate`. The result
//! goes through `hub` into the `store` (a state machine with one counter of versions) and the `log`; the writer is answered when the record
//! is on disk. Watchers are positions in the store's history. `controllers` follow the same history.
//!
//! **Limits.** Bodies 3 MiB, 10,000 JSON patch operations, 20,000 watches, history 4,096 events or 32 MiB per kind.

mod admission;
mod apply;
mod auth;
mod certificates;
mod clock;
mod controllers;
mod crd;
mod defaults;
mod discovery;
mod error;
mod http;
mod hub;
mod kinds;
mod log;
mod meta;
mod names;
mod openapi;
mod patch;
mod protobuf;
mod quantity;
mod schema;
mod selector;
mod server;
mod store;
mod strategy;
mod table;
mod time;
mod validate;
mod versions;

pub use admission::{Admission, AdmissionRequest, Denied, LogOptions, Operation, PodLogs};
pub use auth::{Tokens, User};
pub use certificates::{Certificates, kubeconfig};
pub use clock::{Clock, SystemClock};
pub use error::Error;
pub use server::{ApiServer, Builder};
