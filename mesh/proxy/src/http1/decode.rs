//! Bodies from bytes (RFC 9112 sections 6 and 7).

use bytes::{Buf as _, Bytes, BytesMut};
use http::HeaderMap;
use http_body::SizeHint;

use super::extension::Extension;
use super::fields::{field, line};
use super::input::Input;
use super::violation::Violation;

/// Longest chunk-size line with its extensions, bytes.
const MAX_CHUNK_LINE: usize = 256;
/// Longest trailer section, bytes.
const MAX_TRAILERS: usize = 8 * 1024;

/// How long a body is, as its head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    Empty,
    /// So many bytes.
    Length(u64),
    /// In chunks.
    Chunked,
    /// Until the connection is closed.
    UntilClose,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Length(u64),
    Chunk(Chunk),
    UntilClose,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    Size {
        value: u64,
        digits: u8,
    },
    Extension {
        value: u64,
        length: usize,
        at: Extension,
    },
    SizeLf {
        value: u64,
    },
    Data(u64),
    DataCr,
    DataLf,
    /// `searched` bytes of the section hold no end.
    Trailers {
        searched: usize,
    },
}

/// What was found.
#[derive(Debug)]
pub enum Decoded {
    /// Content.
    Data(Bytes),
    /// Fields behind the content, which is over.
    Trailers(HeaderMap),
    /// The end.
    End,
    /// Nothing more: the rest has not come.
    More,
}

/// Takes one body out of what was read.
#[derive(Debug)]
pub struct Decoder {
    state: State,
}

impl Decoder {
    /// For a body of that length.
    pub fn new(framing: Framing) -> Self {
        Self {
            state: match framing {
                Framing::Empty | Framing::Length(0) => State::Done,
                Framing::Length(length) => State::Length(length),
                Framing::Chunked => State::Chunk(Chunk::Size { value: 0, digits: 0 }),
                Framing::UntilClose => State::UntilClose,
            },
        }
    }

    /// Whether all of it has been taken.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// How much there is still to come.
    pub fn size_hint(&self) -> SizeHint {
        match self.state {
            State::Length(left) => SizeHint::with_exact(left),
            State::Done => SizeHint::with_exact(0),
            State::Chunk(_) | State::UntilClose => SizeHint::default(),
        }
    }

    /// The connection was closed: whether that is the body's end.
    pub fn close(&mut self) -> bool {
        if self.state == State::UntilClose {
            self.state = State::Done;
        }
        self.is_done()
    }

    /// Takes the next piece, and of what follows the body nothing.
    pub fn decode(&mut self, input: &mut Input) -> Result<Decoded, Violation> {
        loop {
            let chunk = match self.state {
                State::Done => return Ok(Decoded::End),
                _ if input.buf.is_empty() => return Ok(Decoded::More),
                State::UntilClose => return Ok(Decoded::Data(input.take(input.buf.len()))),
                State::Length(left) => {
                    let taken = take(input, left);
                    let left = left - taken.len() as u64;
                    self.state = if left == 0 {
                        State::Done
                    } else {
                        State::Length(left)
                    };
                    return Ok(Decoded::Data(taken));
                }
                State::Chunk(chunk) => chunk,
            };
            match chunk {
                Chunk::Data(left) => {
                    let taken = take(input, left);
                    let left = left - taken.len() as u64;
                    self.state = State::Chunk(if left == 0 {
                        Chunk::DataCr
                    } else {
                        Chunk::Data(left)
                    });
                    return Ok(Decoded::Data(taken));
                }
                Chunk::Trailers { searched } => return self.trailers(input, searched),
                chunk => {
                    let next = step(chunk, input.buf[0])?;
                    input.buf.advance(1);
                    self.state = State::Chunk(next);
                }
            }
        }
    }

    /// What stands behind the last chunk, up to the empty line.
    fn trailers(&mut self, input: &mut Input, searched: usize) -> Result<Decoded, Violation> {
        let Some(length) = trailers_end(&input.buf, searched)? else {
            if input.buf.len() > MAX_TRAILERS {
                return Err(Violation::HeadTooLarge);
            }
            // The last line may go on.
            let searched = memchr::memrchr(b'\n', &input.buf).map_or(0, |feed| feed + 1);
            self.state = State::Chunk(Chunk::Trailers { searched });
            return Ok(Decoded::More);
        };
        self.state = State::Done;
        let section = input.take(length);
        if length == 2 {
            return Ok(Decoded::End);
        }
        let mut trailers = HeaderMap::new();
        let mut at = 0;
        while let Some((text, next)) = line(&section, at)
            && !text.is_empty()
        {
            let (name, value) = field(&section, at, text)?;
            trailers.append(name, value);
            at = next;
        }
        Ok(Decoded::Trailers(trailers))
    }
}

/// Up to `most` bytes.
fn take(input: &mut Input, most: u64) -> Bytes {
    let length = usize::try_from(most).unwrap_or(usize::MAX).min(input.buf.len());
    input.take(length)
}

/// Where the section ends, with its empty line. `from` is the beginning of a line.
fn trailers_end(bytes: &BytesMut, from: usize) -> Result<Option<usize>, Violation> {
    let mut start = from;
    while let Some(offset) = memchr::memchr(b'\n', &bytes[start..]) {
        let feed = start + offset;
        if feed >= MAX_TRAILERS {
            return Err(Violation::HeadTooLarge);
        }
        if feed == start || bytes[feed - 1] != b'\r' {
            return Err(Violation::BadChunk);
        }
        if feed - start == 1 {
            return Ok(Some(feed + 1));
        }
        start = feed + 1;
    }
    Ok(None)
}

