//! Starting from what is on disk.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use super::record::{self, Record, Stop};
use super::segment::Segment;
use crate::error::Error;
use crate::store::Store;

/// Versions left out at each start, so that one that was handed out and lost is never handed out again.
const VERSION_GAP: u64 = 1000;

/// Where to go on writing.
pub(crate) struct Recovered {
    pub(crate) dir: PathBuf,
    pub(crate) segment: PathBuf,
    pub(crate) file: Box<dyn Segment>,
    pub(crate) segment_bytes: u64,
    /// Held until the log is closed: one server per directory.
    pub(crate) _lock: File,
}

fn storage(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Storage { action, path, source }
}

pub(crate) fn snapshot_path(dir: &Path, rv: u64) -> PathBuf {
    dir.join(format!("{rv:020}.snapshot"))
}

pub(crate) fn segment_path(dir: &Path, rv: u64) -> PathBuf {
    dir.join(format!("{rv:020}.log"))
}

/// Make a rename or a new file in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

pub(crate) fn recover(dir: &Path, store: &mut Store) -> Result<Recovered, Error> {
    fs::create_dir_all(dir).map_err(storage("creating", dir))?;
    let lock_path = dir.join("lock");
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock_path)
        .map_err(storage("opening", &lock_path))?;
    lock.try_lock().map_err(|error| match error {
        fs::TryLockError::WouldBlock => Error::Storage {
            action: "locking (another server uses this directory)",
            path: lock_path.clone(),
            source: std::io::ErrorKind::WouldBlock.into(),
        },
        fs::TryLockError::Error(source) => Error::Storage {
            action: "locking",
            path: lock_path.clone(),
            source,
        },
    })?;
    let mut snapshots: Vec<u64> = Vec::new();
    let mut segments: Vec<u64> = Vec::new();
    for entry in fs::read_dir(dir).map_err(storage("listing", dir))? {
        let path = entry.map_err(storage("listing", dir))?.path();
        let stem = path
            .file_stem()
            .and_then(|s| s.to_str())
            .and_then(|s| s.parse::<u64>().ok());
        match (path.extension().and_then(|e| e.to_str()), stem) {
            (Some("snapshot"), Some(rv)) => snapshots.push(rv),
            (Some("log"), Some(rv)) => segments.push(rv),
            (Some("tmp"), _) => {
                // A snapshot that was not finished.
                fs::remove_file(&path).map_err(storage("removing", &path))?;
            }
            _ => {}
        }
    }
    snapshots.sort_unstable();
    segments.sort_unstable();
    let base = snapshots.last().copied();
    if let Some(rv) = base {
        load_snapshot(&snapshot_path(dir, rv), store)?;
    }
    let base = base.unwrap_or(0);
    // Segments from before the snapshot are covered by it.
    let mut last = None;
    let live: Vec<u64> = segments.iter().copied().filter(|s| *s >= base).collect();
    for (i, rv) in live.iter().enumerate() {
        let path = segment_path(dir, *rv);
        let kept = replay(&path, store, base, i + 1 == live.len())?;
        last = Some((path, kept));
    }
    for rv in segments.iter().filter(|s| **s < base) {
        let path = segment_path(dir, *rv);
        fs::remove_file(&path).map_err(storage("removing", &path))?;
    }
    for rv in snapshots.iter().filter(|s| **s < base) {
        let path = snapshot_path(dir, *rv);
        fs::remove_file(&path).map_err(storage("removing", &path))?;
    }
    store.skip_versions(VERSION_GAP);
    let (segment, segment_bytes) = last.unwrap_or_else(|| (segment_path(dir, base), 0));
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&segment)
        .map_err(storage("opening", &segment))?;
    file.set_len(segment_bytes)
        .map_err(storage("cutting the torn end of", &segment))?;
    file.sync_all().map_err(storage("syncing", &segment))?;
    sync_dir(dir).map_err(storage("syncing", dir))?;
    Ok(Recovered {
        dir: dir.to_owned(),
        segment,
        file: Box::new(file),
        segment_bytes,
        _lock: lock,
    })
}

