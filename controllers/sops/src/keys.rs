//! The keys of the reader, as data.

use std::fmt;

use crate::age::Identity;
use crate::error::Result;

/// Age identities. Printing them shows their number only.
#[derive(Clone, Default)]
pub struct Keys {
    identities: Vec<Identity>,
}

impl Keys {
    /// No keys.
    pub fn new() -> Keys {
        Keys::default()
    }

    /// Adds the identities of a key file as `age-keygen` writes it: one per line, `#` starts a comment.
    pub fn add_age(&mut self, text: &str) -> Result<&mut Keys> {
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if !line.is_empty() && !line.starts_with('#') {
                self.identities.push(Identity::parse(line, number + 1)?);
            }
        }
        Ok(self)
    }

    /// Number of identities.
    pub fn len(&self) -> usize {
        self.identities.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.identities.is_empty()
    }

    pub(crate) fn identities(&self) -> &[Identity] {
        &self.identities
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({} age identities)", self.identities.len())
    }
}
