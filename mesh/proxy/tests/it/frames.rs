//! An HTTP/2 client that says exactly what it is told: raw frames, HPACK by hand, nothing checked.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::soon;

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// The first frame in `bytes` and what follows it.
    pub(crate) fn parse(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (head, rest) = bytes.split_at_checked(9)?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let (payload, rest) = rest.split_at_checked(length)?;
        let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        Some((
            Self {
                kind: head[3],
                flags: head[4],
                stream,
                payload: payload.to_vec(),
            },
            rest,
        ))
    }

    /// The error code of a RST_STREAM or GOAWAY.
    pub(crate) fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        self.payload.get(at..at + 4).map_or(u32::MAX, |code| {
            u32::from_be_bytes([code[0], code[1], code[2], code[3]])
        })
    }
}

/// A frame to send.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut out = vec![length[1], length[2], length[3], kind, flags];
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// A number with an N-bit prefix (RFC 7541 section 5.1).
fn number(out: &mut Vec<u8>, first: u8, bits: u8, value: usize) {
    let limit = (1usize << bits) - 1;
    if value < limit {
        out.push(first | value as u8);
        return;
    }
    out.push(first | limit as u8);
    let mut left = value - limit;
    while left >= 128 {
        out.push((left % 128) as u8 | 128);
        left /= 128;
    }
    out.push(left as u8);
}

/// A literal field without indexing and without Huffman coding, whatever its bytes.
pub(crate) fn literal(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.push(0);
    number(out, 0, 7, name.len());
    out.extend(name);
    number(out, 0, 7, value.len());
    out.extend(value);
}

/// A literal field that enters the dynamic table.
pub(crate) fn indexed_literal(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.push(0x40);
    number(out, 0, 7, name.len());
    out.extend(name);
    number(out, 0, 7, value.len());
    out.extend(value);
}

/// A header block.
pub(crate) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        literal(&mut out, name.as_bytes(), value.as_bytes());
    }
    out
}

/// An ordinary request's pseudo fields, then `more`.
pub(crate) fn request(method: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let mut fields = vec![
        (":method", method),
        (":scheme", "http"),
        (":authority", "reviews"),
        (":path", path),
    ];
    fields.extend(more);
    block(&fields)
}

/// What became of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// A response with this status.
    Status(u16),
    /// The stream was reset with this code.
    Reset(u32),
    /// The connection ended with a GOAWAY of this code.
    Goaway(u32),
    /// The connection ended without one.
    Closed,
}

impl Fate {
    /// Refused in one of the ways that RFC 9113 allows for a malformed request (section 8.1.1).
    pub(crate) fn refused(&self) -> bool {
        match self {
            Self::Status(status) => (400..600).contains(status),
            Self::Reset(_) | Self::Goaway(_) | Self::Closed => true,
        }
    }
}

/// A connection, of a client or accepted by a server.
pub(crate) struct RawClient {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl RawClient {
    /// Connects and exchanges SETTINGS; `settings` is the payload of ours.
    pub(crate) async fn connect(at: SocketAddr, settings: &[u8]) -> Self {
        let stream = soon("a connection", TcpStream::connect(at)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut client = Self {
            stream,
            buffer: Vec::new(),
        };
        let mut hello = PREFACE.to_vec();
        hello.extend(frame(SETTINGS, 0, 0, settings));
        client.send(&hello).await;
        client
    }

    /// The server's end: takes the client's preface and sends SETTINGS; `settings` is the payload of ours.
    pub(crate) async fn accepted(mut stream: TcpStream, settings: &[u8]) -> std::io::Result<Self> {
        stream.set_nodelay(true)?;
        let mut preface = [0; PREFACE.len()];
        stream.read_exact(&mut preface).await?;
        stream.write_all(&frame(SETTINGS, 0, 0, settings)).await?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
        })
    }

    /// Ends the connection at once, so that the peer sees a reset.
    pub(crate) fn reset(self) {
        let _ = socket2::SockRef::from(&self.stream).set_linger(Some(std::time::Duration::ZERO));
    }

