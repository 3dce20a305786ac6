//! serin-canary: rollouts. A new revision of a workload gets traffic step by step while it is measured, and is promoted
//! or taken back.
//!
//! The API is Flagger's: the Canary resource, its phases, the objects it generates, its events. Built as
//! *observe → decide → act*:
//!
//! ```text
//! watch caches ─▶ Observed ─▶ decide(Observed, Plan, Status, now) ─▶ Decision { status, actions, events, wake_at } ─▶ act
//!                    ▲                    (pure)                                                                   │
//!   endpoints, dead pods, liveness of the weight (Traffic), samples (MetricSource) ◀──────── route, Deployments ◀──┘
//! ```
//!
//! - [`plan`]: a spec, read once; what is not honoured is named.
//! - [`observed`]: what is seen, as one struct.
//! - [`decide`]: the decision function and its promises. Pure.
//! - [`objects`]: the generated objects. Pure.
//! - [`templates`]: metrics that a provider is asked for (MetricTemplate).
//! - [`traffic`]: the seam to a mesh.
//! - [`metrics`]: the controller's own metrics, Flagger's.
//! - [`run`]: the shell. One task per Canary, asleep until something that concerns it happens; at rest a Canary costs no
//!   API request at all.
//!
//! Differences from Flagger that are on purpose:
//!
//! - Nothing waits for a tick. A step's measurement opens when its weight is live in every proxy that needs it, and lasts
//!   `analysis.interval`, which may be shorter than 10 s.
//! - A dead canary pod, a weight that proxies refuse, or the sequential comparison with the primary stop a run at once.
//!   The failed check that reaches the threshold does too, and not an interval later.
//! - No data halts a run without counting as a failed check: a monitoring outage does not roll back a good release.
//! - Pods are scaled down when no proxy sends to them any more.
//! - A change of `spec.service` during a run rewrites the route in place and does not reset its weights.
//! - A revision pushed during a promotion loses its traffic at once instead of being rolled into it.
//!
//! Limits: strategies other than weights, gates and webhooks, session affinity, autoscalers, targets
//! other than Deployments, and providers other than Istio's API are refused by the condition `FullyHonoured`. The hash in
//! `lastAppliedSpec` is ours: a Canary that Flagger managed before starts one run when it is taken over.

pub mod decide;
#[cfg(test)]
mod golden;
pub mod metrics;
pub mod objects;
pub mod observed;
pub mod plan;
mod shell;
pub mod templates;
pub mod traffic;

pub use shell::{Caches, Context, run};

/// Field manager of everything that is written here.
pub const FIELD_MANAGER: &str = "serin-canary";

/// What can go wrong, with the object it concerned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A write was refused or did not get through. It is tried again with back-off.
    #[error("{action} {object}: {source}")]
    Write {
        /// What was being done.
        action: &'static str,
        /// `Kind namespace/name`.
        object: String,
        /// The API server's answer.
        #[source]
        source: Box<kube::Error>,
    },
    /// A write did not answer in time. It is tried again.
    #[error("{action} {object}: no answer within {seconds} s")]
    Timeout {
        /// What was being done.
        action: &'static str,
        /// `Kind namespace/name`.
        object: String,
        /// The deadline.
        seconds: u64,
    },
    /// The objects cannot be generated.
    #[error("generate the objects of Canary {canary}: {reason}")]
    Blueprint {
        /// `namespace/name`.
        canary: String,
        /// Why not, for the user.
        reason: String,
    },
    /// Metric providers cannot be asked from this process.
    #[error("metric providers: {0}")]
    Providers(#[from] serin_providers::Error),
    /// A watch did not start.
    #[error(transparent)]
    Watch(#[from] serin_kit::Error),
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a String does not fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}
