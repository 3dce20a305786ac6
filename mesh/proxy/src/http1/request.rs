//! Heads of requests, read strictly.
//!
//! What a second parser could read differently is refused: bare line feeds, both `Content-Length` and `Transfer-Encoding`, codings
//! other than `chunked`, more or less than one `Host`, folded lines (RFC 9112 sections 2.2, 3.2, 5 and 6).

#[cfg(test)]
mod tests;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version, header};

use super::chars::{find, is_host, is_target, is_token};
use super::decode::Framing;
use super::fields::{field, line, names};
use super::head::{Found, HeadLimits};
use super::violation::Violation;

/// Fields that the proxy itself adds to most requests: room for them is made with the others'.
const ADDED: usize = 8;

/// A request's head, and what follows from it for the connection.
#[derive(Debug)]
pub struct Head {
    /// The head.
    pub parts: Box<Parts>,
    /// What follows it.
    pub framing: Framing,
    /// Whether another request may follow.
    pub keep_alive: bool,
    /// Whether the client waits to be told that its content is wanted (`Expect: 100-continue`).
    pub expects: bool,
    /// It asks for an upgrade or a tunnel: what follows depends on the answer.
    pub undecided: bool,
}

/// Reads a head that is whole, as it was found. `connect` lets CONNECT pass.
pub fn parse(head: &Bytes, found: Found, limits: HeadLimits, connect: bool) -> Result<Head, Violation> {
    let mut at = 0;
    let first = loop {
        let (text, next) = line(head, at).ok_or(Violation::BadStartLine)?;
        if !text.is_empty() {
            break (at, text, next);
        }
        at = next;
    };
    let (begin, text, mut at) = first;
    let start = start_line(head, begin, text, connect)?;
    if found.lines - 1 > limits.fields {
        return Err(Violation::HeadTooLarge);
    }
    let mut facts = Facts::default();
    let mut headers = HeaderMap::with_capacity(found.lines - 1 + ADDED);
    while let Some((text, next)) = line(head, at)
        && !text.is_empty()
    {
        let (name, value) = field(head, at, text)?;
        facts.note(&name, &value)?;
        headers.append(name, value);
        at = next;
    }
    let http_10 = start.version == Version::HTTP_10;
    let framing = facts.framing(http_10)?;
    let tunnel = start.method == Method::CONNECT;
    if tunnel && framing != Framing::Empty {
        // Its content would mean nothing (RFC 9110 section 9.3.6), or be taken for the tunnel's.
        return Err(Violation::Connect);
    }
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.method = start.method;
    parts.uri = start.target;
    parts.version = start.version;
    parts.headers = headers;
    Ok(Head {
        keep_alive: if http_10 {
            facts.keep_alive && !facts.close
        } else {
            !facts.close
        },
        expects: facts.expects && !http_10 && framing != Framing::Empty,
        undecided: tunnel || (facts.upgrade && facts.connection_upgrade && framing == Framing::Empty),
        framing,
        parts: Box::new(parts),
    })
}

/// What stands for a head that cannot be read, so that its refusal is answered, logged and counted like any other.
pub fn unreadable() -> Box<Parts> {
    let (mut parts, ()) = Request::new(()).into_parts();
    parts
        .headers
        .insert(header::HOST, HeaderValue::from_static("refused"));
    Box::new(parts)
}

struct StartLine {
    method: Method,
    target: Uri,
    version: Version,
}

/// A request line that begins at `at` of `head`.
fn start_line(head: &Bytes, at: usize, line: &[u8], connect: bool) -> Result<StartLine, Violation> {
    // A space within the target is found as one of its bytes.
    let spaces = find(line, b' ').zip(line.iter().rposition(|byte| *byte == b' '));
    let Some((method, target, version, from)) = spaces.and_then(|(first, last)| {
        let target = line.get(first + 1..last)?;
        Some((&line[..first], target, &line[last + 1..], at + first + 1))
    }) else {
        return Err(Violation::BadStartLine);
    };
    if !is_token(method) || !is_target(target) {
        return Err(Violation::BadStartLine);
    }
    let version = match version {
        b"HTTP/1.1" => Version::HTTP_11,
        b"HTTP/1.0" => Version::HTTP_10,
        other if other.starts_with(b"HTTP/") => return Err(Violation::BadVersion),
        _ => return Err(Violation::BadStartLine),
    };
    if method == b"CONNECT" && !connect {
        return Err(Violation::Connect);
    }
    Ok(StartLine {
        method: Method::from_bytes(method).map_err(|_| Violation::BadStartLine)?,
        target: Uri::from_maybe_shared(head.slice(from..from + target.len()))
            .map_err(|_| Violation::BadStartLine)?,
        version,
    })
}

/// What the fields say of framing and of the connection.
#[derive(Default)]
struct Facts {
    length: Option<u64>,
    codings: usize,
    chunked: bool,
    hosts: usize,
    upgrade: bool,
    connection_upgrade: bool,
    close: bool,
    keep_alive: bool,
    expects: bool,
}

impl Facts {
    fn note(&mut self, name: &header::HeaderName, value: &HeaderValue) -> Result<(), Violation> {
        match *name {
            header::HOST => {
                self.hosts += 1;
                if !valid_host(value.as_bytes()) {
                    return Err(Violation::BadHost);
                }
            }
            header::UPGRADE => self.upgrade = true,
            header::CONNECTION => {
                self.connection_upgrade |= names(value, b"upgrade");
                self.close |= names(value, b"close");
                self.keep_alive |= names(value, b"keep-alive");
            }
            header::EXPECT => self.expects = value.as_bytes().eq_ignore_ascii_case(b"100-continue"),
            header::CONTENT_LENGTH => {
                if self.length.is_some() {
                    return Err(Violation::SeveralLengths);
                }
                self.length = Some(length(value.as_bytes()).ok_or(Violation::BadLength)?);
            }
            header::TRANSFER_ENCODING => {
                for coding in value.as_bytes().split(|byte| *byte == b',') {
                    self.codings += 1;
                    if !coding.trim_ascii().eq_ignore_ascii_case(b"chunked") {
                        return Err(Violation::UnknownCoding);
                    }
                    if std::mem::replace(&mut self.chunked, true) {
                        return Err(Violation::BadCoding);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn framing(&self, http_10: bool) -> Result<Framing, Violation> {
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
        Ok(match self.length {
            _ if self.chunked => Framing::Chunked,
            Some(length) if length > 0 => Framing::Length(length),
            _ => Framing::Empty,
        })
    }
}

/// A length: digits, and nothing else.
pub(super) fn length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
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
