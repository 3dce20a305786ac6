//! What can go wrong between a question and its number.

use crate::credentials::Credentials;

/// Longest part of an answer that is repeated in an error.
const EXCERPT_MAX: usize = 200;

/// Why there is no number.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The MetricTemplate asks for what cannot be.
    #[error("metric provider {provider}: {reason}")]
    Config {
        /// Its type.
        provider: &'static str,
        /// What to change.
        reason: String,
    },
    /// A type that this version does not know.
    #[error("metric provider {0:?} is not known; see docs/supported/providers.md for those that are")]
    Unknown(String),
    /// The Secret, or the environment, lacks what is needed to log in.
    #[error("metric provider {provider} cannot log in: {reason}")]
    Credentials {
        /// Its type.
        provider: &'static str,
        /// What is missing.
        reason: String,
    },
    /// The query cannot be rendered or read.
    #[error("query of the metric template: {0}")]
    Query(String),
    /// The answer is empty: there is nothing to measure. Not an error of anybody's.
    #[error("metric provider {provider} has no values: {reason}")]
    NoValues {
        /// Its type.
        provider: &'static str,
        /// In which way it is empty.
        reason: String,
    },
    /// It cannot be reached.
    #[error("metric provider {provider} cannot be asked at {host}: {reason}")]
    Unreachable {
        /// Its type.
        provider: &'static str,
        /// Host and port.
        host: String,
        /// What happened.
        reason: String,
    },
    /// It did not answer in time.
    #[error("metric provider {provider} at {host} gave no answer within {seconds} s")]
    Timeout {
        /// Its type.
        provider: &'static str,
        /// Host and port.
        host: String,
        /// The deadline.
        seconds: u64,
    },
    /// It refused.
    #[error("metric provider {provider} at {host} answered {status}: {excerpt}")]
    Status {
        /// Its type.
        provider: &'static str,
        /// Host and port.
        host: String,
        /// The HTTP status.
        status: u16,
        /// The beginning of what it said.
        excerpt: String,
    },
    /// It answered something that is not understood.
    #[error("metric provider {provider} answered something else than one number: {reason}")]
    Answer {
        /// Its type.
        provider: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    pub(crate) fn config(provider: &'static str, reason: impl Into<String>) -> Self {
        Self::Config {
            provider,
            reason: reason.into(),
        }
    }

    pub(crate) fn no_values(provider: &'static str, reason: impl Into<String>) -> Self {
        Self::NoValues {
            provider,
            reason: reason.into(),
        }
    }

    pub(crate) fn answer(provider: &'static str, reason: impl Into<String>) -> Self {
        Self::Answer {
            provider,
            reason: reason.into(),
        }
    }

    /// Whether there was simply nothing to measure.
    pub const fn is_no_values(&self) -> bool {
        matches!(self, Self::NoValues { .. })
    }

    /// The same error without anything secret that the other side may have repeated.
    #[must_use]
    pub fn scrubbed(mut self, credentials: &Credentials) -> Self {
        match &mut self {
            Self::Config { reason, .. }
            | Self::Credentials { reason, .. }
            | Self::Query(reason)
            | Self::NoValues { reason, .. }
            | Self::Unreachable { reason, .. }
            | Self::Answer { reason, .. }
            | Self::Status { excerpt: reason, .. } => *reason = credentials.scrub(reason),
            Self::Unknown(_) | Self::Timeout { .. } => {}
        }
        self
    }
}

/// The beginning of an answer, as one printable line.
pub(crate) fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(EXCERPT_MAX * 4)]);
    let mut line: String = text
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .filter(|c| !c.is_control())
        .take(EXCERPT_MAX)
        .collect();
    if line.is_empty() {
        line.push_str("(no text)");
    }
    line
}
