//! Decryption of files and objects that SOPS has encrypted for age recipients.
//!
//! Text goes in with the [`Keys`] as data, text comes out: [`decrypt`] for files (YAML, JSON, dotenv, binary), and
//! [`decrypt_object`] for an object that is already parsed. Nothing is read from a disk, an environment or a network, and
//! nothing is encrypted here.
//!
//! How data flows: `document` makes a tree of the text and splits off the metadata (`metadata`); one of its age
//! stanzas gives the data key (`age`); `tree` walks the values in the order of the file, opens each with AES-256-GCM
//! (`cipher`), whose additional data is the path of the value so that values cannot be swapped, and hashes all of them; the
//! hash must be the MAC of the metadata, so that no value was added or taken away.
//!
//! A file is always checked against its MAC. An object is not ([`decrypt_object`]), because kustomize may have changed
//! fields that are not encrypted, and has sorted its keys; Flux does the same. Each value is still authenticated in its
//! place.
//!
//! Not here, and refused by name: PGP, cloud KMS and Vault keys where no age key fits, keys that are shared
//! between groups (Shamir), post-quantum and SSH age recipients, rules that depend on comments, INI. Comments of YAML
//! files are not kept.
//!
//! Formats: SOPS 3 (`ENC[AES256_GCM,…]`), age v1 (<https://c2sp.org/age>).

mod age;
mod cipher;
mod document;
mod error;
mod keys;
mod metadata;
mod tree;

use serin_manifests::{Map, Value};

pub use document::Format;
pub use error::{Error, Result};
pub use keys::Keys;

/// Decrypts a file that SOPS wrote, and checks its MAC. `from` is the format of the text, `to` the one wanted; they
/// differ where a file lies encrypted as YAML under a name that says otherwise.
pub fn decrypt(text: &[u8], from: Format, to: Format, keys: &Keys) -> Result<Vec<u8>> {
    let mut document = document::read(text, from)?;
    let data_key = document.metadata.data_key(keys)?;
    if to == Format::Binary
        && let Some(data) = document.binary_data()
    {
        return tree::open_bytes(data, &document.metadata, &data_key);
    }
    tree::open(
        &mut document.trees,
        &document.metadata,
        &data_key,
        tree::Check::Mac,
    )?;
    document::write(&document.trees, from, to)
}

/// Whether a file carries the marks of SOPS, and in which format. Cheap; what it says yes to may still be broken.
pub fn detect(text: &[u8]) -> Option<Format> {
    document::detect(text)
}

/// Whether an object has been encrypted by SOPS: it has a `sops` field with a `mac`.
pub fn is_encrypted(object: &Map) -> bool {
    object.get("sops").is_some_and(|sops| sops.get("mac").is_some())
}

/// Decrypts an object in which kustomize may have changed what is not encrypted: the MAC is not checked, but
/// every value is authenticated with its path.
pub fn decrypt_object(object: &mut Map, keys: &Keys) -> Result<()> {
    let Some(sops) = object.remove("sops") else {
        return Err(Error::NotEncrypted);
    };
    let metadata = metadata::Metadata::from_value(&sops)?;
    let data_key = metadata.data_key(keys)?;
    let mut trees = vec![Value::Map(std::mem::take(object))];
    tree::open(&mut trees, &metadata, &data_key, tree::Check::EachValue)?;
    if let Some(Value::Map(map)) = trees.pop() {
        *object = map;
    }
    Ok(())
}
