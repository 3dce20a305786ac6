//! Documents in protobuf's JSON mapping, turned into protobuf's bytes.
//!
//! One generic path for every message that Envoy's API has: names are looked up in the [`Schema`], values are checked
//! and written as the field's type says, messages within an `Any` by their `@type`. What the schema does not know is
//! refused with its path, as protobuf's own reader does.

use base64::Engine as _;
use prost::encoding::{WireType, encode_key, encode_varint};
use serde_json::{Map, Value};

use super::schema::{Field, Kind, Schema, Shape, TypeId};
use crate::error::{Refusal, Within};

/// How deep messages may be within messages.
const MAX_DEPTH: usize = 64;

/// The bytes of `value` as the message of that name.
pub(super) fn encode(schema: &Schema, message: &str, value: &Value) -> Result<Vec<u8>, Refusal> {
    let id = schema
        .find(message)
        .ok_or_else(|| Refusal::new("", format!("{message} is not known to this proxy")))?;
    let mut out = Vec::new();
    Writer { schema, depth: 0 }.message(id, value, &mut out)?;
    Ok(out)
}

fn wrong(wanted: &str) -> Refusal {
    Refusal::new("", format!("is not {wanted}"))
}

fn object(value: &Value) -> Result<&Map<String, Value>, Refusal> {
    value.as_object().ok_or_else(|| wrong("an object"))
}

#[derive(Clone, Copy)]
struct Writer<'a> {
    schema: &'a Schema,
    depth: usize,
}

impl Writer<'_> {
    fn message(self, id: TypeId, value: &Value, out: &mut Vec<u8>) -> Result<(), Refusal> {
        if self.depth >= MAX_DEPTH {
            return Err(Refusal::new("", "is nested too deeply"));
        }
        let inner = Self {
            depth: self.depth + 1,
            ..self
        };
        if let Some(name) = self.schema.name(id).strip_prefix("google.protobuf.")
            && let Some(result) = inner.well_known(name, value, out)
        {
            return result;
        }
        inner.fields(id, object(value)?, &[], out)
    }

    fn fields(
        self,
        id: TypeId,
        map: &Map<String, Value>,
        besides: &[&str],
        out: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        // Number of the field, and of the choice that it belongs to.
        let mut seen: Vec<(u32, Option<u32>)> = Vec::new();
        for (key, value) in map {
            if besides.contains(&key.as_str()) {
                continue;
            }
            let field = self
                .schema
                .field(id, key)
                .ok_or_else(|| Refusal::new(key.as_str(), "is not a field that this proxy knows here"))?;
            // Null is absent, but for the type whose value it is.
            if value.is_null() && !self.is_value(field.kind) {
                continue;
            }
            if seen.iter().any(|(number, _)| *number == field.number) {
                return Err(Refusal::new(key.as_str(), "is there twice"));
            }
            if field.oneof.is_some() && seen.iter().any(|(_, oneof)| *oneof == field.oneof) {
                return Err(Refusal::new(
                    key.as_str(),
                    "excludes another field that is there as well",
                ));
            }
            seen.push((field.number, field.oneof));
            self.field(&field, value, out).within(field.name)?;
        }
        Ok(())
    }

    fn is_value(self, kind: Kind) -> bool {
        matches!(kind, Kind::Message(id) if self.schema.name(id) == "google.protobuf.Value")
    }

    fn field(self, field: &Field<'_>, value: &Value, out: &mut Vec<u8>) -> Result<(), Refusal> {
        match field.shape {
            Shape::One => self.one(field.number, field.kind, value, out),
            Shape::List => {
                let items = value.as_array().ok_or_else(|| wrong("a list"))?;
                for (index, item) in items.iter().enumerate() {
                    self.one(field.number, field.kind, item, out)
                        .within(format!("[{index}]"))?;
                }
                Ok(())
            }
            Shape::Map(key_kind) => {
                for (key, item) in object(value)? {
                    let mut entry = Vec::new();
                    let key_value = match key_kind {
                        b'b' => Value::Bool(key == "true"),
                        _ => Value::String(key.clone()),
                    };
                    self.one(1, Kind::Scalar(key_kind), &key_value, &mut entry)
                        .within(key.as_str())?;
                    self.one(2, field.kind, item, &mut entry).within(key.as_str())?;
                    bytes(field.number, &entry, out);
                }
                Ok(())
            }
        }
    }

    /// One value with the field's number before it.
    fn one(self, number: u32, kind: Kind, value: &Value, out: &mut Vec<u8>) -> Result<(), Refusal> {
        match kind {
            Kind::Message(id) => {
                let mut inner = Vec::new();
                self.message(id, value, &mut inner)?;
                bytes(number, &inner, out);
                Ok(())
            }
            Kind::Enum(id) => {
                let found = match value {
                    Value::String(name) => self.schema.value(id, name),
                    Value::Number(number) => number.as_i64().and_then(|number| i32::try_from(number).ok()),
                    _ => None,
                };
                let found = found.ok_or_else(|| {
                    let known: Vec<_> = self.schema.values(id).map(|(name, _)| name).collect();
                    wrong(&format!("one of {}", known.join(", ")))
                })?;
                varint(number, i64::from(found) as u64, out);
                Ok(())
            }
            Kind::Scalar(letter) => scalar(number, letter, value, out),
        }
    }

    /// Types with a JSON form of their own; `None` for others.
    fn well_known(self, name: &str, value: &Value, out: &mut Vec<u8>) -> Option<Result<(), Refusal>> {
        Some(match name {
            "Any" => self.any(value, out),
            "Duration" => duration(value, out),
            "Timestamp" => Err(Refusal::new("", "timestamps are not supported in files")),
            "FieldMask" => Err(Refusal::new("", "field masks are not supported in files")),
            "Struct" => structure(value, out, self.depth),
            "Value" => struct_value(value, out, self.depth),
            "ListValue" => list_value(value, out, self.depth),
            "Empty" => object(value).and_then(|map| match map.keys().next() {
                None => Ok(()),
                Some(key) => Err(Refusal::new(key.as_str(), "an empty message has no fields")),
            }),
            "BoolValue" => scalar(1, b'b', value, out),
            "StringValue" => scalar(1, b't', value, out),
            "BytesValue" => scalar(1, b'y', value, out),
            "DoubleValue" => scalar(1, b'd', value, out),
            "FloatValue" => scalar(1, b'f', value, out),
            "Int32Value" => scalar(1, b'i', value, out),
            "Int64Value" => scalar(1, b'l', value, out),
            "UInt32Value" => scalar(1, b'u', value, out),
            "UInt64Value" => scalar(1, b'U', value, out),
            _ => return None,
        })
    }

    fn any(self, value: &Value, out: &mut Vec<u8>) -> Result<(), Refusal> {
        let map = object(value)?;
        if map.is_empty() {
            return Ok(());
        }
        let url = map
            .get("@type")
            .and_then(Value::as_str)
            .ok_or_else(|| Refusal::new("@type", "is missing"))?;
        let name = url.rsplit('/').next().unwrap_or_default();
        let id = self
            .schema
            .find(name)
            .ok_or_else(|| Refusal::new("@type", format!("{name} is not known to this proxy")))?;
        let mut inner = Vec::new();
        let special = name
            .strip_prefix("google.protobuf.")
            .filter(|name| *name != "Empty");
        if special.is_some() {
            // Types whose JSON is no object have it under `value`.
            self.message(id, map.get("value").unwrap_or(&Value::Null), &mut inner)
                .within("value")?;
        } else {
            self.fields(id, map, &["@type"], &mut inner)?;
        }
        bytes(1, url.as_bytes(), out);
        bytes(2, &inner, out);
        Ok(())
    }
}

