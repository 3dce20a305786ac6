//! Reading container logs: what the API server's `pods/NAME/log` answers.
//!
//! The shims write files (`node/logs/<ns>_<pod>_<uid>/<container>/<restart>.log`, CRI format, rotated); any process on
//! the machine may read them. Following waits on inotify, not on a timer.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::Stream;
use jiff::Timestamp;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use crate::node::record::Paths;
use crate::shim::logfile::{MAX_FILES, rotated};
use crate::sys::fdpass;

/// Chunks that may wait for a slow reader; then reading pauses.
const QUEUE: usize = 16;
/// Size of a chunk.
const CHUNK: usize = 32 * 1024;

/// `PodLogOptions`, as far as they concern reading.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on with what is written later, until the container ends.
    pub follow: bool,
    /// The run before the current one.
    pub previous: bool,
    /// Only the last so many lines.
    pub tail_lines: Option<usize>,
    /// Only lines not older than this.
    pub since: Option<Timestamp>,
    /// Put each line's time in front of it.
    pub timestamps: bool,
    /// At most so many bytes.
    pub limit_bytes: Option<usize>,
}

/// Which container's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogTarget {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Its uid.
    pub uid: String,
    /// The container.
    pub container: String,
}

/// Reads the logs that the node of a state directory keeps.
#[derive(Debug, Clone)]
pub struct PodLogs {
    paths: Paths,
}

/// Why there is no log, in kubelet's words where it has them.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// There is no earlier run.
    #[error("previous terminated container \"{container}\" in pod \"{pod}\" not found")]
    NoPrevious {
        /// The container.
        container: String,
        /// Its pod.
        pod: String,
    },
    /// It has not written or not been started yet.
    #[error("container \"{container}\" in pod \"{pod}\" is waiting to start")]
    NotStarted {
        /// The container.
        container: String,
        /// Its pod.
        pod: String,
    },
    /// The file could not be read.
    #[error("read the log of container \"{container}\" in pod \"{pod}\": {source}")]
    Read {
        /// The container.
        container: String,
        /// Its pod.
        pod: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl PodLogs {
    /// For the node of a state directory.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            paths: Paths::new(state_dir),
        }
    }

    /// Opens a log. Reading happens on a blocking thread and ends when the stream is dropped.
    ///
    /// A followed log ends with the run that it belongs to, as kubelet's does.
    pub fn open(
        &self,
        target: &LogTarget,
        options: LogOptions,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + Unpin + use<>, LogError> {
        let directory = self
            .paths
            .pod_logs(&target.namespace, &target.pod, &target.uid)
            .join(&target.container);
        let attempts = attempts(&directory);
        let wanted = if options.previous {
            attempts.iter().rev().nth(1)
        } else {
            attempts.last()
        };
        let Some(attempt) = wanted else {
            let (container, pod) = (target.container.clone(), target.pod.clone());
            return Err(if options.previous {
                LogError::NoPrevious { container, pod }
            } else {
                LogError::NotStarted { container, pod }
            });
        };
        let path = directory.join(format!("{attempt}.log"));
        let failed = |source: io::Error| LogError::Read {
            container: target.container.clone(),
            pod: target.pod.clone(),
            source,
        };
        let watcher = if options.follow && !options.previous {
            Some(Follow::new(&directory).map_err(failed)?)
        } else {
            None
        };
        let (sender, receiver) = mpsc::channel(QUEUE);
        let ended = self.paths.pod(&target.uid);
        tokio::spawn(async move {
            if let Err(error) = read(&path, &options, watcher, &sender, &ended, attempt_number(&path)).await {
                let _ = sender.send(Err(error)).await;
            }
        });
        Ok(tokio_stream(receiver))
    }
}

fn tokio_stream(
    mut receiver: mpsc::Receiver<io::Result<Bytes>>,
) -> impl Stream<Item = io::Result<Bytes>> + Send + Unpin {
    futures::stream::poll_fn(move |context| receiver.poll_recv(context))
}

fn attempt_number(path: &Path) -> u32 {
    path.file_stem()
        .and_then(|stem| stem.to_str())
        .and_then(|stem| stem.parse().ok())
        .unwrap_or(0)
}

