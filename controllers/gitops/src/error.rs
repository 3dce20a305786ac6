//! The crate's one error type. Every variant says what was being done, to what, and what helps.

use std::time::Duration;

/// What can go wrong between a git server and the cluster.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A git operation failed.
    #[error("{action} {url}: {reason}")]
    Git {
        /// What was being done: `list references of`, `fetch`.
        action: &'static str,
        /// The repository, without credentials.
        url: String,
        /// libgit2's words, with a remedy where we know one.
        reason: String,
    },
    /// A git operation did not end in time.
    #[error("{action} {url}: no answer within {seconds} s (spec.timeout); is the git server reachable?", seconds = .after.as_secs_f64())]
    GitTimeout {
        /// What was being done.
        action: &'static str,
        /// The repository, without credentials.
        url: String,
        /// The deadline that passed.
        after: Duration,
    },
    /// Too many git operations hang; a new one would only add to them.
    #[error(
        "{url}: {hanging} git operations hang in unanswered connections; this one waits for the next interval"
    )]
    GitExhausted {
        /// The repository, without credentials.
        url: String,
        /// How many threads are stuck.
        hanging: usize,
    },
    /// The reference that the object asks for is not in the repository.
    #[error("{url}: {reason}")]
    Reference {
        /// The repository, without credentials.
        url: String,
        /// Which reference, and what is there instead.
        reason: String,
    },
    /// A Secret or ConfigMap that the object names cannot be used.
    #[error("{kind} '{namespace}/{name}': {reason}")]
    Referred {
        /// `Secret` or `ConfigMap`.
        kind: &'static str,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The object's own specification cannot be acted on, whatever happens around it.
    #[error("{0}")]
    Spec(String),
    /// The tree of a revision cannot be read.
    #[error("read {path} of revision {revision}: {reason}")]
    Tree {
        /// Path in the repository.
        path: String,
        /// The revision.
        revision: String,
        /// Why not.
        reason: String,
    },
    /// The manifests could not be built.
    #[error("{0}")]
    Build(String),
    /// One object could not be applied, deleted or read.
    #[error("{object} {action} failed: {reason}{}", from(origin.as_ref()))]
    Object {
        /// `Kind/namespace/name`, as Flux writes objects.
        object: String,
        /// `dry-run`, `apply`, `delete`, `get`.
        action: &'static str,
        /// The API server's words.
        reason: String,
        /// File and line that it comes from, where the build knows.
        origin: Option<String>,
        /// Whether the same request may succeed in a moment (server busy or away).
        transient: bool,
    },
    /// The API server does not know a kind.
    #[error(
        "{object}: no matches for kind \"{kind}\" in version \"{version}\"; is its CustomResourceDefinition installed?"
    )]
    NoKind {
        /// `Kind/namespace/name`.
        object: String,
        /// Kind.
        kind: String,
        /// API version.
        version: String,
    },
    /// Something needed from the cluster did not happen in time.
    #[error("{what} within {seconds} s", seconds = .after.as_secs())]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// A file system operation of the cache or a watch.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which path.
        path: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Talking to the API server in general.
    #[error("{action}: {source}")]
    Api {
        /// What was being done.
        action: String,
        /// The client's words.
        #[source]
        source: Box<kube::Error>,
    },
    /// From the parts that all controllers share.
    #[error(transparent)]
    Kit(#[from] serin_kit::Error),
    /// The controller is stopping.
    #[error("the controller is stopping")]
    Stopping,
}

impl Error {
    /// Wraps a client error with what was being done.
    pub(crate) fn api(action: impl Into<String>, source: kube::Error) -> Self {
        Self::Api {
            action: action.into(),
            source: Box::new(source),
        }
    }
}

impl Error {
    /// Whether trying again soon may succeed without anybody changing anything.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Object { transient, .. } => *transient,
            Self::Api { source, .. } => is_transient(source),
            Self::NoKind { .. } | Self::Deadline { .. } => true,
            Self::Git { .. }
            | Self::GitTimeout { .. }
            | Self::GitExhausted { .. }
            | Self::Reference { .. }
            | Self::Referred { .. }
            | Self::Spec(_)
            | Self::Tree { .. }
            | Self::Build(_)
            | Self::Io { .. }
            | Self::Kit(_)
            | Self::Stopping => false,
        }
    }
}

fn from(origin: Option<&String>) -> String {
    origin
        .map(|origin| format!(" (from {origin})"))
        .unwrap_or_default()
}

/// Whether the API server was busy or away, rather than refusing.
pub(crate) fn is_transient(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code >= 500 || status.code == 429,
        kube::Error::Service(_) | kube::Error::HyperError(_) => true,
        _ => false,
    }
}

/// The API server's own sentence when it gave one, the client's words otherwise.
pub(crate) fn server_words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        other => other.to_string(),
    }
}
