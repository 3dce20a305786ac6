//! serin-simulation: does a judge keep its promises, and how does it compare with what is deployed today?
//!
//! Simulated hours of traffic to a canary and a primary, second by second, shown to Serin's judges and, in the same
//! runs, to Flagger's rule, Argo Rollouts' rule and Kayenta's judge. Counted are false rollbacks (with their confidence
//! interval), the probability and the time of detection, and the requests that failed until then.
//!
//! ```text
//! scenario ─▶ world (one Sample a second) ─▶ contestants ─▶ tally ─▶ goals, results.md, plots
//! ```
//!
//! - [`scenario`]: arrivals, errors, latency, weights, sessions, restarts. [`world`] draws them, exactly and per second.
//! - [`contest`]: who takes part. [`absolute`]: judges with a limit of their own. [`rules`]: the rules of others, as they are.
//! - [`watching`]: the watch after promotion, over days.
//! - [`run`]: runs in parallel. Each run has a seed of its own, so the results do not depend on the number of threads.
//! - [`report`]: the tables, the goals and whether they are met; [`plots`] and [`svg`]: the figures of the documentation.
//!
//! Limits: an hour is 3,600 draws; nothing below a second is modelled (a verdict's time is rounded up to it), and neither
//! is the time that a weight needs to reach the proxies.

pub mod absolute;
pub mod contest;
pub mod latency;
pub mod plots;
pub mod random;
pub mod report;
pub mod rules;
pub mod run;
pub mod scenario;
pub mod stats;
pub mod svg;
pub mod watching;
pub mod world;
