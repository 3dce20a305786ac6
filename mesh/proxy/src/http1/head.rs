//! Where heads end, however they arrive.

use super::chars::find;
use super::violation::Violation;

/// Limits of a head.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Bytes.
    pub bytes: usize,
    /// Fields.
    pub fields: usize,
}

/// Finds where a head ends, however it arrives.
#[derive(Debug)]
pub struct Finder {
    limits: HeadLimits,
    /// Whether lines must end in CR LF, or may in LF alone.
    strict: bool,
    /// Start of the line that is being searched.
    line_start: usize,
    /// Up to where it has been searched.
    searched: usize,
    /// Lines with something in them.
    lines: usize,
}

/// A head that has arrived whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Bytes, with the empty line.
    pub length: usize,
    /// Lines with something in them.
    pub lines: usize,
}

impl Finder {
    /// For heads within these limits, whose lines must end in CR LF.
    pub fn strict(limits: HeadLimits) -> Self {
        Self {
            limits,
            strict: true,
            line_start: 0,
            searched: 0,
            lines: 0,
        }
    }

    /// The same for heads whose lines may end in LF alone (RFC 9112 section 2.2).
    pub fn lenient(limits: HeadLimits) -> Self {
        Self {
            strict: false,
            ..Self::strict(limits)
        }
    }

    /// The limits.
    pub fn limits(&self) -> HeadLimits {
        self.limits
    }

    /// Where the head ends that `bytes` begin with, if it is all there. Asked again, they must begin with the same.
    pub fn find(&mut self, bytes: &[u8]) -> Result<Option<Found>, Violation> {
        while let Some(offset) = find(&bytes[self.searched..], b'\n') {
            let feed = self.searched + offset;
            if feed >= self.limits.bytes {
                return Err(Violation::HeadTooLarge);
            }
            let bare = feed == self.line_start || bytes[feed - 1] != b'\r';
            if bare && self.strict {
                return Err(Violation::BareLineFeed);
            }
            let empty = feed - self.line_start == usize::from(!bare);
            (self.line_start, self.searched) = (feed + 1, feed + 1);
            if !empty {
                self.lines += 1;
            } else if self.lines > 0 {
                let found = Found {
                    length: feed + 1,
                    lines: self.lines,
                };
                (self.line_start, self.searched, self.lines) = (0, 0, 0);
                return Ok(Some(found));
            }
            // Else an empty line before the first one, which is let pass (RFC 9112 section 2.2).
        }
        self.searched = bytes.len();
        if bytes.len() > self.limits.bytes {
            return Err(Violation::HeadTooLarge);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HeadLimits = HeadLimits { bytes: 40, fields: 3 };

    #[test]
    fn a_head_that_comes_byte_by_byte_is_found_where_its_empty_line_ends() {
        for text in [
            "GET / HTTP/1.1\r\nhost: a\r\n\r\nnext",
            "\r\n\r\nGET / HTTP/1.1\r\n\r\nnext",
        ] {
            let length = text.len() - "next".len();
            let lines = text.matches(['G', 'h']).count();
            let mut finder = Finder::strict(LIMITS);
            for end in 0..length {
                assert_eq!(finder.find(&text.as_bytes()[..end]), Ok(None), "{end}");
            }
            let found = Some(Found { length, lines });
            assert_eq!(finder.find(&text.as_bytes()[..length]), Ok(found));
            // It begins anew.
            assert_eq!(finder.find(text.as_bytes()), Ok(found));
        }
    }

    #[test]
    fn lines_that_end_in_a_bare_line_feed_are_for_the_lenient_only() {
        let text = b"HTTP/1.1 200 OK\na: b\n\nnext";
        assert_eq!(Finder::strict(LIMITS).find(text), Err(Violation::BareLineFeed));
        let found = Finder::lenient(LIMITS).find(text).unwrap().unwrap();
        assert_eq!((found.length, found.lines), (text.len() - 4, 2));
    }

    #[test]
    fn a_head_that_is_too_long_is_refused_whole_or_not() {
        for text in [
            format!("GET /{} ", "a".repeat(40)),
            format!("GET /{}\r\n\r\n", "a".repeat(36)),
        ] {
            let found = Finder::strict(LIMITS).find(text.as_bytes());
            assert_eq!(found, Err(Violation::HeadTooLarge), "{text}");
        }
    }
}
