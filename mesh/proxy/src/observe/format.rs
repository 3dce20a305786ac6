//! Envoy's format language: texts with command operators (`%REQ(X-A?:PATH):10%`), and JSON objects of such texts.
//!
//! Parsed when the configuration arrives; an operator that the proxy does not have is refused by name. A value that is
//! not there is written `-`, in JSON `null`, or left out where `omit_empty_values` says so.

mod certificates;
mod operator;

use std::fmt::Write as _;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::google::protobuf::{Struct, Value, value::Kind};

use super::record::{Record, Wants};
use crate::error::{Refusal, Within};
use crate::policy::metadata::to_json;

pub use operator::Operator;
use operator::{Datum, parse_operator};

/// Envoy's default line.
pub const DEFAULT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
    %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
    %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
    \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

/// Nesting of a JSON format at most.
const MAX_DEPTH: usize = 16;

/// A compiled format.
#[derive(Debug)]
pub enum Format {
    /// A text; ends as it is written, usually with a line feed.
    Text(Template),
    /// A JSON object, one per line.
    Json(Json, bool),
}

/// Text with operators.
#[derive(Debug)]
pub struct Template {
    pieces: Box<[Piece]>,
    omit_empty: bool,
}

/// A node of a JSON format.
#[derive(Debug)]
pub enum Json {
    /// An object, keys in order.
    Object(Box<[(Box<str>, Json)]>),
    /// A list.
    List(Box<[Json]>),
    /// One operator: its value keeps its type.
    Typed(Operator),
    /// Text with operators.
    Text(Template),
    /// A number, truth value or null as configured.
    Fixed(serde_json::Value),
}

#[derive(Debug)]
enum Piece {
    Literal(Box<str>),
    Operator(Operator),
}

impl Format {
    /// Compiles the default line.
    pub(crate) fn standard(wants: &mut Wants) -> Result<Self, Refusal> {
        Template::parse(DEFAULT, false, wants).map(Self::Text)
    }

    /// Compiles the message; an empty one is the default line.
    pub(crate) fn compile(
        from: Option<&core::SubstitutionFormatString>,
        wants: &mut Wants,
    ) -> Result<Self, Refusal> {
        use core::substitution_format_string::Format as Kind;
        let Some(from) = from else {
            return Self::standard(wants);
        };
        // The formatters that Istio names are always there; others are refused.
        for (index, formatter) in from.formatters.iter().enumerate() {
            let known = ["req_without_query", "metadata"];
            if !known.iter().any(|name| formatter.name.ends_with(name)) {
                return Err(Refusal::new(
                    format!("formatters[{index}]"),
                    format!("the formatter {:?} is not supported", formatter.name),
                ));
            }
        }
        let omit = from.omit_empty_values;
        match &from.format {
            None => Self::standard(wants),
            Some(Kind::TextFormat(text)) => Template::parse(text, omit, wants)
                .map(Self::Text)
                .within("text_format"),
            Some(Kind::TextFormatSource(source)) => {
                let bytes = crate::policy::service::data(Some(source)).within("text_format_source")?;
                let text = String::from_utf8(bytes)
                    .map_err(|_| Refusal::new("text_format_source", "is not UTF-8"))?;
                Template::parse(&text, omit, wants)
                    .map(Self::Text)
                    .within("text_format_source")
            }
            Some(Kind::JsonFormat(fields)) => Self::json(fields, omit, wants).within("json_format"),
        }
    }

    /// Compiles a JSON format.
    pub(crate) fn json(fields: &Struct, omit: bool, wants: &mut Wants) -> Result<Self, Refusal> {
        Json::object(fields, omit, wants, 0).map(|json| Self::Json(json, omit))
    }

    /// Appends the line of a request.
    pub fn write(&self, record: &Record<'_>, out: &mut String) {
        match self {
            Self::Text(template) => template.write(record, out),
            Self::Json(json, omit) => {
                json.write(record, *omit, out);
                out.push('\n');
            }
        }
    }
}

impl Json {
    fn object(from: &Struct, omit: bool, wants: &mut Wants, depth: usize) -> Result<Self, Refusal> {
        let mut keys: Vec<_> = from.fields.iter().collect();
        keys.sort_by_key(|(key, _)| *key);
        keys.into_iter()
            .map(|(key, value)| {
                Ok((
                    key.as_str().into(),
                    Self::value(value, omit, wants, depth + 1).within(key)?,
                ))
            })
            .collect::<Result<_, Refusal>>()
            .map(Self::Object)
    }