/// The restart counts that have a log, ascending.
fn attempts(directory: &Path) -> Vec<u32> {
    let mut attempts: Vec<u32> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".log")?.parse().ok())
        .collect();
    attempts.sort_unstable();
    attempts
}

/// Cuts, filters and formats lines; counts the bytes.
struct Formatter {
    options: LogOptions,
    left: usize,
    out: Vec<u8>,
}

impl Formatter {
    fn new(options: &LogOptions) -> Self {
        Self {
            left: options.limit_bytes.unwrap_or(usize::MAX),
            options: options.clone(),
            out: Vec::new(),
        }
    }

    /// Takes in one CRI line, newline included.
    fn push(&mut self, line: &[u8]) {
        let Some(parsed) = Line::parse(line) else { return };
        if self
            .options
            .since
            .is_some_and(|since| parsed.time.is_none_or(|time| time < since))
        {
            return;
        }
        if self.options.timestamps {
            self.put(parsed.stamp);
            self.put(b" ");
        }
        self.put(parsed.text);
        if parsed.complete {
            self.put(b"\n");
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        let length = bytes.len().min(self.left);
        self.out.extend_from_slice(&bytes[..length]);
        self.left -= length;
    }
}

struct Line<'a> {
    stamp: &'a [u8],
    time: Option<Timestamp>,
    text: &'a [u8],
    complete: bool,
}

impl<'a> Line<'a> {
    /// `<time> <stream> <F|P> <text>\n`
    fn parse(line: &'a [u8]) -> Option<Self> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let stamp = parts.next()?;
        let _stream = parts.next()?;
        let tag = parts.next()?;
        let text = parts.next().unwrap_or_default();
        Some(Self {
            stamp,
            time: std::str::from_utf8(stamp)
                .ok()
                .and_then(|stamp| stamp.parse().ok()),
            text,
            complete: tag == b"F",
        })
    }
}

/// Wakes when something in a directory changes.
struct Follow(AsyncFd<Watch>);

struct Watch(Inotify);

impl std::os::fd::AsRawFd for Watch {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        use std::os::fd::AsFd;
        self.0.as_fd().as_raw_fd()
    }
}

impl std::os::fd::AsFd for Watch {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Follow {
    fn new(directory: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(
            directory,
            AddWatchFlags::IN_MODIFY
                | AddWatchFlags::IN_CREATE
                | AddWatchFlags::IN_MOVED_FROM
                | AddWatchFlags::IN_DELETE_SELF
                | AddWatchFlags::IN_CLOSE_WRITE,
        )?;
        Ok(Self(fdpass::watched(Watch(inotify))?))
    }

