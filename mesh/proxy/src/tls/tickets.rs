//! Session tickets under keys that the operator gives, so that several proxies resume each other's sessions.
//!
//! A key is 80 bytes, as for Envoy: 16 of name, 32 that we encrypt with (AES-256-GCM), 32 that Envoy would authenticate
//! with and that we mix into the associated data. Tickets are ours: an Envoy with the same keys cannot read them. The
//! first key makes tickets, all of them open tickets.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::server::ProducesTickets;

use crate::error::Refusal;

/// Bytes of a key.
const KEY: usize = 80;
/// Bytes of a key's name.
const NAME: usize = 16;

struct Key {
    name: [u8; NAME],
    tag: [u8; 32],
    key: LessSafeKey,
}

/// See the module.
pub struct Ticketer {
    keys: Vec<Key>,
    lifetime: u32,
    now: fn() -> u64,
}

impl std::fmt::Debug for Ticketer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticketer")
            .field("keys", &self.keys.len())
            .finish_non_exhaustive()
    }
}

fn unix_now() -> u64 {
    rustls_pki_types::UnixTime::now().as_secs()
}

impl Ticketer {
    /// With these keys of 80 bytes; tickets are good for `lifetime` seconds.
    pub fn new(keys: &[Vec<u8>], lifetime: u32) -> Result<Self, Refusal> {
        let keys = keys
            .iter()
            .enumerate()
            .map(|(index, bytes)| {
                let path = format!("keys[{index}]");
                let bytes: &[u8; KEY] = bytes.as_slice().try_into().map_err(|_| {
                    Refusal::new(
                        &*path,
                        format!("a session ticket key has {KEY} bytes, this has {}", bytes.len()),
                    )
                })?;
                let mut name = [0; NAME];
                name.copy_from_slice(&bytes[..NAME]);
                let mut tag = [0; 32];
                tag.copy_from_slice(&bytes[NAME + 32..]);
                let key = UnboundKey::new(&AES_256_GCM, &bytes[NAME..NAME + 32])
                    .map_err(|_| Refusal::new(&*path, "cannot be used"))?;
                Ok(Key {
                    name,
                    tag,
                    key: LessSafeKey::new(key),
                })
            })
            .collect::<Result<Vec<_>, Refusal>>()?;
        if keys.is_empty() {
            return Err(Refusal::new("keys", "there is no key"));
        }
        Ok(Self {
            keys,
            lifetime,
            now: unix_now,
        })
    }

    /// With a key of its own that nobody else knows.
    pub fn random(lifetime: u32) -> Result<Self, Refusal> {
        let mut key = vec![0; KEY];
        aws_lc_rs::rand::fill(&mut key).map_err(|_| Refusal::new("", "the system has no randomness"))?;
        Self::new(&[key], lifetime)
    }
}

impl ProducesTickets for Ticketer {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.lifetime
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let key = self.keys.first()?;
        let mut nonce = [0; NONCE_LEN];
        aws_lc_rs::rand::fill(&mut nonce).ok()?;
        let mut sealed = (self.now)().to_be_bytes().to_vec();
        sealed.extend_from_slice(plain);
        key.key
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(key.tag),
                &mut sealed,
            )
            .ok()?;
        Some([&key.name[..], &nonce[..], &sealed].concat())
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        let (name, rest) = cipher.split_at_checked(NAME)?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_LEN)?;
        let key = self.keys.iter().find(|key| key.name == name)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let opened = key
            .key
            .open_in_place(nonce, Aad::from(key.tag), &mut sealed)
            .ok()?;
        let (made, plain) = opened.split_at_checked(8)?;
        let made = u64::from_be_bytes(made.try_into().ok()?);
        // Also where the clock was set back since: a ticket from further ahead than it lasts would last as long as that.
        ((self.now)().abs_diff(made) <= u64::from(self.lifetime)).then(|| plain.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> Vec<u8> {
        (0..80).map(|index| index ^ seed).collect()
    }

    #[test]
    fn tickets_of_an_older_key_are_opened_and_of_an_unknown_one_are_not() {
        let old = Ticketer::new(&[key(1)], 60).unwrap();
        let both = Ticketer::new(&[key(2), key(1)], 60).unwrap();
        let ticket = old.encrypt(b"session").unwrap();
        assert_eq!(both.decrypt(&ticket).unwrap(), b"session");
        assert!(Ticketer::new(&[key(3)], 60).unwrap().decrypt(&ticket).is_none());
        assert!(old.decrypt(&both.encrypt(b"x").unwrap()).is_none());
        let mut broken = ticket.clone();
        broken[40] ^= 1;
        assert!(both.decrypt(&broken).is_none());
        assert!(both.decrypt(&ticket[..20]).is_none());
    }

    #[test]
    fn a_ticket_is_good_for_its_lifetime_only() {
        let mut ticketer = Ticketer::new(&[key(1)], 60).unwrap();
        ticketer.now = || 1_000;
        let ticket = ticketer.encrypt(b"session").unwrap();
        ticketer.now = || 1_060;
        assert!(ticketer.decrypt(&ticket).is_some());
        ticketer.now = || 1_061;
        assert!(ticketer.decrypt(&ticket).is_none());
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_make_tickets_last_longer() {
        let mut ticketer = Ticketer::new(&[key(1)], 60).unwrap();
        ticketer.now = || 1_000_000;
        let ticket = ticketer.encrypt(b"session").unwrap();
        ticketer.now = || 999_940;
        assert!(ticketer.decrypt(&ticket).is_some(), "within its lifetime");
        ticketer.now = || 999_939;
        assert!(ticketer.decrypt(&ticket).is_none());
        ticketer.now = || 0;
        assert!(ticketer.decrypt(&ticket).is_none());
    }

    #[test]
    fn keys_of_another_length_are_refused() {
        assert_eq!(Ticketer::new(&[vec![0; 48]], 1).unwrap_err().path, "keys[0]");
        assert_eq!(Ticketer::new(&[], 1).unwrap_err().path, "keys");
    }
}