    fn value(from: &Value, omit: bool, wants: &mut Wants, depth: usize) -> Result<Self, Refusal> {
        if depth > MAX_DEPTH {
            return Err(Refusal::new("", "is nested too deeply"));
        }
        match &from.kind {
            Some(Kind::StringValue(text)) => {
                let mut template = Template::parse(text, omit, wants)?;
                if let [Piece::Operator(_)] = &*template.pieces {
                    let mut pieces = std::mem::take(&mut template.pieces).into_vec();
                    if let Some(Piece::Operator(operator)) = pieces.pop() {
                        return Ok(Self::Typed(operator));
                    }
                }
                Ok(Self::Text(template))
            }
            Some(Kind::StructValue(fields)) => Self::object(fields, omit, wants, depth),
            Some(Kind::ListValue(list)) => list
                .values
                .iter()
                .map(|value| Self::value(value, omit, wants, depth + 1))
                .collect::<Result<_, _>>()
                .map(Self::List),
            Some(Kind::NumberValue(_) | Kind::BoolValue(_) | Kind::NullValue(_)) | None => {
                Ok(Self::Fixed(to_json(from)))
            }
        }
    }

    /// Writes the node; `false` if nothing was written because there is nothing and that is to be left out.
    fn write(&self, record: &Record<'_>, omit: bool, out: &mut String) -> bool {
        match self {
            Self::Object(fields) => {
                out.push('{');
                let mut first = true;
                for (key, node) in fields {
                    let before = out.len();
                    if !first {
                        out.push(',');
                    }
                    quote(key, out);
                    out.push(':');
                    if node.write(record, omit, out) {
                        first = false;
                    } else {
                        out.truncate(before);
                    }
                }
                out.push('}');
            }
            Self::List(nodes) => {
                out.push('[');
                let mut first = true;
                for node in nodes {
                    let before = out.len();
                    if !first {
                        out.push(',');
                    }
                    if node.write(record, omit, out) {
                        first = false;
                    } else {
                        out.truncate(before);
                    }
                }
                out.push(']');
            }
            Self::Typed(operator) => match operator.value(record) {
                Datum::Absent if omit => return false,
                Datum::Absent => out.push_str("null"),
                Datum::Text(text) => quote(cut(&text, operator.limit), out),
                Datum::Number(number) => {
                    let _ = write!(out, "{number}");
                }
                Datum::Quoted(text) => quote(text, out),
                Datum::Json(value) => {
                    let _ = write!(out, "{value}");
                }
            },
            Self::Text(template) => {
                let mut text = String::new();
                template.write(record, &mut text);
                if omit && text.is_empty() {
                    return false;
                }
                quote(&text, out);
            }
            Self::Fixed(value) => {
                let _ = write!(out, "{value}");
            }
        }
        true
    }
}

/// A JSON string.
fn quote(text: &str, out: &mut String) {
    out.push('"');
    let mut plain = 0;
    for (index, byte) in text.bytes().enumerate() {
        let escape = match byte {
            b'"' => "\\\"",
            b'\\' => "\\\\",
            b'\n' => "\\n",
            b'\r' => "\\r",
            b'\t' => "\\t",
            0..0x20 => {
                out.push_str(&text[plain..index]);
                let _ = write!(out, "\\u{byte:04x}");
                plain = index + 1;
                continue;
            }
            _ => continue,
        };
        out.push_str(&text[plain..index]);
        out.push_str(escape);
        plain = index + 1;
    }
    out.push_str(&text[plain..]);
    out.push('"');
}

/// The first `limit` bytes, not within a character.
fn cut(text: &str, limit: Option<usize>) -> &str {
    match limit {
        Some(limit) if limit < text.len() => {
            let mut end = limit;
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            &text[..end]
        }
        _ => text,
    }
}

impl Template {
    /// Parses a text.
    pub(crate) fn parse(text: &str, omit_empty: bool, wants: &mut Wants) -> Result<Self, Refusal> {
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(start) = rest.find('%') {
            literal.push_str(&rest[..start]);
            rest = &rest[start + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                literal.push('%');
                rest = after;
                continue;
            }
            let (operator, after) = parse_operator(rest, wants)?;
            if !literal.is_empty() {
                pieces.push(Piece::Literal(std::mem::take(&mut literal).into()));
            }
            pieces.push(Piece::Operator(operator));
            rest = after;
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal.into()));
        }
        Ok(Self {
            pieces: pieces.into(),
            omit_empty,
        })
    }

    /// The text, where it has no operators.
    pub(crate) fn literal(&self) -> Option<&str> {
        match &*self.pieces {
            [] => Some(""),
            [Piece::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// Appends the text.
    pub fn write(&self, record: &Record<'_>, out: &mut String) {
        for piece in &self.pieces {
            match piece {
                Piece::Literal(text) => out.push_str(text),
                Piece::Operator(operator) => match operator.value(record) {
                    Datum::Absent if self.omit_empty => {}
                    Datum::Absent => out.push('-'),
                    Datum::Text(text) => out.push_str(cut(&text, operator.limit)),
                    Datum::Number(number) => {
                        let _ = write!(out, "{number}");
                    }
                    Datum::Json(serde_json::Value::String(text)) => out.push_str(cut(&text, operator.limit)),
                    Datum::Json(value) => out.push_str(cut(&value.to_string(), operator.limit)),
                    Datum::Quoted(text) => {
                        let mut quoted = String::with_capacity(text.len() + 2);
                        quote(text, &mut quoted);
                        out.push_str(cut(&quoted, operator.limit));
                    }
                },
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
