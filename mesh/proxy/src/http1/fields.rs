//! Lines of a head, and fields from lines.

use bytes::Bytes;
use http::{HeaderName, HeaderValue};

use super::chars::find;
use super::violation::Violation;

/// The next line of `bytes` from `at`, without its end, and where the one after it begins.
pub(super) fn line(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let rest = &bytes[at..];
    let feed = find(rest, b'\n')?;
    let line = &rest[..feed];
    Some((line.strip_suffix(b"\r").unwrap_or(line), at + feed + 1))
}

/// A field line that begins at `at` of `head`: its name, and its value as a share of the head.
pub(super) fn field(head: &Bytes, at: usize, line: &[u8]) -> Result<(HeaderName, HeaderValue), Violation> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err(Violation::FoldedLine);
    }
    let colon = find(line, b':').ok_or(Violation::BadField)?;
    let name = HeaderName::from_bytes(&line[..colon]).map_err(|_| Violation::BadField)?;
    let blank = |byte: &u8| *byte == b' ' || *byte == b'\t';
    let value = &line[colon + 1..];
    let Some(first) = value.iter().position(|byte| !blank(byte)) else {
        return Ok((name, HeaderValue::from_static("")));
    };
    let last = value.iter().rposition(|byte| !blank(byte)).unwrap_or(first);
    let from = at + colon + 1;
    let value = head.slice(from + first..=from + last);
    // Visible ASCII, space, tab, and bytes above ASCII (RFC 9110 section 5.5).
    let value = HeaderValue::from_maybe_shared(value).map_err(|_| Violation::BadField)?;
    Ok((name, value))
}

/// Whether a `Connection` value names `option`.
pub(super) fn names(value: &HeaderValue, option: &[u8]) -> bool {
    let value = value.as_bytes();
    // Most values are one option.
    value.eq_ignore_ascii_case(option)
        || value
            .split(|byte| *byte == b',')
            .any(|named| named.trim_ascii().eq_ignore_ascii_case(option))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_around_a_value_are_none_of_it() {
        for (text, value) in [("a:b", "b"), ("a: \t b c \t", "b c"), ("a:", ""), ("a: \t ", "")] {
            let head = Bytes::from(format!("skip\r\n{text}\r\n"));
            let (found, next) = line(&head, 6).unwrap();
            assert_eq!((found, next), (text.as_bytes(), head.len()));
            let (name, read) = field(&head, 6, found).unwrap();
            assert_eq!((name.as_str(), read.to_str().unwrap()), ("a", value));
        }
        for text in ["a", "a b:c", ":c", "a:\x01", "a:b\x0c", "a:b\rc", "a:b\x7f"] {
            let head = Bytes::from(text);
            assert_eq!(
                field(&head, 0, &head).unwrap_err(),
                Violation::BadField,
                "{text:?}"
            );
        }
    }

    #[test]
    fn options_of_a_connection_are_found_in_a_list_and_whatever_their_case() {
        for (value, found) in [
            ("close", true),
            ("Keep-Alive, CLOSE", true),
            ("closed", false),
            ("", false),
        ] {
            assert_eq!(
                names(&HeaderValue::from_static(value), b"close"),
                found,
                "{value}"
            );
        }
    }
}
