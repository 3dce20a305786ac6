//! Protobuf's bytes turned into protobuf's JSON, by the [`Schema`]: what the proxy was given, for `/config_dump`.
//!
//! The way back of [`super::json`]. Names are those of the .proto files; fields that are not set are left out; what holds
//! secrets is said to be there and not shown, as in Envoy. Bytes that are no message end where they stop making sense:
//! what was taken into use was decoded before.

use base64::Engine as _;
use bytes::Buf;
use prost::encoding::{WireType, decode_key, decode_varint};
use serde_json::{Map, Value, json};

use super::schema::{Field, Kind, Schema, Shape, TypeId};

/// How deep messages are shown within messages.
const MAX_DEPTH: usize = 64;
/// In the place of what is secret.
const REDACTED: &str = "[redacted]";
/// Fields whose content nobody should read: those that Envoy calls sensitive.
const SECRET: [(&str, &str); 6] = [
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsCertificate",
        "private_key",
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsCertificate",
        "pkcs12",
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsCertificate",
        "password",
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsSessionTicketKeys",
        "keys",
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.GenericSecret",
        "secret",
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.GenericSecret",
        "secrets",
    ),
];

/// `bytes` as the message of that name; with its `@type`.
pub(super) fn show(schema: &Schema, message: &str, bytes: &[u8]) -> Value {
    let mut value = match schema.find(message) {
        Some(id) => Reader { schema, depth: 0 }.message(id, bytes),
        None => json!({ "value": base64::engine::general_purpose::STANDARD.encode(bytes) }),
    };
    if let Some(map) = value.as_object_mut() {
        map.insert(
            "@type".to_owned(),
            format!("type.googleapis.com/{message}").into(),
        );
    }
    value
}

