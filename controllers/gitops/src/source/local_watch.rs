//! Watches on repositories of this machine: a push is heard of when git renames the reference into place.
//!
//! One inotify instance serves all repositories (a user may have 128). A repository that does not exist yet is
//! watched as soon as a reconcile finds it; until then the interval is the bound.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use parking_lot::Mutex;

use crate::error::Error;
use crate::key::Key;

/// Tells who is interested that a repository's references may have changed.
pub(crate) type Wake = dyn Fn(&Key) + Send + Sync;

/// The watched repositories.
pub(crate) struct LocalWatches {
    watcher: Mutex<RecommendedWatcher>,
    interested: Arc<Mutex<Interested>>,
}

#[derive(Default)]
struct Interested {
    /// By the directory that holds `refs`, `HEAD` and `packed-refs`.
    by_directory: HashMap<PathBuf, HashSet<Key>>,
    of: HashMap<Key, PathBuf>,
}

impl LocalWatches {
    pub(crate) fn new(wake: Arc<Wake>) -> Result<Self, Error> {
        let interested: Arc<Mutex<Interested>> = Arc::default();
        let seen = interested.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let keys: HashSet<Key> = match event {
                Ok(event) if matches!(event.kind, EventKind::Access(_)) => return,
                Ok(event) => event
                    .paths
                    .iter()
                    .flat_map(|path| seen.lock().interested_in(path))
                    .collect(),
                Err(error) => {
                    // Events were lost (the kernel's queue overflowed): look at everything.
                    tracing::warn!(%error, "watch of local repositories lost events");
                    seen.lock().of.keys().cloned().collect()
                }
            };
            for key in &keys {
                wake(key);
            }
        })
        .map_err(|e| Error::Io {
            action: "start a watch for",
            path: "local repositories".into(),
            source: std::io::Error::other(e),
        })?;
        Ok(Self {
            watcher: Mutex::new(watcher),
            interested,
        })
    }

    /// Watches the repository at `path` for `key`. Cheap when it is watched already.
    pub(crate) fn watch(&self, key: &Key, path: &Path) -> Result<(), Error> {
        let failed = |source: std::io::Error| Error::Io {
            action: "watch",
            path: path.display().to_string(),
            source,
        };
        let repo = git2::Repository::open(path).map_err(|e| Error::Git {
            action: "open",
            url: path.display().to_string(),
            reason: e.message().to_string(),
        })?;
        let directory = repo.commondir().canonicalize().map_err(failed)?;
        {
            let interested = self.interested.lock();
            if interested.of.get(key) == Some(&directory) {
                return Ok(());
            }
        }
        self.forget(key);
        {
            let mut watcher = self.watcher.lock();
            watcher
                .watch(&directory, RecursiveMode::NonRecursive)
                .map_err(|e| failed(std::io::Error::other(e)))?;
            for below in ["refs", "reftable"] {
                let below = directory.join(below);
                if below.is_dir() {
                    watcher
                        .watch(&below, RecursiveMode::Recursive)
                        .map_err(|e| failed(std::io::Error::other(e)))?;
                }
            }
        }
        let mut interested = self.interested.lock();
        interested
            .by_directory
            .entry(directory.clone())
            .or_default()
            .insert(key.clone());
        interested.of.insert(key.clone(), directory);
        Ok(())
    }

    /// Ends the watch for `key`, and the repository's when nobody else wants it.
    pub(crate) fn forget(&self, key: &Key) {
        let unused = {
            let mut interested = self.interested.lock();
            let Some(directory) = interested.of.remove(key) else {
                return;
            };
            let empty = interested.by_directory.get_mut(&directory).is_some_and(|keys| {
                keys.remove(key);
                keys.is_empty()
            });
            if empty {
                interested.by_directory.remove(&directory);
            }
            empty.then_some(directory)
        };
        if let Some(directory) = unused {
            let mut watcher = self.watcher.lock();
            for path in [directory.join("refs"), directory.join("reftable"), directory] {
                // A repository that was deleted took its watch with it.
                let _ = watcher.unwatch(&path);
            }
        }
    }
}

impl Interested {
    /// Whose references a changed path belongs to.
    fn interested_in(&self, path: &Path) -> Vec<Key> {
        // git writes `main.lock` and renames it to `main`; only the second is news.
        if path.extension().is_some_and(|e| e == "lock") {
            return Vec::new();
        }
        self.by_directory
            .iter()
            .filter(|(directory, _)| match path.strip_prefix(directory) {
                Ok(inside) => {
                    inside.starts_with("refs")
                        || inside.starts_with("reftable")
                        || inside == Path::new("packed-refs")
                        || inside == Path::new("HEAD")
                }
                Err(_) => false,
            })
            .flat_map(|(_, keys)| keys.iter().cloned())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_commit_in_a_watched_repository_wakes_whoever_follows_it() {
        let dir = tempfile::tempdir().unwrap();
        let repo = git2::Repository::init_bare(dir.path()).unwrap();
        let (send, woken) = std::sync::mpsc::channel();
        let watches = LocalWatches::new(Arc::new(move |key: &Key| drop(send.send(key.clone())))).unwrap();
        let key = Key::new("flux-system", "app");
        watches.watch(&key, dir.path()).unwrap();

        let who = git2::Signature::now("a", "a@b").unwrap();
        let tree = repo
            .find_tree(repo.treebuilder(None).unwrap().write().unwrap())
            .unwrap();
        repo.commit(Some("refs/heads/main"), &who, &who, "x", &tree, &[])
            .unwrap();
        assert_eq!(woken.recv_timeout(Duration::from_secs(20)).unwrap(), key);
    }

    #[test]
    fn only_references_are_news() {
        let key = Key::new("ns", "a");
        let mut interested = Interested::default();
        interested
            .by_directory
            .entry("/r".into())
            .or_default()
            .insert(key.clone());
        for (path, news) in [
            ("/r/refs/heads/main", true),
            ("/r/packed-refs", true),
            ("/r/HEAD", true),
            ("/r/refs/heads/main.lock", false),
            ("/r/index", false),
            ("/r/objects/ab/cd", false),
            ("/other/refs/heads/main", false),
        ] {
            assert_eq!(
                !interested.interested_in(Path::new(path)).is_empty(),
                news,
                "{path}"
            );
        }
    }
}
