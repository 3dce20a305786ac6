//! What can go wrong, without a single secret in the text.

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something could not be decrypted.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// There is no SOPS metadata.
    #[error("sops metadata not found: the text was not encrypted by sops")]
    NotEncrypted,
    /// The text is not of the format.
    #[error("cannot read the {format} that sops encrypted: {message}")]
    Malformed {
        /// Name of the format.
        format: &'static str,
        /// What is wrong.
        message: String,
    },
    /// The metadata lacks something or contradicts itself.
    #[error("invalid sops metadata: {0}")]
    Metadata(String),
    /// A feature of SOPS that is not honoured.
    #[error("sops: {what} not supported; {instead}")]
    Unsupported {
        /// What.
        what: String,
        /// What to do.
        instead: &'static str,
    },
    /// None of the given keys opens the data key.
    #[error(
        "cannot get the sops data key: none of the {given} age keys given opens it; it is encrypted for {recipients}"
    )]
    NoKey {
        /// How many keys were given.
        given: usize,
        /// For whom the data key is encrypted.
        recipients: String,
    },
    /// A line of a key file is not an age key.
    #[error("age key in line {line} is malformed: {message}")]
    Key {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        message: &'static str,
    },
    /// An age file is damaged, or not one.
    #[error("malformed age file: {0}")]
    Age(&'static str),
    /// A value does not open: damaged, moved, or encrypted with another key.
    #[error("cannot decrypt the value at '{path}': {message}")]
    Value {
        /// Keys that lead to it, joined by dots.
        path: String,
        /// What is wrong.
        message: &'static str,
    },
    /// The values are not those over which the MAC was made.
    #[error(
        "MAC mismatch: the file was changed after it was encrypted; edit it with sops, or restore it from git"
    )]
    Mac,
}
