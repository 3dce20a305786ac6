//! What can go wrong when text becomes objects, said for the person who wrote the text.

use std::fmt;

/// Where in which file, with the line itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The file as the caller named it.
    pub file: String,
    /// The line, from 1; 0 when not known.
    pub line: usize,
    /// The column, from 1; 0 when not known.
    pub column: usize,
    /// The text of the line.
    pub snippet: String,
}

impl Place {
    /// A place in a text: looks up the line.
    pub fn in_text(file: &str, text: &str, line: usize, column: usize) -> Place {
        let snippet = if line == 0 {
            ""
        } else {
            text.lines().nth(line - 1).unwrap_or("")
        };
        Place {
            file: file.to_owned(),
            line,
            column,
            snippet: snippet.chars().take(200).collect(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
            if self.column > 0 {
                write!(f, ":{}", self.column)?;
            }
        }
        if !self.snippet.is_empty() {
            write!(f, "\n  {:>4} | {}", self.line, self.snippet)?;
            if self.column > 0 && self.column <= self.snippet.chars().count() + 1 {
                write!(f, "\n       | {}^", " ".repeat(self.column - 1))?;
            }
        }
        Ok(())
    }
}

/// Errors of this crate.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The text is not YAML.
    #[error("malformed YAML: {message}\n  at {place}")]
    Syntax {
        /// What the parser expected.
        message: String,
        /// Where.
        place: Place,
    },
    /// A mapping has the same key twice.
    #[error("mapping key \"{key}\" already defined at line {first_line}\n  at {place}")]
    DuplicateKey {
        /// The key.
        key: String,
        /// The line that defined it first.
        first_line: usize,
        /// Where it is defined again.
        place: Place,
    },
    /// The document is larger than the caller allows.
    #[error("{budget} budget exceeded: {what} is more than the limit of {limit}\n  at {place}")]
    Budget {
        /// Which budget: `bytes`, `depth`, `nodes`, `aliases`, `documents`.
        budget: &'static str,
        /// What was counted.
        what: String,
        /// The limit.
        limit: usize,
        /// Where the limit was passed.
        place: Place,
    },
    /// The document is YAML, but no Kubernetes object.
    #[error("{message}\n  at {place}")]
    NotAnObject {
        /// What is missing.
        message: String,
        /// Where the document starts.
        place: Place,
    },
    /// A value that JSON, and so Kubernetes, cannot express.
    #[error("{object}: {message}")]
    Value {
        /// The object.
        object: String,
        /// What is wrong and at which path.
        message: String,
    },
}

impl Error {
    /// Where the error is, if it is in a file.
    pub fn place(&self) -> Option<&Place> {
        match self {
            Error::Syntax { place, .. }
            | Error::DuplicateKey { place, .. }
            | Error::Budget { place, .. }
            | Error::NotAnObject { place, .. } => Some(place),
            Error::Value { .. } => None,
        }
    }
}