/// One value on the wire.
enum Wire<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message, by number.
fn fields(mut bytes: &[u8]) -> impl Iterator<Item = (u32, Wire<'_>)> {
    std::iter::from_fn(move || {
        let (number, wire) = decode_key(&mut bytes).ok()?;
        let value = match wire {
            WireType::Varint => Wire::Varint(decode_varint(&mut bytes).ok()?),
            WireType::ThirtyTwoBit => Wire::Fixed32(bytes.try_get_u32_le().ok()?),
            WireType::SixtyFourBit => Wire::Fixed64(bytes.try_get_u64_le().ok()?),
            WireType::LengthDelimited => {
                let length = usize::try_from(decode_varint(&mut bytes).ok()?).ok()?;
                let (value, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                Wire::Bytes(value)
            }
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        Some((number, value))
    })
}

/// The field of that number, where its bytes are.
fn bytes_of(message: &[u8], number: u32) -> &[u8] {
    fields(message)
        .filter_map(|(own, wire)| match wire {
            Wire::Bytes(bytes) if own == number => Some(bytes),
            _ => None,
        })
        .last()
        .unwrap_or_default()
}

fn varint_of(message: &[u8], number: u32) -> u64 {
    fields(message)
        .filter_map(|(own, wire)| match wire {
            Wire::Varint(value) if own == number => Some(value),
            _ => None,
        })
        .last()
        .unwrap_or_default()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[derive(Clone, Copy)]
struct Reader<'a> {
    schema: &'a Schema,
    depth: usize,
}

impl Reader<'_> {
    fn message(self, id: TypeId, bytes: &[u8]) -> Value {
        let inner = Self {
            depth: self.depth + 1,
            ..self
        };
        if inner.depth > MAX_DEPTH {
            return Value::Null;
        }
        let name = self.schema.name(id);
        if let Some(value) = name
            .strip_prefix("google.protobuf.")
            .and_then(|name| inner.well_known(name, bytes))
        {
            return value;
        }
        let mut out = Map::new();
        for (number, wire) in fields(bytes) {
            let Some(field) = self.schema.numbered(id, number) else {
                continue;
            };
            if SECRET.contains(&(name, field.name)) {
                out.insert(field.name.to_owned(), REDACTED.into());
                continue;
            }
            inner.field(&field, wire, &mut out);
        }
        out.into()
    }

    fn field(self, field: &Field<'_>, wire: Wire<'_>, out: &mut Map<String, Value>) {
        match field.shape {
            Shape::One => {
                out.insert(field.name.to_owned(), self.one(field.kind, wire));
            }
            Shape::List => {
                let list = out.entry(field.name).or_insert_with(|| json!([]));
                let Some(list) = list.as_array_mut() else { return };
                match (field.kind, wire) {
                    // Numbers come packed.
                    (Kind::Scalar(letter), Wire::Bytes(bytes)) if !matches!(letter, b't' | b'y') => {
                        list.extend(packed(letter, bytes).map(|wire| scalar(letter, wire)));
                    }
                    (Kind::Enum(id), Wire::Bytes(bytes)) => {
                        list.extend(packed(b'i', bytes).map(|wire| self.one(Kind::Enum(id), wire)));
                    }
                    (kind, wire) => list.push(self.one(kind, wire)),
                }
            }
            Shape::Map(key) => {
                let Wire::Bytes(entry) = wire else { return };
                let (mut name, mut value) = (String::new(), None);
                for (number, wire) in fields(entry) {
                    match number {
                        1 => {
                            name = match scalar(key, wire) {
                                Value::String(name) => name,
                                other => other.to_string(),
                            }
                        }
                        2 => value = Some(self.one(field.kind, wire)),
                        _ => {}
                    }
                }
                let map = out.entry(field.name).or_insert_with(|| json!({}));
                if let Some(map) = map.as_object_mut() {
                    let absent = || self.one(field.kind, Wire::Bytes(&[]));
                    map.insert(name, value.unwrap_or_else(absent));
                }
            }
        }
    }

    fn one(self, kind: Kind, wire: Wire<'_>) -> Value {
        match (kind, wire) {
            (Kind::Message(id), Wire::Bytes(bytes)) => self.message(id, bytes),
            (Kind::Enum(id), Wire::Varint(number)) => {
                let number = number as i32;
                let text = number.to_string();
                self.schema
                    .values(id)
                    .find(|(_, have)| *have == text)
                    .map_or_else(|| number.into(), |(name, _)| name.into())
            }
            (Kind::Scalar(letter), wire) => scalar(letter, wire),
            _ => Value::Null,
        }
    }

    fn well_known(self, name: &str, bytes: &[u8]) -> Option<Value> {
        let wrapped = |letter: u8| {
            let wire = fields(bytes)
                .find(|(number, _)| *number == 1)
                .map(|(_, wire)| wire);
            match (letter, wire) {
                (_, Some(wire)) => scalar(letter, wire),
                (b't' | b'y', None) => "".into(),
                (b'b', None) => false.into(),
                (b'l' | b'U', None) => "0".into(),
                (_, None) => 0.into(),
            }
        };
        Some(match name {
            "Any" => self.any(bytes),
            "Duration" => duration(bytes).into(),
            "Struct" => self.structure(bytes),
            "Value" => self.struct_value(bytes),
            "ListValue" => self.list_value(bytes),
            "Empty" => json!({}),
            "BoolValue" => wrapped(b'b'),
            "StringValue" => wrapped(b't'),
            "BytesValue" => wrapped(b'y'),
            "DoubleValue" => wrapped(b'd'),
            "FloatValue" => wrapped(b'f'),
            "Int32Value" => wrapped(b'i'),
            "Int64Value" => wrapped(b'l'),
            "UInt32Value" => wrapped(b'u'),
            "UInt64Value" => wrapped(b'U'),
            _ => return None,
        })
    }

    fn any(self, bytes: &[u8]) -> Value {
        let url = text(bytes_of(bytes, 1));
        let name = url.rsplit('/').next().unwrap_or_default();
        let inner = bytes_of(bytes, 2);
        let Some(id) = self.schema.find(name) else {
            let value = base64::engine::general_purpose::STANDARD.encode(inner);
            return json!({ "@type": url, "value": value });
        };
        match self.message(id, inner) {
            Value::Object(mut map) if !name.starts_with("google.protobuf.") || name.ends_with(".Empty") => {
                map.insert("@type".to_owned(), url.into());
                map.into()
            }
            value => json!({ "@type": url, "value": value }),
        }
    }

    fn structure(self, bytes: &[u8]) -> Value {
        let mut out = Map::new();
        for (number, wire) in fields(bytes) {
            if let (1, Wire::Bytes(entry)) = (number, wire) {
                out.insert(text(bytes_of(entry, 1)), self.struct_value(bytes_of(entry, 2)));
            }
        }
        out.into()
    }

    fn struct_value(self, bytes: &[u8]) -> Value {
        let inner = Self {
            depth: self.depth + 1,
            ..self
        };
        if inner.depth > MAX_DEPTH {
            return Value::Null;
        }
        match fields(bytes).last() {
            Some((2, wire @ Wire::Fixed64(_))) => scalar(b'd', wire),
            Some((3, wire @ Wire::Bytes(_))) => scalar(b't', wire),
            Some((4, wire @ Wire::Varint(_))) => scalar(b'b', wire),
            Some((5, Wire::Bytes(inner_bytes))) => inner.structure(inner_bytes),
            Some((6, Wire::Bytes(inner_bytes))) => inner.list_value(inner_bytes),
            _ => Value::Null,
        }
    }

    fn list_value(self, bytes: &[u8]) -> Value {
        fields(bytes)
            .filter_map(|(number, wire)| match wire {
                Wire::Bytes(item) if number == 1 => Some(self.struct_value(item)),
                _ => None,
            })
            .collect()
    }
}

/// The numbers of a packed list.
fn packed(letter: u8, mut bytes: &[u8]) -> impl Iterator<Item = Wire<'_>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        Some(match letter {
            b'x' | b'w' | b'f' => Wire::Fixed32(bytes.try_get_u32_le().ok()?),
            b'X' | b'W' | b'd' => Wire::Fixed64(bytes.try_get_u64_le().ok()?),
            _ => Wire::Varint(decode_varint(&mut bytes).ok()?),
        })
    })
}

