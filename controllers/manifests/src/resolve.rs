//! From text to value: which type a scalar without quotes has.
//!
//! Two dialects matter. Resources that kustomize reads follow go-yaml 3 (YAML 1.2 booleans, but octal `0644`, `0b11` and
//! `1_000` as in YAML 1.1). What kubectl reads, and the kustomization file itself, follow go-yaml 2: `yes`, `on`, `y`
//! are booleans too. Numbers are printed as Go prints them.

use std::borrow::Cow;

use base64::Engine as _;

use crate::value::{Scalar, Style, Tag};

/// A scalar as a reader sees it.
#[derive(Clone, Debug)]
pub enum Plain<'a> {
    /// `null`
    Null,
    /// A boolean.
    Bool(bool),
    /// An integer that fits 64 bits with a sign.
    Int(i64),
    /// An integer above `i64::MAX`.
    Uint(u64),
    /// Any other number.
    Float(f64),
    /// Text.
    Str(Cow<'a, str>),
}

impl PartialEq for Plain<'_> {
    /// Numbers are equal by value: `1000` and `1e3` are.
    fn eq(&self, other: &Plain<'_>) -> bool {
        use Plain::{Bool, Float, Int, Null, Str, Uint};
        match (self, other) {
            (Null, Null) => true,
            (Bool(a), Bool(b)) => a == b,
            (Str(a), Str(b)) => a == b,
            (Int(a), Int(b)) => a == b,
            (Uint(a), Uint(b)) => a == b,
            (Float(a), Float(b)) => a.to_bits() == b.to_bits() || a == b,
            (Int(a), Float(b)) | (Float(b), Int(a)) => *a as f64 == *b,
            (Uint(a), Float(b)) | (Float(b), Uint(a)) => *a as f64 == *b,
            _ => false,
        }
    }
}

/// Which booleans a plain scalar may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// go-yaml 3: `true`, `false`. Resources of kustomize.
    Kustomize,
    /// go-yaml 2: also `yes`, `no`, `on`, `off`, `y`, `n`. kubectl, and the kustomization file.
    Kubectl,
}

/// The tag of text without quotes (go-yaml 3).
pub fn tag_of(text: &str) -> Tag {
    resolve(text, Dialect::Kustomize).0
}

/// Tag and value of text without quotes.
pub(crate) fn resolve(text: &str, dialect: Dialect) -> (Tag, Plain<'_>) {
    let Some(&first) = text.as_bytes().first() else {
        return (Tag::Null, Plain::Null);
    };
    match first {
        b'y' | b'Y' | b'n' | b'N' | b't' | b'T' | b'f' | b'F' | b'o' | b'O' | b'~' => word(text, dialect),
        b'.' => match text {
            ".nan" | ".NaN" | ".NAN" => (Tag::Float, Plain::Float(f64::NAN)),
            ".inf" | ".Inf" | ".INF" => (Tag::Float, Plain::Float(f64::INFINITY)),
            _ => float(text).map_or_else(|| string(text), |f| (Tag::Float, Plain::Float(f))),
        },
        b'+' | b'-' | b'0'..=b'9' => number(text),
        _ => string(text),
    }
}

fn string(text: &str) -> (Tag, Plain<'_>) {
    (Tag::Str, Plain::Str(Cow::Borrowed(text)))
}

fn word(text: &str, dialect: Dialect) -> (Tag, Plain<'_>) {
    match text {
        "true" | "True" | "TRUE" => (Tag::Bool, Plain::Bool(true)),
        "false" | "False" | "FALSE" => (Tag::Bool, Plain::Bool(false)),
        "~" | "null" | "Null" | "NULL" => (Tag::Null, Plain::Null),
        "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" if dialect == Dialect::Kubectl => {
            (Tag::Bool, Plain::Bool(true))
        }
        "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" if dialect == Dialect::Kubectl => {
            (Tag::Bool, Plain::Bool(false))
        }
        _ => string(text),
    }
}

