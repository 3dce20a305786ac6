//! Errors: what is wrong, where, how the build came there, and what would help.

use std::fmt;

use serin_manifests::Place;

/// Why a build failed.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum Cause {
    /// No `kustomization.yaml` in a directory that should be built.
    #[error(
        "unable to find one of 'kustomization.yaml', 'kustomization.yml' or 'Kustomization' in directory '{0}'"
    )]
    NoKustomization(String),
    /// More than one of the file names in one directory.
    #[error("Found multiple kustomization files under: {dir}: {files}")]
    MultipleKustomizations {
        /// The directory.
        dir: String,
        /// The files found.
        files: String,
    },
    /// A kustomization that says nothing.
    #[error("kustomization.yaml is empty")]
    EmptyKustomization,
    /// The kustomization file cannot be read as one.
    #[error("invalid Kustomization: {0}")]
    InvalidKustomization(String),
    /// A field that kustomize does not know.
    #[error("invalid {what}: unknown field \"{field}\"")]
    UnknownField {
        /// What was being read.
        what: String,
        /// The field.
        field: String,
    },
    /// A document that is not YAML, or too large.
    #[error("{0}")]
    Manifest(serin_manifests::Error),
    /// A document without what makes it a resource.
    #[error("{0}")]
    NotAResource(String),
    /// A path that does not exist.
    #[error("'{path}': no such file or directory")]
    Missing {
        /// The path.
        path: String,
    },
    /// A path that is not of the kind that is needed there.
    #[error("'{path}' must resolve to {expected}, but it is {found}")]
    WrongEntry {
        /// The path.
        path: String,
        /// What is needed.
        expected: &'static str,
        /// What is there.
        found: &'static str,
    },
    /// A file outside the directory that may be read from there.
    #[error("security; file '{path}' is not in or below '{root}'")]
    OutsideRoot {
        /// The path after resolving symbolic links.
        path: String,
        /// The directory of the kustomization.
        root: String,
    },
    /// A path that leads out of the given tree.
    #[error("security; '{path}' leads out of the source tree")]
    OutsideTree {
        /// The path.
        path: String,
    },
    /// A base given by an absolute path.
    #[error("new root '{path}' cannot be absolute")]
    AbsolutePath {
        /// The path.
        path: String,
    },
    /// A file that a remote server would have to give.
    #[error("remote resource '{url}' is not allowed here")]
    Remote {
        /// The address.
        url: String,
    },
    /// A base that contains the kustomization which refers to it.
    #[error("cycle detected: candidate root '{root}' contains visited root '{visited}'")]
    Cycle {
        /// The base.
        root: String,
        /// Where the build already is.
        visited: String,
    },
    /// Two resources with one identity.
    #[error("may not add resource with an already registered id: {id}")]
    DuplicateId {
        /// The identity.
        id: String,
    },
    /// A generator that does not fit what is there.
    #[error("{0}")]
    Generator(String),
    /// A patch whose target does not exist.
    #[error(
        "no resource matches strategic merge patch {id:?}: no matches for Id {id}; failed to find unique target for patch {id}"
    )]
    NoPatchTarget {
        /// The identity that the patch names.
        id: String,
    },
    /// A patch that cannot be read or applied.
    #[error("{0}")]
    Patch(String),
    /// A replacement that cannot be made.
    #[error("{0}")]
    Replacement(String),
    /// A selector that cannot be read.
    #[error("{0}")]
    Selector(String),
    /// A name that could refer to several resources.
    #[error("{0}")]
    NameReference(String),
    /// A variable that cannot be resolved.
    #[error("{0}")]
    Var(String),
    /// A transformer that cannot do its work.
    #[error("{0}")]
    Transformer(String),
    /// Wrong `sortOptions`.
    #[error("{0}")]
    SortOptions(String),
    /// An `openapi` that cannot be used.
    #[error("{0}")]
    OpenApi(String),
    /// A plugin that would have to be executed.
    #[error("external plugins disabled; unable to load external plugin '{0}'")]
    ExternalPlugin(String),
    /// Charts.
    #[error("helmCharts are not rendered by this build (chart '{0}')")]
    Helm(String),
    /// A limit was passed.
    #[error("{budget} budget exceeded: {what} (limit {limit})")]
    Budget {
        /// Which: `files`, `bytes`, `depth`, `kustomizations`, `resources`, `regex`, `steps`, or one of a document.
        budget: &'static str,
        /// What was counted.
        what: String,
        /// The limit.
        limit: usize,
    },
    /// A file that lies encrypted in the tree does not open.
    #[error("decrypting '{path}': {message}")]
    Decrypt {
        /// The path.
        path: String,
        /// Why not.
        message: String,
    },
    /// The tree could not be read.
    #[error("reading '{path}': {message}")]
    Tree {
        /// The path.
        path: String,
        /// What the tree said.
        message: String,
    },
}