    /// The same for as long as it takes.
    pub(crate) async fn listen(&mut self) -> Option<Frame> {
        let found = self.overhear().await?;
        if matches!(found.kind, SETTINGS | PING) && found.flags & ACK == 0 {
            let payload = if found.kind == PING {
                &found.payload[..]
            } else {
                &[]
            };
            let answer = frame(found.kind, ACK, 0, payload);
            let _ = self.stream.write_all(&answer).await;
        }
        Some(found)
    }

    /// The next frame, which is not answered; `None` at the end of the connection.
    pub(crate) async fn overhear(&mut self) -> Option<Frame> {
        loop {
            if let Some((found, rest)) = Frame::parse(&self.buffer) {
                self.buffer = rest.to_vec();
                return Some(found);
            }
            let mut chunk = vec![0_u8; 16 * 1024];
            match self.stream.read(&mut chunk).await {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.buffer.extend(&chunk[..count]),
            }
        }
    }

    /// Sends bytes; an error is the peer's way to end the connection and shows when reading.
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        let _ = soon("room to write", self.stream.write_all(bytes)).await;
    }

    /// Sends bytes without waiting for room for ever: false when the peer no longer reads or is gone.
    pub(crate) async fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).await.is_ok()
    }

    /// The next frame; `None` at the end of the connection. SETTINGS and PING of the peer are acknowledged.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        soon("a frame or the end", self.listen()).await
    }

    /// Opens a stream with this header block and no body.
    pub(crate) async fn get(&mut self, stream: u32, block: &[u8]) {
        self.send(&frame(HEADERS, END_HEADERS | END_STREAM, stream, block))
            .await;
    }

    /// Reads until something final has happened to `stream` or to the connection.
    pub(crate) async fn fate(&mut self, stream: u32) -> Fate {
        let mut goaway = None;
        while let Some(frame) = self.next().await {
            match frame.kind {
                HEADERS if frame.stream == stream => {
                    if let Some(status) = status_of(&frame.payload) {
                        return Fate::Status(status);
                    }
                }
                RST_STREAM if frame.stream == stream => return Fate::Reset(frame.code()),
                GOAWAY => goaway = Some(frame.code()),
                _ => {}
            }
        }
        goaway.map_or(Fate::Closed, Fate::Goaway)
    }

    /// Reads to the end of the connection; the code of its GOAWAY, if there was one.
    pub(crate) async fn end(&mut self) -> Option<u32> {
        let mut code = None;
        while let Some(frame) = self.next().await {
            if frame.kind == GOAWAY {
                code = Some(frame.code());
            }
        }
        code
    }
}

/// The status of a response head; h2 puts it first, indexed or literal (RFC 7541 appendix A: 8 to 14 are statuses).
fn status_of(block: &[u8]) -> Option<u16> {
    let mut at = 0;
    // Size updates of the dynamic table may come first.
    while block.get(at)? & 0xe0 == 0x20 {
        at += 1;
    }
    let first = *block.get(at)?;
    match first {
        0x88..=0x8e => Some([200, 204, 206, 304, 400, 404, 500][usize::from(first - 0x88)]),
        // Literal with indexed name :status (8).
        0x48 | 0x08 | 0x18 => {
            let length = usize::from(block.get(at + 1)? & 0x7f);
            let text = block.get(at + 2..at + 2 + length)?;
            if block[at + 1] & 0x80 == 0 {
                return std::str::from_utf8(text).ok()?.parse().ok();
            }
            // Huffman codes of digits: 0, 1, 2 have five bits (their value), 3 to 9 six bits (0x19 to 0x1f).
            let bits: Vec<u8> = text
                .iter()
                .flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1))
                .collect();
            let (mut out, mut place) = (0u16, 0);
            for _ in 0..3 {
                let five = bits
                    .get(place..place + 5)?
                    .iter()
                    .fold(0, |sum, bit| sum << 1 | bit);
                if five < 3 {
                    out = out * 10 + u16::from(five);
                    place += 5;
                } else {
                    let six = bits
                        .get(place..place + 6)?
                        .iter()
                        .fold(0, |sum, bit| sum << 1 | bit);
                    out = out * 10 + u16::from(six.checked_sub(0x16)?);
                    place += 6;
                }
            }
            Some(out)
        }
        _ => None,
    }
}
