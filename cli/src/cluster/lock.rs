//! The lock of a cluster: one process at a time starts it, is it, or takes it down.
//!
//! `serin up` takes it before it makes anything and hands it to the server as its standard input, so that there is no moment in which
//! a cluster that is about to run looks as if nothing did. `serin down` holds it while it removes what is left, so that nothing
//! starts meanwhile. The kernel releases it whatever its holder dies of. The file says who holds it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::{Cluster, private_directory};

/// What the holder of the lock is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The cluster's process, or the command that is starting it.
    Server,
    /// `serin down`.
    Down,
}

/// Who holds the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) pid: Pid,
    pub(crate) role: Role,
}

/// The lock, held until this and every copy of it in another process is gone.
///
/// It is a lock of the open file (flock(2)), which closing releases and a child inherits; hence no explicit unlocking.
#[derive(Debug)]
pub(crate) struct ClusterLock {
    file: File,
}

/// What came of trying to take the lock.
#[derive(Debug)]
pub(crate) enum Attempt {
    Taken(ClusterLock),
    /// By whom, if that is known.
    Held(Option<Holder>),
}

/// How long somebody who only looks may hold the lock.
const GLANCE: Duration = Duration::from_millis(200);

impl ClusterLock {
    /// Takes the lock for this process; the error says who has it.
    pub(crate) async fn take(cluster: &Cluster, role: Role) -> anyhow::Result<Self> {
        let started = Instant::now();
        loop {
            let holder = match Self::try_take(cluster, role)? {
                Attempt::Taken(lock) => return Ok(lock),
                Attempt::Held(holder) => holder,
            };
            let lives = holder.is_some_and(|holder| kill(holder.pid, None).is_ok());
            if !lives && started.elapsed() < GLANCE {
                // Somebody merely looks whether it is held, or has not written its name yet; the kernel tells nobody when that is over.
                tokio::time::sleep(GLANCE / 20).await;
                continue;
            }
            match holder.map(|holder| holder.role) {
                Some(Role::Down) => bail!(
                    "cluster {} is just being taken down; try again in a moment",
                    cluster.name()
                ),
                Some(Role::Server) | None => bail!("cluster {} is already running", cluster.name()),
            }
        }
    }

    /// Takes the lock for this process if nobody has it.
    pub(crate) fn try_take(cluster: &Cluster, role: Role) -> anyhow::Result<Attempt> {
        loop {
            private_directory(cluster.directory())?;
            let file = open(cluster)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(Attempt::Held(read(&file)?)),
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("lock {}", cluster.lock().display()));
                }
            }
            if let Some(lock) = Self::of(cluster, file)? {
                lock.write(Pid::this(), role)?;
                return Ok(Attempt::Taken(lock));
            }
        }
    }

    /// The lock that whoever started this process took for it, if it did.
    pub(crate) fn inherited(cluster: &Cluster) -> anyhow::Result<Option<Self>> {
        let stdin = io::stdin();
        let file = File::from(
            stdin
                .as_fd()
                .try_clone_to_owned()
                .context("look at standard input")?,
        );
        let Some(lock) = Self::of(cluster, file)? else {
            return Ok(None);
        };
        // No process that this one starts may hold the lock longer than it does.
        let null = File::open("/dev/null").context("open /dev/null")?;
        nix::unistd::dup2_stdin(&null).context("replace standard input")?;
        lock.write(Pid::this(), Role::Server)?;
        Ok(Some(lock))
    }

    /// A locked file as the lock, unless the cluster has another lock file, or none, by now.
    fn of(cluster: &Cluster, file: File) -> anyhow::Result<Option<Self>> {
        let here = file.metadata().context("look at the lock of the cluster")?;
        match std::fs::metadata(cluster.lock()) {
            Ok(there) if (there.dev(), there.ino()) == (here.dev(), here.ino()) => Ok(Some(Self { file })),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("look at the lock of the cluster"),
        }
    }

    /// The lock for a child, as its standard input.
    pub(crate) fn for_child(&self) -> anyhow::Result<Stdio> {
        let file = self.file.try_clone().context("hand on the lock of the cluster")?;
        Ok(Stdio::from(file))
    }

    /// Says who holds it from now on. The text has one length, so that no reader sees half of it.
    pub(crate) fn write(&self, pid: Pid, role: Role) -> anyhow::Result<()> {
        let role = match role {
            Role::Server => "server",
            Role::Down => "down",
        };
        let text = format!("{pid:>10} {role:<6}\n");
        self.file
            .write_all_at(text.as_bytes(), 0)
            .context("write who holds the lock of the cluster")
    }
}

