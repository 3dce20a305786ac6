//! Time and chance as inputs.

use jiff::Timestamp;

/// Where the server gets the time, uids and random names from; tests supply their own.
pub trait Clock: Send + Sync + 'static {
    /// The wall-clock time.
    fn now(&self) -> Timestamp;
    /// A fresh uid.
    fn uid(&self) -> String;
    /// `length` random characters of the alphabet that Kubernetes uses for generated names.
    fn suffix(&self, length: usize) -> String;
}

/// The system's clock and random numbers.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

/// No vowels and no look-alikes, so that no words come out.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn uid(&self) -> String {
        uuid::Uuid::new_v4().to_string()
    }

    fn suffix(&self, length: usize) -> String {
        let mut out = String::with_capacity(length);
        while out.len() < length {
            for byte in uuid::Uuid::new_v4().as_bytes() {
                // Bytes beyond a multiple of the alphabet would favour its first letters.
                if out.len() < length && usize::from(*byte) < ALPHABET.len() * (256 / ALPHABET.len()) {
                    out.push(char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()]));
                }
            }
        }
        out
    }
}