/// What follows after a byte of the framing.
fn step(chunk: Chunk, byte: u8) -> Result<Chunk, Violation> {
    Ok(match chunk {
        Chunk::Size { value, digits } => match byte {
            b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F' if digits < 15 => {
                let digit = (byte as char).to_digit(16).unwrap_or(0);
                Chunk::Size {
                    value: value * 16 + u64::from(digit),
                    digits: digits + 1,
                }
            }
            b'\r' if digits > 0 => Chunk::SizeLf { value },
            b';' if digits > 0 => Chunk::Extension {
                value,
                length: 0,
                at: Extension::NameStart,
            },
            _ => return Err(Violation::BadChunk),
        },
        Chunk::Extension { value, at, .. } if byte == b'\r' && at.may_end() => Chunk::SizeLf { value },
        Chunk::Extension { value, length, at } => match at.next(byte) {
            Some(at) if length < MAX_CHUNK_LINE => Chunk::Extension {
                value,
                length: length + 1,
                at,
            },
            _ => return Err(Violation::BadChunk),
        },
        Chunk::SizeLf { value } => match (byte, value) {
            (b'\n', 0) => Chunk::Trailers { searched: 0 },
            (b'\n', value) => Chunk::Data(value),
            _ => return Err(Violation::BadChunk),
        },
        Chunk::DataCr if byte == b'\r' => Chunk::DataLf,
        Chunk::DataLf if byte == b'\n' => Chunk::Size { value: 0, digits: 0 },
        Chunk::DataCr | Chunk::DataLf => return Err(Violation::BadChunk),
        // Taken as a whole.
        Chunk::Data(_) | Chunk::Trailers { .. } => chunk,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Content, trailers and what is left, of bytes that come in pieces.
    fn decode(
        framing: Framing,
        pieces: &[&[u8]],
    ) -> Result<(Vec<u8>, Option<HeaderMap>, Vec<u8>, bool), Violation> {
        let (mut decoder, mut input) = (Decoder::new(framing), Input::default());
        let (mut content, mut trailers) = (Vec::new(), None);
        for piece in pieces {
            input.buf.extend_from_slice(piece);
            loop {
                match decoder.decode(&mut input)? {
                    Decoded::Data(data) => content.extend_from_slice(&data),
                    Decoded::Trailers(found) => trailers = Some(found),
                    Decoded::End | Decoded::More => break,
                }
            }
        }
        Ok((content, trailers, input.buf.to_vec(), decoder.is_done()))
    }

    #[test]
    fn each_framing_ends_where_it_says_and_leaves_what_follows() {
        for (framing, bytes, content, rest) in [
            (Framing::Empty, "next", "", "next"),
            (Framing::Length(3), "abcnext", "abc", "next"),
            (Framing::Chunked, "3;x=1\r\nabc\r\n0\r\n\r\nnext", "abc", "next"),
            (
                Framing::Chunked,
                "3\r\nabc\r\n0\r\nt: v\r\nu: w\r\n\r\nnext",
                "abc",
                "next",
            ),
        ] {
            let whole = decode(framing, &[bytes.as_bytes()]).unwrap();
            assert_eq!(
                (&*whole.0, &*whole.2, whole.3),
                (content.as_bytes(), rest.as_bytes(), true)
            );
            let one_by_one: Vec<_> = bytes.as_bytes().chunks(1).collect();
            assert_eq!(decode(framing, &one_by_one).unwrap(), whole);
            assert_eq!(whole.1.is_some(), bytes.contains("t: v"), "{bytes}");
        }
        let mut until_close = Decoder::new(Framing::UntilClose);
        assert!(!until_close.is_done() && until_close.close() && until_close.is_done());
        assert!(!Decoder::new(Framing::Length(1)).close());
    }

    #[test]
    fn loose_chunk_framing_is_refused() {
        for bytes in [
            "\r\n",
            "x\r\n",
            " 3\r\n",
            "3 \r\n",
            "3\n",
            "+3\r\n",
            "0x3\r\n",
            "3\r\nabcd\r\n",
            "3\r\nabc\n",
            "3\r\nabc\rX",
            "1234567890abcdef\r\n",
            "3;\r\nabc",
            "3;a=\"\r\n",
            "0\r\nt: v\n\r\n",
            "0\r\n\n",
            "0\r\nno field\r\n\r\n",
            "0\r\n t: v\r\n\r\n",
            "0\r\nt : v\r\n\r\n",
        ] {
            assert!(
                decode(Framing::Chunked, &[bytes.as_bytes()]).is_err(),
                "{bytes:?}"
            );
        }
        let long = format!("0\r\nt: {}", "v".repeat(MAX_TRAILERS));
        assert_eq!(
            decode(Framing::Chunked, &[long.as_bytes()]).unwrap_err(),
            Violation::HeadTooLarge
        );
        let long = format!("3;{}", "v".repeat(MAX_CHUNK_LINE + 1));
        assert_eq!(
            decode(Framing::Chunked, &[long.as_bytes()]).unwrap_err(),
            Violation::BadChunk
        );
    }

    proptest! {
        /// However bytes are cut, the same is found.
        #[test]
        fn what_is_found_does_not_hang_on_how_bytes_arrive(
            text in "([0-9a-f]{1,2}(;[a-z=\"]{0,5})?\r\n[a-z]{0,20}(\r\n)?){0,4}0\r\n(t: v\r\n)?\r\n[a-z]{0,5}",
            cuts in proptest::collection::vec(0usize..200, 0..6),
        ) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let pieces: Vec<_> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(decode(Framing::Chunked, &pieces), decode(Framing::Chunked, &[bytes]));
        }
    }
}
