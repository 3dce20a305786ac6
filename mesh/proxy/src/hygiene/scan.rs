//! A strict scanner of the HTTP/1 request stream: message framing without interpretation.
//!
//! hyper parses what it can; this scanner sees the same bytes first and refuses what a second parser could read
//! differently: bare line feeds, both `Content-Length` and `Transfer-Encoding`, codings other than `chunked`, more or
//! less than one `Host`, loose chunk framing. It follows the framing of bodies so that it knows where the next head
//! begins (RFC 9112 sections 2.2, 3.2, 6 and 7.1).

#[cfg(test)]
mod tests;

use super::chars::{find, is_host, is_target, is_token, is_value};
use super::extension::Extension;

/// Longest chunk-size line with its extensions, bytes.
const MAX_CHUNK_LINE: usize = 256;
/// Longest trailer section, bytes.
const MAX_TRAILERS: usize = 8 * 1024;

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Violation {
    /// A line that ends in LF without CR.
    BareLineFeed = 1,
    /// `Content-Length` and `Transfer-Encoding` together.
    LengthAndCoding,
    /// More than one `Content-Length`.
    SeveralLengths,
    /// A `Content-Length` that is not a number.
    BadLength,
    /// A transfer coding other than `chunked`.
    UnknownCoding,
    /// `chunked` more than once, or `Transfer-Encoding` in HTTP/1.0.
    BadCoding,
    /// No `Host` in HTTP/1.1.
    NoHost,
    /// More than one `Host`.
    SeveralHosts,
    /// A `Host` that is not a host.
    BadHost,
    /// A field line that continues the one before (obs-fold).
    FoldedLine,
    /// Something that is not a field line, or space before the colon.
    BadField,
    /// Something that is not a request line.
    BadRequestLine,
    /// A version other than HTTP/1.0 and HTTP/1.1.
    BadVersion,
    /// CONNECT.
    Connect,
    /// A head longer than allowed, or with too many fields.
    HeadTooLarge,
    /// Chunk framing that is not exactly as specified.
    BadChunk,
    /// A head that did not come to its end in time; not found by the scanner, which has no clock.
    Unfinished,
}

impl Violation {
    const ALL: [Self; 17] = [
        Self::BareLineFeed,
        Self::LengthAndCoding,
        Self::SeveralLengths,
        Self::BadLength,
        Self::UnknownCoding,
        Self::BadCoding,
        Self::NoHost,
        Self::SeveralHosts,
        Self::BadHost,
        Self::FoldedLine,
        Self::BadField,
        Self::BadRequestLine,
        Self::BadVersion,
        Self::Connect,
        Self::HeadTooLarge,
        Self::BadChunk,
        Self::Unfinished,
    ];

    /// The violation behind its number.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|violation| *violation as u8 == code)
    }

    /// The status that answers it.
    pub fn status(self) -> u16 {
        match self {
            Self::UnknownCoding => 501,
            Self::BadVersion => 505,
            Self::Connect => 405,
            Self::Unfinished => 408,
            Self::HeadTooLarge => 431,
            _ => 400,
        }
    }

    /// Response code details for logs.
    pub fn details(self) -> &'static str {
        match self {
            Self::BareLineFeed => "http1.bare_line_feed",
            Self::LengthAndCoding => "http1.content_length_and_chunked_not_allowed",
            Self::SeveralLengths => "http1.several_content_lengths",
            Self::BadLength => "http1.invalid_content_length",
            Self::UnknownCoding => "http1.invalid_transfer_encoding",
            Self::BadCoding => "http1.transfer_encoding_not_allowed",
            Self::NoHost => "missing_host_header",
            Self::SeveralHosts => "http1.several_hosts",
            Self::BadHost => "http1.invalid_host",
            Self::FoldedLine => "http1.obs_fold",
            Self::BadField => "http1.invalid_header_line",
            Self::BadRequestLine => "http1.invalid_request_line",
            Self::BadVersion => "http1.unsupported_version",
            Self::Connect => "http1.connect_not_allowed",
            Self::HeadTooLarge => "request_headers_too_large",
            Self::BadChunk => "http1.invalid_chunk",
            Self::Unfinished => "request_header_timeout",
        }
    }
}