fn number(text: &str) -> (Tag, Plain<'_>) {
    match text {
        "+.inf" | "+.Inf" | "+.INF" => return (Tag::Float, Plain::Float(f64::INFINITY)),
        "-.inf" | "-.Inf" | "-.INF" => return (Tag::Float, Plain::Float(f64::NEG_INFINITY)),
        _ => {}
    }
    // Most of what starts with a digit is not a number: versions, dates in names, quantities. One look decides.
    if !text
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.' | b'_' | b':' | b' '))
    {
        return string(text);
    }
    if let Some(stamp) = timestamp(text) {
        return (Tag::Timestamp, Plain::Str(Cow::Owned(stamp)));
    }
    let digits: Cow<'_, str> = if text.contains('_') {
        Cow::Owned(text.replace('_', ""))
    } else {
        Cow::Borrowed(text)
    };
    if let Some(found) = integer(&digits) {
        return match found {
            Ok(i) => (Tag::Int, Plain::Int(i)),
            Err(u) => (Tag::Int, Plain::Uint(u)),
        };
    }
    match float(&digits) {
        Some(f) => (Tag::Float, Plain::Float(f)),
        None => string(text),
    }
}

/// An integer with the prefixes of Go (`0x`, `0o`, `0b`, a leading `0` for octal). `Err` holds one above `i64::MAX`.
fn integer(text: &str) -> Option<Result<i64, u64>> {
    let (negative, signed, rest) = match text.as_bytes().first()? {
        b'-' => (true, true, &text[1..]),
        b'+' => (false, true, &text[1..]),
        _ => (false, false, text),
    };
    let bytes = rest.as_bytes();
    let (radix, body) = match bytes {
        [b'0', b'x' | b'X', ..] => (16, &rest[2..]),
        [b'0', b'o' | b'O', ..] => (8, &rest[2..]),
        [b'0', b'b' | b'B', ..] => (2, &rest[2..]),
        [b'0', _, ..] => (8, &rest[1..]),
        _ => (10, rest),
    };
    if body.is_empty() || !body.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let magnitude = u64::from_str_radix(body, radix).ok()?;
    if negative {
        return if magnitude <= i64::MAX as u64 + 1 {
            Some(Ok((magnitude as i64).wrapping_neg()))
        } else {
            None
        };
    }
    match i64::try_from(magnitude) {
        Ok(i) => Some(Ok(i)),
        // Go's ParseUint takes no sign.
        Err(_) if signed => None,
        Err(_) => Some(Err(magnitude)),
    }
}

/// A decimal number, or `None` when it does not look like one or is too large for 64 bits.
fn float(text: &str) -> Option<f64> {
    let b = text.as_bytes();
    let mut i = usize::from(matches!(b.first(), Some(b'+' | b'-')));
    let whole = digits(b, i);
    i += whole;
    let mut fraction = 0;
    if b.get(i) == Some(&b'.') {
        fraction = digits(b, i + 1);
        i += 1 + fraction;
    }
    if whole == 0 && fraction == 0 {
        return None;
    }
    if matches!(b.get(i), Some(b'e' | b'E')) {
        i += 1;
        i += usize::from(matches!(b.get(i), Some(b'+' | b'-')));
        let exponent = digits(b, i);
        if exponent == 0 {
            return None;
        }
        i += exponent;
    }
    if i != b.len() {
        return None;
    }
    text.parse::<f64>().ok().filter(|f| f.is_finite())
}

fn digits(b: &[u8], from: usize) -> usize {
    b.iter().skip(from).take_while(|c| c.is_ascii_digit()).count()
}

