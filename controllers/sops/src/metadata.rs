//! What SOPS notes beside the values: for whom the data key is encrypted, which values are encrypted, the MAC.

use regex::{Regex, RegexBuilder};
use serin_manifests::{Map, Value};

use crate::age;
use crate::error::{Error, Result};
use crate::keys::Keys;

/// Size of a compiled rule; those in use are a few words.
const MAX_REGEX_BYTES: usize = 256 << 10;

/// Which values are encrypted.
#[derive(Debug)]
pub(crate) enum Rule {
    UnencryptedSuffix(String),
    EncryptedSuffix(String),
    UnencryptedRegex(Regex),
    EncryptedRegex(Regex),
}

impl Rule {
    /// Whether the value at a path of keys is encrypted.
    pub(crate) fn applies(&self, path: &[&str]) -> bool {
        match self {
            Rule::UnencryptedSuffix(suffix) => !path.iter().any(|key| key.ends_with(suffix.as_str())),
            Rule::EncryptedSuffix(suffix) => path.iter().any(|key| key.ends_with(suffix.as_str())),
            Rule::UnencryptedRegex(regex) => !path.iter().any(|key| regex.is_match(key)),
            Rule::EncryptedRegex(regex) => path.iter().any(|key| regex.is_match(key)),
        }
    }
}

/// The `sops` part of a document.
#[derive(Debug)]
pub(crate) struct Metadata {
    /// Recipient and armored age file of each.
    age: Vec<(String, String)>,
    /// Names of the other kinds of keys in use.
    others: Vec<&'static str>,
    pub(crate) rule: Rule,
    pub(crate) mac: String,
    /// RFC 3339, as SOPS writes it; the additional data of the MAC.
    pub(crate) last_modified: String,
    pub(crate) mac_only_encrypted: bool,
}

/// Lists of keys that another program or service would have to open.
const OTHERS: [(&str, &str); 6] = [
    ("pgp", "PGP"),
    ("kms", "AWS KMS"),
    ("gcp_kms", "GCP KMS"),
    ("azure_kv", "Azure Key Vault"),
    ("hc_vault", "HashiCorp Vault"),
    ("hckms", "Huawei KMS"),
];

impl Metadata {
    /// From the value below `sops`.
    pub(crate) fn from_value(value: &Value) -> Result<Metadata> {
        let map = value
            .as_map()
            .ok_or_else(|| Error::Metadata("`sops` is not a mapping".into()))?;
        let groups = list(map, "key_groups");
        let keys = match groups {
            [] => map,
            [Value::Map(one)] if list(map, "age").is_empty() => one,
            _ => {
                return Err(Error::Unsupported {
                    what: format!(
                        "data keys shared between {} key groups (Shamir) are",
                        groups.len()
                    ),
                    instead: "encrypt the file for one group of keys",
                });
            }
        };
        let mut age = Vec::new();
        for entry in list(keys, "age") {
            age.push((text(entry, "recipient")?, text(entry, "enc")?));
        }
        let others = OTHERS
            .iter()
            .filter(|(field, _)| !list(keys, field).is_empty())
            .map(|(_, name)| *name)
            .collect();
        let last_modified = text(value, "lastmodified")?;
        Ok(Metadata {
            age,
            others,
            rule: rule(map)?,
            mac: text(value, "mac")?,
            last_modified: match last_modified.strip_suffix("+00:00") {
                Some(time) => format!("{time}Z"),
                None => last_modified,
            },
            mac_only_encrypted: map.get("mac_only_encrypted").and_then(Value::text) == Some("true"),
        })
    }

    /// The key of all values, opened with one of the reader's keys.
    pub(crate) fn data_key(&self, keys: &Keys) -> Result<Vec<u8>> {
        if self.age.is_empty() {
            if self.others.is_empty() {
                return Err(Error::Metadata("no keys found in file".into()));
            }
            return Err(Error::Unsupported {
                what: format!("{} keys are", self.others.join(" and ")),
                instead: "add an age recipient to the file with `sops rotate --add-age`",
            });
        }
        let mut broken = None;
        for (_, file) in &self.age {
            match age::decrypt(file.as_bytes(), keys.identities()) {
                Ok(Some(key)) if key.len() == 32 => return Ok(key),
                Ok(Some(_)) => broken = Some(Error::Age("the data key is not 32 bytes long")),
                Ok(None) => {}
                Err(e) => broken = Some(e),
            }
        }
        let recipients: Vec<&str> = self.age.iter().map(|(recipient, _)| recipient.as_str()).collect();
        Err(broken.unwrap_or(Error::NoKey {
            given: keys.len(),
            recipients: recipients.join(", "),
        }))
    }
}

fn list<'a>(map: &'a Map, field: &str) -> &'a [Value] {
    map.get(field).and_then(Value::as_seq).unwrap_or_default()
}

fn text(value: &Value, field: &str) -> Result<String> {
    let found = value.get(field).and_then(Value::text);
    found
        .map(str::to_owned)
        .ok_or_else(|| Error::Metadata(format!("`{field}` is missing")))
}

fn rule(map: &Map) -> Result<Rule> {
    let given = |field| {
        map.get(field)
            .and_then(Value::text)
            .filter(|text| !text.is_empty())
    };
    for field in ["encrypted_comment_regex", "unencrypted_comment_regex"] {
        if given(field).is_some() {
            return Err(Error::Unsupported {
                what: format!("`{field}` is"),
                instead: "use `encrypted_regex`, which looks at keys",
            });
        }
    }
    let compile = |pattern: &str| {
        RegexBuilder::new(pattern)
            .size_limit(MAX_REGEX_BYTES)
            .build()
            .map_err(|_| {
                Error::Metadata(format!(
                    "'{pattern}' is not a regular expression, or a too large one"
                ))
            })
    };
    let mut rules = Vec::new();
    if let Some(suffix) = given("unencrypted_suffix") {
        rules.push(Rule::UnencryptedSuffix(suffix.to_owned()));
    }
    if let Some(suffix) = given("encrypted_suffix") {
        rules.push(Rule::EncryptedSuffix(suffix.to_owned()));
    }
    if let Some(pattern) = given("unencrypted_regex") {
        rules.push(Rule::UnencryptedRegex(compile(pattern)?));
    }
    if let Some(pattern) = given("encrypted_regex") {
        rules.push(Rule::EncryptedRegex(compile(pattern)?));
    }
    if rules.len() > 1 {
        return Err(Error::Metadata(
            "cannot use more than one of encrypted_suffix, unencrypted_suffix, encrypted_regex and unencrypted_regex"
                .into(),
        ));
    }
    Ok(rules
        .pop()
        .unwrap_or_else(|| Rule::UnencryptedSuffix("_unencrypted".to_owned())))
}