    async fn changed(&self) -> io::Result<()> {
        loop {
            let mut guard = self.0.readable().await?;
            match self.0.get_ref().0.read_events() {
                Ok(events) if !events.is_empty() => return Ok(()),
                Ok(_) | Err(nix::errno::Errno::EAGAIN) => guard.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

type Sender = mpsc::Sender<io::Result<Bytes>>;

async fn read(
    path: &Path,
    options: &LogOptions,
    follow: Option<Follow>,
    sender: &Sender,
    pod_directory: &Path,
    attempt: u32,
) -> io::Result<()> {
    let mut formatter = Formatter::new(options);
    // Older files of this run first, unless only the end is wanted and the newest files hold it.
    let history: Vec<PathBuf> = (1..MAX_FILES)
        .rev()
        .map(|number| rotated(path, number))
        .filter(|path| path.exists())
        .collect();
    let mut current = BufReader::new(File::open(path)?);
    if let Some(lines) = options.tail_lines {
        for line in tail(&history, &mut current, lines)? {
            formatter.push(&line);
        }
        flush(&mut formatter, sender, true).await?;
    } else {
        for path in &history {
            copy(&mut BufReader::new(File::open(path)?), &mut formatter, sender).await?;
        }
        copy(&mut current, &mut formatter, sender).await?;
    }
    let Some(follow) = follow else { return Ok(()) };
    while formatter.left > 0 && !sender.is_closed() {
        // Looked at before reading: what it wrote last is then read, and the end is the end.
        let over = has_ended(path, pod_directory, attempt);
        copy(&mut current, &mut formatter, sender).await?;
        if replaced(path, &current) {
            // Rotated: the rest of the old file has been read, go on with the new one.
            current = BufReader::new(File::open(path)?);
            continue;
        }
        if over {
            return Ok(());
        }
        tokio::select! {
            changed = follow.changed() => changed?,
            () = sender.closed() => return Ok(()),
        }
    }
    Ok(())
}

/// Whether the run that writes this log has ended: the shim says so with a marker beside the log.
fn has_ended(path: &Path, pod_directory: &Path, attempt: u32) -> bool {
    if !pod_directory.exists() || end_marker(path).exists() {
        return true;
    }
    path.parent()
        .is_some_and(|directory| attempts(directory).last().is_some_and(|last| *last > attempt))
}

/// The file that marks the end of a run's log.
pub(crate) fn end_marker(log: &Path) -> PathBuf {
    log.with_extension("ended")
}

fn replaced(path: &Path, open: &BufReader<File>) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (std::fs::metadata(path), open.get_ref().metadata()) {
        (Ok(now), Ok(open)) => now.ino() != open.ino(),
        _ => false,
    }
}

/// Sends whole lines up to the end of the file; leaves a line that is still being written.
async fn copy(reader: &mut BufReader<File>, formatter: &mut Formatter, sender: &Sender) -> io::Result<()> {
    let mut line = Vec::new();
    while formatter.left > 0 {
        line.clear();
        let length = reader.read_until(b'\n', &mut line)?;
        if length == 0 {
            break;
        }
        if line.last() != Some(&b'\n') {
            reader.seek_relative(-i64::try_from(length).unwrap_or(0))?;
            break;
        }
        formatter.push(&line);
        flush(formatter, sender, false).await?;
    }
    flush(formatter, sender, true).await
}

async fn flush(formatter: &mut Formatter, sender: &Sender, all: bool) -> io::Result<()> {
    if formatter.out.is_empty() || (!all && formatter.out.len() < CHUNK) {
        return Ok(());
    }
    let bytes = Bytes::from(std::mem::take(&mut formatter.out));
    sender
        .send(Ok(bytes))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
}

/// The last `count` lines; leaves `current` at its end.
fn tail(history: &[PathBuf], current: &mut BufReader<File>, count: usize) -> io::Result<VecDeque<Vec<u8>>> {
    let mut lines = last_lines(current.get_mut(), count)?;
    current.seek(SeekFrom::Start(lines.1))?;
    for path in history.iter().rev() {
        if lines.0.len() >= count {
            break;
        }
        let (mut older, _) = last_lines(&mut File::open(path)?, count - lines.0.len())?;
        older.append(&mut lines.0);
        lines.0 = older;
    }
    Ok(lines.0)
}

/// The last complete lines of a file, read from its end in blocks, and where they end.
fn last_lines(file: &mut File, count: usize) -> io::Result<(VecDeque<Vec<u8>>, u64)> {
    const BLOCK: u64 = 64 * 1024;
    let size = file.metadata()?.len();
    let mut start = size;
    let mut bytes: Vec<u8> = Vec::new();
    while start > 0 && bytes.split(|byte| *byte == b'\n').count() <= count + 1 {
        let from = start.saturating_sub(BLOCK);
        let mut block = vec![0; usize::try_from(start - from).unwrap_or(0)];
        file.seek(SeekFrom::Start(from))?;
        file.read_exact(&mut block)?;
        block.append(&mut bytes);
        bytes = block;
        start = from;
    }
    let complete = bytes
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    let end = start + complete as u64;
    let mut lines: VecDeque<Vec<u8>> = bytes[..complete]
        .split_inclusive(|byte| *byte == b'\n')
        .map(<[u8]>::to_vec)
        .collect();
    while lines.len() > count {
        lines.pop_front();
    }
    Ok((lines, end))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::StreamExt;

    use super::*;
    use crate::shim::logfile::{LogFile, Stream as From};

    fn target() -> LogTarget {
        LogTarget {
            namespace: "n".into(),
            pod: "p".into(),
            uid: "u".into(),
            container: "c".into(),
        }
    }

    fn log(state: &Path, attempt: u32) -> (PathBuf, LogFile) {
        let paths = Paths::new(state);
        std::fs::create_dir_all(paths.pod("u")).unwrap();
        let path = paths
            .pod_logs("n", "p", "u")
            .join("c")
            .join(format!("{attempt}.log"));
        let file = LogFile::open(&path).unwrap();
        (path, file)
    }

    fn write(log: &mut LogFile, second: u32, text: &str) {
        log.line(
            &format!("2026-01-01T00:00:{second:02}Z"),
            From::Stdout,
            text.as_bytes(),
            true,
        );
        log.flush().unwrap();
    }

    async fn all(state: &Path, options: LogOptions) -> String {
        let mut stream = PodLogs::new(state).open(&target(), options).unwrap();
        let mut text = Vec::new();
        while let Some(chunk) = stream.next().await {
            text.extend_from_slice(&chunk.unwrap());
        }
        String::from_utf8(text).unwrap()
    }

    #[tokio::test]
    async fn options_select_and_format_lines() {
        let state = tempfile::tempdir().unwrap();
        let (_, mut first) = log(state.path(), 0);
        write(&mut first, 0, "earlier run");
        let (_, mut second) = log(state.path(), 1);
        for number in 1..=5 {
            write(&mut second, number, &format!("line {number}"));
        }
        let options = LogOptions::default;
        assert_eq!(
            all(state.path(), options()).await,
            "line 1\nline 2\nline 3\nline 4\nline 5\n"
        );
        let tail = LogOptions {
            tail_lines: Some(2),
            ..options()
        };
        assert_eq!(all(state.path(), tail).await, "line 4\nline 5\n");
        let since = LogOptions {
            since: Some("2026-01-01T00:00:05Z".parse().unwrap()),
            timestamps: true,
            ..options()
        };
        assert_eq!(all(state.path(), since).await, "2026-01-01T00:00:05Z line 5\n");
        let limited = LogOptions {
            limit_bytes: Some(8),
            ..options()
        };
        assert_eq!(all(state.path(), limited).await, "line 1\nl");
        let previous = LogOptions {
            previous: true,
            ..options()
        };
        assert_eq!(all(state.path(), previous).await, "earlier run\n");
        let none = LogOptions {
            tail_lines: Some(0),
            ..options()
        };
        assert_eq!(all(state.path(), none).await, "");
    }

    #[tokio::test]
    async fn following_delivers_what_is_written_later_and_ends_with_the_run() {
        let state = tempfile::tempdir().unwrap();
        let (path, mut file) = log(state.path(), 0);
        write(&mut file, 1, "one");
        let options = LogOptions {
            follow: true,
            ..LogOptions::default()
        };
        let mut stream = PodLogs::new(state.path()).open(&target(), options).unwrap();
        let within = Duration::from_secs(10);
        let next = tokio::time::timeout(within, stream.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(next, "one\n");
        write(&mut file, 2, "two");
        let next = tokio::time::timeout(within, stream.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(next, "two\n");
        std::fs::write(end_marker(&path), "").unwrap();
        assert!(
            tokio::time::timeout(within, stream.next())
                .await
                .unwrap()
                .is_none()
        );
    }

    #[tokio::test]
    async fn a_missing_log_is_explained() {
        let state = tempfile::tempdir().unwrap();
        let logs = PodLogs::new(state.path());
        let error = logs
            .open(&target(), LogOptions::default())
            .err()
            .unwrap()
            .to_string();
        assert_eq!(error, "container \"c\" in pod \"p\" is waiting to start");
        let previous = LogOptions {
            previous: true,
            ..LogOptions::default()
        };
        let error = logs.open(&target(), previous).err().unwrap().to_string();
        assert_eq!(
            error,
            "previous terminated container \"c\" in pod \"p\" not found"
        );
    }
}
