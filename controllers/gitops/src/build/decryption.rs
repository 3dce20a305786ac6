//! `spec.decryption`: files and objects that SOPS encrypted.
//!
//! Files of secret generators and patches are opened while kustomize reads them, and checked against their MAC; objects are
//! opened after the build, value by value, since kustomize may have changed what is not encrypted. A `Secret` may also
//! hold whole encrypted files as its values. What stays encrypted is refused, never applied.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serin_kustomize::{Decrypt, EncryptedUse};
use serin_manifests::{Object, Value};
use serin_sops::{Format, Keys};
use sha2::{Digest, Sha256};

use super::whereabouts;
use crate::error::Error;

/// The keys of one Kustomization.
#[derive(Debug, Default)]
pub(crate) struct Decryption {
    pub(crate) keys: Keys,
    /// Changes when the keys do.
    pub(crate) digest: [u8; 32],
}

impl Decryption {
    /// From the values of a Secret: those whose name ends in `.agekey` are age identities, as in Flux.
    pub(crate) fn from_secret<'a>(
        data: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    ) -> Result<Decryption, String> {
        let (mut keys, mut hash) = (Keys::new(), Sha256::new());
        for (name, value) in data {
            if !name.ends_with(".agekey") {
                continue;
            }
            let text = std::str::from_utf8(value).map_err(|_| format!("'{name}' is not text"))?;
            keys.add_age(text).map_err(|e| format!("'{name}': {e}"))?;
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
        Ok(Decryption {
            keys,
            digest: hash.finalize().into(),
        })
    }
}

impl Decrypt for Decryption {
    fn open(&self, path: &str, content: &[u8], wanted: EncryptedUse) -> Result<Option<Vec<u8>>, String> {
        let Some(from) = serin_sops::detect(content) else {
            return Ok(None);
        };
        let to = match (wanted, Format::of_path(path)) {
            (EncryptedUse::Env, Format::Binary) => Format::Dotenv,
            // A patch is read as YAML, of which JSON is a part.
            (EncryptedUse::Patch, Format::Binary) => from,
            (_, format) => format,
        };
        serin_sops::decrypt(content, from, to, &self.keys)
            .map(Some)
            .map_err(|e| e.to_string())
    }
}

/// Decrypts an object in place, if there is something to decrypt in it.
pub(super) fn open_object(object: &mut Object, decryption: Option<&Decryption>) -> Result<(), Error> {
    let secret = object.kind() == "Secret";
    if serin_sops::is_encrypted(object.root()) || (secret && object.root().get("sops").is_some()) {
        let at = whereabouts(object);
        let Some(decryption) = decryption else {
            return Err(Error::Build(format!(
                "{at} is SOPS encrypted, configuring decryption is required for this {} to be reconciled",
                object.kind().to_lowercase()
            )));
        };
        return serin_sops::decrypt_object(object.root_mut(), &decryption.keys)
            .map_err(|e| Error::Build(format!("{at}: {e}")));
    }
    match decryption {
        Some(decryption) if secret => open_values(object, decryption),
        _ => Ok(()),
    }
}

/// Values of a Secret that are encrypted files themselves.
fn open_values(object: &mut Object, decryption: &Decryption) -> Result<(), Error> {
    let at = whereabouts(object);
    let Some(Value::Map(data)) = object.root_mut().get_mut("data") else {
        return Ok(());
    };
    for entry in &mut data.entries {
        let Some(content) = entry.value.text().and_then(|text| STANDARD.decode(text).ok()) else {
            continue;
        };
        let key = &entry.key.text;
        let opened = decryption
            .open(key, &content, EncryptedUse::File)
            .map_err(|e| Error::Build(format!("{at}: data.{key}: {e}")))?;
        if let Some(opened) = opened {
            entry.value = Value::string(STANDARD.encode(opened));
        }
    }
    Ok(())
}