/// Opens the lock's file, which is made if there is none.
fn open(cluster: &Cluster) -> anyhow::Result<File> {
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

/// Who holds the lock; `None` if nobody does.
pub(crate) fn holder(cluster: &Cluster) -> anyhow::Result<Option<Holder>> {
    if !cluster.lock().exists() {
        return Ok(None);
    }
    let file = open(cluster)?;
    match file.try_lock_shared() {
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => read(&file),
        Err(TryLockError::Error(error)) => Err(error).context("look at the lock of the cluster"),
    }
}

/// What the file says; nothing in the moment between taking the lock for the first time and writing into it.
fn read(file: &File) -> anyhow::Result<Option<Holder>> {
    let mut bytes = [0; 32];
    let length = file
        .read_at(&mut bytes, 0)
        .context("read the lock of the cluster")?;
    let text = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default());
    let mut words = text.split_whitespace();
    let Some(pid) = words.next() else { return Ok(None) };
    let pid = pid.parse().context("read the lock of the cluster")?;
    let role = match words.next() {
        Some("down") => Role::Down,
        _ => Role::Server,
    };
    Ok(Some(Holder {
        pid: Pid::from_raw(pid),
        role,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn cluster() -> (tempfile::TempDir, Cluster) {
        let home = tempfile::tempdir().unwrap();
        let cluster = Cluster::named("locks", Some(home.path())).unwrap();
        (home, cluster)
    }

    #[tokio::test]
    async fn a_cluster_runs_as_long_as_its_lock_is_held() {
        let (_home, cluster) = cluster();
        assert_eq!(holder(&cluster).unwrap(), None);
        let lock = ClusterLock::take(&cluster, Role::Server).await.unwrap();
        let ours = Holder {
            pid: Pid::this(),
            role: Role::Server,
        };
        assert_eq!(holder(&cluster).unwrap(), Some(ours));
        let refused = ClusterLock::take(&cluster, Role::Server).await.unwrap_err();
        assert!(refused.to_string().contains("already running"), "{refused}");
        drop(lock);
        assert_eq!(holder(&cluster).unwrap(), None);

        let down = ClusterLock::take(&cluster, Role::Down).await.unwrap();
        let refused = ClusterLock::take(&cluster, Role::Server).await.unwrap_err();
        assert!(refused.to_string().contains("taken down"), "{refused}");
        drop(down);
    }

    #[tokio::test]
    async fn the_lock_goes_over_to_the_process_that_is_started_without_a_moment_in_between() {
        let (_home, cluster) = cluster();
        let lock = ClusterLock::take(&cluster, Role::Server).await.unwrap();
        let mut child = Command::new("sleep")
            .arg("600")
            .stdin(lock.for_child().unwrap())
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        lock.write(pid, Role::Server).unwrap();
        drop(lock);
        assert_eq!(holder(&cluster).unwrap().map(|holder| holder.pid), Some(pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(holder(&cluster).unwrap(), None);
    }

    #[tokio::test]
    async fn somebody_who_looks_whether_it_is_held_keeps_nobody_from_taking_it() {
        let (_home, cluster) = cluster();
        private_directory(cluster.directory()).unwrap();
        let looking = open(&cluster).unwrap();
        looking.lock_shared().unwrap();
        let (taken, ()) = tokio::join!(ClusterLock::take(&cluster, Role::Server), async {
            tokio::task::yield_now().await;
            drop(looking);
        });
        taken.unwrap();
    }

    #[tokio::test]
    async fn a_lock_file_that_was_removed_with_its_cluster_locks_nothing() {
        let (_home, cluster) = cluster();
        let first = ClusterLock::take(&cluster, Role::Down).await.unwrap();
        std::fs::remove_dir_all(cluster.directory()).unwrap();
        assert_eq!(holder(&cluster).unwrap(), None);
        let second = ClusterLock::take(&cluster, Role::Server).await.unwrap();
        drop(first);
        assert!(
            holder(&cluster).unwrap().is_some(),
            "another lock by the same name"
        );
        drop(second);
    }
}
