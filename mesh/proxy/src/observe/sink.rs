//! Where lines go: standard output, standard error, files. Appending never waits; one thread writes for all.
//!
//! A line is appended to its sink's buffer under a short lock. The writer is woken by the first line of a batch and
//! waits a moment for others, so that a busy proxy pays one wake-up for many lines. A buffer that is full drops lines
//! and counts them. Files are opened when the configuration arrives, and again when [`Sinks::reopen`] is called, which is
//! how log rotation works.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::error::Refusal;

/// Bytes that may wait to be written, per sink.
const MAX_WAITING: usize = 4 << 20;
/// How long the writer waits for more lines.
const BATCH: Duration = Duration::from_millis(20);
/// Bytes that are written without waiting for more.
const FULL_BATCH: usize = 64 << 10;

/// A destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file, appended to.
    File(PathBuf),
}

/// What the writer waits for.
#[derive(Debug, Default)]
struct Signal {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    sinks: Vec<Arc<Sink>>,
    /// Lines are waiting.
    dirty: bool,
    /// They should not wait any longer.
    urgent: bool,
    ended: bool,
}

/// One destination and what waits for it.
#[derive(Debug)]
pub struct Sink {
    target: Target,
    waiting: Mutex<String>,
    file: Mutex<Option<File>>,
    reopen: AtomicBool,
    dropped: AtomicU64,
    signal: Arc<Signal>,
}

impl Sink {
    /// Appends what `write` writes. Nothing is appended while the buffer is full.
    pub fn append(&self, write: impl FnOnce(&mut String)) {
        let (first, full) = {
            let mut waiting = self.waiting.lock();
            if waiting.len() >= MAX_WAITING {
                self.dropped.fetch_add(1, Ordering::Relaxed);
                return;
            }
            let before = waiting.len();
            write(&mut waiting);
            (before == 0, before < FULL_BATCH && waiting.len() >= FULL_BATCH)
        };
        if first || full {
            let mut state = self.signal.state.lock();
            state.dirty = true;
            state.urgent |= full;
            self.signal.wake.notify_one();
        }
    }

    /// Lines that were dropped.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Writes what waits.
    fn flush(&self) {
        let text = std::mem::take(&mut *self.waiting.lock());
        if text.is_empty() {
            return;
        }
        let written = match &self.target {
            Target::Stdout => std::io::stdout().lock().write_all(text.as_bytes()),
            Target::Stderr => std::io::stderr().lock().write_all(text.as_bytes()),
            Target::File(path) => {
                let mut file = self.file.lock();
                if self.reopen.swap(false, Ordering::AcqRel) || file.is_none() {
                    *file = open(path).ok();
                }
                match &mut *file {
                    Some(file) => file.write_all(text.as_bytes()),
                    None => Err(std::io::ErrorKind::NotFound.into()),
                }
            }
        };
        if written.is_err() {
            self.dropped
                .fetch_add(text.matches('\n').count() as u64, Ordering::Relaxed);
        }
    }
}

fn open(path: &std::path::Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// All sinks, by target. Ends its thread, after writing everything, when dropped.
#[derive(Debug, Default)]
pub struct Sinks {
    sinks: HashMap<Target, Arc<Sink>>,
    signal: Arc<Signal>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl Sinks {
    /// The sink of a target. A file that cannot be opened is refused.
    pub fn open(&mut self, target: Target) -> Result<Arc<Sink>, Refusal> {
        if let Some(sink) = self.sinks.get(&target) {
            return Ok(sink.clone());
        }
        let file = match &target {
            Target::File(path) => Some(
                open(path).map_err(|error| Refusal::new("path", format!("{}: {error}", path.display())))?,
            ),
            Target::Stdout | Target::Stderr => None,
        };
        if self.writer.is_none() {
            let signal = self.signal.clone();
            let thread = std::thread::Builder::new()
                .name("access-log".into())
                .spawn(move || write_all(&signal))
                .map_err(|error| Refusal::new("", format!("no thread for access logs: {error}")))?;
            self.writer = Some(thread);
        }
        let sink = Arc::new(Sink {
            target: target.clone(),
            waiting: Mutex::default(),
            file: Mutex::new(file),
            reopen: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            signal: self.signal.clone(),
        });
        self.signal.state.lock().sinks.push(sink.clone());
        self.sinks.insert(target, sink.clone());
        Ok(sink)
    }

    /// Files are opened anew before the next line is written.
    pub fn reopen(&self) {
        for sink in self.sinks.values() {
            sink.reopen.store(true, Ordering::Release);
        }
    }

    /// Lines that were dropped.
    pub fn dropped(&self) -> u64 {
        self.sinks.values().map(|sink| sink.dropped()).sum()
    }

    /// Closes sinks that no listener uses any more.
    pub fn sweep(&mut self) {
        // Here, in the writer's list, and nowhere else.
        self.sinks
            .retain(|_, sink| Arc::strong_count(sink) > 2 || !sink.waiting.lock().is_empty());
        let sinks = &self.sinks;
        self.signal
            .state
            .lock()
            .sinks
            .retain(|sink| sinks.contains_key(&sink.target));
    }
}

impl Drop for Sinks {
    fn drop(&mut self) {
        {
            let mut state = self.signal.state.lock();
            state.ended = true;
            self.signal.wake.notify_one();
        }
        if let Some(writer) = self.writer.take() {
            // A panic has been reported by the thread itself.
            let _ = writer.join();
        }
    }
}

fn write_all(signal: &Signal) {
    loop {
        let (sinks, ended) = {
            let mut state = signal.state.lock();
            while !state.dirty && !state.ended {
                signal.wake.wait(&mut state);
            }
            if !state.urgent && !state.ended {
                signal.wake.wait_for(&mut state, BATCH);
            }
            state.dirty = false;
            state.urgent = false;
            (state.sinks.clone(), state.ended)
        };
        for sink in sinks {
            sink.flush();
        }
        if ended {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_reach_their_file_and_after_a_rotation_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("access.log");
        let mut sinks = Sinks::default();
        let sink = sinks.open(Target::File(path.clone())).unwrap();
        sink.append(|out| out.push_str("one\n"));
        // Only the writer empties the buffer; the file holds the line once it has.
        sink.flush();
        let moved = directory.path().join("access.log.1");
        std::fs::rename(&path, &moved).unwrap();
        sinks.reopen();
        sink.append(|out| out.push_str("two\n"));
        drop(sinks);
        let whole = |path| std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(whole(&moved) + &whole(&path), "one\ntwo\n");
        assert!(whole(&path).ends_with("two\n"));
    }

    #[test]
    fn a_full_buffer_drops_lines_and_counts_them() {
        let sink = Sink {
            target: Target::File("/nonexistent/x".into()),
            waiting: Mutex::default(),
            file: Mutex::default(),
            reopen: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            signal: Arc::default(),
        };
        let line = "x".repeat(1 << 20) + "\n";
        for _ in 0..6 {
            sink.append(|out| out.push_str(&line));
        }
        assert_eq!(sink.dropped(), 2);
        sink.flush();
        assert_eq!(sink.dropped(), 6, "what cannot be written is dropped as well");
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_refused() {
        let refusal = Sinks::default()
            .open(Target::File("/nonexistent/dir/x".into()))
            .unwrap_err();
        assert!(refusal.reason.contains("/nonexistent/dir/x"), "{refusal}");
    }
}
