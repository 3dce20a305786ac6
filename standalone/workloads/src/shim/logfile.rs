//! A container's log on disk, in the CRI format (`<RFC 3339 time> stdout|stderr F|P <text>`), rotated by size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Size at which a file is rotated; kubelet's `containerLogMaxSize` default.
pub(crate) const MAX_FILE_BYTES: u64 = 10 * 1024 * 1024;
/// How many files are kept, the current one included; kubelet's `containerLogMaxFiles` default.
pub(crate) const MAX_FILES: u32 = 5;
/// A longer line is written in parts (tag `P`), as container runtimes do.
pub(crate) const MAX_LINE_BYTES: usize = 16 * 1024;

/// Which stream of the process a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Cuts a byte stream into lines.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Calls `each` with every complete line (`true`) and every over-long part (`false`).
    pub(crate) fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8], bool)) {
        let mut bytes = bytes;
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, more) = bytes.split_at(end);
            bytes = &more[1..];
            self.rest.extend_from_slice(line);
            self.part(&mut each);
            each(&self.rest, true);
            self.rest.clear();
        }
        self.rest.extend_from_slice(bytes);
        self.part(&mut each);
    }

    fn part(&mut self, each: &mut impl FnMut(&[u8], bool)) {
        while self.rest.len() > MAX_LINE_BYTES {
            each(&self.rest[..MAX_LINE_BYTES], false);
            self.rest.drain(..MAX_LINE_BYTES);
        }
    }

    /// What is left when the stream ends without a newline: a part, so that a reader gets the bytes as written.
    pub(crate) fn finish(&mut self, mut each: impl FnMut(&[u8], bool)) {
        if !self.rest.is_empty() {
            each(&self.rest, false);
            self.rest.clear();
        }
    }
}

/// The open log of one container start.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    max_bytes: u64,
    buffer: Vec<u8>,
}

impl LogFile {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::with_limit(path, MAX_FILE_BYTES)
    }

    fn with_limit(path: &Path, max_bytes: u64) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            size,
            max_bytes,
            buffer: Vec::new(),
        })
    }

    /// Adds a line; it reaches the file at [`LogFile::flush`].
    pub(crate) fn line(&mut self, time: &str, stream: Stream, text: &[u8], complete: bool) {
        let tag = if complete { "F" } else { "P" };
        self.buffer
            .extend_from_slice(format!("{time} {} {tag} ", stream.name()).as_bytes());
        self.buffer.extend_from_slice(text);
        self.buffer.push(b'\n');
    }

    /// Writes what was added. A full disk loses lines, never the container.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        if self.size > 0 && self.size + self.buffer.len() as u64 > self.max_bytes {
            self.rotate()?;
        }
        let result = self.file.write_all(&self.buffer);
        self.size += self.buffer.len() as u64;
        self.buffer.clear();
        result
    }

    fn rotate(&mut self) -> io::Result<()> {
        for number in (1..MAX_FILES - 1).rev() {
            let (from, to) = (rotated(&self.path, number), rotated(&self.path, number + 1));
            match fs::rename(&from, &to) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(&self.path, rotated(&self.path, 1))?;
        self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

/// The name of the `number`th older file.
pub(crate) fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_at_newlines_whatever_the_chunks() {
        let text = b"one\ntwo\n\nlast";
        for size in 1..text.len() {
            let mut lines = Lines::default();
            let mut seen = Vec::new();
            for chunk in text.chunks(size) {
                lines.push(chunk, |line, complete| {
                    seen.push((String::from_utf8_lossy(line).into_owned(), complete))
                });
            }
            lines.finish(|line, complete| seen.push((String::from_utf8_lossy(line).into_owned(), complete)));
            let lines: Vec<&str> = seen.iter().map(|(line, _)| line.as_str()).collect();
            assert_eq!(lines, ["one", "two", "", "last"]);
            assert!(seen[..3].iter().all(|(_, complete)| *complete) && !seen[3].1);
        }
    }

    #[test]
    fn an_over_long_line_is_written_in_parts() {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        let mut bytes = vec![b'x'; MAX_LINE_BYTES + 10];
        bytes.push(b'\n');
        lines.push(&bytes, |line, complete| seen.push((line.len(), complete)));
        assert_eq!(seen, [(MAX_LINE_BYTES, false), (10, true)]);
    }

    #[test]
    fn a_full_file_is_rotated_and_the_oldest_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c").join("0.log");
        let mut log = LogFile::with_limit(&path, 100).unwrap();
        for number in 0..40 {
            log.line(
                "2026-01-01T00:00:00Z",
                Stream::Stdout,
                format!("line {number}").as_bytes(),
                true,
            );
            log.flush().unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(path.parent().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["0.log", "0.log.1", "0.log.2", "0.log.3", "0.log.4"]);
        let newest = fs::read_to_string(&path).unwrap();
        assert!(newest.ends_with("stdout F line 39\n"), "{newest}");
        assert!(fs::metadata(&path).unwrap().len() <= 100);
    }
}
