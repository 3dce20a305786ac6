//! Clearing up from the files alone, whatever was killed before.
//!
//! Namespaces, mounts, interfaces and nftables rules of ours all live in namespaces of processes that are recorded in
//! the state directory. When those processes have ended, so has everything else; nothing is ever created in the
//! host's own namespaces but the sockets of LoadBalancer Services, which end with the processes that hold them.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::Error;
use crate::node::record::{Paths, read_node};
use crate::node::shim_client::read_record;
use crate::shim::protocol::{Request, files};
use crate::sys::fdpass;
use crate::sys::process::{ProcessRecord, end};

/// How long pods may take to stop by themselves.
const POD_GRACE: Duration = Duration::from_secs(5);
/// How long the node may take to stop.
const NODE_GRACE: Duration = Duration::from_secs(3);

/// Ends the node and every pod of a state directory and removes what they left on disk.
///
/// May be called whatever still runs, also when nothing does. Blocks for a few seconds at most.
pub fn teardown(state_dir: &Path) -> Result<(), Error> {
    let paths = Paths::new(state_dir);
    let mut left = Vec::new();
    if let Ok(record) = read_node(&paths) {
        if !end(&record.node, NODE_GRACE) {
            left.push(record.node.pid);
        }
        if let Some(broker) = &record.broker
            && !end(broker, NODE_GRACE)
        {
            left.push(broker.pid);
        }
    }
    let pods = paths.pod_directories();
    // Asked together, so that their graces run side by side.
    let asked: Vec<_> = pods
        .iter()
        .map(|(_, directory)| ask_to_end(directory, POD_GRACE))
        .collect();
    for ((_, directory), connection) in pods.iter().zip(asked) {
        left.extend(finish_pod(directory, connection, POD_GRACE));
    }
    if !left.is_empty() {
        return Err(Error::LeftBehind(left));
    }
    match fs::remove_dir_all(paths.root()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove", paths.root(), error))
        }
        _ => Ok(()),
    }
}

/// Ends what may still run of one pod: its shim, and its containers should the shim be gone already.
pub(crate) fn end_pod(directory: &Path, grace: Duration) {
    let connection = ask_to_end(directory, grace);
    finish_pod(directory, connection, grace);
}

fn ask_to_end(directory: &Path, grace: Duration) -> Option<std::os::fd::OwnedFd> {
    let record = read_record(directory).ok()?;
    if !record.shim.is_alive() {
        return None;
    }
    let connection = fdpass::connect_to(&directory.join(files::SOCKET)).ok()?;
    let request = Request::Shutdown {
        id: 1,
        grace_millis: grace.as_millis() as u64,
    };
    fdpass::send(&connection, &serde_json::to_vec(&request).ok()?, &[]).ok()?;
    Some(connection)
}

/// Waits for the end that was asked for and enforces it; processes that would not go.
fn finish_pod(directory: &Path, connection: Option<std::os::fd::OwnedFd>, grace: Duration) -> Vec<i32> {
    let Ok(record) = read_record(directory) else {
        return Vec::new();
    };
    if connection.is_some() {
        record.shim.wait_gone(grace + Duration::from_secs(1));
    }
    let mut left = Vec::new();
    for process in std::iter::once(&record.shim).chain(&record.containers) {
        if !kill(process) {
            left.push(process.pid);
        }
    }
    left
}

fn kill(process: &ProcessRecord) -> bool {
    if !process.is_alive() {
        return true;
    }
    process.signal(Signal::SIGKILL);
    process.wait_gone(Duration::from_secs(5))
}
