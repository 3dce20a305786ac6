//! The server process: started in the background, known by the lock that it holds, ended by its process id.

use std::fs::OpenOptions;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::Cluster;
use super::lock::{self, Attempt, ClusterLock, Holder, Role};

/// The line with which the server says that everything runs.
pub(crate) const READY: &str = "ready";
/// How long a start may take before `up` gives up waiting (the server goes on).
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the server may take to stop before it is killed; what it leaves is removed by the teardown.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a process may take to end once it has released the lock, with which it dies, in milliseconds.
const END_TIMEOUT: u16 = 5000;
/// How often `down` looks who holds the lock while it waits for it: the kernel tells nobody when a lock is released, and waiting
/// inside flock(2) has no deadline and hides that the holder has changed.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The process id of the server, if it runs or is being started.
pub(crate) fn running(cluster: &Cluster) -> anyhow::Result<Option<Pid>> {
    let holder = lock::holder(cluster)?;
    Ok(holder
        .filter(|holder| holder.role == Role::Server)
        .map(|holder| holder.pid))
}

/// Starts the server in the background and waits until it says that it is ready. Lines that it prints before go to
/// `progress`.
pub(crate) async fn start(
    cluster: &Cluster,
    arguments: &[String],
    mut progress: impl FnMut(&str),
) -> anyhow::Result<()> {
    // Before anything is made: whoever wants to stop the cluster from now on finds it.
    let lock = ClusterLock::take(cluster, Role::Server).await?;
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
        .stdin(lock.for_child()?)
        .stdout(Stdio::piped())
        .stderr(log)
        // A group of its own: Ctrl-C at the terminal is for the command, not for the cluster.
        .process_group(0);
    let mut child = command.spawn().context("start the server")?;
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        lock.write(Pid::from_raw(pid), Role::Server)?;
    }
    // The server holds it now, and nobody else: it ends with the server.
    drop(command);
    drop(lock);
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

/// Asks the server to stop and waits until it is gone; kills it when it does not listen. The cluster is locked until the result is
/// dropped, so that nothing starts while its remains are removed.
pub(crate) async fn stop(cluster: &Cluster) -> anyhow::Result<Stopped> {
    if !cluster.directory().exists() {
        return Ok(Stopped {
            ran: false,
            _lock: None,
        });
    }
    let mut told: Option<Pid> = None;
    let mut ends: Vec<Ending> = Vec::new();
    let started = Instant::now();
    loop {
        let holder = match ClusterLock::try_take(cluster, Role::Down)? {
            Attempt::Taken(lock) => {
                // The kernel releases the lock of a process a moment before the process is gone.
                for end in ends {
                    end.wait().await?;
                }
                return Ok(Stopped {
                    ran: told.is_some(),
                    _lock: Some(lock),
                });
            }
            Attempt::Held(holder) => holder,
        };
        let waited = started.elapsed();
        match holder {
            // `up` hands the lock to the server, so that the holder may be another one than a moment ago.
            Some(Holder {
                pid,
                role: Role::Server,
            }) if told != Some(pid) => {
                ends.extend(Ending::of(pid));
                send(pid, Signal::SIGTERM)?;
                told = Some(pid);
            }
            Some(Holder {
                pid,
                role: Role::Server,
            }) if waited > STOP_TIMEOUT => send(pid, Signal::SIGKILL)?,
            Some(_) | None => {}
        }
        if waited > 2 * STOP_TIMEOUT {
            bail!(
                "the lock of cluster {} is still held{}; end that process and try again",
                cluster.name(),
                holder
                    .map(|holder| format!(" by process {}", holder.pid))
                    .unwrap_or_default()
            );
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// A cluster whose server does not run, and cannot be started while this lives.
#[derive(Debug)]
pub(crate) struct Stopped {
    /// Whether a server ran.
    pub(crate) ran: bool,
    _lock: Option<ClusterLock>,
}

/// The end of a process that is no child of this one.
struct Ending {
    pid: Pid,
    handle: OwnedFd,
}

impl Ending {
    /// Of a process that lives; `None` where it is gone already, or the kernel cannot tell (before 5.3).
    fn of(pid: Pid) -> Option<Self> {
        let handle = crate::sys::pidfd(pid).ok()?;
        Some(Self { pid, handle })
    }

    /// Returns once it has ended, or after the deadline: its lock is free, so that it cannot do anything to the cluster any more.
    async fn wait(self) -> anyhow::Result<()> {
        let Self { pid, handle } = self;
        let ended = tokio::task::spawn_blocking(move || {
            let mut waiting = [PollFd::new(handle.as_fd(), PollFlags::POLLIN)];
            loop {
                match poll(&mut waiting, END_TIMEOUT) {
                    Err(Errno::EINTR) => {}
                    outcome => return outcome,
                }
            }
        });
        if ended.await?.context("wait for the end of the server")? == 0 {
            tracing::warn!(
                pid = pid.as_raw(),
                "the server has let go of the cluster and has not ended yet"
            );
        }
        Ok(())
    }
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

    #[tokio::test]
    async fn the_end_of_a_process_is_waited_for() {
        let mut child = std::process::Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let end = Ending::of(pid).expect("it lives");
        // It ends with its input.
        drop(child.stdin.take());
        end.wait().await.unwrap();
        assert!(child.try_wait().unwrap().is_some());
        assert!(
            Ending::of(pid).is_none(),
            "it is gone, and its number not taken again"
        );
    }
}