/// Limits of a request head.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Bytes.
    pub bytes: usize,
    /// Fields.
    pub fields: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head,
    Body(u64),
    Chunked(Chunk),
    /// The head asked for an upgrade or a tunnel; what follows depends on the answer.
    Undecided,
    Opaque,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    Size { value: u64, digits: u8 },
    Extension { length: usize, at: Extension },
    SizeLf { value: u64 },
    Data(u64),
    DataCr,
    DataLf,
    TrailerStart { length: usize },
    Trailer { length: usize },
    TrailerLf { length: usize },
    EndLf,
}

/// The scanner's position in the stream.
#[derive(Debug)]
pub struct Scanner {
    state: State,
    limits: HeadLimits,
    /// Within the head: start of the current line, and how far it has been searched.
    line_start: usize,
    searched: usize,
    /// Value of the chunk whose extension is being read.
    chunk_value: u64,
    heads: u32,
    connect: bool,
}

impl Scanner {
    /// At the start of a stream.
    pub fn new(limits: HeadLimits) -> Self {
        Self {
            state: State::Head,
            limits,
            line_start: 0,
            searched: 0,
            chunk_value: 0,
            heads: 0,
            connect: false,
        }
    }

    /// The same, letting CONNECT pass: what follows one depends on the answer, as with an upgrade.
    pub fn allowing_connect(mut self, allowed: bool) -> Self {
        self.connect = allowed;
        self
    }

    /// Heads that have been passed on.
    pub fn heads(&self) -> u32 {
        self.heads
    }

    /// Whether an upgrade must be decided before anything more may be read.
    pub fn undecided(&self) -> bool {
        self.state == State::Undecided
    }

    /// Decides it: from here on anything goes, or the next request follows.
    pub fn decide(&mut self, upgraded: bool) {
        if self.undecided() {
            self.state = if upgraded { State::Opaque } else { State::Head };
        }
    }

    /// Whether the stream is no longer HTTP.
    pub fn opaque(&self) -> bool {
        self.state == State::Opaque
    }

    /// Whether the violation that [`Scanner::advance`] reported is in a head (so that nothing of the request has been
    /// let through).
    pub fn in_head(&self) -> bool {
        self.state == State::Head
    }

