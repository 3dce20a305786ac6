//! Evaluating: values, operators, functions, and the budget.

use std::borrow::Cow;
use std::cell::Cell;
use std::cmp::Ordering;

use http::HeaderName;
use regex::Regex;
use serin_xds::pb::google::protobuf as google;

use super::Attribute;
use super::functions::{Function, duration};
use super::time::{self, Part};
use crate::observe::record::Side;
use crate::policy::filter_state::FilterState;
use crate::policy::metadata::Metadata;

/// Steps of one evaluation.
const BUDGET: u32 = 10_000;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// `null`.
    Null,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// One that is never negative.
    Uint(u64),
    /// A number.
    Double(f64),
    /// A text.
    Text(Cow<'a, str>),
    /// Nanoseconds.
    Duration(i64),
    /// Nanoseconds since 1970.
    Timestamp(i64),
    /// Bytes.
    Bytes(Cow<'a, [u8]>),
    /// A list.
    List(Vec<Value<'a>>),
    /// A map that the expression has made.
    Map(Vec<(Value<'a>, Value<'a>)>),
    /// Everything that filters have said, by namespace.
    Metadata(&'a Metadata),
    /// Fields by name.
    Struct(&'a google::Struct),
    /// Objects by key, as bytes.
    State(&'a FilterState),
}

/// Where attributes come from.
pub trait Scene {
    /// An attribute, if it is there.
    fn attribute(&self, attribute: Attribute) -> Option<Value<'_>>;

    /// A header field, if it is there; `place` is where it was kept.
    fn header(&self, side: Side, name: &HeaderName, place: usize) -> Option<Cow<'_, str>>;

    /// The names of all fields of a request, where they are at hand.
    fn header_names(&self) -> Vec<&str> {
        Vec::new()
    }
}

/// A compiled part of an expression.
#[derive(Debug)]
pub(super) enum Node {
    Literal(Value<'static>),
    /// `true` asks whether it is there.
    Attribute(Attribute, bool),
    Header(Side, HeaderName, usize, bool),
    Field(Box<Node>, Box<str>, bool),
    List(Box<[Node]>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
    If(Box<[Node; 3]>),
    Matches(Box<Node>, Regex),
    Call(Function, Box<[Node]>),
    Map(Box<[(Node, Node)]>),
    /// The variable of a comprehension, by how many are further in.
    Variable(usize),
    Fold(Box<Folding>),
    /// True unless it is false; errors are not.
    NotFalse(Box<Node>),
    /// Every field of the request.
    AllHeaders,
    /// A field of the request by a name that is made; `true` asks whether it is there.
    NamedHeader(Box<Node>, bool),
    /// A part of a time or span, so many seconds east of UTC.
    Part(Part, Box<Node>, i32),
}

/// A compiled comprehension. `result` sees the accumulator, `condition` and `step` the element and then it.
#[derive(Debug)]
pub(super) struct Folding {
    pub(super) range: Node,
    pub(super) initial: Node,
    pub(super) condition: Node,
    pub(super) step: Node,
    pub(super) result: Node,
}

/// An evaluation has no value: a field is not there, types do not fit, the budget is used up.
#[derive(Clone, Copy, Debug)]
struct Failed;

type Outcome<'a> = Result<Value<'a>, Failed>;

struct Run<'s> {
    scene: &'s dyn Scene,
    left: Cell<u32>,
}

pub(super) fn holds(node: &Node, scene: &dyn Scene) -> bool {
    let run = Run {
        scene,
        left: Cell::new(BUDGET),
    };
    matches!(run.value(node, None), Ok(Value::Bool(true)))
}

/// The variables of the comprehensions around, the innermost first.
struct Variables<'e, 'a> {
    value: Outcome<'a>,
    outer: Option<&'e Variables<'e, 'a>>,
}

type Around<'e, 'a> = Option<&'e Variables<'e, 'a>>;

impl Run<'_> {
    fn spend(&self, steps: usize) -> Result<(), Failed> {
        let steps = u32::try_from(steps).unwrap_or(u32::MAX);
        // What is used up stays used up: nothing is decided after that.
        let left = self.left.get().checked_sub(steps);
        self.left.set(left.unwrap_or(0));
        left.map(drop).ok_or(Failed)
    }

    /// Lists and maps are copied where they are named.
    fn spend_on_value(&self, value: &Value<'_>) -> Result<(), Failed> {
        match value {
            Value::List(items) => self.spend(items.len() / 16),
            Value::Map(entries) => self.spend(entries.len() / 8),
            Value::Text(text) => self.spend_on(text),
            Value::Bytes(bytes) => self.spend(bytes.len() / 64),
            _ => Ok(()),
        }
    }

    /// A comprehension. An element that fails makes the accumulator fail, which a later one may make good (`exists`).
    fn fold<'a>(&'a self, fold: &'a Folding, around: Around<'_, 'a>) -> Outcome<'a> {
        let elements = match self.value(&fold.range, around)? {
            Value::List(items) => items,
            Value::Map(entries) => entries.into_iter().map(|(key, _)| key).collect(),
            Value::Struct(fields) => {
                self.spend(fields.fields.len())?;
                let mut keys: Vec<&str> = fields.fields.keys().map(String::as_str).collect();
                // In an order that does not change from one request to the next.
                keys.sort_unstable();
                keys.into_iter().map(|key| Value::Text(key.into())).collect()
            }
            Value::Metadata(metadata) => metadata
                .iter()
                .map(|(name, _)| Value::Text(name.into()))
                .collect(),
            _ => return Err(Failed),
        };
        let mut accumulated = self.value(&fold.initial, around);
        for element in elements {
            let accumulator = Variables {
                value: accumulated,
                outer: around,
            };
            let variables = Variables {
                value: Ok(element),
                outer: Some(&accumulator),
            };
            if let Value::Bool(false) = self.value(&fold.condition, Some(&variables))? {
                drop(variables);
                accumulated = accumulator.value;
                break;
            }
            accumulated = self.value(&fold.step, Some(&variables));
        }
        let accumulator = Variables {
            value: accumulated,
            outer: around,
        };
        self.value(&fold.result, Some(&accumulator))
    }

    fn spend_on(&self, text: &str) -> Result<(), Failed> {
        self.spend(text.len() / 64)
    }

    fn value<'a>(&'a self, node: &'a Node, around: Around<'_, 'a>) -> Outcome<'a> {
        self.spend(1)?;
        match node {
            Node::Literal(value) => Ok(value.clone()),
            Node::Attribute(attribute, test) => {
                let found = self.scene.attribute(*attribute);
                if *test {
                    Ok(Value::Bool(found.is_some()))
                } else {
                    found.ok_or(Failed)
                }
            }
            Node::Header(side, name, place, test) => {
                let found = self.scene.header(*side, name, *place);
                if *test {
                    Ok(Value::Bool(found.is_some()))
                } else {
                    found.map(Value::Text).ok_or(Failed)
                }
            }
            Node::Field(operand, name, test) => {
                let found = field(&self.value(operand, around)?, name);
                if *test {
                    Ok(Value::Bool(found.is_some()))
                } else {
                    found.ok_or(Failed)
                }
            }
            Node::List(items) => items
                .iter()
                .map(|item| self.value(item, around))
                .collect::<Result<_, _>>()
                .map(Value::List),
            // Either side decides alone, whatever the other one is.
            Node::And(left, right) => self.either(left, right, false, around),
            Node::Or(left, right) => self.either(left, right, true, around),
            Node::If(parts) => match self.value(&parts[0], around)? {
                Value::Bool(true) => self.value(&parts[1], around),
                Value::Bool(false) => self.value(&parts[2], around),
                _ => Err(Failed),
            },
            Node::Matches(subject, regex) => match self.value(subject, around)? {
                Value::Text(text) => {
                    self.spend_on(&text)?;
                    Ok(Value::Bool(regex.is_match(&text)))
                }
                _ => Err(Failed),
            },
            Node::Call(function, arguments) => self.call(*function, arguments, around),
            Node::Map(entries) => entries
                .iter()
                .map(|(key, value)| Ok((self.value(key, around)?, self.value(value, around)?)))
                .collect::<Result<_, _>>()
                .map(Value::Map),
            Node::Variable(place) => {
                let mut found = around;
                for _ in 0..*place {
                    found = found.and_then(|variables| variables.outer);
                }
                let value = found.ok_or(Failed)?.value.as_ref().map_err(|failed| *failed)?;
                self.spend_on_value(value)?;
                Ok(value.clone())
            }
            Node::Fold(fold) => self.fold(fold, around),
            Node::NotFalse(operand) => {
                let value = self.value(operand, around);
                Ok(Value::Bool(!matches!(value, Ok(Value::Bool(false)))))
            }
            Node::AllHeaders => {
                let names = self.scene.header_names();
                self.spend(names.len())?;
                Ok(Value::List(
                    names.into_iter().map(|name| Value::Text(name.into())).collect(),
                ))
            }
            Node::NamedHeader(name, test) => {
                let Value::Text(name) = self.value(name, around)? else {
                    return Err(Failed);
                };
                let found = match super::pseudo(&name) {
                    Some(attribute) => self.scene.attribute(attribute),
                    None => HeaderName::from_bytes(name.to_ascii_lowercase().as_bytes())
                        .ok()
                        .and_then(|name| self.scene.header(Side::Request, &name, 0))
                        .map(Value::Text),
                };
                if *test {
                    return Ok(Value::Bool(found.is_some()));
                }
                found.ok_or(Failed)
            }
            Node::Part(part, operand, east) => match self.value(operand, around)? {
                Value::Timestamp(nanos) => Ok(Value::Int(part.of_time(nanos, *east))),
                Value::Duration(nanos) => part.of_span(nanos).map(Value::Int).ok_or(Failed),
                _ => Err(Failed),
            },
        }
    }

    fn either<'a>(
        &'a self,
        left: &'a Node,
        right: &'a Node,
        decides: bool,
        around: Around<'_, 'a>,
    ) -> Outcome<'a> {
        let left = self.value(left, around);
        if matches!(left, Ok(Value::Bool(value)) if value == decides) {
            return left;
        }
        let right = self.value(right, around);
        match (left, right) {
            (_, Ok(Value::Bool(value))) if value == decides => Ok(Value::Bool(value)),
            (Ok(Value::Bool(_)), Ok(Value::Bool(value))) => Ok(Value::Bool(value)),
            _ => Err(Failed),
        }
    }

    fn call<'a>(&'a self, function: Function, arguments: &'a [Node], around: Around<'_, 'a>) -> Outcome<'a> {
        let first = self.value(arguments.first().ok_or(Failed)?, around)?;
        let Some(second) = arguments.get(1) else {
            return self.unary(function, first);
        };
        let second = self.value(second, around)?;
        if let (Value::Text(a), Value::Text(b)) = (&first, &second) {
            self.spend_on(a)?;
            self.spend_on(b)?;
        }
        let compared = |wanted: &[Ordering]| {
            compare(&first, &second)
                .map(|order| Value::Bool(wanted.contains(&order)))
                .ok_or(Failed)
        };
        match function {
            Function::Equal => Ok(Value::Bool(equal(&first, &second))),
            Function::NotEqual => Ok(Value::Bool(!equal(&first, &second))),
            Function::Less => compared(&[Ordering::Less]),
            Function::LessOrEqual => compared(&[Ordering::Less, Ordering::Equal]),
            Function::Greater => compared(&[Ordering::Greater]),
            Function::GreaterOrEqual => compared(&[Ordering::Greater, Ordering::Equal]),
            Function::In => match &second {
                Value::List(items) => {
                    self.spend(items.len())?;
                    Ok(Value::Bool(items.iter().any(|item| equal(item, &first))))
                }
                map @ (Value::Metadata(_) | Value::Struct(_) | Value::State(_)) => match &first {
                    Value::Text(name) => Ok(Value::Bool(field(map, name).is_some())),
                    _ => Err(Failed),
                },
                Value::Map(entries) => {
                    self.spend(entries.len())?;
                    Ok(Value::Bool(entries.iter().any(|(key, _)| equal(key, &first))))
                }
                _ => Err(Failed),
            },
            Function::Index => match (first, &second) {
                (Value::Map(entries), _) => {
                    self.spend(entries.len())?;
                    let found = entries.into_iter().find(|(key, _)| equal(key, &second));
                    found.map(|(_, value)| value).ok_or(Failed)
                }
                (Value::List(mut items), Value::Int(index)) => {
                    let index = usize::try_from(*index).map_err(|_| Failed)?;
                    if index < items.len() {
                        Ok(items.swap_remove(index))
                    } else {
                        Err(Failed)
                    }
                }
                (map, Value::Text(name)) => field(&map, name).ok_or(Failed),
                _ => Err(Failed),
            },
            Function::StartsWith | Function::EndsWith | Function::Contains => match (&first, &second) {
                (Value::Text(text), Value::Text(part)) => Ok(Value::Bool(match function {
                    Function::StartsWith => text.starts_with(&**part),
                    Function::EndsWith => text.ends_with(&**part),
                    _ => text.contains(&**part),
                })),
                _ => Err(Failed),
            },
            Function::Add => match (first, second) {
                (Value::List(mut all), Value::List(more)) => {
                    self.spend((all.len() + more.len()) / 16)?;
                    all.extend(more);
                    Ok(Value::List(all))
                }
                (Value::Bytes(all), Value::Bytes(more)) => {
                    self.spend((all.len() + more.len()) / 64)?;
                    Ok(Value::Bytes([all, more].concat().into()))
                }
                (first, second) => arithmetic(function, first, second),
            },
            _ => arithmetic(function, first, second),
        }
    }

    fn unary<'a>(&'a self, function: Function, value: Value<'a>) -> Outcome<'a> {
        match (function, value) {
            (Function::Not, Value::Bool(value)) => Ok(Value::Bool(!value)),
            (Function::Negate, Value::Int(value)) => value.checked_neg().map(Value::Int).ok_or(Failed),
            (Function::Negate, Value::Double(value)) => Ok(Value::Double(-value)),
            (Function::Size, Value::Text(text)) => {
                self.spend_on(&text)?;
                Ok(Value::Int(text.chars().count() as i64))
            }
            (Function::Size, Value::List(items)) => Ok(Value::Int(items.len() as i64)),
            (Function::Size, Value::Struct(fields)) => Ok(Value::Int(fields.fields.len() as i64)),
            (Function::Size, Value::Map(entries)) => Ok(Value::Int(entries.len() as i64)),
            (Function::Size, Value::Bytes(bytes)) => Ok(Value::Int(bytes.len() as i64)),
            (Function::Text, Value::Bytes(bytes)) => {
                self.spend(bytes.len() / 64)?;
                let text = String::from_utf8(bytes.into_owned()).map_err(|_| Failed)?;
                Ok(Value::Text(text.into()))
            }
            (Function::Text, Value::Timestamp(nanos)) => Ok(Value::Text(time::write_time(nanos).into())),
            (Function::Text, Value::Duration(nanos)) => Ok(Value::Text(time::write_span(nanos).into())),
            (Function::Bytes, Value::Bytes(bytes)) => Ok(Value::Bytes(bytes)),
            (Function::Bytes, Value::Text(text)) => {
                self.spend_on(&text)?;
                Ok(Value::Bytes(text.into_owned().into_bytes().into()))
            }
            (Function::Bool, Value::Bool(value)) => Ok(Value::Bool(value)),
            (Function::Bool, Value::Text(text)) => match &*text {
                "1" | "t" | "true" | "TRUE" | "True" => Ok(Value::Bool(true)),
                "0" | "f" | "false" | "FALSE" | "False" => Ok(Value::Bool(false)),
                _ => Err(Failed),
            },
            (Function::Timestamp, Value::Timestamp(nanos)) => Ok(Value::Timestamp(nanos)),
            (Function::Timestamp, Value::Text(text)) => {
                time::timestamp(&text).map(Value::Timestamp).ok_or(Failed)
            }
            (Function::Timestamp, Value::Int(seconds)) => seconds
                .checked_mul(1_000_000_000)
                .map(Value::Timestamp)
                .ok_or(Failed),
            (Function::Duration, Value::Duration(nanos)) => Ok(Value::Duration(nanos)),
            (Function::Duration, Value::Text(text)) => duration(&text).map(Value::Duration).ok_or(Failed),
            (Function::Int, Value::Timestamp(nanos)) => Ok(Value::Int(nanos.div_euclid(1_000_000_000))),
            (Function::Uint, Value::Uint(value)) => Ok(Value::Uint(value)),
            (Function::Uint, Value::Int(value)) => u64::try_from(value).map(Value::Uint).map_err(|_| Failed),
            (Function::Uint, Value::Double(value)) if (0.0..1.8e19).contains(&value) => {
                Ok(Value::Uint(value as u64))
            }
            (Function::Uint, Value::Text(text)) => text.parse().map(Value::Uint).map_err(|_| Failed),
            (Function::Text, Value::Text(text)) => Ok(Value::Text(text)),
            (Function::Text, Value::Int(value)) => Ok(Value::Text(value.to_string().into())),
            (Function::Text, Value::Uint(value)) => Ok(Value::Text(value.to_string().into())),
            (Function::Text, Value::Double(value)) => Ok(Value::Text(value.to_string().into())),
            (Function::Text, Value::Bool(value)) => Ok(Value::Text(value.to_string().into())),
            (Function::Int, Value::Int(value)) => Ok(Value::Int(value)),
            (Function::Int, Value::Uint(value)) => i64::try_from(value).map(Value::Int).map_err(|_| Failed),
            // The range of i64, exclusive of its upper end, which no double names exactly.
            (Function::Int, Value::Double(value)) if value.abs() < 9.2e18 => Ok(Value::Int(value as i64)),
            (Function::Int, Value::Text(text)) => text.parse().map(Value::Int).map_err(|_| Failed),
            (Function::Double, Value::Int(value)) => Ok(Value::Double(value as f64)),
            (Function::Double, Value::Uint(value)) => Ok(Value::Double(value as f64)),
            (Function::Double, Value::Double(value)) => Ok(Value::Double(value)),
            (Function::Double, Value::Text(text)) => text.parse().map(Value::Double).map_err(|_| Failed),
            _ => Err(Failed),
        }
    }
}

/// Whole numbers of either kind; nothing where the result is none of the kind.
macro_rules! whole {
    ($function:expr, $a:expr, $b:expr) => {
        match $function {
            Function::Add => $a.checked_add($b),
            Function::Subtract => $a.checked_sub($b),
            Function::Multiply => $a.checked_mul($b),
            Function::Divide => $a.checked_div($b),
            Function::Modulo => $a.checked_rem($b),
            _ => None,
        }
    };
}

/// What times and spans know of arithmetic.
fn sum(function: Function, a: i64, b: i64) -> Option<i64> {
    match function {
        Function::Add | Function::Subtract => whole!(function, a, b),
        _ => None,
    }
}

fn arithmetic<'a>(function: Function, first: Value<'a>, second: Value<'a>) -> Outcome<'a> {
    let checked = match (first, second) {
        (Value::Int(a), Value::Int(b)) => whole!(function, a, b).map(Value::Int),
        (Value::Uint(a), Value::Uint(b)) => whole!(function, a, b).map(Value::Uint),
        (Value::Double(a), Value::Double(b)) => match function {
            Function::Add => Some(a + b),
            Function::Subtract => Some(a - b),
            Function::Multiply => Some(a * b),
            Function::Divide => Some(a / b),
            _ => None,
        }
        .map(Value::Double),
        // The length of a text is bounded by the expression and by the request's head.
        (Value::Text(a), Value::Text(b)) if function == Function::Add => {
            Some(Value::Text((a.into_owned() + &b).into()))
        }
        (Value::Duration(a), Value::Duration(b)) => sum(function, a, b).map(Value::Duration),
        (Value::Timestamp(a), Value::Duration(b)) => sum(function, a, b).map(Value::Timestamp),
        (Value::Timestamp(a), Value::Timestamp(b)) if function == Function::Subtract => {
            a.checked_sub(b).map(Value::Duration)
        }
        _ => None,
    };
    checked.ok_or(Failed)
}

fn equal(a: &Value<'_>, b: &Value<'_>) -> bool {
    match (a, b) {
        (Value::List(a), Value::List(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        (Value::Map(a), Value::Map(b)) => {
            a.len() == b.len()
                && a.iter().all(|(key, value)| {
                    b.iter()
                        .any(|(other, own)| equal(key, other) && equal(value, own))
                })
        }
        _ => compare(a, b).map_or_else(|| a == b, Ordering::is_eq),
    }
}

/// The order of two values of a kind; numbers are of one kind.
fn compare(a: &Value<'_>, b: &Value<'_>) -> Option<Ordering> {
    let real = |value: &Value<'_>| match value {
        Value::Int(value) => Some(*value as f64),
        Value::Uint(value) => Some(*value as f64),
        Value::Double(value) => Some(*value),
        _ => None,
    };
    match (a, b) {
        (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
        (Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
        (Value::Bytes(a), Value::Bytes(b)) => Some(a.cmp(b)),
        (Value::Duration(a), Value::Duration(b)) | (Value::Timestamp(a), Value::Timestamp(b)) => {
            Some(a.cmp(b))
        }
        (Value::Int(a), Value::Int(b)) => Some(a.cmp(b)),
        (Value::Uint(a), Value::Uint(b)) => Some(a.cmp(b)),
        (Value::Int(a), Value::Uint(b)) => Some(i128::from(*a).cmp(&i128::from(*b))),
        (Value::Uint(a), Value::Int(b)) => Some(i128::from(*a).cmp(&i128::from(*b))),
        _ => real(a)?.partial_cmp(&real(b)?),
    }
}

/// A field of a map.
fn field<'a>(map: &Value<'a>, name: &str) -> Option<Value<'a>> {
    match map {
        // `metadata` and its only field stand for the same.
        Value::Metadata(metadata) if name == "filter_metadata" => Some(Value::Metadata(metadata)),
        Value::Metadata(metadata) => metadata.get(name).map(Value::Struct),
        Value::Struct(fields) => fields.fields.get(name).map(of_message),
        Value::State(state) => Some(match state.fields(name) {
            Some(fields) => Value::Struct(fields),
            None => Value::Bytes(state.get(name)?.as_bytes().into()),
        }),
        Value::Map(entries) => entries
            .iter()
            .find(|(key, _)| matches!(key, Value::Text(text) if text == name))
            .map(|(_, value)| value.clone()),
        _ => None,
    }
}

fn of_message(from: &google::Value) -> Value<'_> {
    use google::value::Kind;
    match &from.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => Value::Bool(*value),
        Some(Kind::NumberValue(value)) => Value::Double(*value),
        Some(Kind::StringValue(value)) => Value::Text(value.as_str().into()),
        Some(Kind::StructValue(fields)) => Value::Struct(fields),
        Some(Kind::ListValue(list)) => Value::List(list.values.iter().map(of_message).collect()),
    }
}
