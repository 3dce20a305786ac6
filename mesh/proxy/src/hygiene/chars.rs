//! Which bytes may be where in an HTTP/1 head, as tables: one lookup a byte.

/// RFC 9110 section 5.6.2: names of methods and fields.
const TOKEN: u8 = 1;
/// RFC 9112 section 3.2, loosely: visible ASCII but the fragment, which never travels.
const TARGET: u8 = 2;
/// RFC 9110 section 5.5: visible ASCII, space, tab, and bytes above ASCII.
const VALUE: u8 = 4;

static CLASSES: [u8; 256] = classes();

const fn classes() -> [u8; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let b = byte as u8;
        if b.is_ascii_alphanumeric() || in_set(b, b"!#$%&'*+-.^_`|~") {
            table[byte] |= TOKEN;
        }
        if b.is_ascii_graphic() && b != b'#' {
            table[byte] |= TARGET;
        }
        if b.is_ascii_graphic() || b == b' ' || b == b'\t' || b >= 0x80 {
            table[byte] |= VALUE;
        }
        byte += 1;
    }
    table
}

const fn in_set(byte: u8, set: &[u8]) -> bool {
    let mut index = 0;
    while index < set.len() {
        if set[index] == byte {
            return true;
        }
        index += 1;
    }
    false
}

fn all(bytes: &[u8], class: u8) -> bool {
    // Without a way out of the loop, so that it is unrolled.
    bytes.iter().fold(class, |all, byte| all & CLASSES[usize::from(*byte)]) == class
}

/// A non-empty token.
pub(super) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && all(bytes, TOKEN)
}

/// Bytes of a request target; not empty.
pub(super) fn is_target(bytes: &[u8]) -> bool {
    !bytes.is_empty() && all(bytes, TARGET)
}

/// Bytes of a field value.
pub(super) fn is_value(bytes: &[u8]) -> bool {
    all(bytes, VALUE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_is_where_the_grammar_puts_it() {
        assert!(is_token(b"X-Custom_1!#$%&'*+.^`|~") && !is_token(b""));
        for byte in *b"()<>@,;:\\\"/[]?={} \t\0\x7f\x80" {
            assert!(!is_token(&[b'a', byte]), "{byte}");
        }
        assert!(is_target(b"/a?b=%20&c") && is_target(b"http://[::1]:80/") && !is_target(b"/a#b"));
        for byte in [0, 9, 10, 13, b' ', 0x7f, 0x80, 0xff] {
            assert!(!is_target(&[b'/', byte]), "{byte}");
        }
        assert!(is_value(b"") && is_value("ü \t~".as_bytes()));
        for byte in (0..9).chain(10..0x20).chain([0x7f]) {
            assert!(!is_value(&[b'a', byte]), "{byte}");
        }
    }
}
