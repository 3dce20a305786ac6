//! Is this release worse than the one that runs, and how sure are we?
//!
//! * [`sample`]: what was measured: counts of one arm (canary or primary) over one interval.
//! * [`source`]: where measurements come from, one trait; the embedded mesh is an implementation.
//! * [`judge`]: pure functions from evidence to a [`Verdict`]: comparisons of errors and latency, absolute guards, sanity
//!   checks, tests of values from external providers, the watch after promotion, and Flagger's rule.
//! * [`judges`]: all judges of one run with one overall alpha.
//! * [`verdict`]: what a judge can say, how verdicts combine, and the sentence that explains one.
//! * [`planner`]: how long a step needs to find a regression of a given size.
//! * [`replay`]: recorded measurements as JSON lines.
//!
//! ```text
//! MetricSource ─▶ Sample (both arms, one second) ─▶ Judges::observe ─▶ Judges::verdict ─▶ Combined { verdict, metrics }
//!                                                     │   ▲
//!                                                  status of the Canary (a few hundred bytes per metric)
//! ```
//!
//! The judges know nothing of Kubernetes, clocks or networks. Their state stays valid across restarts because the tests may
//! be looked at at any time.
//!
//! Limits: one canary is compared with one primary; requests that one client repeats are counted as independent (feed
//! counts of distinct clients, or choose a higher tolerance); a slowdown inside one histogram bucket is not seen.

pub mod judge;
pub mod judges;
mod math;
pub mod planner;
#[cfg(test)]
mod random;
pub mod replay;
pub mod sample;
pub mod source;
mod text;
pub mod verdict;

pub use judges::{Judges, Options};
pub use sample::{Arm, Counts, ErrorClass, ErrorClasses, Histogram, Sample};
pub use source::{MetricSource, Query, SourceError};
pub use verdict::{Combined, Evidence, MetricVerdict, Missing, Policy, Verdict};
