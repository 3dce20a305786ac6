//! The values of a document: opened in the order of the file, and hashed for the MAC.

use std::fmt::Write as _;

use aws_lc_rs::digest;
use serin_manifests::{Plain as Read, Scalar, Style, Tag, Value};

use crate::cipher::{self, Kind, Plain};
use crate::error::{Error, Result};
use crate::metadata::Metadata;

/// What the MAC starts with when it covers encrypted values only: SHA-256 of `sops`.
const ONLY_ENCRYPTED: [u8; 32] = [
    0x8a, 0x3f, 0xd2, 0xad, 0x54, 0xce, 0x66, 0x52, 0x7b, 0x10, 0x34, 0xf3, 0xd1, 0x47, 0xbe, 0x0b, 0x0b,
    0x97, 0x5b, 0x3b, 0xf4, 0x4f, 0x72, 0xc6, 0xfd, 0xad, 0xec, 0x81, 0x76, 0xf2, 0x7d, 0x69,
];

/// What is checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// Every value in its place, and that all of them are there in order.
    Mac,
    /// Every value in its place.
    EachValue,
}

/// Decrypts the values of all documents of a file.
pub(crate) fn open(trees: &mut [Value], metadata: &Metadata, key: &[u8], check: Check) -> Result<()> {
    let mut walk = Walk::new(metadata, key);
    for tree in trees.iter_mut() {
        walk.value(tree, &mut Vec::new())?;
    }
    match check {
        Check::EachValue => Ok(()),
        Check::Mac => verify(walk, metadata, key),
    }
}

/// Decrypts the one value of a binary file, which need not be text, and checks its MAC.
pub(crate) fn open_bytes(data: &str, metadata: &Metadata, key: &[u8]) -> Result<Vec<u8>> {
    let opened = cipher::open(data, key, "data:").map_err(|message| Error::Value {
        path: "data".into(),
        message,
    })?;
    let mut walk = Walk::new(metadata, key);
    walk.hash.update(&opened.bytes);
    verify(walk, metadata, key)?;
    Ok(opened.bytes)
}

fn verify(walk: Walk<'_>, metadata: &Metadata, key: &[u8]) -> Result<()> {
    let stated =
        cipher::open(&metadata.mac, key, &metadata.last_modified).map_err(|message| Error::Value {
            path: "sops.mac".into(),
            message,
        })?;
    let mut found = String::new();
    for byte in walk.hash.finish().as_ref() {
        // Writing to a String cannot fail.
        let _ = write!(found, "{byte:02X}");
    }
    if stated.bytes == found.as_bytes() {
        Ok(())
    } else {
        Err(Error::Mac)
    }
}

struct Walk<'a> {
    metadata: &'a Metadata,
    key: &'a [u8],
    hash: digest::Context,
}