    /// How many of `bytes` are fine to pass on. What is left must be presented again, with more after it.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<usize, (usize, Violation)> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            match self.state {
                State::Opaque => return Ok(bytes.len()),
                State::Undecided => return Ok(at),
                State::Body(left) => {
                    let taken = left.min(rest.len() as u64);
                    at += taken as usize;
                    self.state = if taken == left {
                        State::Head
                    } else {
                        State::Body(left - taken)
                    };
                }
                State::Chunked(chunk) => {
                    at += self.chunked(chunk, rest).map_err(|violation| (at, violation))?;
                }
                State::Head => match self.head(rest).map_err(|violation| (at, violation))? {
                    Some(length) => at += length,
                    None => return Ok(at),
                },
            }
        }
        Ok(at)
    }

    /// Length of the head, if it is all there.
    fn head(&mut self, bytes: &[u8]) -> Result<Option<usize>, Violation> {
        while let Some(offset) = find(&bytes[self.searched..], b'\n') {
            let feed = self.searched + offset;
            if feed == self.line_start || bytes[feed - 1] != b'\r' {
                return Err(Violation::BareLineFeed);
            }
            let empty = feed - self.line_start == 1;
            self.searched = feed + 1;
            // An empty line before the request line is let pass (RFC 9112 section 2.2).
            let leading = bytes[..self.line_start]
                .iter()
                .all(|byte| matches!(byte, b'\r' | b'\n'));
            self.line_start = feed + 1;
            if empty && !leading {
                let length = feed + 1;
                if length > self.limits.bytes {
                    return Err(Violation::HeadTooLarge);
                }
                self.state = self.judge(&bytes[..length])?;
                self.heads = self.heads.wrapping_add(1);
                (self.line_start, self.searched) = (0, 0);
                return Ok(Some(length));
            }
        }
        self.searched = bytes.len();
        if bytes.len() > self.limits.bytes {
            return Err(Violation::HeadTooLarge);
        }
        Ok(None)
    }

    /// What follows a complete head.
    fn judge(&self, head: &[u8]) -> Result<State, Violation> {
        let mut rest = head;
        let mut lines = std::iter::from_fn(|| {
            let line;
            (line, rest) = rest.split_at_checked(find(rest, b'\n')?)?;
            rest = &rest[1..];
            Some(line.strip_suffix(b"\r").unwrap_or(line))
        })
        .skip_while(|line| line.is_empty());
        let line = lines.next().unwrap_or_default();
        let http_10 = request_line(line, self.connect)?;
        let connect = line.starts_with(b"CONNECT ");
        let mut facts = Facts::default();
        let mut count = 0;
        for line in lines.take_while(|line| !line.is_empty()) {
            count += 1;
            if count > self.limits.fields {
                return Err(Violation::HeadTooLarge);
            }
            facts.field(line)?;
        }
        match facts.state(http_10)? {
            // Its content would mean nothing (RFC 9110 section 9.3.6), or be taken for the tunnel's.
            State::Body(_) | State::Chunked(_) if connect => Err(Violation::Connect),
            _ if connect => Ok(State::Undecided),
            state => Ok(state),
        }
    }

    fn chunked(&mut self, chunk: Chunk, bytes: &[u8]) -> Result<usize, Violation> {
        if let Chunk::Data(left) = chunk {
            let taken = left.min(bytes.len() as u64);
            let next = if taken == left {
                Chunk::DataCr
            } else {
                Chunk::Data(left - taken)
            };
            self.state = State::Chunked(next);
            return Ok(taken as usize);
        }
        let byte = bytes[0];
        let next = match chunk {
            Chunk::Size { value, digits } => match byte {
                b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F' if digits < 15 => {
                    let digit = (byte as char).to_digit(16).unwrap_or(0);
                    Chunk::Size {
                        value: value * 16 + u64::from(digit),
                        digits: digits + 1,
                    }
                }
                b'\r' if digits > 0 => Chunk::SizeLf { value },
                b';' if digits > 0 => {
                    self.chunk_value = value;
                    Chunk::Extension {
                        length: 0,
                        at: Extension::NameStart,
                    }
                }
                _ => return Err(Violation::BadChunk),
            },
            Chunk::Extension { at, .. } if byte == b'\r' && at.may_end() => Chunk::SizeLf {
                value: self.chunk_value,
            },
            Chunk::Extension { length, at } => match at.next(byte) {
                Some(at) if length < MAX_CHUNK_LINE => Chunk::Extension {
                    length: length + 1,
                    at,
                },
                _ => return Err(Violation::BadChunk),
            },
            Chunk::SizeLf { value } => match (byte, value) {
                (b'\n', 0) => Chunk::TrailerStart { length: 0 },
                (b'\n', value) => Chunk::Data(value),
                _ => return Err(Violation::BadChunk),
            },
            Chunk::Data(_) => Chunk::DataCr,
            Chunk::DataCr if byte == b'\r' => Chunk::DataLf,
            Chunk::DataLf if byte == b'\n' => Chunk::Size { value: 0, digits: 0 },
            Chunk::DataCr | Chunk::DataLf => return Err(Violation::BadChunk),
            Chunk::TrailerStart { .. } if byte == b'\r' => Chunk::EndLf,
            Chunk::TrailerStart { length } | Chunk::Trailer { length } => match byte {
                b'\r' => Chunk::TrailerLf { length },
                b'\n' | 0 => return Err(Violation::BadChunk),
                _ if length >= MAX_TRAILERS => return Err(Violation::HeadTooLarge),
                _ => Chunk::Trailer { length: length + 1 },
            },
            Chunk::TrailerLf { length } if byte == b'\n' => Chunk::TrailerStart { length },
            Chunk::EndLf if byte == b'\n' => {
                self.state = State::Head;
                return Ok(1);
            }
            Chunk::TrailerLf { .. } | Chunk::EndLf => return Err(Violation::BadChunk),
        };
        self.state = State::Chunked(next);
        Ok(1)
    }
}

