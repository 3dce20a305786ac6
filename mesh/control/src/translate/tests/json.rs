//! Encoded Envoy messages as protobuf JSON, by the field table in `schema.txt`.

use std::collections::HashMap;
use std::sync::LazyLock;

use base64::Engine as _;
use serde_json::{Map, Value};

struct Field {
    name: String,
    card: Card,
    of: String,
}

#[derive(PartialEq)]
enum Card {
    One,
    Many,
    Map,
}

#[derive(Default)]
struct Schema {
    messages: HashMap<String, HashMap<u64, Field>>,
    enums: HashMap<String, HashMap<u64, String>>,
}

static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let mut schema = Schema::default();
    let (mut message, mut enumeration) = (String::new(), String::new());
    for line in include_str!("schema.txt").lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["message", name] => {
                (message, enumeration) = ((*name).to_owned(), String::new());
                schema.messages.entry(message.clone()).or_default();
            }
            ["enum", name] => {
                enumeration = (*name).to_owned();
            }
            [number, name, card, of] => {
                let card = match *card {
                    "rep" => Card::Many,
                    "map" => Card::Map,
                    _ => Card::One,
                };
                let field = Field {
                    name: (*name).to_owned(),
                    card,
                    of: (*of).to_owned(),
                };
                schema
                    .messages
                    .get_mut(&message)
                    .unwrap()
                    .insert(number.parse().unwrap(), field);
            }
            [number, name] => {
                let values = schema.enums.entry(enumeration.clone()).or_default();
                values.insert(number.parse().unwrap(), (*name).to_owned());
            }
            _ => {}
        }
    }
    schema
});

enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first().expect("a varint ends within the message");
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            break;
        }
    }
    value
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Wire<'_>)> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let mut take = |count: usize| {
            let (head, tail) = bytes.split_at(count);
            bytes = tail;
            head
        };
        let value = match tag & 7 {
            0 => Wire::Varint(varint(&mut bytes)),
            1 => Wire::Fixed64(u64::from_le_bytes(take(8).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes) as usize;
                let (head, tail) = bytes.split_at(length);
                bytes = tail;
                Wire::Bytes(head)
            }
            5 => Wire::Fixed32(u32::from_le_bytes(take(4).try_into().unwrap())),
            other => panic!("wire type {other}"),
        };
        out.push((tag >> 3, value));
    }
    out
}

/// A message of type `name`.
pub(super) fn message(name: &str, bytes: &[u8]) -> Value {
    if let Some(value) = well_known(name, bytes) {
        return value;
    }
    let schema = SCHEMA
        .messages
        .get(name)
        .unwrap_or_else(|| panic!("{name} is not in schema.txt"));
    let mut out = Map::new();
    for (number, wire) in fields(bytes) {
        let field = schema
            .get(&number)
            .unwrap_or_else(|| panic!("field {number} of {name} is not in schema.txt"));
        match field.card {
            Card::One => {
                out.insert(field.name.clone(), scalar(&field.of, wire));
            }
            Card::Many => {
                let list = out
                    .entry(field.name.clone())
                    .or_insert_with(|| Value::Array(Vec::new()));
                let list = list.as_array_mut().unwrap();
                match wire {
                    // Packed numbers.
                    Wire::Bytes(mut packed) if is_number(&field.of) => {
                        while !packed.is_empty() {
                            list.push(scalar(&field.of, Wire::Varint(varint(&mut packed))));
                        }
                    }
                    wire => list.push(scalar(&field.of, wire)),
                }
            }
            Card::Map => {
                let Wire::Bytes(entry) = wire else {
                    panic!("a map entry of {name} is a message")
                };
                let (mut key, mut value) = (String::new(), Value::Object(Map::new()));
                for (number, wire) in fields(entry) {
                    match (number, wire) {
                        (1, Wire::Bytes(bytes)) => key = String::from_utf8(bytes.to_vec()).unwrap(),
                        (_, wire) => value = scalar(&field.of, wire),
                    }
                }
                let map = out
                    .entry(field.name.clone())
                    .or_insert_with(|| Value::Object(Map::new()));
                map.as_object_mut().unwrap().insert(key, value);
            }
        }
    }
    Value::Object(out)
}

fn is_number(of: &str) -> bool {
    matches!(of, "uint32" | "int32" | "uint64" | "int64" | "bool") || SCHEMA.enums.contains_key(of)
}