impl<'a> Walk<'a> {
    fn new(metadata: &'a Metadata, key: &'a [u8]) -> Walk<'a> {
        let mut hash = digest::Context::new(&digest::SHA512);
        if metadata.mac_only_encrypted {
            hash.update(&ONLY_ENCRYPTED);
        }
        Walk { metadata, key, hash }
    }

    /// Says whether the value is to be kept: an encrypted comment in a list is not.
    fn value(&mut self, value: &mut Value, path: &mut Vec<String>) -> Result<bool> {
        match value {
            Value::Map(map) => {
                for entry in &mut map.entries {
                    path.push(entry.key.text.to_string());
                    self.value(&mut entry.value, path)?;
                    path.pop();
                }
                Ok(true)
            }
            Value::Seq(seq) => {
                // Elements have the path of their list.
                let mut kept = Vec::with_capacity(seq.items.len());
                for mut item in seq.items.drain(..) {
                    if self.value(&mut item, path)? {
                        kept.push(item);
                    }
                }
                seq.items = kept;
                Ok(true)
            }
            Value::Scalar(scalar) => self.scalar(scalar, path),
        }
    }

    fn scalar(&mut self, scalar: &mut Scalar, path: &[String]) -> Result<bool> {
        let error = |message| Error::Value {
            path: path.join("."),
            message,
        };
        let read = scalar
            .plain()
            .map_err(|_| error("it cannot be read as what its tag says"))?;
        if matches!(read, Read::Null) {
            return Ok(true);
        }
        let keys: Vec<&str> = path.iter().map(String::as_str).collect();
        if !self.metadata.rule.applies(&keys) {
            if !self.metadata.mac_only_encrypted {
                let bytes = bytes_of(&read, scalar.tag);
                self.hash.update(&bytes);
            }
            return Ok(true);
        }
        let Read::Str(text) = &read else {
            return Err(error("it should be encrypted, but is not text"));
        };
        let additional: String = keys.iter().flat_map(|key| [*key, ":"]).collect();
        let opened = cipher::open(text, self.key, &additional).map_err(error)?;
        let Some(bytes) = hashed(&opened) else {
            return Err(error("it does not have the type that it states"));
        };
        if opened.kind == Kind::Comment {
            return Ok(false);
        }
        self.hash.update(&bytes);
        let style = scalar.style;
        *scalar = scalar_of(opened).ok_or_else(|| error("it is not UTF-8 text"))?;
        // The quotes around the cipher text say nothing about the value.
        scalar.style = if style == Style::Literal {
            Style::Literal
        } else {
            Style::Plain
        };
        Ok(true)
    }
}

/// What a decrypted value adds to the MAC. `None` if it is not what its type says.
fn hashed(plain: &Plain) -> Option<Vec<u8>> {
    let text = || std::str::from_utf8(&plain.bytes).ok();
    Some(match plain.kind {
        Kind::Str | Kind::Bytes | Kind::Time | Kind::Comment => plain.bytes.clone(),
        Kind::Int => text()?.parse::<i64>().ok()?.to_string().into_bytes(),
        Kind::Float => float(text()?.parse().ok()?).into_bytes(),
        Kind::Bool => boolean(truth(text()?)?).to_vec(),
    })
}

/// What a value that is not encrypted adds to the MAC.
fn bytes_of(read: &Read<'_>, tag: Tag) -> Vec<u8> {
    match read {
        Read::Null => Vec::new(),
        Read::Bool(value) => boolean(*value).to_vec(),
        Read::Int(number) => number.to_string().into_bytes(),
        Read::Uint(number) => number.to_string().into_bytes(),
        Read::Float(number) => float(*number).into_bytes(),
        Read::Str(text) if tag == Tag::Timestamp && text.len() == 10 => {
            format!("{text}T00:00:00Z").into_bytes()
        }
        Read::Str(text) => text.as_bytes().to_vec(),
    }
}

fn boolean(value: bool) -> &'static [u8] {
    if value { b"True" } else { b"False" }
}

/// The spellings of Go's `strconv.ParseBool`.
fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// The shortest text without an exponent, as Go's `strconv.FormatFloat(x, 'f', -1, 64)`.
fn float(number: f64) -> String {
    if number.is_infinite() {
        return if number > 0.0 { "+Inf" } else { "-Inf" }.to_owned();
    }
    number.to_string()
}

fn scalar_of(plain: Plain) -> Option<Scalar> {
    let text = String::from_utf8(plain.bytes).ok()?;
    Some(match plain.kind {
        Kind::Str | Kind::Bytes | Kind::Comment => Scalar::string(text),
        Kind::Int => Scalar::tagged_as(Tag::Int, text),
        Kind::Float => {
            let text = serin_manifests::go_float(text.parse().ok()?);
            Scalar::tagged_as(serin_manifests::tag_of(&text), text)
        }
        Kind::Bool => Scalar::tagged_as(Tag::Bool, if truth(&text)? { "true" } else { "false" }),
        Kind::Time => Scalar::tagged_as(Tag::Timestamp, text),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_hashed_as_go_prints_them() {
        assert_eq!(float(1e21), "1000000000000000000000");
        assert_eq!(float(1.5), "1.5");
        assert_eq!(float(1e-7), "0.0000001");
        assert_eq!(float(3.0), "3");
    }
}
