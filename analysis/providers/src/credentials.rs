//! Secrets that cannot be printed by accident.

use std::collections::BTreeMap;

/// What stands in place of a secret.
const REDACTED: &str = "***";
/// Shorter values are not looked for in texts: they would match everywhere, and guessing them needs no log.
const SCRUB_MIN: usize = 4;

/// A secret value. `Debug` does not show it, and there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<Vec<u8>>) -> Self {
        Self(value.into())
    }

    /// The value, to be put on the wire and nowhere else. White space around it is cut: a Secret made from a file ends
    /// in a line feed, which no header can carry.
    pub(crate) fn expose(&self) -> Result<&str, std::str::Utf8Error> {
        std::str::from_utf8(&self.0).map(str::trim)
    }

    pub(crate) fn expose_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(REDACTED)
    }
}

/// The data of a Secret object.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials(BTreeMap<String, Secret>);

impl Credentials {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Secret> {
        self.0.get(key)
    }

    /// The text with every value that occurs in it taken out.
    pub(crate) fn scrub(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in self.0.values() {
            if let Ok(value) = secret.expose()
                && value.len() >= SCRUB_MIN
                && text.contains(value)
            {
                text = text.replace(value, REDACTED);
            }
        }
        text
    }
}

impl<K: Into<String>, V: Into<Vec<u8>>> FromIterator<(K, V)> for Credentials {
    fn from_iter<T: IntoIterator<Item = (K, V)>>(pairs: T) -> Self {
        Self(
            pairs
                .into_iter()
                .map(|(key, value)| (key.into(), Secret::new(value)))
                .collect(),
        )
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn credentials_are_neither_printed_nor_repeated_in_errors() {
        let credentials: Credentials = [("token", "s3cr3t-t0ken\n"), ("pin", "12")].into_iter().collect();
        let printed = format!("{credentials:?} {:?}", credentials.get("token"));
        assert!(
            printed.contains("token") && !printed.contains("s3cr3t"),
            "{printed}"
        );
        let error = Error::Status {
            provider: "prometheus",
            host: "h:1".to_owned(),
            status: 401,
            excerpt: "token s3cr3t-t0ken is not known".to_owned(),
        };
        assert_eq!(
            error.scrubbed(&credentials).to_string(),
            "metric provider prometheus at h:1 answered 401: token *** is not known"
        );
    }
}
