//! The file that records are appended to, as the writer needs it; a seam for tests whose disk is full.

use std::fs::File;
use std::io::{self, Write as _};

/// An open segment.
pub(crate) trait Segment: Send + Sync {
    /// Append and make durable. After an error any part of it may be in the file.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Cut everything after this many bytes off.
    fn cut(&mut self, length: u64) -> io::Result<()>;
}

impl Segment for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)?;
        self.sync_data()
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }
}