fn bytes(number: u32, value: &[u8], out: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(value.len() as u64, out);
    out.extend_from_slice(value);
}

fn varint(number: u32, value: u64, out: &mut Vec<u8>) {
    encode_key(number, WireType::Varint, out);
    encode_varint(value, out);
}

/// A whole number; protobuf takes it as text as well, and as `5.0`.
fn whole(value: &Value, least: i128, most: i128) -> Result<i128, Refusal> {
    let number = match value {
        Value::Number(number) => number
            .as_u64()
            .map(i128::from)
            .or_else(|| number.as_i64().map(i128::from))
            .or_else(|| {
                number
                    .as_f64()
                    .filter(|number| number.fract() == 0.0 && number.abs() < 1e18)
                    .map(|number| number as i128)
            }),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    number
        .filter(|number| (least..=most).contains(number))
        .ok_or_else(|| wrong(&format!("a whole number from {least} to {most}")))
}

fn real(value: &Value) -> Result<f64, Refusal> {
    let number = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => match text.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            other => other.parse().ok(),
        },
        _ => None,
    };
    number.ok_or_else(|| wrong("a number"))
}

fn scalar(number: u32, letter: u8, value: &Value, out: &mut Vec<u8>) -> Result<(), Refusal> {
    let zigzag = |value: i128| ((value << 1) ^ (value >> 127)) as u64;
    match letter {
        b't' => bytes(
            number,
            value.as_str().ok_or_else(|| wrong("a text"))?.as_bytes(),
            out,
        ),
        b'b' => varint(
            number,
            u64::from(value.as_bool().ok_or_else(|| wrong("true or false"))?),
            out,
        ),
        b'y' => {
            let text = value.as_str().ok_or_else(|| wrong("base64"))?;
            let engine = base64::engine::general_purpose::STANDARD;
            let url = base64::engine::general_purpose::URL_SAFE;
            let decoded = engine
                .decode(text)
                .or_else(|_| url.decode(text))
                .map_err(|_| wrong("base64"))?;
            bytes(number, &decoded, out);
        }
        b'i' => varint(
            number,
            whole(value, i32::MIN.into(), i32::MAX.into())? as u64,
            out,
        ),
        b'l' => varint(
            number,
            whole(value, i64::MIN.into(), i64::MAX.into())? as u64,
            out,
        ),
        b'u' => varint(number, whole(value, 0, u32::MAX.into())? as u64, out),
        b'U' => varint(number, whole(value, 0, u64::MAX.into())? as u64, out),
        b'z' => varint(
            number,
            zigzag(whole(value, i32::MIN.into(), i32::MAX.into())?),
            out,
        ),
        b'Z' => varint(
            number,
            zigzag(whole(value, i64::MIN.into(), i64::MAX.into())?),
            out,
        ),
        b'x' | b'w' => {
            let range = if letter == b'x' {
                (0, u32::MAX.into())
            } else {
                (i32::MIN.into(), i32::MAX.into())
            };
            encode_key(number, WireType::ThirtyTwoBit, out);
            out.extend_from_slice(&(whole(value, range.0, range.1)? as u32).to_le_bytes());
        }
        b'X' | b'W' => {
            let range = if letter == b'X' {
                (0, u64::MAX.into())
            } else {
                (i64::MIN.into(), i64::MAX.into())
            };
            encode_key(number, WireType::SixtyFourBit, out);
            out.extend_from_slice(&(whole(value, range.0, range.1)? as u64).to_le_bytes());
        }
        b'd' => {
            let value = real(value)?;
            encode_key(number, WireType::SixtyFourBit, out);
            out.extend_from_slice(&value.to_le_bytes());
        }
        b'f' => {
            let value = real(value)? as f32;
            encode_key(number, WireType::ThirtyTwoBit, out);
            out.extend_from_slice(&value.to_le_bytes());
        }
        _ => return Err(Refusal::new("", "has a type that this proxy cannot read")),
    }
    Ok(())
}

