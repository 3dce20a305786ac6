//! What a judge can say, and how verdicts combine.

use serde::{Deserialize, Serialize};

/// The numbers behind a verdict, for status, events and people.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// The measured value, in the metric's unit (percent, milliseconds, or the evidence E of a comparison).
    pub value: f64,
    /// The bound that it was held against.
    pub bound: f64,
    /// How many canary requests it rests on.
    pub samples: u64,
    /// One sentence that a person understands.
    pub explanation: String,
}

/// What a judge says of one metric.
///
/// *No data* and *provider error* are values of their own, never a failure by accident nor a success.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "camelCase")]
pub enum Verdict {
    /// The release is worse: stop it now.
    Bad(Evidence),
    /// The release is not worse than tolerated.
    Good(Evidence),
    /// The evidence does not suffice yet.
    Undecided(Evidence),
    /// There was nothing to measure.
    NoData {
        /// What is missing.
        explanation: String,
    },
    /// The source could not be asked.
    ProviderError {
        /// What went wrong.
        explanation: String,
    },
}

impl Verdict {
    /// The word for status and tables.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Bad(_) => "bad",
            Self::Good(_) => "good",
            Self::Undecided(_) => "undecided",
            Self::NoData { .. } => "no data",
            Self::ProviderError { .. } => "provider error",
        }
    }

    /// The sentence behind the word.
    pub fn explanation(&self) -> &str {
        match self {
            Self::Bad(evidence) | Self::Good(evidence) | Self::Undecided(evidence) => &evidence.explanation,
            Self::NoData { explanation } | Self::ProviderError { explanation } => explanation,
        }
    }

    /// Whether the release must be stopped.
    pub const fn is_bad(&self) -> bool {
        matches!(self, Self::Bad(_))
    }
}