fn scalar(letter: u8, wire: Wire<'_>) -> Value {
    let zigzag = |value: u64| ((value >> 1) as i64) ^ -((value & 1) as i64);
    match (letter, wire) {
        (b't', Wire::Bytes(bytes)) => text(bytes).into(),
        (b'y', Wire::Bytes(bytes)) => base64::engine::general_purpose::STANDARD.encode(bytes).into(),
        (b'b', Wire::Varint(value)) => (value != 0).into(),
        (b'i', Wire::Varint(value)) => (value as i32).into(),
        (b'u', Wire::Varint(value)) => (value as u32).into(),
        // Numbers of 64 bits are text, because JavaScript has none.
        (b'l', Wire::Varint(value)) => (value as i64).to_string().into(),
        (b'U', Wire::Varint(value)) => value.to_string().into(),
        (b'z', Wire::Varint(value)) => zigzag(value).into(),
        (b'Z', Wire::Varint(value)) => zigzag(value).to_string().into(),
        (b'x', Wire::Fixed32(value)) => value.into(),
        (b'w', Wire::Fixed32(value)) => (value as i32).into(),
        (b'f', Wire::Fixed32(value)) => f64::from(f32::from_bits(value)).into(),
        (b'X', Wire::Fixed64(value)) => value.to_string().into(),
        (b'W', Wire::Fixed64(value)) => (value as i64).to_string().into(),
        (b'd', Wire::Fixed64(value)) => f64::from_bits(value).into(),
        _ => Value::Null,
    }
}

/// `1.5s`.
fn duration(bytes: &[u8]) -> String {
    let (seconds, nanos) = (varint_of(bytes, 1) as i64, varint_of(bytes, 2) as i32);
    let sign = if seconds < 0 || nanos < 0 { "-" } else { "" };
    let (seconds, nanos) = (seconds.unsigned_abs(), nanos.unsigned_abs());
    if nanos == 0 {
        return format!("{sign}{seconds}s");
    }
    let fraction = format!("{nanos:09}");
    format!("{sign}{seconds}.{}s", fraction.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bootstrap::json;

    #[test]
    fn what_was_read_from_a_document_is_shown_as_it_was_written() {
        let schema = Schema::load();
        let document = serde_json::json!({
            "name": "c",
            "connect_timeout": "0.25s",
            "type": "STRICT_DNS",
            "lb_policy": "LEAST_REQUEST",
            "per_connection_buffer_limit_bytes": 32768,
            "respect_dns_ttl": true,
            "circuit_breakers": {"thresholds": [
                {"priority": "HIGH", "max_requests": 7, "retry_budget": {"budget_percent": {"value": 12.5}}}
            ]},
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 5}}
                }
            },
            "metadata": {"filter_metadata": {"istio": {
                "services": [{"host": "a"}], "number": 1.5, "yes": true, "nothing": null
            }}},
            "load_assignment": {"cluster_name": "c", "endpoints": [
                {"locality": {"zone": "z"}, "load_balancing_weight": 3}
            ]},
            "outlier_detection": {"base_ejection_time": "30s"}
        });
        let name = "envoy.config.cluster.v3.Cluster";
        let bytes = json::encode(&schema, name, &document).unwrap();
        let mut shown = show(&schema, name, &bytes);
        assert_eq!(
            shown.as_object_mut().unwrap().remove("@type").unwrap(),
            format!("type.googleapis.com/{name}")
        );
        assert_eq!(shown, document);
    }

    #[test]
    fn private_keys_are_not_shown_wherever_they_are() {
        let schema = Schema::load();
        let context = serde_json::json!({
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {"tls_certificates": [{
                "certificate_chain": {"inline_string": "chain"},
                "private_key": {"inline_string": "very secret"}
            }]},
            "session_ticket_keys": {"keys": [{"inline_bytes": "dmVyeSBzZWNyZXQ="}]}
        });
        let document = serde_json::json!({"filter_chains": [
            {"transport_socket": {"name": "tls", "typed_config": context}}
        ]});
        let name = "envoy.config.listener.v3.Listener";
        let bytes = json::encode(&schema, name, &document).unwrap();
        let text = show(&schema, name, &bytes).to_string();
        assert!(text.contains("chain") && text.contains(REDACTED), "{text}");
        assert!(
            !text.contains("very secret") && !text.contains("dmVyeSBzZWNyZXQ="),
            "{text}"
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_shown_without_harm(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let schema = Schema::load();
            show(&schema, "envoy.config.listener.v3.Listener", &bytes);
        }
    }
}