/// Whether the version is HTTP/1.0.
fn request_line(line: &[u8], connect: bool) -> Result<bool, Violation> {
    // A space within the target is found as one of its bytes.
    let spaces = find(line, b' ').zip(line.iter().rposition(|byte| *byte == b' '));
    let Some((method, target, version)) = spaces.and_then(|(first, last)| {
        let target = line.get(first + 1..last)?;
        Some((&line[..first], target, &line[last + 1..]))
    }) else {
        return Err(Violation::BadRequestLine);
    };
    if !is_token(method) || !is_target(target) {
        return Err(Violation::BadRequestLine);
    }
    let http_10 = match version {
        b"HTTP/1.1" => false,
        b"HTTP/1.0" => true,
        other if other.starts_with(b"HTTP/") => return Err(Violation::BadVersion),
        _ => return Err(Violation::BadRequestLine),
    };
    if method == b"CONNECT" && !connect {
        return Err(Violation::Connect);
    }
    Ok(http_10)
}

#[derive(Default)]
struct Facts {
    length: Option<u64>,
    codings: usize,
    chunked: bool,
    hosts: usize,
    upgrade: bool,
    connection_upgrade: bool,
}

impl Facts {
    fn field(&mut self, line: &[u8]) -> Result<(), Violation> {
        if matches!(line[0], b' ' | b'\t') {
            return Err(Violation::FoldedLine);
        }
        let colon = find(line, b':').ok_or(Violation::BadField)?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if !is_token(name) || !is_value(value) {
            return Err(Violation::BadField);
        }
        // Lengths first: most fields are none of these.
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => {
                self.hosts += 1;
                if !valid_host(value) {
                    return Err(Violation::BadHost);
                }
            }
            7 if name.eq_ignore_ascii_case(b"upgrade") => self.upgrade = true,
            10 if name.eq_ignore_ascii_case(b"connection") => {
                self.connection_upgrade |= value
                    .split(|byte| *byte == b',')
                    .any(|token| token.trim_ascii().eq_ignore_ascii_case(b"upgrade"));
            }
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                if self.length.is_some() {
                    return Err(Violation::SeveralLengths);
                }
                let digits = !value.is_empty() && value.len() <= 19 && value.iter().all(u8::is_ascii_digit);
                let text = std::str::from_utf8(value)
                    .ok()
                    .filter(|_| digits)
                    .ok_or(Violation::BadLength)?;
                self.length = Some(text.parse().map_err(|_| Violation::BadLength)?);
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                for coding in value.split(|byte| *byte == b',') {
                    self.codings += 1;
                    let coding = coding.trim_ascii();
                    if coding.eq_ignore_ascii_case(b"chunked") {
                        if self.chunked {
                            return Err(Violation::BadCoding);
                        }
                        self.chunked = true;
                    } else {
                        return Err(Violation::UnknownCoding);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn state(&self, http_10: bool) -> Result<State, Violation> {
        if self.codings > 0 && http_10 {
            return Err(Violation::BadCoding);
        }
        if self.codings > 0 && self.length.is_some() {
            return Err(Violation::LengthAndCoding);
        }
        match self.hosts {
            0 if !http_10 => return Err(Violation::NoHost),
            0 | 1 => {}
            _ => return Err(Violation::SeveralHosts),
        }
        if self.chunked {
            return Ok(State::Chunked(Chunk::Size { value: 0, digits: 0 }));
        }
        Ok(match self.length {
            Some(length) if length > 0 => State::Body(length),
            _ if self.upgrade && self.connection_upgrade => State::Undecided,
            _ => State::Head,
        })
    }
}

/// Whether a `Host` value is a host with an optional port: unreserved characters, sub-delims, percent-encoding, or a
/// bracketed address. Empty is allowed (RFC 9110 section 7.2). A comma, though a sub-delim, is what two joined fields
/// look like, and is not.
pub fn valid_host(value: &[u8]) -> bool {
    if is_host(value) {
        return true;
    }
    let is_bracket = |byte: &u8| matches!(byte, b'[' | b']');
    value.starts_with(b"[")
        && value.iter().filter(|byte| is_bracket(byte)).count() == 2
        && value.split(is_bracket).all(is_host)
}
