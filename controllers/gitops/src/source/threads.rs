//! The threads on which libgit2 runs. libgit2 blocks; a server that accepts and never answers holds its thread until
//! libgit2's own (process-wide) timeout, whatever our caller's deadline was. So:
//!
//! * an operation that passes its deadline is told to stop (its callbacks look at [`Stop`]) and is abandoned: the
//!   caller gets its error at once, the thread ends when libgit2 lets it. As long as it has only talked to the server
//!   ([`Stop::may_write`] was not asked) its cache is free for the next try at once, so that a server that answers
//!   again is not waited for;
//! * at most [`RUNNING_MAX`] operations run at a time and at most [`PER_HOST_MAX`] on one host, where an abandoned
//!   one still counts for its host. One hanging server so never takes more than [`PER_HOST_MAX`] threads from others;
//! * when [`ABANDONED_MAX`] threads hang, new operations are refused, with the reason.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::error::Error;

/// Git operations at a time. They are bound by the network, not by the processor.
const RUNNING_MAX: usize = 8;
/// Git operations at a time against one host.
const PER_HOST_MAX: usize = 3;
/// Hanging threads that we live with; each costs a stack and a socket.
const ABANDONED_MAX: usize = 32;

/// Tells an operation that nobody waits for it any more.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop(Arc<StopState>);

#[derive(Debug, Default)]
struct StopState {
    requested: AtomicBool,
    gate: Mutex<Gate>,
}

/// Who may write into the cache of an operation.
#[derive(Debug, Default)]
struct Gate {
    /// The cache's permit, returned when the operation has ended or can no longer begin to write.
    permit: Option<OwnedSemaphorePermit>,
    writing: bool,
    closed: bool,
}

impl Stop {
    fn holding(permit: OwnedSemaphorePermit) -> Self {
        let stop = Self::default();
        stop.0.gate.lock().permit = Some(permit);
        stop
    }

    /// Whether the operation must end.
    pub(crate) fn requested(&self) -> bool {
        self.0.requested.load(Ordering::Relaxed)
    }

    /// To be asked before the operation first writes into its cache; if not, it must end without doing so.
    pub(crate) fn may_write(&self) -> bool {
        let mut gate = self.0.gate.lock();
        gate.writing |= !gate.closed;
        gate.writing
    }

    fn request(&self) {
        self.0.requested.store(true, Ordering::Relaxed);
        let mut gate = self.0.gate.lock();
        gate.closed = true;
        if !gate.writing {
            gate.permit = None;
        }
    }

    /// The thread is done with everything.
    fn finish(&self) {
        self.0.gate.lock().permit = None;
    }
}

/// Requests the stop when the waiting side goes away, by deadline or by cancellation.
struct StopOnDrop(Stop);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.request();
    }
}

/// What an operation has to share.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Limit {
    Host(String),
    /// A bare cache: libgit2 does not let two writers create one, and one fetch serves all who want the same.
    Cache(PathBuf),
}

/// What an operation is about, for its limits and for the words of its errors.
#[derive(Debug, Clone)]
pub(crate) struct Job<'a> {
    pub(crate) host: &'a str,
    pub(crate) cache: &'a Path,
    pub(crate) action: &'static str,
    /// Without credentials.
    pub(crate) url: &'a str,
    pub(crate) deadline: Duration,
}

/// The pool. Cloning shares it.
#[derive(Debug, Clone)]
pub(crate) struct Threads {
    running: Arc<Semaphore>,
    /// Permits by host, and by cache directory.
    permits: Arc<Mutex<HashMap<Limit, Arc<Semaphore>>>>,
    abandoned: Arc<AtomicUsize>,
}

impl Threads {
    pub(crate) fn new() -> Self {
        Self {
            running: Arc::new(Semaphore::new(RUNNING_MAX)),
            permits: Arc::default(),
            abandoned: Arc::default(),
        }
    }

