//! Which bytes may be where in an HTTP/1 head, as a table: one lookup a byte, or less where eight can be looked at at once.

/// RFC 9110 section 5.6.2: names of methods and fields.
const TOKEN: u8 = 1;
/// RFC 9112 section 3.2, loosely: visible ASCII but the fragment, which never travels.
const TARGET: u8 = 2;
/// RFC 3986 section 3.2.2: unreserved characters, sub-delims without the comma, percent-encoding, and the port's colon.
const HOST: u8 = 4;

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
        if b.is_ascii_alphanumeric() || in_set(b, b".-_~:%!$&'()*+;=") {
            table[byte] |= HOST;
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
    bytes
        .iter()
        .fold(class, |all, byte| all & CLASSES[usize::from(*byte)])
        == class
}

/// A non-empty token.
pub(crate) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && all(bytes, TOKEN)
}

/// Bytes of a request target; not empty.
pub(crate) fn is_target(bytes: &[u8]) -> bool {
    // Of a word all at once: neither space nor control, DEL, the fragment's sign, or above ASCII.
    let fine = |word: u64| (below(word, 0x21) | equal(word, 0x7f) | equal(word, b'#') | word) & HIGH == 0;
    !bytes.is_empty() && in_words(bytes, TARGET, fine)
}

/// Bytes of a host with an optional port, but for the brackets of an address.
pub(crate) fn is_host(bytes: &[u8]) -> bool {
    all(bytes, HOST)
}

const ONES: u64 = u64::MAX / 255;
const HIGH: u64 = ONES << 7;

/// The high bit of some byte is set if a byte is below `bound`, which is at most 0x80, and of none otherwise.
/// (Sean Eron Anderson, Bit Twiddling Hacks, "Determine if a word has a byte less than n".)
const fn below(word: u64, bound: u8) -> u64 {
    word.wrapping_sub(ONES * bound as u64) & !word & HIGH
}

/// The same for a byte that is `value`.
const fn equal(word: u64, value: u8) -> u64 {
    below(word ^ (ONES * value as u64), 1)
}

/// Where `byte` is first. Most lines and names are short, for which a search that is made for long ones is slow to begin.
pub(crate) fn find(bytes: &[u8], byte: u8) -> Option<usize> {
    const SHORT: usize = 64;
    let (words, _) = bytes[..bytes.len().min(SHORT)].as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        // The lowest bit that is set is right: what a borrow adds is above it.
        let found = equal(u64::from_le_bytes(*word), byte);
        if found != 0 {
            return Some(index * 8 + found.trailing_zeros() as usize / 8);
        }
    }
    let searched = words.len() * 8;
    let rest = &bytes[searched..];
    let at = if rest.len() < 8 {
        rest.iter().position(|other| *other == byte)
    } else {
        memchr::memchr(byte, rest)
    };
    at.map(|at| searched + at)
}

/// Whether all bytes are of `class`: eight at a time by `fine`, and by the table where that says no or there are fewer.
fn in_words(bytes: &[u8], class: u8, fine: impl Fn(u64) -> bool) -> bool {
    let (words, rest) = bytes.as_chunks::<8>();
    words
        .iter()
        .all(|word| fine(u64::from_le_bytes(*word)) || all(word, class))
        && all(rest, class)
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
    }

    #[test]
    fn a_byte_is_found_where_it_is_first() {
        for length in 0..100 {
            // With neighbours that are nearly it.
            let mut bytes: Vec<u8> = b";\x3a\xba9".iter().copied().cycle().take(length).collect();
            bytes.retain(|byte| *byte != b':');
            assert_eq!(find(&bytes, b':'), None);
            for at in 0..bytes.len() {
                let mut bytes = bytes.clone();
                bytes[at] = b':';
                if let Some(last) = bytes.last_mut() {
                    *last = b':';
                }
                assert_eq!(find(&bytes, b':'), Some(at));
            }
        }
    }

    #[test]
    fn a_byte_is_judged_alike_alone_and_anywhere_in_a_word() {
        for byte in 0..=u8::MAX {
            for before in 0..20 {
                let mut bytes = vec![b'x'; before];
                bytes.push(byte);
                bytes.extend([b'~'; 9]);
                assert_eq!(is_target(&bytes), is_target(&[byte]), "{byte} at {before}");
                // What borrows from its neighbour in one step must not hide it.
                bytes.insert(before, 0x80);
                assert!(!is_target(&bytes), "{byte} at {before} after 0x80");
            }
        }
    }
}
