//! Content versions: a hash of an encoded message that does not depend on the order of map entries.
//!
//! Protobuf maps have no order on the wire, and the generated types hold them in hash maps, so two encodings of the
//! same message may differ. A version must be equal for equal content, also between two runs of the control plane:
//! a proxy that reconnects after a restart states the versions it holds, and only what differs is sent.
//!
//! There is no schema here. A run of consecutive entries of one field counts as a map when every entry is a message
//! of a printable string key (field 1) and at most a length-delimited value (field 2), with distinct keys; such a run
//! is hashed in key order. What this cannot tell apart is a *list* of such pairs in two orders (for example the
//! initial metadata of a gRPC service), whose order means nothing in the Envoy API. Lists of header mutations are not
//! affected: their first field is a message, whose bytes are not printable.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// Bytes of the hash kept: 96 bits, so that a collision among a billion versions has a chance of about 1e-11.
const VERSION_BYTES: usize = 12;

/// Messages nested deeper than this are hashed as they are.
const MAX_DEPTH: usize = 32;

/// The version of an encoded message: 24 hexadecimal digits.
pub(crate) fn content_version(message: &[u8]) -> String {
    let digest = Sha256::digest(canonical(message, 0).as_deref().unwrap_or(message));
    digest
        .iter()
        .take(VERSION_BYTES)
        .fold(String::with_capacity(VERSION_BYTES * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
            text
        })
}

/// One field of an encoded message: its number, its whole encoding and, when length-delimited, its content.
struct Field<'a> {
    number: u64,
    encoded: &'a [u8],
    content: Option<&'a [u8]>,
}

/// The message with the entries of its maps in key order, at every depth; `None` if the bytes are no message.
fn canonical(message: &[u8], depth: usize) -> Option<Vec<u8>> {
    if depth > MAX_DEPTH || message.is_empty() {
        return None;
    }
    let fields = fields(message)?;
    let mut out = Vec::with_capacity(message.len());
    let mut rest = fields.as_slice();
    while let Some(first) = rest.first() {
        let run = rest
            .iter()
            .take_while(|field| field.number == first.number)
            .count();
        let (group, tail) = rest.split_at(run);
        match map_order(group) {
            Some(ordered) => ordered.into_iter().for_each(|field| push(&mut out, field, depth)),
            None => group.iter().for_each(|field| push(&mut out, field, depth)),
        }
        rest = tail;
    }
    Some(out)
}

fn push(out: &mut Vec<u8>, field: &Field<'_>, depth: usize) {
    match field.content {
        // Reordering keeps lengths, so the tag and the length in front stay true.
        Some(content) => {
            let head = field.encoded.len() - content.len();
            out.extend_from_slice(&field.encoded[..head]);
            match canonical(content, depth + 1) {
                Some(ordered) => out.extend_from_slice(&ordered),
                None => out.extend_from_slice(content),
            }
        }
        None => out.extend_from_slice(field.encoded),
    }
}

/// The fields of the group in key order if the group looks like a map of two entries or more.
fn map_order<'a, 'b>(group: &'b [Field<'a>]) -> Option<Vec<&'b Field<'a>>> {
    if group.len() < 2 {
        return None;
    }
    let mut ordered = BTreeMap::new();
    for field in group {
        ordered.insert(map_key(field.content?)?, field);
    }
    (ordered.len() == group.len()).then(|| ordered.into_values().collect())
}

fn map_key(entry: &[u8]) -> Option<&[u8]> {
    let entry = fields(entry)?;
    let (key, value) = match entry.as_slice() {
        [key] => (key, None),
        [key, value] => (key, Some(value)),
        _ => return None,
    };
    let is_value = value.is_none_or(|value| value.number == 2 && value.content.is_some());
    let text = key.content.filter(|_| key.number == 1 && is_value)?;
    std::str::from_utf8(text)
        .ok()
        .filter(|text| !text.chars().any(char::is_control))
        .map(str::as_bytes)
}

/// Splits an encoded message into its fields; `None` if it is not a well-formed one.
fn fields(message: &[u8]) -> Option<Vec<Field<'_>>> {
    let mut fields = Vec::new();
    let mut rest = message;
    while !rest.is_empty() {
        let start = rest;
        let (tag, after_tag) = varint(rest)?;
        let number = tag >> 3;
        let (content, after) = match tag & 7 {
            0 => (None, varint(after_tag)?.1),
            1 => (None, after_tag.get(8..)?),
            2 => {
                let (length, body) = varint(after_tag)?;
                let length = usize::try_from(length).ok()?;
                (Some(body.get(..length)?), body.get(length..)?)
            }
            5 => (None, after_tag.get(4..)?),
            _ => return None,
        };
        if number == 0 {
            return None;
        }
        fields.push(Field {
            number,
            encoded: &start[..start.len() - after.len()],
            content,
        });
        rest = after;
    }
    Some(fields)
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * index).min(63);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[index + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use envoy_types::pb::envoy::config::core::v3::{HeaderValue, HeaderValueOption, Metadata};
    use envoy_types::pb::envoy::config::route::v3::VirtualHost;
    use envoy_types::pb::google::protobuf::value::Kind;
    use envoy_types::pb::google::protobuf::{Struct, Value};
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    fn metadata(entries: &[(String, String)]) -> Metadata {
        let fields: HashMap<_, _> = entries
            .iter()
            .map(|(key, value)| {
                (
                    key.clone(),
                    Value {
                        kind: Some(Kind::StringValue(value.clone())),
                    },
                )
            })
            .collect();
        let inner = Struct { fields };
        let filter_metadata = [("istio".to_string(), inner.clone()), ("other".to_string(), inner)]
            .into_iter()
            .collect();
        Metadata {
            filter_metadata,
            ..Metadata::default()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn equal_maps_have_equal_versions_whatever_their_order(
            entries in proptest::collection::hash_map("[a-z]{1,8}", "[ -~]{0,12}", 0..12)
        ) {
            let entries: Vec<_> = entries.into_iter().collect();
            // Two hash maps with different random states encode in different orders.
            let one = metadata(&entries).encode_to_vec();
            let two = metadata(&entries).encode_to_vec();
            prop_assert_eq!(content_version(&one), content_version(&two));
        }

        #[test]
        fn different_values_have_different_versions(
            entries in proptest::collection::hash_map("[a-z]{1,8}", "[ -~]{0,12}", 1..12)
        ) {
            let mut entries: Vec<_> = entries.into_iter().collect();
            let one = content_version(&metadata(&entries).encode_to_vec());
            entries[0].1.push('x');
            prop_assert_ne!(one, content_version(&metadata(&entries).encode_to_vec()));
        }

        #[test]
        fn any_bytes_have_a_version(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(content_version(&bytes).len(), 24);
        }
    }

    #[test]
    fn the_order_of_header_mutations_and_of_domains_is_content() {
        let header = |name: &str| HeaderValueOption {
            header: Some(HeaderValue {
                key: name.into(),
                value: "1".into(),
                ..HeaderValue::default()
            }),
            ..HeaderValueOption::default()
        };
        let host = |headers: [&str; 2], domains: [&str; 2]| VirtualHost {
            name: "reviews:9080".into(),
            domains: domains.map(String::from).to_vec(),
            request_headers_to_add: headers.map(header).to_vec(),
            ..VirtualHost::default()
        };
        let version = |host: VirtualHost| content_version(&host.encode_to_vec());
        let first = version(host(["a", "b"], ["x", "y"]));
        assert_ne!(first, version(host(["b", "a"], ["x", "y"])));
        assert_ne!(first, version(host(["a", "b"], ["y", "x"])));
    }
}
