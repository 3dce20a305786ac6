//! YAML in and out.

mod map_builder;
mod parse;
mod scan;
mod scan_scalars;
mod write;

pub use parse::{ReadOptions, parse_document};
pub use write::{compare_keys, write_json, write_map, write_value};

use crate::error::{Error, Place};
use crate::limits::Limits;

/// The text of a document that is one scalar.
pub(crate) fn read_scalar(text: &str) -> Option<String> {
    let limits = Limits {
        max_file_bytes: usize::MAX,
        ..Limits::default()
    };
    let dialect = crate::resolve::Dialect::Kustomize;
    let options = ReadOptions {
        file: "",
        line_offset: 0,
        dialect,
        limits: &limits,
    };
    match parse_document(text, &options) {
        Ok(Some(crate::value::Value::Scalar(s))) => Some(s.text.into()),
        _ => None,
    }
}

/// Splits a file at its `---` lines. Each part comes with the number of lines before it.
///
/// A separator may be followed by a comment, by nothing else: `--- {a: 1}` is refused, as kustomize does.
pub fn split_documents<'a>(
    text: &'a str,
    file: &str,
    limits: &Limits,
) -> Result<Vec<(usize, &'a str)>, Error> {
    let bytes = text.as_bytes();
    let mut parts = Vec::new();
    let mut start = 0;
    let mut first_line = 0;
    let mut line = 0;
    let mut at = 0;
    while let Some(n) = bytes[at..].iter().position(|&b| b == b'\n') {
        let line_end = at + n;
        line += 1;
        at = line_end + 1;
        if !bytes[at..].starts_with(b"---") {
            continue;
        }
        // The separator needs a line end of its own; the last line of a file may be a bare `---`.
        let Some(n) = bytes[at..].iter().position(|&b| b == b'\n') else {
            continue;
        };
        let rest = text[at + 3..at + n].trim();
        if !rest.is_empty() && !rest.starts_with('#') {
            let place = Place::in_text(file, text, line + 1, 1);
            let message = format!("invalid document separator: {}", &text[at..at + n].trim());
            return Err(Error::Syntax { message, place });
        }
        parts.push((first_line, &text[start..=line_end]));
        if parts.len() > limits.max_documents {
            return Err(Error::Budget {
                budget: "documents",
                what: format!("{} documents in one file", parts.len()),
                limit: limits.max_documents,
                place: Place::in_text(file, text, line + 1, 1),
            });
        }
        at += n + 1;
        line += 1;
        start = at;
        // A separator right behind this one is text: its line break was used up by the first, as in kustomize.
        first_line = line;
    }
    if !text.is_empty() {
        parts.push((first_line, &text[start..]));
    }
    Ok(parts)
}
