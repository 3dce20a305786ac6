//! Heads of responses.
//!
//! Endpoints are read less strictly than clients: a line may end in LF alone, a length may be said several times if it is the same. What
//! could be read as another body than the one that is sent on is refused.

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Version, header};

use super::decode::Framing;
use super::fields::{field, line, names};
use super::head::{Finder, Found, HeadLimits};
use super::input::Input;
use super::request::length;
use super::violation::Violation;

/// Reads the heads of one connection's responses.
#[derive(Debug)]
pub struct Parser(Finder);

/// A response's head, and what follows from it for the connection.
#[derive(Debug)]
pub struct Head {
    /// Status.
    pub status: StatusCode,
    /// HTTP/1.0 or HTTP/1.1.
    pub version: Version,
    /// Fields.
    pub headers: HeaderMap,
    /// What follows it. Nothing after an interim answer, whose successor is the next head.
    pub framing: Framing,
    /// Whether another request may follow.
    pub keep_alive: bool,
    /// What follows is no longer HTTP: 101, or a granted CONNECT.
    pub tunnel: bool,
}

impl Parser {
    /// For heads within these limits.
    pub fn new(limits: HeadLimits) -> Self {
        Self(Finder::lenient(limits))
    }

    /// The head that comes next, if it is all there, of an answer to a request with that method.
    pub fn next(&mut self, input: &mut Input, method: &Method) -> Result<Option<Head>, Violation> {
        if !begins(&input.buf) {
            // Not waited for: whoever speaks another protocol may wait for an answer of ours.
            return Err(Violation::BadStartLine);
        }
        let Some(found) = self.0.find(&input.buf)? else {
            return Ok(None);
        };
        let head = input.take(found.length);
        parse(&head, found, self.0.limits(), method).map(Some)
    }
}

/// Whether a head may begin like that.
fn begins(bytes: &[u8]) -> bool {
    let blank = bytes
        .iter()
        .take_while(|byte| matches!(byte, b'\r' | b'\n'))
        .count();
    bytes[blank..]
        .iter()
        .zip(b"HTTP/1.")
        .all(|(have, want)| have == want)
}

fn parse(head: &Bytes, found: Found, limits: HeadLimits, method: &Method) -> Result<Head, Violation> {
    let mut at = 0;
    let text = loop {
        let (text, next) = line(head, at).ok_or(Violation::BadStartLine)?;
        at = next;
        if !text.is_empty() {
            break text;
        }
    };
    let (version, status) = status_line(text)?;
    if found.lines - 1 > limits.fields {
        return Err(Violation::HeadTooLarge);
    }
    let mut headers = HeaderMap::with_capacity(found.lines + 3);
    let (mut close, mut keep_alive) = (false, false);
    let mut said = None;
    let mut coding = None;
    while let Some((text, next)) = line(head, at)
        && !text.is_empty()
    {
        let (name, value) = field(head, at, text)?;
        match name {
            header::CONNECTION => {
                close |= names(&value, b"close");
                keep_alive |= names(&value, b"keep-alive");
            }
            header::CONTENT_LENGTH => {
                for value in value.as_bytes().split(|byte| *byte == b',') {
                    let value = length(value.trim_ascii()).ok_or(Violation::BadLength)?;
                    if said.is_some_and(|said| said != value) {
                        return Err(Violation::SeveralLengths);
                    }
                    said = Some(value);
                }
            }
            header::TRANSFER_ENCODING => {
                let last = value.as_bytes().rsplit(|byte| *byte == b',').next();
                coding = last.map(|last| last.trim_ascii().eq_ignore_ascii_case(b"chunked"));
            }
            _ => {}
        }
        headers.append(name, value);
        at = next;
    }
    let tunnel =
        status == StatusCode::SWITCHING_PROTOCOLS || (*method == Method::CONNECT && status.is_success());
    let bodiless = status.is_informational()
        || tunnel
        || *method == Method::HEAD
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let framing = match coding {
        _ if bodiless => Framing::Empty,
        Some(_) if version == Version::HTTP_10 => return Err(Violation::BadCoding),
        Some(true) => Framing::Chunked,
        Some(false) => Framing::UntilClose,
        None => match said {
            Some(0) => Framing::Empty,
            Some(length) => Framing::Length(length),
            None => Framing::UntilClose,
        },
    };
    let persists = if version == Version::HTTP_10 {
        keep_alive && !close
    } else {
        !close
    };
    Ok(Head {
        status,
        version,
        headers,
        framing,
        keep_alive: persists && !tunnel && framing != Framing::UntilClose,
        tunnel,
    })
}

