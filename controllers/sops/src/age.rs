//! Reading age files (<https://c2sp.org/age>) that were encrypted for X25519 recipients.
//!
//! A header with one stanza per recipient wraps a file key of 16 bytes; a MAC under that key covers the header; the payload
//! is a stream of ChaCha20-Poly1305 chunks of 64 KiB. SOPS puts 32 bytes into it, so everything stays small.

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::{agreement, hkdf, hmac};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use crate::error::{Error, Result};

const VERSION: &str = "age-encryption.org/v1";
const BEGIN: &str = "-----BEGIN AGE ENCRYPTED FILE-----";
const END: &str = "-----END AGE ENCRYPTED FILE-----";
/// Plain bytes of a chunk; each is followed by a tag of 16 bytes.
const CHUNK: usize = 64 * 1024;
const TAG: usize = 16;
/// SOPS wraps 32 bytes; whatever is much longer is not a data key.
const MAX_FILE: usize = 1 << 20;
const MAX_STANZAS: usize = 1_000;

/// A secret key, with its public half.
#[derive(Clone)]
pub(crate) struct Identity {
    secret: [u8; 32],
    public: [u8; 32],
}

impl Identity {
    /// `AGE-SECRET-KEY-1…`.
    pub(crate) fn parse(text: &str, line: usize) -> Result<Identity> {
        let error = |message| Error::Key { line, message };
        if text.to_ascii_uppercase().starts_with("AGE-SECRET-KEY-PQ-") {
            return Err(error(
                "post-quantum identities are not supported; use an X25519 key",
            ));
        }
        if text.to_ascii_uppercase().starts_with("AGE-PLUGIN-") {
            return Err(error(
                "identities of plugins are not supported; use an X25519 key",
            ));
        }
        let (hrp, data) = bech32(text).ok_or(error("not Bech32 text with a right checksum"))?;
        if hrp != "age-secret-key-" {
            return Err(error("it does not start with AGE-SECRET-KEY-1"));
        }
        let secret: [u8; 32] = data.try_into().map_err(|_| error("it is not 32 bytes long"))?;
        let public = private_key(&secret)
            .and_then(|key| key.compute_public_key().ok())
            .and_then(|key| key.as_ref().try_into().ok())
            .ok_or(error("it is no X25519 key"))?;
        Ok(Identity { secret, public })
    }

    /// The file key, if this stanza was made for this identity.
    fn unwrap(&self, stanza: &Stanza<'_>) -> Option<Vec<u8>> {
        let share: [u8; 32] = STANDARD_NO_PAD
            .decode(stanza.arguments.first()?)
            .ok()?
            .try_into()
            .ok()?;
        // An all-zero result means a point of low order; the library refuses it.
        let peer = agreement::UnparsedPublicKey::new(&agreement::X25519, share);
        let shared =
            agreement::agree(&private_key(&self.secret)?, peer, (), |bytes| Ok(bytes.to_vec())).ok()?;
        let salt = [share, self.public].concat();
        let wrap = derive(&salt, &shared, b"age-encryption.org/v1/X25519")?;
        open(&wrap, [0; 12], &stanza.body)
    }
}

fn private_key(secret: &[u8; 32]) -> Option<agreement::PrivateKey> {
    agreement::PrivateKey::from_private_key(&agreement::X25519, secret).ok()
}

struct Stanza<'a> {
    kind: &'a str,
    arguments: Vec<&'a str>,
    body: Vec<u8>,
}

