//! Functions by name: what a call with its arguments becomes when an expression is compiled.

use regex::Regex;

use super::eval::{Node, Value};
use super::time::{self, Part};
use crate::error::Refusal;

/// A function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Not,
    Negate,
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
    In,
    Index,
    Size,
    StartsWith,
    EndsWith,
    Contains,
    Text,
    Int,
    Uint,
    Double,
    Bool,
    Bytes,
    Timestamp,
    Duration,
}

/// A call with its arguments, the target first.
pub(super) fn call(name: &str, has_target: bool, mut all: Vec<Node>) -> Result<Node, Refusal> {
    let count = all.len();
    let wrong = || {
        Refusal::new(
            "",
            format!("the function {name} with {count} arguments is not supported"),
        )
    };
    let take = |all: &mut Vec<Node>| all.pop().map(Box::new).ok_or_else(wrong);
    match (name, count) {
        ("_&&_" | "_||_", 2) => {
            let right = take(&mut all)?;
            let left = take(&mut all)?;
            return Ok(if name == "_&&_" {
                Node::And(left, right)
            } else {
                Node::Or(left, right)
            });
        }
        ("_?_:_", 3) => {
            let parts: [Node; 3] = all.try_into().map_err(|_| wrong())?;
            return Ok(Node::If(Box::new(parts)));
        }
        ("matches", 2) => {
            let pattern = match all.pop() {
                Some(Node::Literal(Value::Text(pattern))) => pattern,
                _ => return Err(Refusal::new("", "the pattern of matches() must be a literal")),
            };
            let regex = Regex::new(&pattern).map_err(|error| Refusal::new("", error.to_string()))?;
            return Ok(Node::Matches(take(&mut all)?, regex));
        }
        // Times and spans that are literals are read once.
        ("duration", 1) if !has_target => {
            if let [Node::Literal(Value::Text(text))] = &*all {
                return duration(text)
                    .map(|nanos| Node::Literal(Value::Duration(nanos)))
                    .ok_or_else(|| Refusal::new("", format!("{text:?} is no duration")));
            }
        }
        ("timestamp", 1) if !has_target => {
            if let [Node::Literal(Value::Text(text))] = &*all {
                return time::timestamp(text)
                    .map(|nanos| Node::Literal(Value::Timestamp(nanos)))
                    .ok_or_else(|| Refusal::new("", format!("{text:?} is no timestamp")));
            }
        }
        ("@not_strictly_false" | "__not_strictly_false__", 1) => {
            return take(&mut all).map(Node::NotFalse);
        }
        _ => {}
    }
    if has_target && let Some(part) = Part::find(name) {
        let east = match (count, all.get(1)) {
            (1, None) => 0,
            (2, Some(Node::Literal(Value::Text(zone)))) => time::offset(zone).ok_or_else(|| {
                Refusal::new(
                    "",
                    format!("the zone {zone:?} is not supported, only UTC and +01:00"),
                )
            })?,
            _ => return Err(wrong()),
        };
        all.truncate(1);
        return take(&mut all).map(|operand| Node::Part(part, operand, east));
    }
    let function = match (name, count) {
        ("!_", 1) => Function::Not,
        ("-_", 1) => Function::Negate,
        ("_==_", 2) => Function::Equal,
        ("_!=_", 2) => Function::NotEqual,
        ("_<_", 2) => Function::Less,
        ("_<=_", 2) => Function::LessOrEqual,
        ("_>_", 2) => Function::Greater,
        ("_>=_", 2) => Function::GreaterOrEqual,
        ("_+_", 2) => Function::Add,
        ("_-_", 2) => Function::Subtract,
        ("_*_", 2) => Function::Multiply,
        ("_/_", 2) => Function::Divide,
        ("_%_", 2) => Function::Modulo,
        ("@in" | "in" | "_in_", 2) => Function::In,
        ("_[_]", 2) => Function::Index,
        ("size", 1) => Function::Size,
        ("startsWith", 2) if has_target => Function::StartsWith,
        ("endsWith", 2) if has_target => Function::EndsWith,
        ("contains", 2) if has_target => Function::Contains,
        ("string", 1) if !has_target => Function::Text,
        ("int", 1) if !has_target => Function::Int,
        ("uint", 1) if !has_target => Function::Uint,
        ("double", 1) if !has_target => Function::Double,
        ("bool", 1) if !has_target => Function::Bool,
        ("bytes", 1) if !has_target => Function::Bytes,
        ("timestamp", 1) if !has_target => Function::Timestamp,
        ("duration", 1) if !has_target => Function::Duration,
        _ => return Err(wrong()),
    };
    Ok(Node::Call(function, all.into()))
}

/// `1h30m`, `1.5s`, `-10ms` in nanoseconds.
pub(super) fn duration(text: &str) -> Option<i64> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text),
    };
    if rest == "0" {
        return Some(0);
    }
    let mut nanos = 0.0f64;
    while !rest.is_empty() {
        let digits = rest.find(|char: char| !(char.is_ascii_digit() || char == '.'))?;
        let value: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let units = [
            ("ns", 1.0),
            ("us", 1e3),
            ("ms", 1e6),
            ("s", 1e9),
            ("m", 60e9),
            ("h", 3600e9),
        ];
        let (unit, scale) = units.iter().find(|(unit, _)| rest.starts_with(unit))?;
        nanos += value * scale;
        rest = &rest[unit.len()..];
    }
    (!text.is_empty() && nanos < i64::MAX as f64).then_some((sign * nanos) as i64)
}
