//! Names, numbers and types of Envoy's fields, for reading files: the generated types have no descriptors.
//!
//! `schema.txt` is written by `hack/envoy-schema.py` from the .proto files that the generated types were made from. It is
//! indexed when a file is read, which takes a millisecond, and forgotten afterwards: a proxy that is configured by xDS
//! never touches it.

use std::collections::HashMap;

const TEXT: &str = include_str!("schema.txt");

/// A type of the schema, by the number of its line.
pub(super) type TypeId = usize;

/// Type of one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// By its letter.
    Scalar(u8),
    /// A message.
    Message(TypeId),
    /// An enum.
    Enum(TypeId),
}

/// How often a field may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Once.
    One,
    /// As a list.
    List,
    /// As a map from this scalar.
    Map(u8),
}

/// A field of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field<'a> {
    /// Its name in the .proto file.
    pub(super) name: &'a str,
    pub(super) number: u32,
    pub(super) shape: Shape,
    pub(super) kind: Kind,
    /// Fields with the same number here exclude each other.
    pub(super) oneof: Option<u32>,
}

/// See the module.
pub(super) struct Schema {
    lines: Vec<&'static str>,
    by_name: HashMap<&'static str, TypeId, foldhash::fast::RandomState>,
}

impl Schema {
    /// Indexes the text.
    pub(super) fn load() -> Self {
        let lines: Vec<&str> = TEXT.lines().collect();
        let by_name = lines
            .iter()
            .enumerate()
            .filter_map(|(id, line)| line.split(' ').nth(1).map(|name| (name, id)))
            .collect();
        Self { lines, by_name }
    }

    /// The type of that full name.
    pub(super) fn find(&self, name: &str) -> Option<TypeId> {
        self.by_name.get(name).copied()
    }

    /// Full name of a type.
    pub(super) fn name(&self, id: TypeId) -> &'static str {
        self.lines[id].split(' ').nth(1).unwrap_or_default()
    }

    /// The field of a message, by its name or by the same in camel case, as protobuf's JSON writes it.
    pub(super) fn field(&self, message: TypeId, name: &str) -> Option<Field<'static>> {
        self.lines[message]
            .split(' ')
            .skip(2)
            .find(|word| {
                word.split_once(':')
                    .is_some_and(|(have, _)| have == name || is_camel_of(name, have))
            })
            .and_then(parse)
    }

    /// The field of a message by its number.
    pub(super) fn numbered(&self, message: TypeId, number: u32) -> Option<Field<'static>> {
        self.lines[message]
            .split(' ')
            .skip(2)
            .find(|word| {
                let mut parts = word.split(':');
                parts.nth(1).and_then(|have| have.parse().ok()) == Some(number)
            })
            .and_then(parse)
    }

    /// The number of an enum's value.
    pub(super) fn value(&self, id: TypeId, name: &str) -> Option<i32> {
        self.values(id)
            .find(|(have, _)| *have == name)
            .and_then(|(_, number)| number.parse().ok())
    }

    /// Names and numbers of an enum's values.
    pub(super) fn values(&self, id: TypeId) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.lines[id]
            .split(' ')
            .skip(2)
            .filter_map(|word| word.split_once(':'))
    }
}

/// Whether `connectTimeout` is `connect_timeout`.
fn is_camel_of(camel: &str, snake: &str) -> bool {
    let mut camel = camel.bytes();
    let mut up = false;
    for byte in snake.bytes() {
        if byte == b'_' {
            up = true;
            continue;
        }
        let wanted = if std::mem::take(&mut up) {
            byte.to_ascii_uppercase()
        } else {
            byte
        };
        if camel.next() != Some(wanted) {
            return false;
        }
    }
    camel.next().is_none()
}

/// `name:number:type|oneof`.
fn parse(word: &'static str) -> Option<Field<'static>> {
    let (name, rest) = word.split_once(':')?;
    let (number, rest) = rest.split_once(':')?;
    let (mut kind, oneof) = match rest.split_once('|') {
        Some((kind, oneof)) => (kind, oneof.parse().ok()),
        None => (rest, None),
    };
    let mut shape = Shape::One;
    if let Some(inner) = kind.strip_prefix('*') {
        (shape, kind) = (Shape::List, inner);
    } else if let Some(inner) = kind.strip_prefix('%') {
        let (key, value) = inner.split_once('=')?;
        (shape, kind) = (Shape::Map(*key.as_bytes().first()?), value);
    }
    let first = *kind.as_bytes().first()?;
    let kind = match first {
        b'M' => Kind::Message(kind[1..].parse().ok()?),
        b'E' => Kind::Enum(kind[1..].parse().ok()?),
        letter => Kind::Scalar(letter),
    };
    Some(Field {
        name,
        number: number.parse().ok()?,
        shape,
        kind,
        oneof,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_schema_is_read_and_refers_to_types_that_exist() {
        let schema = Schema::load();
        let mut fields = 0;
        for (id, line) in schema.lines.iter().enumerate() {
            for word in line.split(' ').skip(2).filter(|_| line.starts_with("m ")) {
                let field = parse(word).unwrap_or_else(|| panic!("{word} of {}", schema.name(id)));
                fields += 1;
                match field.kind {
                    Kind::Message(other) => assert!(schema.lines[other].starts_with("m "), "{word}"),
                    Kind::Enum(other) => assert!(schema.lines[other].starts_with("e "), "{word}"),
                    Kind::Scalar(letter) => assert!(b"dfilUuzZxXwWbty".contains(&letter), "{word}"),
                }
            }
        }
        assert!(fields > 2_000, "{fields}");
    }

    #[test]
    fn fields_are_found_by_both_of_their_names() {
        let schema = Schema::load();
        let cluster = schema.find("envoy.config.cluster.v3.Cluster").unwrap();
        for name in ["connect_timeout", "connectTimeout"] {
            assert_eq!(schema.field(cluster, name).unwrap().number, 4, "{name}");
        }
        assert!(schema.field(cluster, "connect-timeout").is_none());
        assert!(schema.field(cluster, "connectTimeouts").is_none());
    }
}
