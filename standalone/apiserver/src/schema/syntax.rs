//! What Go's decoder says of text that is no JSON: clients of Kubernetes, and people, know these sentences.
//!
//! Only asked once decoding has failed, so that it may take its time. A scanner with the states of `encoding/json`.

use std::fmt::Write as _;

const CUT_SHORT: &str = "unexpected end of JSON input";

/// The sentence, or nothing where the text is JSON.
pub(crate) fn complaint(bytes: &[u8]) -> Option<String> {
    let mut scan = Scan { bytes, at: 0 };
    scan.document().err()
}

struct Scan<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// What one is in the middle of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Open {
    Object,
    Array,
}

impl Scan<'_> {
    fn space(&mut self) {
        while self
            .bytes
            .get(self.at)
            .is_some_and(|b| matches!(b, b' ' | b'\t' | b'\r' | b'\n'))
        {
            self.at += 1;
        }
    }

    fn peek(&self) -> Result<u8, String> {
        self.bytes
            .get(self.at)
            .copied()
            .ok_or_else(|| CUT_SHORT.to_owned())
    }

    fn next(&mut self) -> Result<u8, String> {
        let byte = self.peek()?;
        self.at += 1;
        Ok(byte)
    }

    fn document(&mut self) -> Result<(), String> {
        let mut open: Vec<Open> = Vec::new();
        loop {
            self.space();
            // A value begins here.
            let begun = match self.peek()? {
                b'{' => Some(Open::Object),
                b'[' => Some(Open::Array),
                _ => None,
            };
            match begun {
                Some(kind) => {
                    self.at += 1;
                    self.space();
                    let close = if kind == Open::Object { b'}' } else { b']' };
                    if self.peek()? == close {
                        self.at += 1;
                    } else {
                        open.push(kind);
                        if kind == Open::Object {
                            self.key()?;
                        }
                        continue;
                    }
                }
                None => self.scalar()?,
            }
            // A value has ended: close what ends with it.
            loop {
                self.space();
                let Some(inner) = open.last() else {
                    return match self.bytes.get(self.at) {
                        Some(byte) => Err(invalid(*byte, "after top-level value")),
                        None => Ok(()),
                    };
                };
                match (self.next()?, inner) {
                    (b',', Open::Array) => break,
                    (b',', Open::Object) => {
                        self.space();
                        self.key()?;
                        break;
                    }
                    (b'}', Open::Object) | (b']', Open::Array) => {
                        open.pop();
                    }
                    (byte, Open::Object) => return Err(invalid(byte, "after object key:value pair")),
                    (byte, Open::Array) => return Err(invalid(byte, "after array element")),
                }
            }
        }
    }

    /// A key and its colon.
    fn key(&mut self) -> Result<(), String> {
        match self.next()? {
            b'"' => self.string()?,
            byte => return Err(invalid(byte, "looking for beginning of object key string")),
        }
        self.space();
        match self.next()? {
            b':' => Ok(()),
            byte => Err(invalid(byte, "after object key")),
        }
    }

    fn scalar(&mut self) -> Result<(), String> {
        match self.next()? {
            b'"' => self.string(),
            b't' => self.literal("true"),
            b'f' => self.literal("false"),
            b'n' => self.literal("null"),
            b'-' => match self.next()? {
                byte @ b'0'..=b'9' => self.number(byte),
                byte => Err(invalid(byte, "in numeric literal")),
            },
            byte @ b'0'..=b'9' => self.number(byte),
            byte => Err(invalid(byte, "looking for beginning of value")),
        }
    }

    fn literal(&mut self, word: &str) -> Result<(), String> {
        for expected in word.bytes().skip(1) {
            let byte = self.next()?;
            if byte != expected {
                let expected = char::from(expected);
                return Err(invalid(
                    byte,
                    &format!("in literal {word} (expecting '{expected}')"),
                ));
            }
        }
        Ok(())
    }

    fn digits(&mut self) {
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
        }
    }

    fn number(&mut self, first: u8) -> Result<(), String> {
        if first != b'0' {
            self.digits();
        }
        if self.bytes.get(self.at) == Some(&b'.') {
            self.at += 1;
            let byte = self.next()?;
            if !byte.is_ascii_digit() {
                return Err(invalid(byte, "after decimal point in numeric literal"));
            }
            self.digits();
        }
        if matches!(self.bytes.get(self.at), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek()?, b'+' | b'-') {
                self.at += 1;
            }
            let byte = self.next()?;
            if !byte.is_ascii_digit() {
                return Err(invalid(byte, "in exponent of numeric literal"));
            }
            self.digits();
        }
        Ok(())
    }

    /// What follows the opening quote.
    fn string(&mut self) -> Result<(), String> {
        loop {
            match self.next()? {
                b'"' => return Ok(()),
                b'\\' => match self.next()? {
                    b'b' | b'f' | b'n' | b'r' | b't' | b'\\' | b'/' | b'"' => {}
                    b'u' => {
                        for _ in 0..4 {
                            let byte = self.next()?;
                            if !byte.is_ascii_hexdigit() {
                                return Err(invalid(byte, "in \\u hexadecimal character escape"));
                            }
                        }
                    }
                    byte => return Err(invalid(byte, "in string escape code")),
                },
                byte if byte < 0x20 => return Err(invalid(byte, "in string literal")),
                _ => {}
            }
        }
    }
}

