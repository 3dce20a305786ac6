//! One value: `ENC[AES256_GCM,data:…,iv:…,tag:…,type:…]`.

use aes_gcm::AesGcm;
use aes_gcm::aead::array::ArraySize;
use aes_gcm::aead::consts::{U12, U32};
use aes_gcm::aead::{AeadInOut, KeyInit, Nonce};
use aes_gcm::aes::Aes256;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// What a value was before it was encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Str,
    Int,
    Float,
    Bool,
    Bytes,
    Time,
    Comment,
}

/// A decrypted value.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plain {
    pub(crate) kind: Kind,
    pub(crate) bytes: Vec<u8>,
}

/// Opens a value; `path` is its additional data: the keys that lead to it, each followed by a colon.
pub(crate) fn open(text: &str, key: &[u8], path: &str) -> Result<Plain, &'static str> {
    if text.is_empty() {
        return Ok(Plain {
            kind: Kind::Str,
            bytes: Vec::new(),
        });
    }
    let inner = text
        .strip_prefix("ENC[AES256_GCM,data:")
        .and_then(|rest| rest.strip_suffix(']'))
        .ok_or("it is not ENC[AES256_GCM,…]")?;
    let (data, rest) = inner.split_once(",iv:").ok_or("it has no iv")?;
    let (iv, rest) = rest.split_once(",tag:").ok_or("it has no tag")?;
    let (tag, kind) = rest.split_once(",type:").ok_or("it has no type")?;
    let kind = match kind {
        "str" => Kind::Str,
        "int" => Kind::Int,
        "float" => Kind::Float,
        "bool" => Kind::Bool,
        "bytes" => Kind::Bytes,
        "time" => Kind::Time,
        "comment" => Kind::Comment,
        _ => return Err("its type is unknown"),
    };
    let decode = |part: &str| STANDARD.decode(part).map_err(|_| "a part is not Base64");
    let (mut buffer, iv, tag) = (decode(data)?, decode(iv)?, decode(tag)?);
    if tag.len() != 16 {
        return Err("its tag is not 16 bytes long");
    }
    buffer.extend(tag);
    match iv.len() {
        32 => gcm::<U32>(key, &iv, path, &mut buffer)?,
        12 => gcm::<U12>(key, &iv, path, &mut buffer)?,
        _ => return Err("its iv is neither 32 nor 12 bytes long"),
    }
    Ok(Plain { kind, bytes: buffer })
}

fn gcm<N: ArraySize>(key: &[u8], iv: &[u8], path: &str, buffer: &mut Vec<u8>) -> Result<(), &'static str> {
    let cipher = AesGcm::<Aes256, N>::new_from_slice(key).map_err(|_| "the data key is not 32 bytes long")?;
    let nonce = Nonce::<AesGcm<Aes256, N>>::try_from(iv).map_err(|_| "its iv has a wrong length")?;
    cipher
        .decrypt_in_place(&nonce, path.as_bytes(), buffer)
        .map_err(|_| "it was changed, moved to another key, or encrypted with another data key")
}