/// Reads the date forms that go-yaml knows and returns RFC 3339, which is what JSON makes of a date.
fn timestamp(text: &str) -> Option<String> {
    let b = text.as_bytes();
    if b.len() < 8 || !b[..4].iter().all(u8::is_ascii_digit) || b[4] != b'-' {
        return None;
    }
    let mut at = 5;
    let mut part = |sep: Option<u8>| -> Option<u32> {
        let n = digits(b, at).min(2);
        if n == 0 {
            return None;
        }
        let value = text[at..at + n].parse().ok()?;
        at += n;
        if let Some(sep) = sep {
            if b.get(at) != Some(&sep) {
                return None;
            }
            at += 1;
        }
        Some(value)
    };
    let year: u32 = text[..4].parse().ok()?;
    let month = part(Some(b'-'))?;
    let day = part(None)?;
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let days = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 if leap => 29,
        2 => 28,
        _ => return None,
    };
    if day == 0 || day > days {
        return None;
    }
    if at == b.len() {
        return Some(format!("{year:04}-{month:02}-{day:02}T00:00:00Z"));
    }
    let zoned = match b[at] {
        b'T' | b't' => true,
        b' ' => false,
        _ => return None,
    };
    at += 1;
    let mut clock = |sep: Option<u8>| -> Option<u32> {
        let n = digits(b, at).min(2);
        if n == 0 {
            return None;
        }
        let value = text[at..at + n].parse().ok()?;
        at += n;
        if let Some(sep) = sep {
            if b.get(at) != Some(&sep) {
                return None;
            }
            at += 1;
        }
        Some(value)
    };
    let (hour, minute, second) = (clock(Some(b':'))?, clock(Some(b':'))?, clock(None)?);
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let mut fraction = "";
    if b.get(at) == Some(&b'.') {
        let n = digits(b, at + 1);
        if n == 0 {
            return None;
        }
        fraction = text[at + 1..at + 1 + n.min(9)].trim_end_matches('0');
        at += 1 + n;
    }
    let zone = &text[at..];
    let zone = match (zoned, zone) {
        (false, "") => "Z",
        (true, "Z") => "Z",
        (true, z) => {
            let z = z.as_bytes();
            let shape = z.len() == 6 && matches!(z[0], b'+' | b'-') && z[3] == b':';
            let digit = |i: usize| z.get(i).is_some_and(u8::is_ascii_digit);
            if !(shape && digit(1) && digit(2) && digit(4) && digit(5)) {
                return None;
            }
            if zone[1..3].parse::<u32>().ok()? > 24 || zone[4..6].parse::<u32>().ok()? > 60 {
                return None;
            }
            if &zone[1..] == "00:00" { "Z" } else { zone }
        }
        _ => return None,
    };
    let dot = if fraction.is_empty() { "" } else { "." };
    Some(format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{dot}{fraction}{zone}"
    ))
}

/// What a reader gets from a scalar once it has been written out. Fails where the written tag contradicts the text.
pub(crate) fn read(s: &Scalar) -> Result<Plain<'_>, String> {
    let quoted = s.style != Style::Plain || s.text.contains('\n');
    match s.tag {
        Tag::Str if s.style == Style::Folded => Ok(Plain::Str(refold(&s.text))),
        Tag::Str | Tag::Custom | Tag::Merge => Ok(Plain::Str(Cow::Borrowed(&s.text))),
        Tag::Unset if quoted => Ok(Plain::Str(Cow::Borrowed(&s.text))),
        Tag::Unset => Ok(resolve(&s.text, Dialect::Kustomize).1),
        Tag::Binary => {
            let compact: String = s.text.chars().filter(|c| !matches!(c, '\n' | '\r')).collect();
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(compact)
                .map_err(|_| "!!binary value contains invalid base64 data".to_owned())?;
            Ok(Plain::Str(Cow::Owned(
                String::from_utf8_lossy(&bytes).into_owned(),
            )))
        }
        Tag::Int | Tag::Float | Tag::Bool | Tag::Null | Tag::Timestamp => {
            let (found, value) = resolve(&s.text, Dialect::Kustomize);
            if found == s.tag {
                // An untagged number in quotes is text: the tag is dropped when it is written.
                return Ok(if quoted && !s.tagged {
                    Plain::Str(Cow::Borrowed(&s.text))
                } else {
                    value
                });
            }
            match (s.tag, value) {
                (Tag::Float, Plain::Int(i)) => Ok(Plain::Float(i as f64)),
                _ => Err(format!("cannot read `{}` as {}", s.text, tag_name(s.tag))),
            }
        }
    }
}

