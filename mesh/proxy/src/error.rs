//! The errors of this crate: what was being done, to which object, what to do now.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Why the proxy could not start, or could not do what the operator asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bootstrap file could not be read.
    #[error("reading the bootstrap file {path}: {source}; check --config")]
    BootstrapRead {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The bootstrap document is not what we understand.
    #[error("bootstrap: {}", lines(.0.iter()))]
    Bootstrap(Vec<Refusal>),
    /// The same of a file, with the lines that have to be mended.
    #[error("{}", lines(.fields.iter()))]
    BootstrapFile {
        /// What is wrong with it; never empty.
        fields: Vec<Misplaced>,
    },
    /// The environment of `serin-proxy proxy` lacks something.
    #[error("environment variable {name}: {reason}")]
    Environment {
        /// The variable.
        name: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The application that the proxy is to start.
    #[error("starting the application {program}: {source}; check the words after --")]
    Application {
        /// Its program.
        program: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A listening socket could not be opened.
    #[error("listener {name}: binding {address}: {source}; is another process on that port?")]
    Bind {
        /// The listener's name.
        name: String,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The Unix socket of the admin port could not be opened.
    #[error("admin socket {path}: {what}: {source}; check the path, its directory and who else serves there")]
    AdminSocket {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A hot restart failed.
    #[error(
        "hot restart at {path}: {what}: {source}; check --restart-socket and the process that listens there"
    )]
    Restart {
        /// The Unix socket.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A thread or runtime could not be created.
    #[error("starting {what}: {source}")]
    Start {
        /// Which part.
        what: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The control plane's address cannot be used.
    #[error("control plane {address:?}: {reason}; use unix:/path or http://host:port")]
    ControlPlane {
        /// The address as configured.
        address: String,
        /// Why not.
        reason: String,
    },
    /// Programming the packet filter failed.
    #[error("interception: {action}: {reason}")]
    Intercept {
        /// What was being done.
        action: &'static str,
        /// What `nft` or the system said.
        reason: String,
    },
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::Bootstrap(vec![refusal])
    }
}

fn lines<T: std::fmt::Display>(list: impl Iterator<Item = T>) -> String {
    let list: Vec<String> = list.map(|one| one.to_string()).collect();
    list.join("\n")
}

/// A field of a file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misplaced {
    /// The file.
    pub file: PathBuf,
    /// Its line, from 1, where it could be found.
    pub line: Option<usize>,
    /// Which field, and why.
    pub refusal: Refusal,
}

impl std::fmt::Display for Misplaced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        write!(f, " {}", self.refusal)
    }
}

/// A configuration resource that cannot be honoured: where in it, and why. Sent to the control plane as the text of
/// the NACK, so it is written for the person who wrote the object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}{}{reason}", if .path.is_empty() { "" } else { ": " })]
pub struct Refusal {
    /// Path of the field inside the resource, for example `routes[2].match.headers[0]`.
    pub path: String,
    /// What cannot be honoured.
    pub reason: String,
}

impl Refusal {
    /// A refusal of the field at `path`.
    pub fn new(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            reason: reason.into(),
        }
    }

    /// The same refusal seen from one level further out.
    pub fn within(mut self, outer: impl AsRef<str>) -> Self {
        let outer = outer.as_ref();
        self.path = if self.path.is_empty() {
            outer.to_owned()
        } else if self.path.starts_with('[') {
            format!("{outer}{}", self.path)
        } else {
            format!("{outer}.{}", self.path)
        };
        self
    }
}

/// Adds the outer path to a refusal on its way up.
pub(crate) trait Within<T> {
    /// See [`Refusal::within`].
    fn within(self, outer: impl AsRef<str>) -> Result<T, Refusal>;
}

impl<T> Within<T> for Result<T, Refusal> {
    fn within(self, outer: impl AsRef<str>) -> Result<T, Refusal> {
        self.map_err(|refusal| refusal.within(outer))
    }
}