fn scalar(of: &str, wire: Wire<'_>) -> Value {
    match (of, wire) {
        ("string", Wire::Bytes(bytes)) => Value::from(String::from_utf8(bytes.to_vec()).unwrap()),
        ("bytes", Wire::Bytes(bytes)) => Value::from(base64::engine::general_purpose::STANDARD.encode(bytes)),
        ("bool", Wire::Varint(value)) => Value::from(value != 0),
        ("uint32", Wire::Varint(value)) => Value::from(value),
        ("int32", Wire::Varint(value)) => Value::from(value as i64 as i32),
        ("uint64", Wire::Varint(value)) => Value::from(value.to_string()),
        ("int64", Wire::Varint(value)) => Value::from((value as i64).to_string()),
        ("double", Wire::Fixed64(value)) => number(f64::from_bits(value)),
        ("float", Wire::Fixed32(value)) => number(f64::from(f32::from_bits(value))),
        (name, Wire::Varint(value)) if SCHEMA.enums.contains_key(name) => Value::from(
            SCHEMA.enums[name]
                .get(&value)
                .cloned()
                .unwrap_or_else(|| value.to_string()),
        ),
        (name, Wire::Bytes(bytes)) => message(name, bytes),
        (name, _) => panic!("a {name} cannot be on the wire like this"),
    }
}

fn number(value: f64) -> Value {
    if value.fract() == 0.0 {
        Value::from(value as i64)
    } else {
        Value::from(value)
    }
}

fn well_known(name: &str, bytes: &[u8]) -> Option<Value> {
    let first = || {
        fields(bytes)
            .into_iter()
            .find(|(number, _)| *number == 1)
            .map(|(_, wire)| wire)
    };
    Some(match name {
        "google.protobuf.UInt32Value" => first().map_or(Value::from(0), |wire| scalar("uint32", wire)),
        "google.protobuf.UInt64Value" => first().map_or(Value::from("0"), |wire| scalar("uint64", wire)),
        "google.protobuf.BoolValue" => first().map_or(Value::from(false), |wire| scalar("bool", wire)),
        "google.protobuf.Duration" => {
            let (mut seconds, mut nanos) = (0i64, 0i64);
            for (number, wire) in fields(bytes) {
                match (number, wire) {
                    (1, Wire::Varint(value)) => seconds = value as i64,
                    (_, Wire::Varint(value)) => nanos = value as i64,
                    _ => panic!("a duration is two numbers"),
                }
            }
            // Three digits where they are enough, as protobuf JSON writes it.
            Value::from(match nanos {
                0 => format!("{seconds}s"),
                nanos if nanos % 1_000_000 == 0 => format!("{seconds}.{:03}s", nanos / 1_000_000),
                nanos => format!("{seconds}.{nanos:09}s"),
            })
        }
        "google.protobuf.Any" => {
            let (mut url, mut content): (String, &[u8]) = (String::new(), &[]);
            for (number, wire) in fields(bytes) {
                match (number, wire) {
                    (1, Wire::Bytes(text)) => url = String::from_utf8(text.to_vec()).unwrap(),
                    (_, Wire::Bytes(value)) => content = value,
                    _ => panic!("an Any is a name and bytes"),
                }
            }
            let mut value = message(url.trim_start_matches("type.googleapis.com/"), content);
            value
                .as_object_mut()
                .unwrap()
                .insert("@type".to_owned(), Value::from(url));
            value
        }
        "google.protobuf.Struct" => {
            let mut out = Map::new();
            for (_, wire) in fields(bytes) {
                let Wire::Bytes(entry) = wire else {
                    panic!("a field of a Struct is an entry")
                };
                let (mut key, mut value) = (String::new(), Value::Null);
                for (number, wire) in fields(entry) {
                    match (number, wire) {
                        (1, Wire::Bytes(text)) => key = String::from_utf8(text.to_vec()).unwrap(),
                        (_, Wire::Bytes(content)) => value = message("google.protobuf.Value", content),
                        _ => panic!("an entry is a key and a value"),
                    }
                }
                out.insert(key, value);
            }
            Value::Object(out)
        }
        "google.protobuf.Value" => match fields(bytes).into_iter().next() {
            Some((2, Wire::Fixed64(value))) => number(f64::from_bits(value)),
            Some((3, wire)) => scalar("string", wire),
            Some((4, wire)) => scalar("bool", wire),
            Some((5, Wire::Bytes(content))) => message("google.protobuf.Struct", content),
            Some((6, Wire::Bytes(content))) => Value::Array(
                fields(content)
                    .into_iter()
                    .map(|(_, wire)| match wire {
                        Wire::Bytes(item) => message("google.protobuf.Value", item),
                        _ => panic!("an item of a list is a Value"),
                    })
                    .collect(),
            ),
            _ => Value::Null,
        },
        _ => return None,
    })
}
