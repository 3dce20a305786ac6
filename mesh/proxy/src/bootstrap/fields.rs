//! Reading documents in protobuf's JSON mapping, strictly: each field is taken by name, and what nobody took is refused
//! with its path.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};
use serin_xds::pb::google::protobuf as google;

use crate::error::{Refusal, Within};

/// An object whose fields are being taken.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    taken: RefCell<BTreeSet<String>>,
}

/// `connect_timeout` and `connectTimeout` are the same field.
fn camel(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut up = false;
    for char in name.chars() {
        if char == '_' {
            up = true;
        } else {
            out.push(if up { char.to_ascii_uppercase() } else { char });
            up = false;
        }
    }
    out
}

fn wrong(name: &str, wanted: &str) -> Refusal {
    Refusal::new(name, format!("is not {wanted}"))
}

impl<'a> Fields<'a> {
    /// The fields of `value`.
    pub(super) fn of(value: &'a Value) -> Result<Self, Refusal> {
        match value {
            Value::Object(map) => Ok(Self {
                map,
                taken: RefCell::default(),
            }),
            _ => Err(Refusal::new("", "is not an object")),
        }
    }

    /// A field, if it is there.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        let mut taken = self.taken.borrow_mut();
        for key in [name.to_owned(), camel(name)] {
            if let Some(value) = self.map.get(&key) {
                taken.insert(key);
                return Some(value).filter(|value| !value.is_null());
            }
        }
        None
    }

    /// Refuses what nobody took.
    pub(super) fn end(self) -> Result<(), Refusal> {
        let taken = self.taken.into_inner();
        match self.map.keys().find(|key| !taken.contains(*key)) {
            Some(key) => Err(Refusal::new(
                key.as_str(),
                "is not a field that this proxy knows here",
            )),
            None => Ok(()),
        }
    }

    /// A message read by `read`.
    pub(super) fn message<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Fields<'a>) -> Result<T, Refusal>,
    ) -> Result<Option<T>, Refusal> {
        self.get(name)
            .map(|value| object(value, read).within(name))
            .transpose()
    }

    /// A list of messages.
    pub(super) fn list<T>(
        &self,
        name: &str,
        mut read: impl FnMut(&Fields<'a>) -> Result<T, Refusal>,
    ) -> Result<Vec<T>, Refusal> {
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .enumerate()
                .map(|(index, item)| object(item, &mut read).within(format!("{name}[{index}]")))
                .collect(),
            Some(_) => Err(wrong(name, "a list")),
        }
    }

    /// A text; empty when absent.
    pub(super) fn text(&self, name: &str) -> Result<String, Refusal> {
        match self.get(name) {
            None => Ok(String::new()),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Number(number)) => Ok(number.to_string()),
            Some(_) => Err(wrong(name, "a text")),
        }
    }

    /// A list of texts.
    pub(super) fn texts(&self, name: &str) -> Result<Vec<String>, Refusal> {
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| {
                    item.as_str()
                        .map(str::to_owned)
                        .ok_or_else(|| wrong(name, "a list of texts"))
                })
                .collect(),
            Some(_) => Err(wrong(name, "a list")),
        }
    }

    /// A number.
    pub(super) fn number(&self, name: &str) -> Result<Option<u32>, Refusal> {
        self.get(name)
            .map(|value| {
                value
                    .as_u64()
                    .and_then(|number| u32::try_from(number).ok())
                    .ok_or_else(|| wrong(name, "a number"))
            })
            .transpose()
    }

    /// A wrapped number.
    pub(super) fn wrapped(&self, name: &str) -> Result<Option<google::UInt32Value>, Refusal> {
        Ok(self.number(name)?.map(|value| google::UInt32Value { value }))
    }

    /// A flag; false when absent.
    pub(super) fn flag(&self, name: &str) -> Result<bool, Refusal> {
        Ok(self.maybe_flag(name)?.is_some_and(|flag| flag.value))
    }

    /// A wrapped flag.
    pub(super) fn maybe_flag(&self, name: &str) -> Result<Option<google::BoolValue>, Refusal> {
        self.get(name)
            .map(|value| {
                value
                    .as_bool()
                    .map(|value| google::BoolValue { value })
                    .ok_or_else(|| wrong(name, "true or false"))
            })
            .transpose()
    }

    /// A duration, `1.5s`.
    pub(super) fn duration(&self, name: &str) -> Result<Option<google::Duration>, Refusal> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let parsed = value
            .as_str()
            .and_then(|text| text.strip_suffix('s'))
            .and_then(|text| text.parse::<f64>().ok());
        match parsed.filter(|seconds| (0.0..3.2e11).contains(seconds)) {
            Some(seconds) => Ok(Some(google::Duration {
                seconds: seconds as i64,
                nanos: (seconds.fract() * 1e9).round() as i32,
            })),
            None => Err(wrong(name, "a duration like 1.5s")),
        }
    }

    /// An enum value by name.
    pub(super) fn choice(&self, name: &str, names: &[(&str, i32)]) -> Result<Option<i32>, Refusal> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let found = value
            .as_str()
            .and_then(|text| names.iter().find(|(have, _)| *have == text));
        found.map(|(_, number)| Some(*number)).ok_or_else(|| {
            let known: Vec<_> = names.iter().map(|(name, _)| *name).collect();
            wrong(name, &format!("one of {}", known.join(", ")))
        })
    }
}

/// Reads an object to its last field.
pub(super) fn object<'a, T>(
    value: &'a Value,
    read: impl FnOnce(&Fields<'a>) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    let fields = Fields::of(value)?;
    let out = read(&fields)?;
    fields.end()?;
    Ok(out)
}
