//! What the node keeps on disk so that another node can carry on, and so that `teardown` can clear up without one.
//!
//! ```text
//! <state>/node/
//!   node.json            the node's processes
//!   node.lock            held by the node that works on this directory
//!   pods/<uid>/          one directory per pod
//!     pod.json             PodRecord
//!     shim.json, s.sock    the pod's shim
//!     etc/, volumes/       what is mounted into its containers
//!   logs/<ns>_<pod>_<uid>/<container>/<attempt>.log
//! ```

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use crate::shim::protocol::files;
use crate::sys::process::ProcessRecord;

/// The processes of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NodeRecord {
    pub(crate) node: ProcessRecord,
    /// The process that stays on the host's side and opens sockets there.
    pub(crate) broker: Option<ProcessRecord>,
    /// What the node was started with: another binary or configuration means that it is to be replaced.
    pub(crate) fingerprint: String,
}

/// A pod that was given a network.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodRecord {
    pub(crate) address: Ipv4Addr,
    /// The pod as it was when it was started.
    pub(crate) pod: Pod,
}

/// Paths below the state directory.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    root: PathBuf,
}

impl Paths {
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self {
            root: state_dir.join("node"),
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn node_record(&self) -> PathBuf {
        self.root.join("node.json")
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("node.lock")
    }

    pub(crate) fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    pub(crate) fn pod(&self, uid: &str) -> PathBuf {
        self.pods().join(uid)
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// Directory of a pod's logs.
    pub(crate) fn pod_logs(&self, namespace: &str, name: &str, uid: &str) -> PathBuf {
        self.logs().join(format!("{namespace}_{name}_{uid}"))
    }

    /// The directories of all pods that left something.
    pub(crate) fn pod_directories(&self) -> Vec<(String, PathBuf)> {
        let Ok(entries) = fs::read_dir(self.pods()) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| Some((entry.file_name().to_str()?.to_owned(), entry.path())))
            .collect()
    }
}

pub(crate) fn read_pod(directory: &Path) -> io::Result<PodRecord> {
    Ok(serde_json::from_slice(&fs::read(directory.join(files::POD))?)?)
}

pub(crate) fn write_pod(directory: &Path, record: &PodRecord) -> io::Result<()> {
    write_atomically(&directory.join(files::POD), &serde_json::to_vec(record)?)
}

pub(crate) fn read_node(paths: &Paths) -> io::Result<NodeRecord> {
    Ok(serde_json::from_slice(&fs::read(paths.node_record())?)?)
}

/// Replaces a file so that a reader sees the old or the new content.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = temporary(path);
    fs::write(&temporary, content)?;
    fs::rename(temporary, path)
}

/// Writes a file that is not there yet, whole; leaves one that is there as it is.
pub(crate) fn write_first(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = temporary(path);
    fs::write(&temporary, content)?;
    let linked = fs::hard_link(&temporary, path);
    fs::remove_file(temporary)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// A name of this process's own: server and node write the same files.
fn temporary(path: &Path) -> PathBuf {
    path.with_extension(format!("{}.tmp", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_is_there_is_not_replaced_by_who_only_wants_one_to_be_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("node.json");
        write_first(&path, b"first").unwrap();
        write_first(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        write_atomically(&path, b"third").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"third");
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            1,
            "nothing else is left"
        );
    }
}
