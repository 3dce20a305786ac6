//! Load that runs beside a story, and what became of its requests.

use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::cluster::TestCluster;

/// Load through the gateway, from its start until it is asked for its report.
pub(crate) struct Traffic {
    load: Option<Child>,
}

/// What became of the requests.
#[derive(Debug)]
pub(crate) struct Report(pub(crate) Value);

impl Traffic {
    /// Starts sending `rate` requests a second for `host`.
    pub(crate) fn start(cluster: &TestCluster, host: &str, rate: u32) -> Self {
        Self::start_at(cluster, host, "/", rate)
    }

    /// Starts sending `rate` requests a second for `path` of `host`.
    pub(crate) fn start_at(cluster: &TestCluster, host: &str, path: &str, rate: u32) -> Self {
        let url = format!("http://127.0.0.1:{}{path}", cluster.gateway_port);
        let load = cluster
            .command()
            .args(["load", &url, "-o", "json", "--group-by", "x-podinfo-version"])
            .args(["-r", &rate.to_string(), "-H", &format!("host: {host}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the load");
        Self { load: Some(load) }
    }

    /// Ends the load as Ctrl-C does and returns its report.
    pub(crate) fn stop(mut self) -> Report {
        let load = self.load.take().expect("the load runs");
        signal("INT", load.id());
        let output = load.wait_with_output().expect("wait for the load");
        Report(serde_json::from_slice(&output.stdout).expect("the load prints a report"))
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        if let Some(mut load) = self.load.take() {
            let _ = load.kill();
            let _ = load.wait();
        }
    }
}

impl Report {
    /// Asserts that there was traffic and that the system answered all of it.
    #[track_caller]
    pub(crate) fn nothing_was_lost(&self) {
        assert!(self.0["sent"].as_u64() > Some(0), "there was traffic: {}", self.0);
        assert_eq!(self.0["failed_by_system"], 0, "{}", self.0);
    }

    /// How many answers a version gave.
    pub(crate) fn answered_by(&self, version: &str) -> u64 {
        self.0["groups"][version]["answered"].as_u64().unwrap_or(0)
    }
}

/// Sends a signal to a process.
pub(crate) fn signal(name: &str, pid: u32) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status()
        .expect("run kill");
    assert!(status.success(), "kill -{name} {pid}");
}

/// Kills a process that may have ended already.
pub(crate) fn kill_if_there(pid: u32) {
    let _ = Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .stderr(Stdio::null())
        .status()
        .expect("run kill");
}
