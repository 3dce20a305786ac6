//! The server process: started in the background, known by the lock that it holds, ended by its process id.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::{Cluster, private_directory};

/// The line with which the server says that everything runs.
pub(crate) const READY: &str = "ready";
/// How long a start may take before `up` gives up waiting (the server goes on).
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the server may take to stop before it is killed; what it leaves is removed by the teardown.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// The lock of a cluster, held by its server as long as it lives: the kernel releases it whatever the server dies of.
#[derive(Debug)]
pub(crate) struct ServerLock {
    _file: Flock<File>,
}

impl ServerLock {
    /// Takes the lock and writes our process id into it.
    pub(crate) fn take(cluster: &Cluster) -> anyhow::Result<Self> {
        private_directory(cluster.directory())?;
        let path = cluster.lock();
        let file = open_lock(cluster)?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((_, Errno::EWOULDBLOCK)) => bail!("cluster {} is already running", cluster.name()),
            Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
        };
        file.set_len(0)?;
        file.rewind()?;
        write!(file, "{}", std::process::id())?;
        Ok(Self { _file: file })
    }
}

fn open_lock(cluster: &Cluster) -> anyhow::Result<File> {
    let path = cluster.lock();
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))
}

/// The process id of the server, if it runs.
pub(crate) fn running(cluster: &Cluster) -> anyhow::Result<Option<Pid>> {
    if !cluster.lock().exists() {
        return Ok(None);
    }
    let mut file = match Flock::lock(open_lock(cluster)?, FlockArg::LockSharedNonblock) {
        Ok(_) => return Ok(None),
        Err((file, Errno::EWOULDBLOCK)) => file,
        Err((_, error)) => return Err(error).context("look at the lock of the cluster"),
    };
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    let pid = text
        .trim()
        .parse()
        .with_context(|| format!("read {}", cluster.lock().display()))?;
    Ok(Some(Pid::from_raw(pid)))
}

/// Starts the server in the background and waits until it says that it is ready. Lines that it prints before go to
/// `progress`.
pub(crate) async fn start(
    cluster: &Cluster,
    arguments: &[String],
    mut progress: impl FnMut(&str),
) -> anyhow::Result<()> {
    private_directory(cluster.directory())?;
    let log_path = cluster.log();
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .with_context(|| format!("open {}", log_path.display()))?;
    let home = cluster
        .directory()
        .parent()
        .context("the cluster's directory has no parent")?;
    let mut command = tokio::process::Command::new(std::env::current_exe().context("find this program")?);
    command
        .args(["--name", cluster.name(), "--home"])
        .arg(home)
        .arg("server")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        // A group of its own: Ctrl-C at the terminal is for the command, not for the cluster.
        .process_group(0);
    let mut child = command.spawn().context("start the server")?;
    let stdout = child.stdout.take().context("the server has no standard output")?;
    let mut lines = BufReader::new(stdout).lines();
    let wait = async {
        while let Some(line) = lines.next_line().await.context("read what the server says")? {
            if line == READY {
                return anyhow::Ok(());
            }
            progress(&line);
        }
        let status = child.wait().await.context("wait for the server")?;
        bail!(
            "the server ended while starting ({status}); its last words:\n{}",
            last_words(cluster)
        );
    };
    tokio::time::timeout(START_TIMEOUT, wait)
        .await
        .unwrap_or_else(|_| {
            bail!(
                "the server is not ready after {} s; see {}",
                START_TIMEOUT.as_secs(),
                cluster.log().display()
            )
        })
}

/// The end of the server's log.
fn last_words(cluster: &Cluster) -> String {
    const LINES: usize = 12;
    let text = std::fs::read_to_string(cluster.log()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// Asks the server to stop and waits until it is gone; kills it when it does not listen. Returns whether one ran.
pub(crate) async fn stop(cluster: &Cluster) -> anyhow::Result<bool> {
    let Some(pid) = running(cluster)? else {
        return Ok(false);
    };
    let lock = open_lock(cluster)?;
    // The kernel gives us the lock at the moment in which the server is gone.
    let mut gone = tokio::task::spawn_blocking(move || Flock::lock(lock, FlockArg::LockShared).is_ok());
    send(pid, Signal::SIGTERM)?;
    if tokio::time::timeout(STOP_TIMEOUT, &mut gone).await.is_err() {
        send(pid, Signal::SIGKILL)?;
        gone.await.context("wait for the server to end")?;
    }
    Ok(true)
}

fn send(pid: Pid, signal: Signal) -> anyhow::Result<()> {
    match kill(pid, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("send {signal} to the server, process {pid}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_runs_as_long_as_its_lock_is_held() {
        let home = tempfile::tempdir().unwrap();
        let cluster = Cluster::named("locks", Some(home.path())).unwrap();
        assert_eq!(running(&cluster).unwrap(), None);
        let lock = ServerLock::take(&cluster).unwrap();
        assert_eq!(running(&cluster).unwrap(), Some(Pid::this()));
        assert!(
            ServerLock::take(&cluster)
                .unwrap_err()
                .to_string()
                .contains("already running")
        );
        drop(lock);
        assert_eq!(running(&cluster).unwrap(), None);
    }
}
