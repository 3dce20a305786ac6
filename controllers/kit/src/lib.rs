//! What every Serin controller shares, and nothing that only one of them needs.
//!
//! * [`client`]: a `kube::Client` over an in-process service or a Unix socket, so that the same controllers run
//!   against the embedded API server and against a real cluster.
//! * [`cache`]: one watch per kind, shared: a store to read from and a bounded stream of changes to react to.
//! * [`condition`]: `metav1.Condition` lists, changed only when something changed.
//! * [`unhonoured`]: the one way in which a controller says that it read a field that it does not act on.
//! * [`apply`]: server-side apply of objects and statuses with one field manager per controller.
//! * [`events`]: Kubernetes events, published in the background and never in the way of a reconcile.
//! * [`leader`]: leader election over a Lease, and who leads without one.
//! * [`metrics`]: the controllers' own metrics, served for Prometheus.
//! * [`shutdown`]: a token that is cancelled by SIGINT or SIGTERM.
//!
//! Not here: anything that decides. Decisions live in pure functions of the controllers.

pub mod apply;
pub mod cache;
pub mod client;
pub mod condition;
pub mod events;
pub mod leader;
pub mod metrics;
pub mod shutdown;
pub mod unhonoured;

/// What can go wrong while talking to the API server, with the object it concerned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A write was refused or did not get through.
    #[error("{action} {object}: {source}")]
    Write {
        /// What was being done: `apply`, `apply status of`, `delete`.
        action: &'static str,
        /// `Kind namespace/name`.
        object: String,
        /// The API server's answer.
        #[source]
        source: Box<kube::Error>,
    },
    /// The object could not be turned into JSON.
    #[error("encode {object}: {source}")]
    Encode {
        /// `Kind namespace/name`.
        object: String,
        /// What serde said.
        #[source]
        source: serde_json::Error,
    },
    /// A watch did not deliver its first list in time.
    #[error(
        "watch of {kind} did not deliver its first list within {seconds} s; is its CustomResourceDefinition installed?"
    )]
    NotReady {
        /// The kind being watched.
        kind: String,
        /// How long we waited.
        seconds: u64,
    },
    /// The endpoint of the metrics could not be opened.
    #[error("serve metrics on {address}: {source}; choose another address")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The Unix socket of the API server could not be used.
    #[error("API server socket {path}: {reason}")]
    Socket {
        /// The socket's path.
        path: String,
        /// Why not.
        reason: String,
    },
}
