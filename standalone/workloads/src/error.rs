//! What can go wrong, with what was being done.

use std::path::PathBuf;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request to the API server failed.
    #[error("{action}: {source}")]
    Api {
        /// What was being done, with the object's name.
        action: String,
        /// What the API server answered.
        #[source]
        source: Box<kube::Error>,
    },
    /// A watch did not deliver its first list.
    #[error("list {what}: nothing came within {seconds} s; is the API server running?")]
    NotListed {
        /// The kind.
        what: &'static str,
        /// How long we waited.
        seconds: u64,
    },
    /// An `Image` object cannot be read.
    #[error("read image {name}: {source}; correct it or remove it with `serin image remove`")]
    Image {
        /// The object.
        name: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A file of the node could not be used.
    #[error("{action} {path}: {source}", path = path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The node's namespaces or network could not be set up.
    #[error("{action}: {source}; {remedy}")]
    Kernel {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
        /// What to do about it.
        remedy: &'static str,
    },
    /// Another node process already works on the state directory.
    #[error("another node (pid {pid}) already runs in {path}", path = path.display())]
    AlreadyRunning {
        /// The other node.
        pid: i32,
        /// The state directory.
        path: PathBuf,
    },
    /// Something outlived `teardown`.
    #[error("these processes could not be ended: {0:?}; end them by hand")]
    LeftBehind(Vec<i32>),
    /// The API client could not be made.
    #[error(transparent)]
    Kit(#[from] serin_kit::Error),
}

impl Error {
    pub(crate) fn api(action: impl Into<String>, source: kube::Error) -> Self {
        Self::Api {
            action: action.into(),
            source: Box::new(source),
        }
    }

    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::File {
            action,
            path: path.into(),
            source,
        }
    }
}
