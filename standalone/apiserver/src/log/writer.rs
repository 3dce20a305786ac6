//! The thread that writes: group commit and compaction.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::recover::{Recovered, segment_path, snapshot_path, sync_dir};
use super::{Shared, record};
use crate::error::Error;

/// A segment smaller than this is never compacted.
const COMPACT_MIN: u64 = 16 << 20;
/// A segment this many times the size of the last snapshot is.
const COMPACT_FACTOR: u64 = 4;
/// How long a failing disk is left alone before the pending records are tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What the writer needs of the store behind it.
pub(crate) trait StoreSide: Send + Sync + 'static {
    /// Everything up to this version is on disk and may be seen.
    fn publish(&self, durable: u64);

    /// Every published object with its resource and key, and the version at which that is complete; for compaction.
    fn snapshot(&self) -> (Vec<(Arc<str>, Arc<str>, u64, Vec<u8>)>, u64);
}

struct Writer {
    shared: Arc<Shared>,
    place: Recovered,
    store: Arc<dyn StoreSide>,
    snapshot_bytes: u64,
    /// A part of a failed group may still be at the end of the segment.
    torn: bool,
}

pub(crate) fn spawn(
    shared: Arc<Shared>,
    place: Recovered,
    store: Arc<dyn StoreSide>,
) -> Result<JoinHandle<()>, Error> {
    let dir = place.dir.clone();
    let mut writer = Writer {
        shared,
        place,
        store,
        snapshot_bytes: 0,
        torn: false,
    };
    std::thread::Builder::new()
        .name("apiserver-log".to_owned())
        .spawn(move || writer.run())
        .map_err(|source| Error::Storage {
            action: "starting the log writer of",
            path: dir,
            source,
        })
}

impl Writer {
    fn run(&mut self) {
        // What could not be written yet, kept in order.
        let mut batch: Vec<u8> = Vec::new();
        loop {
            let (rv, closed) = {
                let mut pending = self.shared.pending.lock();
                while pending.bytes.is_empty() && batch.is_empty() && !pending.closed {
                    self.shared.wake.wait(&mut pending);
                }
                if batch.is_empty() {
                    // Swapping keeps the capacity of both buffers.
                    std::mem::swap(&mut batch, &mut pending.bytes);
                } else {
                    batch.append(&mut pending.bytes);
                }
                (pending.rv, pending.closed)
            };
            if batch.is_empty() && closed {
                return;
            }
            match self.write(&batch) {
                Ok(()) => {
                    batch.clear();
                    *self.shared.failure.lock() = None;
                    // Readers first: a writer that has its answer reads what it wrote.
                    self.store.publish(rv);
                    self.shared.durable.send_replace(rv);
                }
                Err(error) => {
                    let text = format!("writing {}: {error}", self.place.segment.display());
                    tracing::error!(error = %text, "the API server's log cannot be written; writes are refused until it can");
                    *self.shared.failure.lock() = Some(text);
                    // Wake the waiting writers to their failure; the records are tried again.
                    self.shared.durable.send_modify(|_| {});
                    if closed {
                        return;
                    }
                    let mut pending = self.shared.pending.lock();
                    self.shared.wake.wait_for(&mut pending, RETRY);
                    continue;
                }
            }
            if self.place.segment_bytes > COMPACT_MIN.max(self.snapshot_bytes * COMPACT_FACTOR)
                && let Err(error) = self.compact()
            {
                tracing::warn!(%error, "compacting the API server's log failed; it goes on growing");
            }
        }
    }

    fn write(&mut self, batch: &[u8]) -> std::io::Result<()> {
        if self.torn {
            self.place.file.cut(self.place.segment_bytes)?;
            self.torn = false;
        }
        match self.place.file.append(batch) {
            Ok(()) => {
                self.place.segment_bytes += batch.len() as u64;
                Ok(())
            }
            Err(error) => {
                // A half-written group is cut off, so that trying again cannot leave a broken record in the middle.
                self.torn = self.place.file.cut(self.place.segment_bytes).is_err();
                Err(error)
            }
        }
    }

    /// Records still in the buffer when the snapshot is taken go into the new segment too; replay skips them by version.
    fn compact(&mut self) -> std::io::Result<()> {
        let (objects, rv) = self.store.snapshot();
        let dir = &self.place.dir;
        let temporary = dir.join(format!("{rv:020}.tmp"));
        let mut file = File::create(&temporary)?;
        let mut out = Vec::with_capacity(1 << 20);
        let mut bytes = 0;
        for (resource, key, rv, json) in &objects {
            record::put(&mut out, resource, key, *rv, json);
            if out.len() >= 1 << 20 {
                bytes += out.len() as u64;
                file.write_all(&out)?;
                out.clear();
            }
        }
        record::end(&mut out, rv);
        bytes += out.len() as u64;
        file.write_all(&out)?;
        file.sync_all()?;
        let segment = segment_path(dir, rv);
        let next = OpenOptions::new().create(true).append(true).open(&segment)?;
        next.sync_all()?;
        fs::rename(&temporary, snapshot_path(dir, rv))?;
        sync_dir(dir)?;
        let old = std::mem::replace(&mut self.place.segment, segment);
        self.place.file = Box::new(next);
        self.place.segment_bytes = 0;
        self.snapshot_bytes = bytes;
        fs::remove_file(old)?;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let stem = path
                .file_stem()
                .and_then(|s| s.to_str())
                .and_then(|s| s.parse::<u64>().ok());
            if path.extension().is_some_and(|e| e == "snapshot") && stem.is_some_and(|s| s < rv) {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}