    /// Runs `work` on a thread of its own.
    pub(crate) async fn run<T, F>(&self, job: Job<'_>, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Stop) -> Result<T, Error> + Send + 'static,
    {
        let hanging = self.abandoned.load(Ordering::Relaxed);
        if hanging >= ABANDONED_MAX {
            return Err(Error::GitExhausted {
                url: job.url.to_string(),
                hanging,
            });
        }
        let late = || Error::GitTimeout {
            action: job.action,
            url: job.url.to_string(),
            after: job.deadline,
        };
        tokio::time::timeout(job.deadline, self.start(&job, work))
            .await
            .map_err(|_| late())?
    }

    async fn start<T, F>(&self, job: &Job<'_>, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Stop) -> Result<T, Error> + Send + 'static,
    {
        let url = job.url;
        let cache = self.limit(Limit::Cache(job.cache.to_path_buf()), 1);
        let cache_permit = cache.acquire_owned().await.map_err(|_| Error::Stopping)?;
        let host = self.limit(Limit::Host(job.host.to_string()), PER_HOST_MAX);
        let host_permit = host.acquire_owned().await.map_err(|_| Error::Stopping)?;
        let _running = self.running.acquire().await.map_err(|_| Error::Stopping)?;
        let stop = Stop::holding(cache_permit);
        let guard = StopOnDrop(stop.clone());
        let (send, receive) = oneshot::channel();
        let abandoned = self.abandoned.clone();
        std::thread::Builder::new()
            .name("serin-git".into())
            .spawn(move || {
                let result = work(&stop);
                if send.send(result).is_err() {
                    abandoned.fetch_sub(1, Ordering::Relaxed);
                }
                stop.finish();
                drop(host_permit);
            })
            .map_err(|source| Error::Io {
                action: "start a git thread for",
                path: url.to_string(),
                source,
            })?;
        let waiting = Waiting {
            abandoned: self.abandoned.clone(),
            answered: false,
        };
        let result = waiting.on(receive).await;
        drop(guard);
        result.unwrap_or(Err(Error::Git {
            action: "work on",
            url: url.to_string(),
            reason: "the git thread ended without an answer; this is a defect of Serin".into(),
        }))
    }

    fn limit(&self, limit: Limit, max: usize) -> Arc<Semaphore> {
        let mut all = self.permits.lock();
        // One that nobody uses is not referenced elsewhere.
        if all.len() > 1024 {
            all.retain(|_, s| Arc::strong_count(s) > 1);
        }
        all.entry(limit)
            .or_insert_with(|| Arc::new(Semaphore::new(max)))
            .clone()
    }
}

/// Counts the thread as abandoned when its waiter is dropped before the answer.
struct Waiting {
    abandoned: Arc<AtomicUsize>,
    answered: bool,
}

impl Waiting {
    async fn on<T>(mut self, receive: oneshot::Receiver<T>) -> Option<T> {
        let answer = receive.await.ok();
        self.answered = true;
        answer
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if !self.answered {
            self.abandoned.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn operations_that_hang_on_one_host_do_not_hold_up_another_host() {
        let threads = Threads::new();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let caches: Vec<PathBuf> = (0..RUNNING_MAX + 2)
            .map(|i| PathBuf::from(format!("/cache/{i}")))
            .collect();
        let job = |host: &'static str, cache, deadline| Job {
            host,
            cache,
            action: "fetch",
            url: "https://host/x",
            deadline,
        };
        let mut hanging = Vec::new();
        for cache in &caches {
            let held = held.clone();
            let work = move |stop: &Stop| {
                let _ = held.lock().recv();
                assert!(stop.requested(), "an abandoned operation is told to stop");
                Ok(())
            };
            hanging.push(threads.run(job("slow", cache, Duration::from_millis(20)), work));
        }
        for result in futures::future::join_all(hanging).await {
            assert!(matches!(result, Err(Error::GitTimeout { .. })), "{result:?}");
        }
        let other = threads
            .run(
                job("fast", Path::new("/cache/fast"), Duration::from_secs(30)),
                |_| Ok(7),
            )
            .await;
        assert_eq!(other.unwrap(), 7);
        assert_eq!(threads.abandoned.load(Ordering::Relaxed), PER_HOST_MAX);
        drop(release);
    }

    #[tokio::test]
    async fn an_operation_that_hangs_keeps_its_cache_only_once_it_may_have_written() {
        let threads = Threads::new();
        let job = |deadline| Job {
            host: "slow",
            cache: Path::new("/cache/one"),
            action: "fetch",
            url: "https://host/x",
            deadline,
        };
        let short = Duration::from_millis(20);
        for writes in [false, true] {
            let (release, held) = std::sync::mpsc::channel::<()>();
            let (answer, ended) = oneshot::channel();
            let hangs = move |stop: &Stop| {
                let wrote = writes && stop.may_write();
                let _ = held.recv();
                let _ = answer.send(stop.may_write() == wrote);
                Ok(())
            };
            let result = threads.run(job(short), hangs).await;
            assert!(matches!(result, Err(Error::GitTimeout { .. })), "{result:?}");
            let next = if writes { short } else { Duration::from_secs(30) };
            let next = threads.run(job(next), |stop| Ok(stop.may_write())).await;
            match next {
                Ok(may_write) => assert!(may_write && !writes),
                Err(error) => assert!(writes && matches!(error, Error::GitTimeout { .. }), "{error}"),
            }
            drop(release);
            assert!(
                ended.await.unwrap(),
                "who was told to stop does not begin to write"
            );
        }
    }
}