/// `HTTP/1.1 200 OK`; the reason may be absent, and means nothing.
fn status_line(line: &[u8]) -> Result<(Version, StatusCode), Violation> {
    let (version, rest) = line.split_at_checked(8).ok_or(Violation::BadStartLine)?;
    let version = match version {
        b"HTTP/1.1" => Version::HTTP_11,
        b"HTTP/1.0" => Version::HTTP_10,
        other if other.starts_with(b"HTTP/1.") => return Err(Violation::BadVersion),
        _ => return Err(Violation::BadStartLine),
    };
    let code = match rest {
        [b' ', code @ ..] if code.len() == 3 => code,
        [b' ', a, b, c, b' ', reason @ ..] => {
            if reason
                .iter()
                .any(|byte| byte.is_ascii_control() && *byte != b'\t')
            {
                return Err(Violation::BadStartLine);
            }
            &[*a, *b, *c]
        }
        _ => return Err(Violation::BadStartLine),
    };
    let status = StatusCode::from_bytes(code).map_err(|_| Violation::BadStartLine)?;
    Ok((version, status))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HeadLimits = HeadLimits {
        bytes: 1024,
        fields: 10,
    };

    fn read(text: &str, method: &Method) -> Result<Option<Head>, Violation> {
        Parser::new(LIMITS).next(&mut Input::with(text.replace('\n', "\r\n").as_bytes()), method)
    }

    #[test]
    fn what_follows_a_head_is_as_status_method_and_fields_say() {
        for (text, method, framing, keep_alive) in [
            ("HTTP/1.1 200 OK\n\n", Method::GET, Framing::UntilClose, false),
            (
                "HTTP/1.1 200\nContent-Length: 3\n\n",
                Method::GET,
                Framing::Length(3),
                true,
            ),
            (
                "HTTP/1.1 200 \nContent-Length: 3, 3\nContent-Length: 3\n\n",
                Method::GET,
                Framing::Length(3),
                true,
            ),
            (
                "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
                Method::GET,
                Framing::Empty,
                true,
            ),
            (
                "HTTP/1.1 200 OK\nContent-Length: 3\n\n",
                Method::HEAD,
                Framing::Empty,
                true,
            ),
            (
                "HTTP/1.1 304 Not Modified\nContent-Length: 3\n\n",
                Method::GET,
                Framing::Empty,
                true,
            ),
            ("HTTP/1.1 204 No Content\n\n", Method::GET, Framing::Empty, true),
            ("HTTP/1.1 103 Early Hints\n\n", Method::GET, Framing::Empty, true),
            (
                "HTTP/1.1 101 Switching Protocols\n\n",
                Method::GET,
                Framing::Empty,
                false,
            ),
            ("HTTP/1.1 200 OK\n\n", Method::CONNECT, Framing::Empty, false),
            (
                "HTTP/1.1 407 No\nContent-Length: 2\n\n",
                Method::CONNECT,
                Framing::Length(2),
                true,
            ),
            (
                "HTTP/1.1 200 OK\nTransfer-Encoding: gzip, chunked\n\n",
                Method::GET,
                Framing::Chunked,
                true,
            ),
            (
                "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nContent-Length: 3\n\n",
                Method::GET,
                Framing::Chunked,
                true,
            ),
            (
                "HTTP/1.1 200 OK\nTransfer-Encoding: gzip\n\n",
                Method::GET,
                Framing::UntilClose,
                false,
            ),
            (
                "HTTP/1.1 200 OK\nContent-Length: 3\nConnection: Close\n\n",
                Method::GET,
                Framing::Length(3),
                false,
            ),
            (
                "HTTP/1.0 200 OK\nContent-Length: 3\n\n",
                Method::GET,
                Framing::Length(3),
                false,
            ),
            (
                "HTTP/1.0 200 OK\nContent-Length: 3\nConnection: keep-alive\n\n",
                Method::GET,
                Framing::Length(3),
                true,
            ),
        ] {
            let head = read(text, &method).unwrap().unwrap();
            assert_eq!(
                (head.framing, head.keep_alive),
                (framing, keep_alive),
                "{method} {text}"
            );
        }
    }

    #[test]
    fn what_is_no_head_or_could_be_read_in_two_ways_is_refused() {
        for (text, violation) in [
            ("HTTP/1.2 200 OK\n\n", Violation::BadVersion),
            ("HTTP/2.0 200 OK\n\n", Violation::BadStartLine),
            ("ICY 200 OK\n\n", Violation::BadStartLine),
            ("HTTP/1.1 20 OK\n\n", Violation::BadStartLine),
            ("HTTP/1.1 2000 OK\n\n", Violation::BadStartLine),
            ("HTTP/1.1 099 OK\n\n", Violation::BadStartLine),
            ("HTTP/1.1200 OK\n\n", Violation::BadStartLine),
            ("HTTP/1.1 200 O\x01K\n\n", Violation::BadStartLine),
            (
                "HTTP/1.1 200 OK\nContent-Length: 3\nContent-Length: 4\n\n",
                Violation::SeveralLengths,
            ),
            ("HTTP/1.1 200 OK\nContent-Length: -3\n\n", Violation::BadLength),
            ("HTTP/1.1 200 OK\n folded: 3\n\n", Violation::FoldedLine),
            ("HTTP/1.1 200 OK\na : 3\n\n", Violation::BadField),
            (
                "HTTP/1.0 200 OK\nTransfer-Encoding: chunked\n\n",
                Violation::BadCoding,
            ),
        ] {
            assert_eq!(read(text, &Method::GET).unwrap_err(), violation, "{text}");
        }
        for text in ["SSH-2.0-x\n", "\x15\x03\x01", "\n\nHTTP/2"] {
            // Though more may come.
            assert_eq!(
                read(text, &Method::GET).unwrap_err(),
                Violation::BadStartLine,
                "{text}"
            );
        }
        let many = format!("HTTP/1.1 200 OK\n{}\n", "a: b\n".repeat(11));
        assert_eq!(read(&many, &Method::GET).unwrap_err(), Violation::HeadTooLarge);
    }

    #[test]
    fn a_head_that_is_not_whole_waits_and_what_follows_it_stays() {
        let (mut parser, mut input) = (Parser::new(LIMITS), Input::default());
        let text = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\nServer: a\n\nbody";
        let mut heads = Vec::new();
        for byte in text.as_bytes() {
            input.buf.extend_from_slice(&[*byte]);
            if heads.len() < 2 {
                heads.extend(parser.next(&mut input, &Method::GET).unwrap());
            }
        }
        assert_eq!(heads[0].status, 100);
        assert_eq!(
            (heads[1].status, heads[1].headers["server"].as_bytes()),
            (StatusCode::OK, &b"a"[..])
        );
        assert_eq!(input.buf, "body");
    }
}