/// Go shows the byte as the character of that number.
fn invalid(byte: u8, context: &str) -> String {
    let mut shown = String::new();
    match byte {
        b'\'' => shown.push_str("\\'"),
        b'\\' => shown.push_str("\\\\"),
        b'\n' => shown.push_str("\\n"),
        b'\r' => shown.push_str("\\r"),
        b'\t' => shown.push_str("\\t"),
        0x07 => shown.push_str("\\a"),
        0x08 => shown.push_str("\\b"),
        0x0b => shown.push_str("\\v"),
        0x0c => shown.push_str("\\f"),
        0x00..=0x1f | 0x7f => {
            let _ = write!(shown, "\\x{byte:02x}");
        }
        0x80..=0xa0 | 0xad => {
            let _ = write!(shown, "\\u{byte:04x}");
        }
        byte => shown.push(char::from(byte)),
    }
    format!("invalid character '{shown}' {context}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_that_is_no_json_is_complained_of_in_gos_words() {
        for (text, wanted) in [
            (
                "not json",
                "invalid character 'o' in literal null (expecting 'u')",
            ),
            ("{\"a\":1}trailing", "invalid character 't' after top-level value"),
            ("{\"a\" 1}", "invalid character '1' after object key"),
            (
                "{\"a\":1 \"b\":2}",
                "invalid character '\"' after object key:value pair",
            ),
            (
                "{\"a\":1,}",
                "invalid character '}' looking for beginning of object key string",
            ),
            (
                "{a:1}",
                "invalid character 'a' looking for beginning of object key string",
            ),
            ("[1 2]", "invalid character '2' after array element"),
            ("[1,]", "invalid character ']' looking for beginning of value"),
            ("-x", "invalid character 'x' in numeric literal"),
            ("01", "invalid character '1' after top-level value"),
            (
                "1.x",
                "invalid character 'x' after decimal point in numeric literal",
            ),
            ("1ex", "invalid character 'x' in exponent of numeric literal"),
            ("\"\\x\"", "invalid character 'x' in string escape code"),
            (
                "\"\\u12g4\"",
                "invalid character 'g' in \\u hexadecimal character escape",
            ),
            ("\"a\nb\"", "invalid character '\\n' in string literal"),
            ("{\"a\":", "unexpected end of JSON input"),
            ("", "unexpected end of JSON input"),
            ("'a'", "invalid character '\\'' looking for beginning of value"),
        ] {
            assert_eq!(complaint(text.as_bytes()).as_deref(), Some(wanted), "{text}");
        }
        assert_eq!(
            complaint(&[0xff, 0xfe]).as_deref(),
            Some("invalid character 'ÿ' looking for beginning of value")
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn only_what_is_no_json_is_complained_of(text in "[\\[\\]{}:,\"0-9eE.+tfnrueals \\\\-]{0,12}") {
            prop_assert_eq!(
                complaint(text.as_bytes()).is_none(),
                serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok(),
                "{}", text
            );
        }
    }
}
