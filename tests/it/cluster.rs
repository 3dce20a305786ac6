//! A cluster of its own for a test, run by the built programs as a user would, and removed whatever happens.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::api::Api;
use crate::mounts::Mounts;
use crate::traffic::signal;

/// Directory of the built programs, from `SERIN_BIN_DIR`.
pub(crate) fn programs() -> Option<PathBuf> {
    let Some(directory) = std::env::var_os("SERIN_BIN_DIR").map(PathBuf::from) else {
        eprintln!("SKIPPED: SERIN_BIN_DIR is not set; `make test` builds the programs and sets it");
        return None;
    };
    assert!(
        directory.join("serin").exists(),
        "SERIN_BIN_DIR holds no program `serin`"
    );
    Some(directory)
}

/// Whether we may make network namespaces without further ado.
fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output().expect("run id");
    let root = String::from_utf8_lossy(&output.stdout).trim() == "0";
    if !root {
        eprintln!("SKIPPED: this test makes network namespaces and is run as root");
    }
    root
}

/// A cluster of its own.
pub(crate) struct TestCluster {
    home: TempDir,
    programs: PathBuf,
    /// File systems that only its processes see.
    mounts: Option<Mounts>,
    pub(crate) gateway_port: u16,
}

impl TestCluster {
    /// A cluster that is not started yet; `None`, loudly, where it cannot run.
    pub(crate) fn new() -> Option<Self> {
        let programs = programs()?;
        if !is_root() {
            return None;
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("find a free port");
        let gateway_port = listener.local_addr().expect("the port found").port();
        let home = tempfile::Builder::new()
            .prefix("serin-")
            .tempdir()
            .expect("make a directory");
        Some(Self {
            home,
            programs,
            mounts: None,
            gateway_port,
        })
    }

    /// A cluster some of whose directories are file systems of `megabytes` each, which only its own processes see.
    pub(crate) fn with_small_file_systems(directories: &[&str], megabytes: u32) -> Option<Self> {
        let mut cluster = Self::new()?;
        let paths: Vec<PathBuf> = directories
            .iter()
            .map(|name| cluster.directory().join(name))
            .collect();
        cluster.mounts = Some(Mounts::new(&paths, megabytes));
        Some(cluster)
    }

    /// A path of the cluster as its processes see it.
    pub(crate) fn inside(&self, path: &Path) -> PathBuf {
        match &self.mounts {
            None => path.to_owned(),
            Some(mounts) => mounts.inside(path),
        }
    }

    /// Starts it and waits until it is ready.
    pub(crate) fn up(&self) {
        let port = self.gateway_port.to_string();
        self.serin(&["up", "--gateway-port", &port]);
    }

    /// Starts it without waiting; the caller waits for the child.
    pub(crate) fn begin_up(&self) -> Child {
        self.command()
            .args(["up", "--gateway-port", &self.gateway_port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("run serin up")
    }

    /// The directory that its own directory is in; removed with it.
    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// Its files.
    pub(crate) fn directory(&self) -> PathBuf {
        self.home.path().join("default")
    }

    /// Its API.
    pub(crate) fn api(&self) -> Api {
        Api::at(self.inside(&self.directory().join("api.sock")))
    }

    /// The program `serin`, told about this cluster.
    pub(crate) fn command(&self) -> Command {
        let mut command = match &self.mounts {
            None => Command::new(self.programs.join("serin")),
            Some(mounts) => {
                let mut command = mounts.enter();
                command.arg(self.programs.join("serin"));
                command
            }
        };
        command.env("SERIN_HOME", self.home.path());
        command
    }

    /// Runs `serin`, whatever it answers.
    pub(crate) fn try_serin(&self, arguments: &[&str]) -> Output {
        self.command()
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("run serin")
    }

    /// Runs `serin` and returns what it printed; it must succeed.
    pub(crate) fn serin(&self, arguments: &[&str]) -> String {
        let output = self.try_serin(arguments);
        assert!(
            output.status.success(),
            "serin {arguments:?}: {}\n{}\n{}\nserver log:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.log(),
        );
        String::from_utf8(output.stdout).expect("serin prints UTF-8")
    }

    /// The end of the server's log.
    pub(crate) fn log(&self) -> String {
        let text =
            std::fs::read_to_string(self.inside(&self.directory().join("server.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(80)..].join("\n")
    }

    /// Runs kubectl against it; `None`, loudly, where there is no kubectl.
    pub(crate) fn kubectl(&self, arguments: &[&str], input: Option<&str>) -> Option<Output> {
        if !crate::cluster::on_path("kubectl") {
            eprintln!("SKIPPED: kubectl is not on PATH");
            return None;
        }
        let mut command = Command::new("kubectl");
        command
            .env("KUBECONFIG", self.directory().join("kubeconfig"))
            .env("HOME", self.home.path())
            .args(arguments)
            .stdin(if input.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("run kubectl");
        if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
            use std::io::Write as _;
            stdin.write_all(text.as_bytes()).expect("feed kubectl");
        }
        Some(child.wait_with_output().expect("wait for kubectl"))
    }

    /// Runs kubectl, which must succeed, and returns what it printed.
    pub(crate) fn kubectl_ok(&self, arguments: &[&str], input: Option<&str>) -> Option<String> {
        let output = self.kubectl(arguments, input)?;
        assert!(
            output.status.success(),
            "kubectl {arguments:?}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        Some(String::from_utf8(output.stdout).expect("kubectl prints UTF-8"))
    }

    /// Sends requests to the gateway and returns the report.
    pub(crate) fn load(&self, host: &str, path: &str, rate: u32, duration: &str) -> Value {
        let url = format!("http://127.0.0.1:{}{path}", self.gateway_port);
        let header = format!("host: {host}");
        let rate = rate.to_string();
        let arguments = [
            "load", &url, "-r", &rate, "-d", duration, "-H", &header, "-o", "json",
        ];
        let output = self.try_serin(&arguments);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!(
                "serin load printed no report ({error}): {}",
                String::from_utf8_lossy(&output.stderr)
            )
        })
    }

    /// Process id of the server.
    pub(crate) fn server_pid(&self) -> u32 {
        let lock = self.inside(&self.directory().join("server.lock"));
        let text = std::fs::read_to_string(lock).expect("read the lock");
        let pid = text
            .split_whitespace()
            .next()
            .expect("the lock says who holds it");
        pid.parse().expect("the lock holds a process id")
    }

    /// Kills the server as `kill -9` does and waits until it is gone.
    pub(crate) fn kill_server(&self) {
        signal("KILL", self.server_pid());
        let lock = self.inside(&self.directory().join("server.lock"));
        let lock = std::fs::File::open(lock).expect("open the lock");
        // The kernel releases it when the server has ended.
        lock.lock_shared().expect("wait for the server to end");
    }

    /// Processes whose command line or environment names the cluster's directory, or that have something of it mounted.
    pub(crate) fn processes(&self) -> BTreeSet<u32> {
        let marker = self.home.path().to_string_lossy().into_owned();
        let not_ours = [std::process::id(), self.mounts.as_ref().map_or(0, Mounts::holder)];
        let mut found = BTreeSet::new();
        for entry in std::fs::read_dir("/proc").expect("read /proc").flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
                continue;
            };
            let names = |file: &str| {
                let bytes = std::fs::read(entry.path().join(file)).unwrap_or_default();
                bytes
                    .windows(marker.len())
                    .any(|window| window == marker.as_bytes())
            };
            if !not_ours.contains(&pid) && (names("cmdline") || names("environ") || names("mountinfo")) {
                found.insert(pid);
            }
        }
        found
    }
}

impl TestCluster {
    /// Its processes whose command line has an argument that ends so: `server`, `node`, `shim`, `serin-proxy`.
    pub(crate) fn processes_with(&self, word: &str) -> Vec<u32> {
        let has = |pid: &u32| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .unwrap_or_default()
                .split(|byte| *byte == 0)
                .any(|argument| argument.ends_with(word.as_bytes()))
        };
        self.processes().into_iter().filter(has).collect()
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("server log of the failed test:\n{}", self.log());
            // A server that does not answer must not hide what failed.
            let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.api().story()));
            eprintln!("{}", told.unwrap_or_default());
        }
        let _ = self.try_serin(&["down", "--purge"]);
    }
}

/// Whether a program is on PATH.
pub(crate) fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).is_file()))
}

/// What the kernel holds that a cluster could have left: interfaces, named namespaces, mounts, rules.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KernelState {
    interfaces: BTreeSet<String>,
    namespaces: BTreeSet<String>,
    mounts: BTreeSet<String>,
    rules: String,
}

impl KernelState {
    /// Reads it.
    pub(crate) fn read() -> Self {
        let lines = |program: &str, arguments: &[&str]| {
            let output = Command::new(program)
                .args(arguments)
                .output()
                .expect("read the kernel's state");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let names = |path: &str| {
            std::fs::read_dir(Path::new(path))
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect()
        };
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("read the mounts");
        Self {
            interfaces: names("/sys/class/net"),
            namespaces: names("/run/netns"),
            mounts: mounts.lines().map(str::to_owned).collect(),
            rules: lines("/usr/sbin/nft", &["list", "ruleset"]),
        }
    }
}
