//! The programs, started and ended.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Mutex;

use crate::ads::Ads;
use crate::configs::{self, Kind, Ports, Setup};
use crate::mesh::{self, Identities, Mesh, Up};
use crate::openloop::Job;
use crate::stamped::{Stamped, Stamps};
use crate::{endpoint, helpers};

/// An open loop that takes longer is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the programs are.
pub(crate) struct Tools {
    proxy: PathBuf,
    /// Another build, that somebody wants compared.
    baseline: Option<PathBuf>,
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
        let ours = |name: &str| {
            built
                .as_ref()
                .map(|folder| folder.join(name))
                .filter(|path| path.is_file())
        };
        let named = std::env::var_os("SERIN_BENCH_PROXY").map(PathBuf::from);
        let Some(proxy) = named.or_else(|| ours("serin-proxy")) else {
            eprintln!("SKIPPED: no serin-proxy in SERIN_BENCH_PROXY or SERIN_BIN_DIR: make build");
            return None;
        };
        for needed in ["h2load", "taskset"] {
            if on_path(needed).is_none() {
                eprintln!("SKIPPED: {needed} is not installed (packages nghttp2-client, util-linux)");
                return None;
            }
        }
        let envoy = std::env::var_os("ENVOY_BIN")
            .map(PathBuf::from)
            .filter(|path| path.is_file())
            .or_else(|| on_path("envoy"));
        let tools = Self {
            proxy,
            baseline: std::env::var_os("SERIN_BENCH_BASELINE").map(PathBuf::from),
            envoy,
            haproxy: on_path("haproxy"),
            nginx: on_path("nginx"),
        };
        for (name, found) in [
            ("envoy", &tools.envoy),
            ("haproxy", &tools.haproxy),
            ("nginx", &tools.nginx),
        ] {
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
            Kind::Serin => (
                self.proxy.clone(),
                args(&["--config", &config, "--concurrency", "1"]),
            ),
            Kind::Baseline => (
                self.baseline.clone()?,
                args(&["--config", &config, "--concurrency", "1"]),
            ),
            Kind::Envoy => (
                self.envoy.clone()?,
                args(&[
                    "-c",
                    &config,
                    "--concurrency",
                    "1",
                    "-l",
                    "error",
                    "--use-dynamic-base-id",
                ]),
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
        // Whoever looks for a reason may hear them.
        .stderr(match std::env::var_os("SERIN_BENCH_LOUD") {
            Some(_) => Stdio::inherit(),
            None => Stdio::null(),
        })
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
    tokio::time::timeout(limit, up)
        .await
        .with_context(|| format!("nobody came to listen on port {port}"))
}

/// The backend, which is this program in a process of its own.
pub(crate) struct Backend {
    ports: endpoint::Ports,
    pub(crate) identities: Identities,
    folder: tempfile::TempDir,
    process: Mutex<Process>,
}

/// What a backend hears and says.
struct Process {
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Backend {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let identities = Identities::new();
        // A gRPC message of 100 bytes, for h2load to send.
        std::fs::write(
            folder.path().join("message"),
            [&[0, 0, 0, 0, 100][..], &[b'x'; 100]].concat(),
        )?;
        for (name, text) in [
            ("root.pem", identities.root()),
            ("server.pem", &identities.server.chain),
            ("server.key", &identities.server.key),
            ("client.pem", &identities.client.chain),
            ("client.key", &identities.client.key),
        ] {
            std::fs::write(folder.path().join(name), text)?;
        }
        let ports = endpoint::Ports {
            plain: free_port().await?,
            grpc: free_port().await?,
            secure: free_port().await?,
            secure2: free_port().await?,
        };
        let mut child = Command::new("taskset")
            .args(["-c", "1"])
            .arg(helpers::program()?)
            .arg("endpoint")
            .args(ports.arguments())
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting the backend")?;
        let commands = child.stdin.take().context("the backend hears nothing")?;
        let answers = child.stdout.take().context("the backend says nothing")?;
        listening(ports.secure2, Duration::from_secs(10)).await?;
        Ok(Self {
            ports,
            identities,
            folder,
            process: Mutex::new(Process {
                commands,
                answers: BufReader::new(answers).lines(),
                _child: child,
            }),
        })
    }

    /// Certificates and the like.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Ports for a proxy in front of it.
    async fn ports(&self) -> anyhow::Result<Ports> {
        Ok(Ports {
            listen: free_port().await?,
            backend: self.ports.plain,
        })
    }

    /// Where a cluster finds it.
    pub(crate) fn port_of(&self, up: Up) -> u16 {
        match up {
            Up::Http1 | Up::Http2 | Up::Bytes => self.ports.plain,
            Up::MutualHttp1 | Up::MutualBytes => self.ports.secure,
            Up::MutualHttp2 => self.ports.secure2,
            Up::Grpc => self.ports.grpc,
        }
    }

    /// Has an open loop made from the backend's own thread; what it says of it.
    pub(crate) async fn load(&self, job: Job) -> anyhow::Result<String> {
        let mut process = self.process.lock().await;
        process.commands.write_all(job.line().as_bytes()).await?;
        let answer = tokio::time::timeout(PATIENCE, process.answers.next_line());
        let answer = answer.await.context("the load does not end")??;
        answer.context("the load broke off")
    }
}

/// A running proxy.
pub(crate) struct Peer {
    pub(crate) kind: Kind,
    pub(crate) port: u16,
    child: Child,
    _folder: tempfile::TempDir,
    /// Where it is driven by one.
    pub(crate) control: Option<Ads>,
    /// When it was started.
    pub(crate) started: Instant,
    /// Times of the connection to it.
    pub(crate) stamps: Arc<Stamps>,
    secure: bool,
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
        std::fs::write(
            &config,
            configs::text(kind, setup, &ports, &folder.path().to_string_lossy()),
        )?;
        let started = Instant::now();
        let child = pinned("0", &program, &args)?;
        listening(ports.listen, Duration::from_secs(60)).await?;
        Ok(Some(Self {
            kind,
            port: ports.listen,
            child,
            _folder: folder,
            control: None,
            started,
            stamps: Arc::default(),
            secure: false,
        }))
    }

    /// A sidecar that takes its configuration from an ADS server of its own. `processor` is where it runs; anywhere if
    /// there is none, with two workers.
    pub(crate) async fn start_mesh(
        tools: &Tools,
        kind: Kind,
        mesh: &Mesh,
        backend: &Backend,
        processor: Option<&str>,
    ) -> anyhow::Result<Option<Self>> {
        let folder = tempfile::tempdir()?;
        let config = folder.path().join("bootstrap.yaml");
        let Some((program, mut args)) = tools.command(kind, &config) else {
            return Ok(None);
        };
        let port = free_port().await?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let place = format!(
            "{{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }}",
            listener.local_addr()?.port()
        );
        let stamps = Arc::new(Stamps::default());
        let control = Ads::serve(Stamped::incoming(listener, stamps.clone()), place);
        control
            .source
            .put_all(mesh::resources(mesh, port, backend, &backend.identities));
        std::fs::write(&config, control.bootstrap("bench", kind == Kind::Envoy))?;
        if processor.is_none()
            && let Some(at) = args.iter().position(|arg| arg == "--concurrency")
        {
            args[at + 1] = "2".to_owned();
        }
        let started = Instant::now();
        let child = pinned(processor.unwrap_or("0,1"), &program, &args)?;
        listening(port, Duration::from_secs(120)).await?;
        Ok(Some(Self {
            kind,
            port,
            child,
            _folder: folder,
            control: Some(control),
            started,
            stamps,
            secure: mesh.down != mesh::Down::Plain,
        }))
    }

    /// Lets it end by itself, as an instrumented program must to write what it has counted.
    pub(crate) async fn end(mut self) -> anyhow::Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()?)?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        tokio::time::timeout(Duration::from_secs(60), self.child.wait())
            .await
            .context("the proxy does not end")??;
        Ok(())
    }

    pub(crate) fn url(&self, path: &str) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}{path}", self.port)
    }

    pub(crate) fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().context("the proxy has ended")
    }

    /// Resident memory, KB.
    pub(crate) fn resident(&self) -> anyhow::Result<usize> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?))?;
        status
            .lines()
            .find_map(|line| {
                line.strip_prefix("VmRSS:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse()
                    .ok()
            })
            .context("no VmRSS")
    }
}
