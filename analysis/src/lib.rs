//! Is this release worse than the one that runs, and how sure are we?
//!
//! * [`sample`]: what was measured: counts of one arm (canary or primary) over one interval.
//! * [`source`]: where measurements come from, one trait; the embedded mesh and Prometheus are implementations.
//! * [`judge`]: pure functions from evidence to a [`verdict::Verdict`]: the sequential comparison of canary against
//!   primary, and Flagger's threshold rule.
//! * [`verdict`]: what a judge can say, how verdicts combine, and the sentence that explains one.
//!
//! The judges know nothing of Kubernetes, clocks or networks. Their state is a few numbers per metric that live in the
//! status of the Canary; it stays valid across restarts because the test may be looked at at any time.
//!
//! Limits: one canary is compared with one primary; requests that one client repeats are counted as independent (see
//! [`judge::comparison`] for what that means for the error bound).

pub mod judge;
pub mod sample;
pub mod source;
pub mod verdict;

pub use sample::{Arm, Counts, Histogram, Sample};
pub use source::{MetricSource, Query, SourceError};
pub use verdict::{Evidence, Verdict};