/// `1.5s`: seconds and at most nine digits of a fraction.
fn duration(value: &Value, out: &mut Vec<u8>) -> Result<(), Refusal> {
    let bad = || wrong("a duration like 1.5s");
    let text = value
        .as_str()
        .and_then(|text| text.strip_suffix('s'))
        .ok_or_else(bad)?;
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if seconds.is_empty()
        || !digits(seconds)
        || !digits(fraction)
        || fraction.len() > 9
        || (fraction.is_empty() && text.contains('.'))
    {
        return Err(bad());
    }
    let seconds: i64 = seconds.parse().map_err(|_| bad())?;
    // Protobuf's limit: ten thousand years.
    if seconds > 315_576_000_000 {
        return Err(bad());
    }
    let nanos: i64 = format!("{fraction:0<9}").parse().map_err(|_| bad())?;
    let sign = if negative { -1 } else { 1 };
    varint(1, (sign * seconds) as u64, out);
    varint(2, (sign * nanos) as u64, out);
    Ok(())
}

fn structure(value: &Value, out: &mut Vec<u8>, depth: usize) -> Result<(), Refusal> {
    for (key, item) in object(value)? {
        let mut entry = Vec::new();
        bytes(1, key.as_bytes(), &mut entry);
        let mut inner = Vec::new();
        struct_value(item, &mut inner, depth + 1).within(key.as_str())?;
        bytes(2, &inner, &mut entry);
        bytes(1, &entry, out);
    }
    Ok(())
}

fn struct_value(value: &Value, out: &mut Vec<u8>, depth: usize) -> Result<(), Refusal> {
    if depth >= MAX_DEPTH {
        return Err(Refusal::new("", "is nested too deeply"));
    }
    let mut inner = Vec::new();
    match value {
        Value::Null => varint(1, 0, out),
        Value::Number(number) => {
            encode_key(2, WireType::SixtyFourBit, out);
            out.extend_from_slice(&number.as_f64().unwrap_or_default().to_le_bytes());
        }
        Value::String(text) => bytes(3, text.as_bytes(), out),
        Value::Bool(value) => varint(4, u64::from(*value), out),
        Value::Object(_) => {
            structure(value, &mut inner, depth)?;
            bytes(5, &inner, out);
        }
        Value::Array(_) => {
            list_value(value, &mut inner, depth)?;
            bytes(6, &inner, out);
        }
    }
    Ok(())
}

fn list_value(value: &Value, out: &mut Vec<u8>, depth: usize) -> Result<(), Refusal> {
    for (index, item) in value
        .as_array()
        .ok_or_else(|| wrong("a list"))?
        .iter()
        .enumerate()
    {
        let mut inner = Vec::new();
        struct_value(item, &mut inner, depth + 1).within(format!("[{index}]"))?;
        bytes(1, &inner, out);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