/// A failed build.
#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    /// Why.
    pub cause: Box<Cause>,
    /// Where: file, line, column, the line's text.
    pub place: Option<Box<Place>>,
    /// The kustomizations that led there, the outermost first.
    pub chain: Vec<String>,
    /// What would probably help.
    pub help: Option<String>,
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of a cause, without a place.
    pub fn new(cause: Cause) -> Error {
        Error {
            cause: Box::new(cause),
            place: None,
            chain: Vec::new(),
            help: None,
        }
    }

    /// Adds the place unless one is known.
    pub fn at(mut self, place: Place) -> Error {
        self.place.get_or_insert_with(|| Box::new(place));
        self
    }

    /// Adds the place if there is one.
    pub(crate) fn at_option(self, place: Option<Place>) -> Error {
        match place {
            Some(place) => self.at(place),
            None => self,
        }
    }

    /// Adds what would help unless something is known already.
    pub fn help(mut self, text: impl Into<String>) -> Error {
        self.help.get_or_insert_with(|| text.into());
        self
    }

    /// Notes that the error came up while a kustomization was built.
    pub(crate) fn inside(mut self, kustomization: &str) -> Error {
        if self.chain.first().map(String::as_str) != Some(kustomization) {
            self.chain.insert(0, kustomization.to_owned());
        }
        self
    }
}

impl From<Cause> for Error {
    fn from(cause: Cause) -> Error {
        Error::new(cause)
    }
}

impl From<serin_manifests::Error> for Error {
    fn from(e: serin_manifests::Error) -> Error {
        let place = e.place().cloned();
        let cause = match &e {
            serin_manifests::Error::Budget {
                budget, what, limit, ..
            } => Cause::Budget {
                budget,
                what: what.clone(),
                limit: *limit,
            },
            _ => Cause::Manifest(e),
        };
        Error::new(cause).at_option(place)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        if let Some(place) = &self.place {
            // Errors of the parser print their own place.
            if !matches!(*self.cause, Cause::Manifest(_)) {
                write!(f, "\n  at {place}")?;
            }
        }
        if self.chain.len() > 1 {
            write!(f, "\n  while building {}", self.chain.join(" -> "))?;
        } else if let (Some(only), None) = (self.chain.first(), &self.place) {
            write!(f, "\n  while building {only}")?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n  help: {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.cause)
    }
}

/// The candidate nearest to a word that was probably mistyped, if one is near enough.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (word.chars().count() / 3).max(1) + 1;
    candidates
        .into_iter()
        .take(2_000)
        .map(|c| (distance(word, c, limit), c))
        .filter(|(d, _)| *d <= limit)
        .min_by_key(|(d, _)| *d)
        .map(|(_, c)| c)
}

/// Edit distance, given up above a limit.
fn distance(a: &str, b: &str, limit: usize) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (
        a.to_lowercase().chars().collect(),
        b.to_lowercase().chars().collect(),
    );
    if a.len().abs_diff(b.len()) > limit || a.len() > 256 || b.len() > 256 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let next = (diagonal + usize::from(ca != cb))
                .min(row[j] + 1)
                .min(row[j + 1] + 1);
            diagonal = row[j + 1];
            row[j + 1] = next;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_error_finds_its_word() {
        assert_eq!(
            nearest("resorces", ["resources", "replicas", "patches"]),
            Some("resources")
        );
        assert_eq!(nearest("xyz", ["resources", "replicas"]), None);
    }
}
