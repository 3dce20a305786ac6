//! Where ambient credentials are looked for, and short-lived ones that were fetched with them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;

use crate::aws::Keys;
use crate::credentials::Secret;
use crate::error::Error;

/// Prefixes of the variables that are of interest.
const PREFIXES: [&str; 4] = ["AWS_", "GOOGLE_", "GCE_", "HOME"];
/// How long before its end a token is not used any more.
const MARGIN: SignedDuration = SignedDuration::from_mins(2);
/// Tokens that are kept. There are as many as there are service accounts in MetricTemplates.
const KEPT_MAX: usize = 256;

/// Environment variables, as a value: the clouds' own names (`AWS_…`, `GOOGLE_…`, `GCE_…`).
#[derive(Clone, Default)]
pub struct Environment(Arc<BTreeMap<String, String>>);

impl Environment {
    /// That of this process.
    pub fn of_process() -> Self {
        std::env::vars()
            .filter(|(name, _)| PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
            .collect()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }
}

impl FromIterator<(String, String)> for Environment {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(variables: T) -> Self {
        Self(Arc::new(variables.into_iter().collect()))
    }
}

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// A file that holds a credential.
pub(crate) async fn file(provider: &'static str, path: &str) -> Result<Vec<u8>, Error> {
    tokio::fs::read(Path::new(path))
        .await
        .map_err(|error| Error::Credentials {
            provider,
            reason: format!("read {path}: {error}"),
        })
}

/// What was fetched, by whom it is for.
pub(crate) struct Kept<T> {
    by_name: Mutex<HashMap<String, (T, Timestamp)>>,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self {
            by_name: Mutex::default(),
        }
    }
}

impl<T: Clone> Kept<T> {
    pub(crate) fn get(&self, name: &str, now: Timestamp) -> Option<T> {
        let by_name = self.by_name.lock();
        let (value, expires) = by_name.get(name)?;
        (*expires > now.saturating_add(MARGIN).ok()?).then(|| value.clone())
    }

    pub(crate) fn put(&self, name: String, value: T, expires: Timestamp, now: Timestamp) {
        let mut by_name = self.by_name.lock();
        if by_name.len() >= KEPT_MAX {
            by_name.retain(|_, (_, expires)| *expires > now);
            if by_name.len() >= KEPT_MAX {
                by_name.clear();
            }
        }
        by_name.insert(name, (value, expires));
    }
}

#[derive(Default)]
pub(crate) struct Tokens {
    pub(crate) aws: Kept<Keys>,
    pub(crate) google: Kept<Secret>,
}