/// What is left of folded text (`>`) once kustomize has written it out and read it again. Its writer doubles the break before
/// an indented line, and none at all where the text starts with a space.
fn refold(text: &str) -> Cow<'_, str> {
    let trouble = text.starts_with([' ', '\t', '\n']) || text.contains("\n ") || text.contains("\n\t");
    let block = !text.ends_with(' ')
        && !text.contains(" \n")
        && text
            .chars()
            .all(|c| matches!(c, '\n' | '\t') || (!c.is_control() && (c as u32) < 0x1_0000));
    if !trouble || !block {
        return Cow::Borrowed(text);
    }
    let doubled = text
        .trim_start_matches('\n')
        .starts_with(|c| !matches!(c, ' ' | '\t'));
    let mut lines = String::with_capacity(text.len() + 16);
    let (mut after_break, mut indented) = (true, true);
    for c in text.chars() {
        if c == '\n' {
            if !after_break && !indented && doubled {
                lines.push('\n');
            }
            lines.push('\n');
            after_break = true;
        } else {
            if after_break {
                indented = matches!(c, ' ' | '\t');
                lines.push_str("  ");
            }
            lines.push(c);
            after_break = false;
        }
    }
    let hint = if text.starts_with([' ', '\n']) { "2" } else { "" };
    let chomp = if !text.ends_with('\n') {
        "-"
    } else if text.ends_with("\n\n") || text == "\n" {
        "+"
    } else {
        ""
    };
    crate::yaml::read_scalar(&format!(">{hint}{chomp}\n{lines}")).map_or(Cow::Borrowed(text), Cow::Owned)
}

/// What is left of text once it went through JSON into a reader of YAML: a next-line character is a line break there, and
/// other control characters are not allowed.
pub(crate) fn through_reader(text: &str) -> Result<Cow<'_, str>, String> {
    // All of these are in the two-byte range that starts with 0xC2, or 0x7F, or the end of the basic plane.
    if !text.bytes().any(|b| matches!(b, 0x7F | 0xC2 | 0xEF)) {
        return Ok(Cow::Borrowed(text));
    }
    let refused =
        |c: char| matches!(c, '\x7F' | '\u{80}'..='\u{84}' | '\u{86}'..='\u{9F}' | '\u{FFFE}' | '\u{FFFF}');
    if text.contains(refused) {
        return Err("yaml: control characters are not allowed".into());
    }
    if !text.contains('\u{85}') {
        return Ok(Cow::Borrowed(text));
    }
    let json = serde_json::Value::from(text).to_string();
    Ok(crate::yaml::read_scalar(&json).map_or(Cow::Borrowed(text), Cow::Owned))
}

/// The short name of a tag.
pub(crate) fn tag_name(tag: Tag) -> &'static str {
    match tag {
        Tag::Unset | Tag::Str => "!!str",
        Tag::Int => "!!int",
        Tag::Float => "!!float",
        Tag::Bool => "!!bool",
        Tag::Null => "!!null",
        Tag::Timestamp => "!!timestamp",
        Tag::Binary => "!!binary",
        Tag::Merge => "!!merge",
        Tag::Custom => "a custom tag",
    }
}

/// A float as a JSON number: whole numbers below 1e21 lose their point, as Go's encoder does.
pub(crate) fn float_to_json(f: f64) -> Result<serde_json::Value, String> {
    if !f.is_finite() {
        return Err(format!("unsupported value: {f}: JSON has no such number"));
    }
    if f == f.trunc() && f.abs() < 9.2e18 {
        return Ok(serde_json::Value::from(f as i64));
    }
    if f == f.trunc() && f > 0.0 && f < 1.8e19 {
        return Ok(serde_json::Value::from(f as u64));
    }
    serde_json::Number::from_f64(f)
        .map(serde_json::Value::Number)
        .ok_or_else(|| format!("unsupported value: {f}"))
}