/// Decrypts an armored or binary age file with the first identity that fits. `None` if none does.
pub(crate) fn decrypt(text: &[u8], identities: &[Identity]) -> Result<Option<Vec<u8>>> {
    if text.len() > MAX_FILE {
        return Err(Error::Age("larger than 1 MiB"));
    }
    let binary = match std::str::from_utf8(text) {
        Ok(armored) if armored.trim_start().starts_with(BEGIN) => dearmor(armored)?,
        _ => text.to_vec(),
    };
    let (stanzas, covered, mac, payload) = header(&binary)?;
    let key = stanzas
        .iter()
        .filter(|stanza| stanza.kind == "X25519")
        .find_map(|stanza| identities.iter().find_map(|identity| identity.unwrap(stanza)));
    let Some(key) = key else {
        return Ok(None);
    };
    if key.len() != 16 {
        return Err(Error::Age("the file key is not 16 bytes long"));
    }
    let mac_key = derive(&[], &key, b"header").ok_or(Error::Age("no header key"))?;
    let mac_key = hmac::Key::new(hmac::HMAC_SHA256, &mac_key);
    if hmac::verify(&mac_key, covered, &mac).is_err() {
        return Err(Error::Age("the header was changed"));
    }
    read_payload(&key, payload).map(Some)
}

fn dearmor(text: &str) -> Result<Vec<u8>> {
    let body = text
        .trim()
        .strip_prefix(BEGIN)
        .and_then(|rest| rest.strip_suffix(END))
        .ok_or(Error::Age("the armor has no end"))?;
    let joined: String = body.lines().map(str::trim).collect();
    STANDARD
        .decode(joined)
        .map_err(|_| Error::Age("the armor is not Base64"))
}

/// The stanzas, the bytes that the MAC covers, the MAC, the rest.
#[allow(clippy::type_complexity)]
fn header(file: &[u8]) -> Result<(Vec<Stanza<'_>>, &[u8], Vec<u8>, &[u8])> {
    let mut at = 0;
    let line = |at: &mut usize| -> Result<&str> {
        let rest = &file[*at..];
        let end = rest
            .iter()
            .position(|&b| b == b'\n')
            .ok_or(Error::Age("the header has no end"))?;
        *at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| Error::Age("the header is not text"))
    };
    if line(&mut at)? != VERSION {
        return Err(Error::Age("it is not of version v1"));
    }
    let mut stanzas = Vec::new();
    loop {
        let start = at;
        let first = line(&mut at)?;
        if let Some(mac) = first.strip_prefix("--- ") {
            let mac = STANDARD_NO_PAD
                .decode(mac)
                .map_err(|_| Error::Age("the header's MAC is not Base64"))?;
            return Ok((stanzas, &file[..start + 3], mac, &file[at..]));
        }
        let mut words = first
            .strip_prefix("-> ")
            .ok_or(Error::Age("a stanza does not start with ->"))?
            .split(' ');
        let kind = words.next().unwrap_or_default();
        let arguments = words.collect();
        let mut body = String::new();
        loop {
            let part = line(&mut at)?;
            body.push_str(part);
            match part.len() {
                64 => {}
                0..64 => break,
                _ => return Err(Error::Age("a line of a stanza is longer than 64 characters")),
            }
        }
        let body = STANDARD_NO_PAD
            .decode(body)
            .map_err(|_| Error::Age("a stanza is not Base64"))?;
        stanzas.push(Stanza {
            kind,
            arguments,
            body,
        });
        if stanzas.len() > MAX_STANZAS {
            return Err(Error::Age("more than 1,000 recipients"));
        }
    }
}

fn read_payload(file_key: &[u8], payload: &[u8]) -> Result<Vec<u8>> {
    let Some((nonce, mut rest)) = payload.split_at_checked(16) else {
        return Err(Error::Age("the payload is missing"));
    };
    let key = derive(nonce, file_key, b"payload").ok_or(Error::Age("no payload key"))?;
    let mut out = Vec::new();
    let mut counter = 0_u64;
    loop {
        let length = rest.len().min(CHUNK + TAG);
        let (chunk, next) = rest.split_at(length);
        let last = next.is_empty();
        let mut nonce = [0; 12];
        nonce[3..11].copy_from_slice(&counter.to_be_bytes());
        nonce[11] = u8::from(last);
        let plain = open(&key, nonce, chunk).ok_or(Error::Age("the payload was changed or cut"))?;
        if last && plain.is_empty() && counter > 0 {
            return Err(Error::Age("the last chunk is empty"));
        }
        out.extend(plain);
        if last {
            return Ok(out);
        }
        counter += 1;
        rest = next;
    }
}

