//! Answers as YAML, written as Go's library writes them: members sorted, lists not indented, texts quoted where YAML 1.1 would
//! read something else (`"12"`, `"yes"`, times), long ones folded.

use std::fmt::Write as _;

use serde_json::{Map, Value};

/// Beyond this column a text goes on in the next line.
const WIDTH: usize = 80;

pub(crate) fn text(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(members) if !members.is_empty() => object(members, 0, &mut out),
        Value::Array(items) if !items.is_empty() => list(items, 0, &mut out),
        other => {
            scalar(other, 0, 0, &mut out);
            out.push('\n');
        }
    }
    out
}

fn indent(depth: usize, out: &mut String) {
    out.extend(std::iter::repeat_n(' ', depth));
}

fn object(members: &Map<String, Value>, depth: usize, out: &mut String) {
    let mut sorted: Vec<(&String, &Value)> = members.iter().collect();
    sorted.sort_by_key(|(key, _)| *key);
    for (i, (key, value)) in sorted.into_iter().enumerate() {
        if i > 0 {
            indent(depth, out);
        }
        let start = out.len();
        // A name stands in one line.
        if key.contains('\n') || key.len() > WIDTH {
            double(key, out);
        } else {
            words(key, depth, depth, out);
        }
        out.push(':');
        let column = depth + out.len() - start + 1;
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                out.push('\n');
                indent(depth + 2, out);
                object(inner, depth + 2, out);
            }
            Value::Array(items) if !items.is_empty() => {
                out.push('\n');
                indent(depth, out);
                list(items, depth, out);
            }
            other => {
                out.push(' ');
                scalar(other, depth, column, out);
                out.push('\n');
            }
        }
    }
}

fn list(items: &[Value], depth: usize, out: &mut String) {
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            indent(depth, out);
        }
        out.push_str("- ");
        match item {
            Value::Object(inner) if !inner.is_empty() => object(inner, depth + 2, out),
            Value::Array(inner) if !inner.is_empty() => list(inner, depth + 2, out),
            other => {
                scalar(other, depth, depth + 2, out);
                out.push('\n');
            }
        }
    }
}

fn scalar(value: &Value, depth: usize, column: usize, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(yes) => out.push_str(if *yes { "true" } else { "false" }),
        Value::Number(number) => {
            let _ = write!(out, "{number}");
        }
        Value::String(text) => words(text, depth, column, out),
        Value::Array(_) => out.push_str("[]"),
        Value::Object(_) => out.push_str("{}"),
    }
}

/// A text in the form that reads back as this text.
fn words(text: &str, depth: usize, column: usize, out: &mut String) {
    if text.is_empty() || means_something_else(text) {
        return double(text, out);
    }
    if text.chars().any(|c| c.is_control() && c != '\n') {
        return double(text, out);
    }
    if text.contains('\n') {
        let block = !text.starts_with([' ', '\n']) && !text.contains(" \n") && !text.ends_with(' ');
        return if block {
            literal(text, depth, out)
        } else {
            double(text, out)
        };
    }
    if plain(text) {
        folded(text, depth, column, out);
    } else {
        out.push('\'');
        folded(&text.replace('\'', "''"), depth, column + 1, out);
        out.push('\'');
    }
}

fn folded(text: &str, depth: usize, mut column: usize, out: &mut String) {
    let mut spaces = false;
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        let breaks =
            c == ' ' && !spaces && column > WIDTH && characters.peek().is_some_and(|next| *next != ' ');
        if breaks {
            out.push('\n');
            indent(depth + 2, out);
            column = depth + 2;
        } else {
            out.push(c);
            column += 1;
        }
        spaces = c == ' ';
    }
}

fn literal(text: &str, depth: usize, out: &mut String) {
    out.push('|');
    if !text.ends_with('\n') {
        out.push('-');
    } else if text.ends_with("\n\n") || text == "\n" {
        out.push('+');
    }
    for line in text.trim_end_matches('\n').split('\n') {
        out.push('\n');
        if !line.is_empty() {
            indent(depth + 2, out);
            out.push_str(line);
        }
    }
    let trailing = text.len() - text.trim_end_matches('\n').len();
    out.extend(std::iter::repeat_n('\n', trailing.saturating_sub(1)));
}