/// A float as go-yaml writes it (`%g` with the fewest digits).
pub fn go_float(f: f64) -> String {
    if f.is_nan() {
        return ".nan".into();
    }
    if f.is_infinite() {
        return if f > 0.0 { "+.inf" } else { "-.inf" }.into();
    }
    if f == 0.0 {
        return if f.is_sign_negative() { "-0" } else { "0" }.into();
    }
    // `{:e}` gives the shortest digits that read back as the same number, which is Go's -1 precision.
    let shortest = format!("{f:e}");
    let (mantissa, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    // Go's %g with the shortest precision switches to an exponent below 1e-4 and from 1e6 on.
    if !(-4..6).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    format!("{f}")
}

/// Whether go-yaml 2 would read this text, written without quotes, as something else than this string.
pub(crate) fn needs_quotes(text: &str) -> bool {
    resolve(text, Dialect::Kubectl).0 != Tag::Str || is_base_60(text)
}

/// `12:30:45`: a number in YAML 1.1, so it is always quoted.
fn is_base_60(text: &str) -> bool {
    let b = text.as_bytes();
    let mut i = usize::from(matches!(b.first(), Some(b'+' | b'-')));
    if !b.get(i).is_some_and(u8::is_ascii_digit) {
        return false;
    }
    while b.get(i).is_some_and(|c| c.is_ascii_digit() || *c == b'_') {
        i += 1;
    }
    let mut groups = 0;
    while b.get(i) == Some(&b':') {
        let n = digits(b, i + 1);
        match n {
            1 => {}
            2 if b[i + 1] <= b'5' => {}
            _ => return false,
        }
        i += 1 + n;
        groups += 1;
    }
    if groups == 0 {
        return false;
    }
    if b.get(i) == Some(&b'.') {
        i += 1;
        while b.get(i).is_some_and(|c| c.is_ascii_digit() || *c == b'_') {
            i += 1;
        }
    }
    i == b.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_resolve_as_go_yaml_does() {
        let cases: &[(&str, Tag, &str)] = &[
            ("0644", Tag::Int, "420"),
            ("0o17", Tag::Int, "15"),
            ("0b11", Tag::Int, "3"),
            ("0x1F", Tag::Int, "31"),
            ("1_000", Tag::Int, "1000"),
            ("-0", Tag::Int, "0"),
            ("+1", Tag::Int, "1"),
            ("08", Tag::Float, "8"),
            ("1e3", Tag::Float, "1000"),
            (".5", Tag::Float, "0.5"),
            ("1.10", Tag::Float, "1.1"),
            ("18446744073709551615", Tag::Int, "18446744073709551615"),
            ("1e400", Tag::Str, "1e400"),
            ("12:30:45", Tag::Str, "12:30:45"),
            ("1.2.3", Tag::Str, "1.2.3"),
            ("0x", Tag::Str, "0x"),
            ("-", Tag::Str, "-"),
            ("100m", Tag::Str, "100m"),
            ("2020-01-01", Tag::Timestamp, "2020-01-01T00:00:00Z"),
            (
                "2020-1-2T3:4:5.120+02:00",
                Tag::Timestamp,
                "2020-01-02T03:04:05.12+02:00",
            ),
            ("2020-13-01", Tag::Str, "2020-13-01"),
            ("2020-02-30", Tag::Str, "2020-02-30"),
        ];
        for (text, tag, want) in cases {
            let (found, value) = resolve(text, Dialect::Kustomize);
            let shown = match value {
                Plain::Null => "null".into(),
                Plain::Bool(b) => b.to_string(),
                Plain::Int(i) => i.to_string(),
                Plain::Uint(u) => u.to_string(),
                Plain::Float(f) => go_float(f),
                Plain::Str(s) => s.into_owned(),
            };
            assert_eq!((found, shown.as_str()), (*tag, *want), "{text}");
        }
    }

    #[test]
    fn floats_print_as_go_prints_them() {
        for (f, want) in [
            (1e21, "1e+21"),
            (1e-7, "1e-07"),
            (0.1, "0.1"),
            (100000.0, "100000"),
            (1234567.5, "1.2345675e+06"),
            (1.5e300, "1.5e+300"),
        ] {
            assert_eq!(go_float(f), want);
        }
    }
}