/// HKDF-SHA256 to 32 bytes.
fn derive(salt: &[u8], secret: &[u8], info: &[u8]) -> Option<[u8; 32]> {
    struct Length;
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            32
        }
    }
    let mut out = [0; 32];
    let info = [info];
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    prk.expand(&info, Length).ok()?.fill(&mut out).ok()?;
    Some(out)
}

/// Opens one ChaCha20-Poly1305 box.
fn open(key: &[u8; 32], nonce: [u8; 12], sealed: &[u8]) -> Option<Vec<u8>> {
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).ok()?);
    let mut buffer = sealed.to_vec();
    let length = key
        .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut buffer)
        .ok()?
        .len();
    buffer.truncate(length);
    Some(buffer)
}

/// Bech32 (BIP 173) without its limit of 90 characters: the part before the last `1` in lower case, and the bytes.
fn bech32(text: &str) -> Option<(String, Vec<u8>)> {
    const ALPHABET: &[u8] = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l";
    const GENERATOR: [u32; 5] = [0x3b6a_57b2, 0x2650_8e6d, 0x1ea1_19fa, 0x3d42_33dd, 0x2a14_62b3];
    let upper = text.bytes().any(|b| b.is_ascii_uppercase());
    if upper && text.bytes().any(|b| b.is_ascii_lowercase()) {
        return None;
    }
    let text = text.to_ascii_lowercase();
    let (hrp, data) = text.rsplit_once('1')?;
    if hrp.is_empty() || data.len() < 6 || !text.is_ascii() {
        return None;
    }
    let mut values = Vec::with_capacity(data.len());
    for byte in data.bytes() {
        values.push(ALPHABET.iter().position(|&b| b == byte)? as u8);
    }
    let mut checksum = 1_u32;
    let expanded = (hrp.bytes().map(|b| b >> 5))
        .chain([0])
        .chain(hrp.bytes().map(|b| b & 31))
        .chain(values.iter().copied());
    for value in expanded {
        let top = checksum >> 25;
        checksum = ((checksum & 0x01ff_ffff) << 5) ^ u32::from(value);
        for (i, generator) in GENERATOR.iter().enumerate() {
            if top >> i & 1 == 1 {
                checksum ^= generator;
            }
        }
    }
    if checksum != 1 {
        return None;
    }
    let (mut bits, mut count, mut bytes) = (0_u32, 0, Vec::new());
    for value in &values[..values.len() - 6] {
        bits = bits << 5 | u32::from(*value);
        count += 5;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    // What is left over is padding: fewer than five bits, all zero.
    (count < 5 && bits == 0).then(|| (hrp.to_owned(), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_with_a_mistyped_letter_is_refused() {
        let key = "AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33";
        assert!(Identity::parse(key, 1).is_ok());
        let wrong = key.replace("GQ97", "GQ98");
        let error = Identity::parse(&wrong, 3).err().map(|e| e.to_string());
        assert_eq!(
            error.as_deref(),
            Some("age key in line 3 is malformed: not Bech32 text with a right checksum")
        );
    }

    #[test]
    fn bech32_knows_the_vectors_of_its_standard() {
        assert!(bech32("A12UEL5L").is_some());
        assert!(bech32("abcdef1qpzry9x8gf2tvdw0s3jn54khce6mua7lmqqqxw").is_some());
        for wrong in [
            "",
            "1",
            "pzry9x0s0muk",
            "1pzry9x0s0muk",
            "A1G7SGD8",
            "a12UEL5L",
            "10a06t8",
            "é1qqqqqqqq",
        ] {
            assert!(bech32(wrong).is_none(), "{wrong}");
        }
    }
}
