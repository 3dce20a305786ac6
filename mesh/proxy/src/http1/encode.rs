//! Heads and bodies to bytes (RFC 9112 sections 3, 4, 6 and 7).

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Request, StatusCode, Version, header};
use http_body::SizeHint;

use super::out::Out;

/// Writes one body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoder {
    /// Nothing follows the head, whatever comes.
    Empty,
    /// So many bytes are still to come.
    Length(u64),
    /// In chunks.
    Chunked,
    /// Until the connection is closed.
    UntilClose,
}

/// A body that is longer or shorter than its head has said: the message has to be broken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a body of another length than its head says")]
pub struct WrongLength;

impl Encoder {
    /// Whether nothing more is to be written.
    pub fn is_done(self) -> bool {
        matches!(self, Self::Empty | Self::Length(0))
    }

    /// Adds content. There must be room.
    pub fn data(&mut self, data: Bytes, out: &mut Out) -> Result<(), WrongLength> {
        if data.is_empty() {
            return Ok(());
        }
        match self {
            Self::Empty => {}
            Self::Length(left) => {
                *left = left.checked_sub(data.len() as u64).ok_or(WrongLength)?;
                out.piece(data, b"");
            }
            Self::Chunked => {
                hex(out.flat(), data.len());
                out.piece(data, b"\r\n");
            }
            Self::UntilClose => out.piece(data, b""),
        }
        Ok(())
    }

    /// Ends the body. There must be room.
    pub fn end(&mut self, trailers: Option<&HeaderMap>, out: &mut Out) -> Result<(), WrongLength> {
        match std::mem::replace(self, Self::Empty) {
            Self::Empty | Self::UntilClose | Self::Length(0) => {}
            Self::Length(_) => return Err(WrongLength),
            Self::Chunked => {
                let out = out.flat();
                out.extend_from_slice(b"0\r\n");
                for (name, value) in trailers.into_iter().flatten() {
                    if may_trail(name) {
                        write_field(out, name, value.as_bytes());
                    }
                }
                out.extend_from_slice(b"\r\n");
            }
        }
        Ok(())
    }
}

/// Fields that would frame, route or authenticate where nobody expects it any more (RFC 9110 section 6.5.1).
fn may_trail(name: &HeaderName) -> bool {
    !matches!(
        *name,
        header::AUTHORIZATION
            | header::CACHE_CONTROL
            | header::CONNECTION
            | header::CONTENT_ENCODING
            | header::CONTENT_LENGTH
            | header::CONTENT_RANGE
            | header::CONTENT_TYPE
            | header::HOST
            | header::MAX_FORWARDS
            | header::PROXY_AUTHORIZATION
            | header::SET_COOKIE
            | header::TE
            | header::TRAILER
            | header::TRANSFER_ENCODING
    )
}

