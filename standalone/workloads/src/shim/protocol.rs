//! What node and shim say to each other: JSON, one value per packet.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::sys::mounts::Bind;
use crate::sys::process::ProcessRecord;

/// File names in a pod's directory.
pub(crate) mod files {
    /// Control socket of the shim.
    pub(crate) const SOCKET: &str = "s.sock";
    /// [`super::ShimRecord`], written once the shim listens.
    pub(crate) const RECORD: &str = "shim.json";
    /// [`crate::node::record::PodRecord`], written by the node before the shim is started.
    pub(crate) const POD: &str = "pod.json";
}

/// Who the shim of a pod directory is, and which processes are its containers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ShimRecord {
    pub(crate) shim: ProcessRecord,
    #[serde(default)]
    pub(crate) containers: Vec<ProcessRecord>,
}

/// What a pod's shim is started with, on its command line as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ShimConfig {
    pub(crate) directory: PathBuf,
    pub(crate) hostname: String,
    /// Number of the inherited descriptor of the pod's network namespace.
    pub(crate) network: i32,
    /// Number of the inherited control connection.
    pub(crate) control: i32,
    /// emptyDir volumes of medium Memory: directory and size in bytes (0: kernel's default).
    #[serde(default)]
    pub(crate) memory_volumes: Vec<(PathBuf, u64)>,
}

/// A container, ready to be executed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ContainerSpec {
    pub(crate) name: String,
    /// Restart count at this start: 0 for the first.
    pub(crate) attempt: u32,
    /// The program; without a slash it is looked up in the PATH of `env`, inside the container.
    pub(crate) program: String,
    /// Arguments, the zeroth included.
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) working_dir: Option<PathBuf>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) groups: Vec<u32>,
    pub(crate) binds: Vec<Bind>,
    pub(crate) read_only_root: bool,
    /// Log file of this attempt.
    pub(crate) log: PathBuf,
    /// `SERIN_LISTENERS` ports in the order of the descriptors that come with the request.
    pub(crate) listeners: Vec<u16>,
}

/// Node to shim.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub(crate) enum Request {
    /// Start the container described by a file (removed once read, it holds secrets). Listening sockets attached.
    Start { id: u64, spec_file: PathBuf },
    /// Signal a container's first process.
    Signal { id: u64, container: String, signal: i32 },
    /// Run a command in a container's namespaces.
    Exec {
        id: u64,
        container: String,
        argv: Vec<String>,
        env: Vec<(String, String)>,
        timeout_millis: u64,
    },
    /// What became of every container.
    State { id: u64 },
    /// The listening sockets that containers were given, port by port.
    Listeners { id: u64 },
    /// SIGTERM to all, SIGKILL after the grace, then the shim ends.
    Shutdown { id: u64, grace_millis: u64 },
}

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Exit {
    /// As Kubernetes counts: the exit status, or 128 + signal.
    pub(crate) code: i32,
    pub(crate) signal: Option<i32>,
    /// Unix time in milliseconds.
    pub(crate) started_at: i64,
    /// Unix time in milliseconds.
    pub(crate) finished_at: i64,
}

/// A container as the shim knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ContainerReport {
    pub(crate) name: String,
    pub(crate) attempt: u32,
    pub(crate) pid: i32,
    pub(crate) started_at: i64,
    pub(crate) exit: Option<Exit>,
}

/// Shim to node.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub(crate) enum Message {
    /// It was done.
    Done { id: u64 },
    /// The container runs.
    Started { id: u64, pid: i32, started_at: i64 },
    /// It could not be done.
    Failed { id: u64, reason: String },
    /// Answer to [`Request::State`].
    State {
        id: u64,
        containers: Vec<ContainerReport>,
    },
    /// Answer to [`Request::Listeners`], descriptors attached in this order.
    Listeners { id: u64, ports: Vec<u16> },
    /// Answer to [`Request::Exec`] once it ended. `code` is none if it was stopped at its timeout.
    Executed {
        id: u64,
        code: Option<i32>,
        output: String,
    },
    /// A container ended. Unasked.
    Exited {
        container: String,
        attempt: u32,
        exit: Exit,
    },
}

impl Message {
    /// The request that it answers.
    pub(crate) fn answers(&self) -> Option<u64> {
        match self {
            Self::Done { id }
            | Self::Started { id, .. }
            | Self::Failed { id, .. }
            | Self::State { id, .. }
            | Self::Listeners { id, .. }
            | Self::Executed { id, .. } => Some(*id),
            Self::Exited { .. } => None,
        }
    }
}