fn double(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Whether a plain text may stand without quotes.
fn plain(text: &str) -> bool {
    let first = text.chars().next().unwrap_or(' ');
    let mut rest = text.chars();
    rest.next();
    let follows = rest.next();
    let starts = match first {
        '-' | '?' | ':' => follows.is_some_and(|c| c != ' '),
        c => !"#,[]{}&*!|>'\"%@` ".contains(c),
    };
    starts
        && !text.ends_with([' ', ':'])
        && !text.contains(": ")
        && !text.contains(" #")
        && !text.starts_with("---")
        && !text.starts_with("...")
}

/// Whether YAML 1.1 would not read these characters as a text.
fn means_something_else(text: &str) -> bool {
    const WORDS: [&str; 26] = [
        "y", "Y", "yes", "Yes", "YES", "on", "On", "ON", "n", "N", "no", "No", "NO", "off", "Off", "OFF",
        "true", "True", "TRUE", "false", "False", "FALSE", "null", "Null", "NULL", "~",
    ];
    if WORDS.contains(&text) || matches!(text, "<<" | "=") {
        return true;
    }
    let signless = text.strip_prefix(['-', '+']).unwrap_or(text);
    if matches!(signless, ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN") {
        return true;
    }
    if !signless.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return false;
    }
    let digits = signless.replace('_', "");
    let whole = |prefix: &str, radix: u32| {
        digits
            .strip_prefix(prefix)
            .is_some_and(|rest| !rest.is_empty() && rest.chars().all(|c| c.is_digit(radix)))
    };
    let number = digits.parse::<f64>().is_ok() || whole("0x", 16) || whole("0b", 2) || whole("0o", 8);
    let sexagesimal = digits.contains(':')
        && digits
            .split(':')
            .all(|part| !part.is_empty() && part.parse::<f64>().is_ok());
    // 2001-12-14, and with a time behind it.
    let bytes = signless.as_bytes();
    let date = bytes.len() >= 8
        && bytes.iter().take(4).all(u8::is_ascii_digit)
        && bytes.get(4) == Some(&b'-')
        && signless
            .chars()
            .all(|c| c.is_ascii_digit() || matches!(c, '-' | ':' | '.' | 'T' | 't' | 'Z' | 'z' | '+' | ' '));
    number || sexagesimal || date
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_reads_as_go_writes_it() {
        let object = json!({"metadata": {"resourceVersion": "12", "creationTimestamp": "2026-01-02T03:04:05Z", "name": "yes"},
            "kind": "ConfigMap", "list": [{"b": 1, "a": {}}, "x: y", []], "data": {"f": "one\ntwo\n", "e": "", "q": "it's: so"}});
        let wanted = "data:\n  e: \"\"\n  f: |\n    one\n    two\n  q: 'it''s: so'\nkind: ConfigMap\nlist:\n- a: {}\n  b: 1\n- 'x: y'\n- []\n\
            metadata:\n  creationTimestamp: \"2026-01-02T03:04:05Z\"\n  name: \"yes\"\n  resourceVersion: \"12\"\n";
        assert_eq!(text(&object), wanted);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn what_is_written_reads_back_as_the_same(
            texts in prop::collection::vec("[ -~\\n\\t]{0,100}|[0-9:.eE_+-]{1,8}|yes|null|~|0x1f|on", 1..5),
            number in any::<i64>(),
        ) {
            let value = json!({"texts": texts, "n": number, "inner": {texts[0].clone(): [texts.clone(), {"k": texts}]}});
            let written = text(&value);
            let read: Value = serde_yaml::from_str(&written)
                .map_err(|e| TestCaseError::fail(format!("{e}\n{written}")))?;
            prop_assert_eq!(read, value, "{}", written);
        }
    }
}
