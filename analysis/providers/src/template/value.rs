//! Pipelines to values.

use std::collections::BTreeMap;

use super::Model;
use super::parse::{Operand, Pipeline};
use crate::Error;

/// Every function that there is: Flagger's first, then those of the language.
pub(super) const FUNCTIONS: [&str; 18] = [
    "name",
    "namespace",
    "target",
    "service",
    "ingress",
    "route",
    "interval",
    "variables",
    "print",
    "printf",
    "urlquery",
    "index",
    "len",
    "eq",
    "ne",
    "and",
    "or",
    "not",
];

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Text(String),
    Integer(i64),
    Boolean(bool),
    Map(&'a BTreeMap<String, String>),
}

fn fault(reason: impl Into<String>) -> Error {
    Error::Query(reason.into())
}

impl Value<'_> {
    /// As it is printed.
    pub(super) fn text(&self) -> Result<String, Error> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::Integer(number) => Ok(number.to_string()),
            Self::Boolean(value) => Ok(value.to_string()),
            Self::Map(_) => Err(fault("variables is a map; name one of them, as in variables.x")),
        }
    }

    /// Go's truth: not empty, not zero.
    pub(super) fn is_true(&self) -> bool {
        match self {
            Self::Text(text) => !text.is_empty(),
            Self::Integer(number) => *number != 0,
            Self::Boolean(value) => *value,
            Self::Map(map) => !map.is_empty(),
        }
    }
}

pub(super) fn pipeline<'a>(pipeline: &Pipeline, model: &'a Model) -> Result<Value<'a>, Error> {
    let mut value = None;
    for command in pipeline {
        value = Some(run(command, value, model)?);
    }
    value.ok_or_else(|| fault("a command is empty"))
}

fn run<'a>(command: &[Operand], piped: Option<Value<'a>>, model: &'a Model) -> Result<Value<'a>, Error> {
    let Some((first, rest)) = command.split_first() else {
        return Err(fault("a command is empty"));
    };
    let (Operand::Name(name, fields), true) = (first, !rest.is_empty() || piped.is_some()) else {
        return operand(first, model);
    };
    if !fields.is_empty() {
        return Err(fault(format!("{name}.{} takes no arguments", fields.join("."))));
    }
    let mut arguments = rest
        .iter()
        .map(|argument| operand(argument, model))
        .collect::<Result<Vec<_>, _>>()?;
    arguments.extend(piped);
    call(name, &arguments)
}

fn operand<'a>(operand: &Operand, model: &'a Model) -> Result<Value<'a>, Error> {
    let text = |text: &String| Value::Text(text.clone());
    let (value, fields) = match operand {
        Operand::Text(value) => return Ok(text(value)),
        Operand::Integer(number) => return Ok(Value::Integer(*number)),
        Operand::Boolean(value) => return Ok(Value::Boolean(*value)),
        Operand::Nested(nested) => return pipeline(nested, model),
        Operand::Name(name, fields) => {
            let value = match name.as_str() {
                "name" => text(&model.name),
                "namespace" => text(&model.namespace),
                "target" => text(&model.target),
                "service" => text(&model.service),
                "ingress" => text(&model.ingress),
                "route" => text(&model.route),
                "interval" => text(&model.interval),
                "variables" => Value::Map(&model.variables),
                other => call(other, &[])?,
            };
            (value, fields)
        }
    };
    fields.iter().try_fold(value, |value, field| match value {
        Value::Map(map) => map.get(field).map(text).ok_or_else(|| {
            fault(format!(
                "variables.{field} is not set; set spec.analysis.metrics[].templateVariables.{field}"
            ))
        }),
        _ => Err(fault(format!("there is no field {field} here"))),
    })
}

fn call<'a>(name: &str, arguments: &[Value<'a>]) -> Result<Value<'a>, Error> {
    let few = || fault(format!("{name} needs more arguments"));
    match name {
        "print" => {
            // Go puts spaces between operands when neither is a string.
            let mut out = String::new();
            for (index, argument) in arguments.iter().enumerate() {
                let is_text = |value: &Value<'_>| matches!(value, Value::Text(_));
                if index > 0 && !is_text(argument) && !is_text(&arguments[index - 1]) {
                    out.push(' ');
                }
                out.push_str(&argument.text()?);
            }
            Ok(Value::Text(out))
        }
        "printf" => printf(arguments).map(Value::Text),
        "urlquery" => {
            let mut text = String::new();
            for argument in arguments {
                text.push_str(&argument.text()?);
            }
            Ok(Value::Text(escaped(&text)))
        }
        "index" => match arguments {
            [Value::Map(map), Value::Text(key)] => Ok(Value::Text(map.get(key).cloned().unwrap_or_default())),
            _ => Err(fault("index takes variables and a name")),
        },
        "len" => match arguments {
            [Value::Text(text)] => Ok(Value::Integer(text.len() as i64)),
            [Value::Map(map)] => Ok(Value::Integer(map.len() as i64)),
            _ => Err(fault("len takes a text or variables")),
        },
        "eq" => match arguments {
            [first, others @ ..] if !others.is_empty() => Ok(Value::Boolean(others.contains(first))),
            _ => Err(few()),
        },
        "ne" => match arguments {
            [first, second] => Ok(Value::Boolean(first != second)),
            _ => Err(few()),
        },
        "not" => match arguments {
            [value] => Ok(Value::Boolean(!value.is_true())),
            _ => Err(few()),
        },
        "and" | "or" => {
            let wanted = name == "or";
            let found = arguments.iter().find(|value| value.is_true() == wanted);
            found.or(arguments.last()).cloned().ok_or_else(few)
        }
        other => Err(fault(format!("{other} takes no arguments"))),
    }
}

fn printf(arguments: &[Value<'_>]) -> Result<String, Error> {
    let Some((Value::Text(format), rest)) = arguments.split_first() else {
        return Err(fault("printf takes a format first"));
    };
    let mut rest = rest.iter();
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let verb = chars
            .next()
            .ok_or_else(|| fault("printf: the format ends in %"))?;
        if verb == '%' {
            out.push('%');
            continue;
        }
        let argument = rest
            .next()
            .ok_or_else(|| fault("printf has fewer arguments than its format names"))?;
        match (verb, argument) {
            ('s', Value::Text(_)) | ('v', _) | ('d', Value::Integer(_)) => out.push_str(&argument.text()?),
            ('q', Value::Text(text)) => out.push_str(&format!("{text:?}")),
            (verb, _) => {
                return Err(fault(format!(
                    "printf: %{verb} is not there, or not for this argument"
                )));
            }
        }
    }
    if rest.next().is_some() {
        return Err(fault("printf has more arguments than its format names"));
    }
    Ok(out)
}

/// As Go's `url.QueryEscape`.
fn escaped(text: &str) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(byte as char),
            b' ' => out.push('+'),
            other => {
                // Writing to a String does not fail.
                let _ = write!(out, "%{other:02X}");
            }
        }
    }
    out
}
