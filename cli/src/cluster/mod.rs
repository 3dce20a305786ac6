//! The cluster on this machine: its files, its process, what runs inside it.

pub(crate) mod admission;
pub(crate) mod lock;
pub(crate) mod logs;
pub(crate) mod mesh;
pub(crate) mod process;
pub(crate) mod server;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

/// A Unix socket's path may have 107 bytes (sun_path less its final zero); ours end in `/mesh/xds.sock`.
const DIRECTORY_MAX: usize = 107 - "/mesh/xds.sock".len();

/// A cluster by name, and where its files are.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    name: String,
    directory: PathBuf,
}

impl Cluster {
    /// The cluster of a name; its files are below `home` or the user's state directory.
    pub(crate) fn named(name: &str, home: Option<&Path>) -> anyhow::Result<Self> {
        let valid = !name.is_empty()
            && name.len() <= 32
            && name
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if !valid {
            bail!("cluster name {name:?}: use up to 32 lower-case letters, digits and dashes");
        }
        let home = match home {
            Some(home) => std::path::absolute(home).context("find the directory of the clusters")?,
            None => default_home()?,
        };
        let directory = home.join(name);
        if directory.as_os_str().len() > DIRECTORY_MAX {
            bail!(
                "{} is too long for the sockets inside it; set SERIN_HOME to a directory with a shorter path",
                directory.display()
            );
        }
        Ok(Self {
            name: name.to_owned(),
            directory,
        })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where all its files are.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Unix socket of the Kubernetes API; who may open it is admin.
    pub(crate) fn api_socket(&self) -> PathBuf {
        self.directory.join("api.sock")
    }

    /// Directory of the mesh's socket, mounted into every proxy's container; open to their users.
    pub(crate) fn mesh(&self) -> PathBuf {
        self.directory.join("mesh")
    }

    /// Unix socket of the mesh control plane: xDS and telemetry.
    pub(crate) fn xds_socket(&self) -> PathBuf {
        self.mesh().join("xds.sock")
    }

    /// What the API server stores.
    pub(crate) fn store(&self) -> PathBuf {
        self.directory.join("store")
    }

    /// The cache of git repositories; may be deleted at any time.
    pub(crate) fn git_cache(&self) -> PathBuf {
        self.directory.join("git")
    }

    /// The kubeconfig for kubectl.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.directory.join("kubeconfig")
    }

    /// Where the controllers' own metrics are served, as a URL.
    pub(crate) fn metrics_address(&self) -> PathBuf {
        self.directory.join("metrics.url")
    }

    /// Where webhooks are taken, as an address; written by the running server.
    pub(crate) fn webhooks(&self) -> PathBuf {
        self.directory.join("webhooks")
    }

    /// The address at which the running server takes webhooks.
    pub(crate) fn webhook_address(&self) -> Option<String> {
        std::fs::read_to_string(self.webhooks())
            .ok()
            .map(|text| text.trim().to_owned())
    }

    /// The log of the server process.
    pub(crate) fn log(&self) -> PathBuf {
        self.directory.join("server.log")
    }

    /// Held locked by the server process and by those who start and stop it; says who holds it.
    pub(crate) fn lock(&self) -> PathBuf {
        self.directory.join("server.lock")
    }

    /// A client of the running cluster.
    pub(crate) fn client(&self) -> anyhow::Result<kube::Client> {
        let socket = self.api_socket();
        if !socket.exists() {
            bail!("cluster {} is not running; start it with: serin up", self.name);
        }
        Ok(serin_kit::client::over_unix(&socket, None)?)
    }
}

fn default_home() -> anyhow::Result<PathBuf> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("XDG_STATE_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".local/state")))
        .map(|state| state.join("serin"))
        .context("neither XDG_STATE_HOME nor HOME is set; say where the clusters are with SERIN_HOME")
}

/// Makes a directory that only its owner can look into.
pub(crate) fn private_directory(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("make directory {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_could_leave_the_directory_is_refused() {
        for name in ["", "..", "a/b", "UPPER", "x".repeat(33).as_str()] {
            assert!(Cluster::named(name, Some(Path::new("/h"))).is_err(), "{name}");
        }
        assert_eq!(
            Cluster::named("demo", Some(Path::new("/h"))).unwrap().directory(),
            Path::new("/h/demo")
        );
    }

    #[test]
    fn a_directory_too_long_for_a_socket_is_refused_with_the_remedy() {
        let long = PathBuf::from("/").join("d".repeat(120));
        let error = Cluster::named("a", Some(&long)).unwrap_err();
        assert!(error.to_string().contains("SERIN_HOME"));
    }
}
