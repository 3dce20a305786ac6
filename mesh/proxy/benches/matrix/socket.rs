//! A non-blocking connection of the load's process: what was read, what is to be written, TLS if there is any, and HTTP/2's
//! frames.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use rustls::ServerConnection;

use crate::stamped;

/// What one read takes at most.
const CHUNK: usize = 16 << 10;

/// See the module. Told of by edges: whoever is told that something is ready reads and writes all that there is.
pub(crate) struct Socket {
    stream: TcpStream,
    tls: Option<Box<ServerConnection>>,
    /// Read and not yet understood.
    pub(crate) read: Vec<u8>,
    /// To be written; what is before `written` has been.
    pub(crate) write: Vec<u8>,
    written: usize,
}

impl Socket {
    /// `stream`, told of by `token`.
    pub(crate) fn new(
        mut stream: TcpStream,
        registry: &Registry,
        token: Token,
        tls: Option<ServerConnection>,
    ) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self {
            stream,
            tls: tls.map(Box::new),
            read: Vec::with_capacity(CHUNK),
            write: Vec::new(),
            written: 0,
        })
    }

    /// Asks the kernel to say when what arrives has arrived.
    pub(crate) fn stamp(&self) -> io::Result<()> {
        stamped::stamp(&self.stream.as_fd())
    }

    /// Writes as much as can be written.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            if !self.write.is_empty() {
                tls.writer().write_all(&self.write)?;
                self.write.clear();
            }
            while tls.wants_write() {
                match tls.write_tls(&mut self.stream) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            return Ok(());
        }
        while self.written < self.write.len() {
            match self.stream.write(&self.write[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.write.clear();
        self.written = 0;
        Ok(())
    }

    /// Reads all that is there, and says when the kernel had the last of it, if it was asked to. The end of the stream is an
    /// error.
    pub(crate) fn fill(&mut self) -> io::Result<Option<u64>> {
        let mut chunk = [0; CHUNK];
        let mut arrived = None;
        loop {
            let count = match stamped::receive(&self.stream, &mut chunk) {
                Ok((0, _)) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok((count, at)) => {
                    arrived = at.or(arrived);
                    count
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(arrived),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            match &mut self.tls {
                None => self.read.extend_from_slice(&chunk[..count]),
                Some(tls) => decrypt(tls, &chunk[..count], &mut self.read)?,
            }
            // Whatever came after a short read tells of itself.
            if count < CHUNK {
                return Ok(arrived);
            }
        }
    }
}

fn decrypt(tls: &mut ServerConnection, mut bytes: &[u8], into: &mut Vec<u8>) -> io::Result<()> {
    while !bytes.is_empty() {
        tls.read_tls(&mut bytes)?;
        tls.process_new_packets().map_err(io::Error::other)?;
        match tls.reader().read_to_end(into) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What an HTTP/2 client says first.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Kinds and flags of frames (RFC 9113 section 6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// A frame that has come whole.
pub(crate) struct Frame<'a> {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// The first one of `bytes`, and how long it is there.
    pub(crate) fn first(bytes: &'a [u8]) -> Option<(Self, usize)> {
        let head = bytes.get(..9)?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let frame = Self {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff,
            payload: bytes.get(9..9 + length)?,
        };
        Some((frame, 9 + length))
    }

    /// Whether nothing follows it on its stream.
    pub(crate) fn ends(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    pub(crate) fn acknowledges(&self) -> bool {
        self.flags & ACK != 0
    }
}

/// Adds a frame to what is to be written.
pub(crate) fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}
