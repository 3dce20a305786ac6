//! The programs, started and ended.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

use crate::configs::{self, Kind, Ports, Setup};

/// Where the programs are.
pub(crate) struct Tools {
    proxy: PathBuf,
    /// `serin`, for its load generator.
    pub(crate) serin: Option<PathBuf>,
    envoy: Option<PathBuf>,
    haproxy: Option<PathBuf>,
    nginx: Option<PathBuf>,
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

impl Tools {
    /// Nothing, said loudly, without what every part needs.
    pub(crate) fn find() -> Option<Self> {
        let built = std::env::var_os("SERIN_BIN_DIR").map(PathBuf::from);
        let ours = |name: &str| built.as_ref().map(|folder| folder.join(name)).filter(|path| path.is_file());
        let Some(proxy) = ours("serin-proxy") else {
            eprintln!("SKIPPED: no serin-proxy in SERIN_BIN_DIR: make build");
            return None;
        };
        for needed in ["h2load", "nginx", "taskset"] {
            if on_path(needed).is_none() {
                eprintln!("SKIPPED: {needed} is not installed (packages nghttp2-client, nginx, util-linux)");
                return None;
            }
        }
        let envoy = std::env::var_os("ENVOY_BIN").map(PathBuf::from).filter(|path| path.is_file()).or_else(|| on_path("envoy"));
        let tools = Self {
            proxy,
            serin: ours("serin"),
            envoy,
            haproxy: on_path("haproxy"),
            nginx: on_path("nginx"),
        };
        for (name, found) in [("envoy", &tools.envoy), ("haproxy", &tools.haproxy)] {
            if found.is_none() {
                eprintln!("SKIPPED: {name} is not installed; its rows are left out");
            }
        }
        Some(tools)
    }

    /// The command that starts `kind` with `config`, without pinning.
    pub(crate) fn command(&self, kind: Kind, config: &Path) -> Option<(PathBuf, Vec<String>)> {
        let config = config.to_string_lossy().into_owned();
        let args = |list: &[&str]| list.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
        Some(match kind {
            Kind::Serin => (self.proxy.clone(), args(&["--config", &config, "--concurrency", "1"])),
            Kind::Envoy => (
                self.envoy.clone()?,
                args(&["-c", &config, "--concurrency", "1", "-l", "error", "--use-dynamic-base-id"]),
            ),
            Kind::HaProxy => (self.haproxy.clone()?, args(&["-f", &config])),
            Kind::Nginx => (self.nginx.clone()?, args(&["-c", &config])),
        })
    }
}

/// A port that is free now.
pub(crate) async fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port())
}

/// Starts a program on one processor.
pub(crate) fn pinned(processor: &str, program: &Path, args: &[String]) -> anyhow::Result<Child> {
    Command::new("taskset")
        .args(["-c", processor])
        .arg(program)
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))
}

/// Waits until somebody listens.
pub(crate) async fn listening(port: u16, limit: Duration) -> anyhow::Result<()> {
    let up = async {
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(limit, up).await.with_context(|| format!("nobody came to listen on port {port}"))
}

/// The backend.
pub(crate) struct Backend {
    ports: (u16, u16),
    _child: Child,
    _folder: tempfile::TempDir,
}

impl Backend {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let place = folder.path().to_string_lossy().into_owned();
        // nginx may run as another user.
        std::fs::write(folder.path().join("10k"), "x".repeat(10 << 10))?;
        std::fs::write(folder.path().join("1m"), "x".repeat(1 << 20))?;
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open)?;
        let ports = (free_port().await?, free_port().await?);
        let config = folder.path().join("backend.conf");
        let text = configs::backend(
            &Ports { listen: 0, backend: ports.0, backend2: ports.1 },
            &place,
        );
        std::fs::write(&config, text)?;
        let nginx = on_path("nginx").context("nginx is gone")?;
        let child = pinned("1", &nginx, &["-c".to_owned(), config.to_string_lossy().into_owned()])?;
        listening(ports.0, Duration::from_secs(10)).await?;
        Ok(Self { ports, _child: child, _folder: folder })
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.ports.0)
    }

    /// Ports for a proxy in front of it.
    pub(crate) async fn ports(&self) -> anyhow::Result<Ports> {
        Ok(Ports {
            listen: free_port().await?,
            backend: self.ports.0,
            backend2: self.ports.1,
        })
    }
}

/// A running proxy.
pub(crate) struct Peer {
    pub(crate) kind: Kind,
    pub(crate) port: u16,
    child: Child,
    _folder: tempfile::TempDir,
}

impl Peer {
    /// Nothing if the program is not there.
    pub(crate) async fn start(
        tools: &Tools,
        kind: Kind,
        setup: Setup,
        backend: &Backend,
    ) -> anyhow::Result<Option<Self>> {
        let folder = tempfile::tempdir()?;
        let config = folder.path().join("proxy.yaml");
        let Some((program, args)) = tools.command(kind, &config) else {
            return Ok(None);
        };
        if matches!(setup, Setup::Many(_)) && matches!(kind, Kind::HaProxy | Kind::Nginx) {
            return Ok(None);
        }
        let ports = backend.ports().await?;
        std::fs::write(&config, configs::text(kind, setup, &ports, &folder.path().to_string_lossy()))?;
        let child = pinned("0", &program, &args)?;
        listening(ports.listen, Duration::from_secs(60)).await?;
        Ok(Some(Self {
            kind,
            port: ports.listen,
            child,
            _folder: folder,
        }))
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub(crate) fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().context("the proxy has ended")
    }

    /// Resident memory, KB.
    pub(crate) fn resident(&self) -> anyhow::Result<usize> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?))?;
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok())
            .context("no VmRSS")
    }
}