fn write_field(out: &mut Vec<u8>, name: &HeaderName, value: &[u8]) {
    let name = name.as_str().as_bytes();
    out.reserve(name.len() + value.len() + 4);
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// A chunk's size and the end of its line.
fn hex(out: &mut Vec<u8>, size: usize) {
    let digits = (usize::BITS - size.leading_zeros()).div_ceil(4).max(1);
    for digit in (0..digits).rev() {
        out.push(b"0123456789abcdef"[(size >> (digit * 4)) & 15]);
    }
    out.extend_from_slice(b"\r\n");
}

fn decimal(out: &mut Vec<u8>, value: u64) {
    use std::io::Write as _;
    // To a Vec nothing fails to be written.
    let _ = write!(out, "{value}");
}

/// Roughly what a head takes.
fn room_for(headers: &HeaderMap) -> usize {
    256 + headers.len() * 32
}

/// The head of a request. `size` is of its body, if it has one. The fields say how the body is framed, if they say anything.
pub fn request_head<B>(out: &mut Vec<u8>, request: &Request<B>, size: Option<&SizeHint>) -> Encoder {
    out.reserve(room_for(request.headers()));
    out.extend_from_slice(request.method().as_str().as_bytes());
    out.push(b' ');
    match (request.uri().authority(), request.uri().path_and_query()) {
        (Some(authority), _) if *request.method() == Method::CONNECT => {
            out.extend_from_slice(authority.as_str().as_bytes());
        }
        (_, Some(path)) => out.extend_from_slice(path.as_str().as_bytes()),
        (_, None) => out.push(b'/'),
    }
    out.extend_from_slice(b" HTTP/1.1\r\n");
    let mut chunked = false;
    let mut length = None;
    for (name, value) in request.headers() {
        match *name {
            header::TRANSFER_ENCODING => {
                chunked = true;
                continue;
            }
            header::CONTENT_LENGTH => {
                length = value.to_str().ok().and_then(|value| value.parse().ok());
                if size.is_some() && length.is_none() {
                    continue;
                }
            }
            _ => {}
        }
        write_field(out, name, value.as_bytes());
    }
    let encoder = match (size, length) {
        (None, _) => Encoder::Empty,
        (Some(_), Some(length)) if !chunked => Encoder::Length(length),
        (Some(size), _) => match size.exact() {
            Some(length) if !chunked => {
                out.extend_from_slice(b"content-length: ");
                decimal(out, length);
                out.extend_from_slice(b"\r\n");
                Encoder::Length(length)
            }
            _ => {
                out.extend_from_slice(b"transfer-encoding: chunked\r\n");
                Encoder::Chunked
            }
        },
    };
    out.extend_from_slice(b"\r\n");
    encoder
}

/// An interim answer.
pub fn interim_head(out: &mut Vec<u8>, status: StatusCode, headers: &HeaderMap) {
    status_line(out, status, false);
    for (name, value) in headers {
        write_field(out, name, value.as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

fn status_line(out: &mut Vec<u8>, status: StatusCode, http_10: bool) {
    out.extend_from_slice(if http_10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
    out.extend_from_slice(status.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(status.canonical_reason().unwrap_or("Unknown").as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Whom a response answers.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Whether it was asked for the head only.
    pub head: bool,
    /// Whether it was asked for a tunnel by CONNECT.
    pub connect: bool,
    /// The client's version.
    pub version: Version,
    /// Whether another request may follow.
    pub keep_alive: bool,
}

/// How a response goes on after its head.
#[derive(Clone, Copy, Debug)]
pub struct Begun {
    /// For its body.
    pub encoder: Encoder,
    /// Whether another request may follow.
    pub keep_alive: bool,
}

/// The head of a response. `size` is of its body, if it has one.
pub fn response_head(
    out: &mut Vec<u8>,
    status: StatusCode,
    headers: &HeaderMap,
    size: Option<&SizeHint>,
    asked: Asked,
    date: &[u8],
) -> Begun {
    out.reserve(room_for(headers));
    let http_10 = asked.version == Version::HTTP_10;
    status_line(out, status, http_10);
    let tunnel = status == StatusCode::SWITCHING_PROTOCOLS || (asked.connect && status.is_success());
    let bodiless = status.is_informational()
        || tunnel
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    // A length says something where there is content, or would be (RFC 9110 section 8.6).
    let may_tell_length = !bodiless && (asked.head || size.is_some());
    let mut keep_alive = asked.keep_alive;
    let mut dated = false;
    let mut length = None;
    for (name, value) in headers {
        match *name {
            header::CONTENT_LENGTH => {
                if !may_tell_length || length.is_some() {
                    continue;
                }
                length = value.to_str().ok().and_then(|value| value.parse().ok());
                if length.is_none() {
                    continue;
                }
            }
            header::TRANSFER_ENCODING => continue,
            header::CONNECTION => keep_alive &= !super::fields::names(value, b"close"),
            header::DATE => dated = true,
            header::TRAILER if http_10 || bodiless || asked.head => continue,
            _ => {}
        }
        write_field(out, name, value.as_bytes());
    }
    let encoder = if bodiless {
        Encoder::Empty
    } else if asked.head {
        if length.is_none()
            && let Some(size) = size
        {
            frame(out, size, http_10, true);
        }
        Encoder::Empty
    } else {
        match (length, size) {
            (Some(length), _) => Encoder::Length(length),
            (None, None) => {
                out.extend_from_slice(b"content-length: 0\r\n");
                Encoder::Empty
            }
            (None, Some(size)) => frame(out, size, http_10, false),
        }
    };
    keep_alive &= encoder != Encoder::UntilClose && !tunnel;
    if !tunnel && keep_alive == http_10 && !headers.contains_key(header::CONNECTION) {
        let option: &[u8] = if keep_alive { b"keep-alive" } else { b"close" };
        out.extend_from_slice(b"connection: ");
        out.extend_from_slice(option);
        out.extend_from_slice(b"\r\n");
    }
    if !dated && !status.is_informational() {
        out.extend_from_slice(b"date: ");
        out.extend_from_slice(date);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
    Begun { encoder, keep_alive }
}

/// Says how long a body is, about which the fields say nothing.
fn frame(out: &mut Vec<u8>, size: &SizeHint, http_10: bool, head_only: bool) -> Encoder {
    match size.exact() {
        Some(0) if head_only => Encoder::Empty,
        Some(length) => {
            out.extend_from_slice(b"content-length: ");
            decimal(out, length);
            out.extend_from_slice(b"\r\n");
            Encoder::Length(length)
        }
        None if http_10 || head_only => Encoder::UntilClose,
        None => {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
            Encoder::Chunked
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const ASKED: Asked = Asked {
        head: false,
        connect: false,
        version: Version::HTTP_11,
        keep_alive: true,
    };

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    /// The fields of a response's head but its date, and how it goes on.
    fn response(
        status: u16,
        fields: &[(&'static str, &'static str)],
        size: Option<SizeHint>,
        asked: Asked,
    ) -> (String, Begun) {
        let mut out = Vec::new();
        let status = StatusCode::from_u16(status).unwrap();
        let begun = response_head(&mut out, status, &headers(fields), size.as_ref(), asked, b"now");
        let text = String::from_utf8(out).unwrap().replace("date: now\r\n", "");
        (text.replace("\r\n", "|"), begun)
    }

    #[test]
    fn a_response_is_framed_as_its_client_can_read_it() {
        let unknown = || Some(SizeHint::default());
        let three = || Some(SizeHint::with_exact(3));
        let old = Asked {
            version: Version::HTTP_10,
            ..ASKED
        };
        let head = Asked { head: true, ..ASKED };
        let last = Asked {
            keep_alive: false,
            ..ASKED
        };
        let connect = Asked {
            connect: true,
            ..ASKED
        };
        for (status, fields, size, asked, text, encoder, keep_alive) in [
            (
                200,
                &[][..],
                None,
                ASKED,
                "HTTP/1.1 200 OK|content-length: 0||",
                Encoder::Empty,
                true,
            ),
            (
                200,
                &[],
                three(),
                ASKED,
                "HTTP/1.1 200 OK|content-length: 3||",
                Encoder::Length(3),
                true,
            ),
            (
                200,
                &[("content-length", "4")],
                unknown(),
                ASKED,
                "HTTP/1.1 200 OK|content-length: 4||",
                Encoder::Length(4),
                true,
            ),
            (
                200,
                &[],
                unknown(),
                ASKED,
                "HTTP/1.1 200 OK|transfer-encoding: chunked||",
                Encoder::Chunked,
                true,
            ),
            (
                200,
                &[],
                None,
                last,
                "HTTP/1.1 200 OK|content-length: 0|connection: close||",
                Encoder::Empty,
                false,
            ),
            (
                200,
                &[],
                unknown(),
                old,
                "HTTP/1.0 200 OK||",
                Encoder::UntilClose,
                false,
            ),
            (
                200,
                &[],
                three(),
                old,
                "HTTP/1.0 200 OK|content-length: 3|connection: keep-alive||",
                Encoder::Length(3),
                true,
            ),
            (
                200,
                &[("connection", "close")],
                three(),
                ASKED,
                "HTTP/1.1 200 OK|connection: close|content-length: 3||",
                Encoder::Length(3),
                false,
            ),
            (
                200,
                &[("content-length", "4")],
                None,
                head,
                "HTTP/1.1 200 OK|content-length: 4||",
                Encoder::Empty,
                true,
            ),
            (200, &[], None, head, "HTTP/1.1 200 OK||", Encoder::Empty, true),
            (
                204,
                &[("content-length", "0")],
                None,
                ASKED,
                "HTTP/1.1 204 No Content||",
                Encoder::Empty,
                true,
            ),
            (
                304,
                &[("content-length", "4")],
                None,
                ASKED,
                "HTTP/1.1 304 Not Modified||",
                Encoder::Empty,
                true,
            ),
            (
                200,
                &[],
                None,
                connect,
                "HTTP/1.1 200 OK||",
                Encoder::Empty,
                false,
            ),
            (
                101,
                &[("upgrade", "x")],
                None,
                ASKED,
                "HTTP/1.1 101 Switching Protocols|upgrade: x||",
                Encoder::Empty,
                false,
            ),
            (
                299,
                &[("content-length", "9")],
                None,
                ASKED,
                "HTTP/1.1 299 Unknown|content-length: 0||",
                Encoder::Empty,
                true,
            ),
        ] {
            let (found, begun) = response(status, fields, size, asked);
            assert_eq!(
                (&*found, begun.encoder, begun.keep_alive),
                (text, encoder, keep_alive),
                "{status} {fields:?}"
            );
        }
    }

    #[test]
    fn a_request_is_framed_by_its_fields_or_else_by_what_is_known_of_its_body() {
        let (unknown, three) = (SizeHint::default(), SizeHint::with_exact(3));
        for (fields, size, text, encoder) in [
            (&[][..], None, "POST /a?b HTTP/1.1||", Encoder::Empty),
            (
                &[],
                Some(&three),
                "POST /a?b HTTP/1.1|content-length: 3||",
                Encoder::Length(3),
            ),
            (
                &[("content-length", "4")],
                Some(&unknown),
                "POST /a?b HTTP/1.1|content-length: 4||",
                Encoder::Length(4),
            ),
            (
                &[("transfer-encoding", "chunked")],
                Some(&unknown),
                "POST /a?b HTTP/1.1|transfer-encoding: chunked||",
                Encoder::Chunked,
            ),
            (
                &[],
                Some(&unknown),
                "POST /a?b HTTP/1.1|transfer-encoding: chunked||",
                Encoder::Chunked,
            ),
        ] {
            let mut request = Request::post("/a?b").body(()).unwrap();
            *request.headers_mut() = headers(fields);
            let mut out = Vec::new();
            let found = request_head(&mut out, &request, size);
            assert_eq!(
                (String::from_utf8(out).unwrap().replace("\r\n", "|"), found),
                (text.to_owned(), encoder)
            );
        }
        let request = Request::builder().method("CONNECT").uri("a:80").body(()).unwrap();
        let mut out = Vec::new();
        request_head(&mut out, &request, None);
        assert_eq!(out, b"CONNECT a:80 HTTP/1.1\r\n\r\n");
    }

    #[test]
    fn bodies_are_written_as_they_were_begun_and_one_of_another_length_is_broken_off() {
        let write = |mut encoder: Encoder, pieces: &[&'static str], trailers: Option<&HeaderMap>| {
            let mut out = Out::default();
            for piece in pieces {
                encoder.data(Bytes::from_static(piece.as_bytes()), &mut out)?;
            }
            encoder.end(trailers, &mut out)?;
            Ok(String::from_utf8(out.flat().clone())
                .unwrap()
                .replace("\r\n", "|"))
        };
        let sum = headers(&[("x-sum", "7"), ("host", "a")]);
        let long = "x".repeat(300);
        let long: &'static str = Box::leak(long.into_boxed_str());
        for (encoder, pieces, text) in [
            (
                Encoder::Chunked,
                &["abc", "", "de"][..],
                "3|abc|2|de|0|x-sum: 7||".to_owned(),
            ),
            (Encoder::Chunked, &[long], format!("12c|{long}|0|x-sum: 7||")),
            (Encoder::Length(5), &["abc", "de"], "abcde".to_owned()),
            (Encoder::UntilClose, &["abc", "de"], "abcde".to_owned()),
            (Encoder::Empty, &["abc"], String::new()),
        ] {
            assert_eq!(write(encoder, pieces, Some(&sum)), Ok(text));
        }
        assert_eq!(write(Encoder::Length(4), &["abc", "de"], None), Err(WrongLength));
        assert_eq!(write(Encoder::Length(4), &["abc"], None), Err(WrongLength));
    }
}