fn damaged(path: &Path, offset: usize, reason: &str) -> Error {
    Error::Damaged {
        path: path.to_owned(),
        offset: offset as u64,
        reason: reason.to_owned(),
    }
}

/// A snapshot is complete or it is damaged: it was renamed into place after its sync.
fn load_snapshot(path: &Path, store: &mut Store) -> Result<(), Error> {
    let bytes = fs::read(path).map_err(storage("reading", path))?;
    let mut at = 0;
    loop {
        match record::read(bytes.get(at..).unwrap_or_default()) {
            Ok((Record::End { rv }, _)) => {
                store.forget("", "", rv);
                return Ok(());
            }
            Ok((entry, length)) => {
                apply(&entry, store).map_err(|reason| damaged(path, at, reason))?;
                at += length;
            }
            Err(Stop::End | Stop::Torn) => {
                return Err(damaged(path, at, "the snapshot ends before its last record"));
            }
            Err(Stop::Damaged(reason)) => return Err(damaged(path, at, reason)),
        }
    }
}

/// Replay a segment; returns how many bytes of it are whole.
fn replay(path: &Path, store: &mut Store, base: u64, is_last: bool) -> Result<u64, Error> {
    let bytes = fs::read(path).map_err(storage("reading", path))?;
    let mut at = 0;
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        match record::read(rest) {
            Ok((entry, length)) => {
                // Records that were in the buffer when the snapshot was taken are in it.
                if entry.rv() > base {
                    apply(&entry, store).map_err(|reason| damaged(path, at, reason))?;
                }
                at += length;
            }
            Err(Stop::End) => return Ok(at as u64),
            Err(Stop::Torn) if is_last => {
                tracing::warn!(path = %path.display(), offset = at, lost = rest.len(), "dropped the torn end of the log; no answered write is lost by this");
                return Ok(at as u64);
            }
            Err(Stop::Torn) => {
                return Err(damaged(
                    path,
                    at,
                    "the segment ends within a record and another follows it",
                ));
            }
            Err(Stop::Damaged(reason)) => {
                // A crash may leave a last block of zeros or of garbage: no whole record can follow it.
                if is_last && !has_record_after(rest) {
                    tracing::warn!(path = %path.display(), offset = at, lost = rest.len(), reason, "dropped the torn end of the log");
                    return Ok(at as u64);
                }
                return Err(damaged(path, at, reason));
            }
        }
    }
}

/// Whether a whole record can be found anywhere after the first byte: then what is broken is not the tail.
fn has_record_after(rest: &[u8]) -> bool {
    // Following the length of the broken record first finds the common case at once.
    let length = rest
        .get(..4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes) as usize;
    if length > 0 && length <= record::MAX_PAYLOAD {
        let next = rest.get(record::HEADER + length..).unwrap_or_default();
        if record::read(next).is_ok() {
            return true;
        }
    }
    /// A search beyond this costs more than it tells.
    const SEARCH: usize = 1 << 20;
    (1..rest.len().min(SEARCH)).any(|at| {
        let candidate = rest.get(at..).unwrap_or_default();
        matches!(
            record::read(candidate),
            Ok((Record::Put { .. } | Record::Delete { .. }, _))
        )
    })
}

fn apply(entry: &Record<'_>, store: &mut Store) -> Result<(), &'static str> {
    match entry {
        Record::Put {
            resource,
            key,
            rv,
            json,
        } => {
            let value = serde_json::from_slice(json).map_err(|_| "an object that is not JSON")?;
            store.restore(&(*resource).into(), key, value, *rv);
        }
        Record::Delete { resource, key, rv } => store.forget(resource, key, *rv),
        Record::End { rv } => store.forget("", "", *rv),
    }
    Ok(())
}
