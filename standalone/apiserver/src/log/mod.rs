//! The durable log: an answered write is on disk.
//!
//! A directory holds one snapshot and one segment that follows it, `<resource version>.snapshot` and `.log`, both sequences of
//! checksummed records. Writers append to a buffer under the store's lock; one thread takes whatever has gathered, writes and syncs it as
//! one group, publishes it to readers and watchers, and wakes the writers. When the segment has outgrown the live objects a new snapshot is written beside it, synced, renamed
//! into place, and the old files are removed. A torn tail (a record cut anywhere) is what a crash leaves and is dropped at the next start;
//! a record whose checksum is wrong with others after it is damage and refused with its offset.

mod record;
mod recover;
mod segment;
mod writer;

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::error::Error;
use crate::store::Store;

pub(crate) use recover::Recovered;
#[cfg(test)]
pub(crate) use segment::Segment;
pub(crate) use writer::StoreSide;

/// Unwritten bytes beyond which writes are refused until the disk has caught up.
const MAX_PENDING: usize = 64 << 20;

/// The writing side.
pub(crate) struct Log {
    shared: Arc<Shared>,
    durable: watch::Receiver<u64>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

pub(crate) struct Shared {
    pending: Mutex<Pending>,
    wake: parking_lot::Condvar,
    durable: watch::Sender<u64>,
    failure: Mutex<Option<String>>,
}

#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    /// Resource version of the last record appended.
    rv: u64,
    closed: bool,
}

impl Log {
    /// Read what is on disk into `store` and begin a segment after it.
    pub(crate) fn open(dir: &Path, store: &mut Store) -> Result<Recovered, Error> {
        recover::recover(dir, store)
    }

    /// Start the writer thread.
    pub(crate) fn start(recovered: Recovered, store: Arc<dyn StoreSide>) -> Result<Self, Error> {
        let (durable, receiver) = watch::channel(0);
        let shared = Arc::new(Shared {
            pending: Mutex::new(Pending::default()),
            wake: parking_lot::Condvar::new(),
            durable,
            failure: Mutex::new(None),
        });
        let thread = writer::spawn(shared.clone(), recovered, store)?;
        Ok(Self {
            shared,
            durable: receiver,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Why writes are refused, if they are.
    pub(crate) fn failure(&self) -> Option<String> {
        if let Some(failure) = self.shared.failure.lock().clone() {
            return Some(failure);
        }
        (self.shared.pending.lock().bytes.len() > MAX_PENDING)
            .then(|| "the disk does not keep up with writes; try again".to_owned())
    }

    pub(crate) fn put(&self, resource: &str, key: &str, rv: u64, json: &[u8]) {
        self.append(rv, |out| record::put(out, resource, key, rv, json));
    }

    pub(crate) fn delete(&self, resource: &str, key: &str, rv: u64) {
        self.append(rv, |out| record::delete(out, resource, key, rv));
    }

    /// Records come in the order of their versions, since the caller holds the store's lock.
    fn append(&self, rv: u64, write: impl FnOnce(&mut Vec<u8>)) {
        let mut pending = self.shared.pending.lock();
        write(&mut pending.bytes);
        pending.rv = rv;
        drop(pending);
        self.shared.wake.notify_one();
    }

    /// Wait until the record of a version is on disk and published.
    pub(crate) async fn durable(&self, rv: u64) -> Result<(), String> {
        let mut receiver = self.durable.clone();
        let failed = || self.shared.failure.lock().clone();
        loop {
            if *receiver.borrow_and_update() >= rv {
                return Ok(());
            }
            if let Some(failure) = failed() {
                return Err(failure);
            }
            if receiver.changed().await.is_err() {
                return Err("the log is closed".to_owned());
            }
        }
    }

    /// Write what is pending and stop.
    pub(crate) fn close(&self) {
        self.shared.pending.lock().closed = true;
        self.shared.wake.notify_one();
        let thread = self.thread.lock().take();
        // The writer may hold the last reference to what owns this log, and must not wait for itself.
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id()) {
            // The thread ends after its last write; a panic in it has been reported already.
            let _ = thread.join();
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests;
