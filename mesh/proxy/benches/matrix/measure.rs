//! Figures: processor time, instructions, system calls, latency, memory.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::ads::Ads;
use crate::configs::Kind;
use crate::mesh::{self, Down, Mesh};
use crate::peers::{Backend, Peer, Tools, free_port, listening};

/// The middle of some figures; 0 of none.
pub(crate) fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

/// One run of load against one proxy.
pub(crate) struct Sample {
    /// Microseconds of processor time per request.
    pub(crate) user: f64,
    pub(crate) kernel: f64,
    /// Requests per second.
    pub(crate) rate: f64,
}

impl Sample {
    pub(crate) fn total(&self) -> f64 {
        self.user + self.kernel
    }

    pub(crate) async fn take(peer: &Peer, load: &[&str], requests: usize, url: &str) -> anyhow::Result<Self> {
        Self::of(peer, requests, h2load(load, requests, url)).await
    }

    /// Of any work, which gives the rate that it reached.
    pub(crate) async fn of(
        peer: &Peer,
        requests: usize,
        work: impl Future<Output = anyhow::Result<f64>>,
    ) -> anyhow::Result<Self> {
        let before = Spent::of(peer.pid()?)?;
        let rate = work.await?;
        let after = Spent::of(peer.pid()?)?;
        let total = (after.nanos - before.nanos) as f64 / 1_000.0 / requests as f64;
        let (user, kernel) = (
            (after.user - before.user) as f64,
            (after.kernel - before.kernel) as f64,
        );
        let share = user / (user + kernel).max(1.0);
        Ok(Self {
            user: total * share,
            kernel: total * (1.0 - share),
            rate,
        })
    }
}

/// Processor time of a process: nanoseconds by the scheduler's account, and ticks, which tell user from kernel.
pub(crate) struct Spent {
    pub(crate) nanos: u64,
    user: u64,
    kernel: u64,
}

impl Spent {
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let after_name = stat.rsplit_once(')').context("/proc/pid/stat")?.1;
        let mut fields = after_name.split_whitespace().skip(11).map(str::parse::<u64>);
        let (Some(Ok(user)), Some(Ok(kernel))) = (fields.next(), fields.next()) else {
            bail!("/proc/{pid}/stat cannot be read");
        };
        let mut nanos = 0;
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
            nanos += text
                .split_whitespace()
                .next()
                .and_then(|first| first.parse::<u64>().ok())
                .unwrap_or(0);
        }
        Ok(Self { nanos, user, kernel })
    }
}

/// New mutual TLS connections with one request each; connections per second.
pub(crate) async fn new_connections(peer: &Peer, count: usize, folder: &Path) -> anyhow::Result<f64> {
    let start = std::time::Instant::now();
    let output = Command::new("taskset")
        .args(["-c", "1"])
        .arg(crate::helpers::program()?)
        .args(["new-connections", &peer.port.to_string(), &count.to_string()])
        .arg(folder)
        .output()
        .await?;
    if !output.status.success() {
        bail!("new connections: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

/// Sends requests as fast as they are answered; requests per second. Every one must succeed.
pub(crate) async fn h2load(load: &[&str], requests: usize, url: &str) -> anyhow::Result<f64> {
    let outcome = h2load_on("1", load, requests, url).await?;
    if outcome.good != requests {
        bail!(
            "{url}: {} of {requests} requests were not answered 2xx",
            requests - outcome.good
        );
    }
    Ok(outcome.rate)
}

/// What became of a load.
pub(crate) struct Outcome {
    /// Requests answered 2xx.
    pub(crate) good: usize,
    pub(crate) rate: f64,
}

/// The same on these processors, whatever becomes of the requests.
pub(crate) async fn h2load_on(
    processors: &str,
    load: &[&str],
    requests: usize,
    url: &str,
) -> anyhow::Result<Outcome> {
    let output = Command::new("taskset")
        .args(["-c", processors, "h2load", "-n", &requests.to_string()])
        .args(load)
        .arg(url)
        .kill_on_drop(true)
        .output()
        .await
        .context("h2load")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = |start: &str| {
        text.lines()
            .find(|line| line.starts_with(start))
            .map(str::to_owned)
    };
    let outcome = line("status codes:").context("h2load printed no status codes")?;
    let good = outcome
        .split_whitespace()
        .nth(2)
        .and_then(|count| count.parse().ok())
        .with_context(|| format!("h2load said {outcome:?}"))?;
    let finished = line("finished in").context("h2load printed no times")?;
    let rate = finished
        .split(", ")
        .find_map(|part| part.strip_suffix(" req/s")?.parse().ok())
        .context("h2load printed no rate")?;
    Ok(Outcome { good, rate })
}

/// Kilobytes that an idle connection costs.
pub(crate) async fn idle_connections(peer: &Peer, count: usize) -> anyhow::Result<f64> {
    // What serving at all takes, code included, is not a connection's.
    h2load(&["--h1", "-c", "1"], 500, &peer.url("/")).await?;
    let before = peer.resident()?;
    let mut open = Vec::with_capacity(count);
    for _ in 0..count {
        let mut stream = TcpStream::connect(("127.0.0.1", peer.port)).await?;
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: b\r\n\r\n")
            .await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"0123456789") {
            if stream.read_buf(&mut answer).await? == 0 {
                bail!("a connection was closed");
            }
        }
        open.push(stream);
    }
    tokio::time::sleep(Duration::from_secs(8)).await;
    Ok((peer.resident()?.saturating_sub(before)) as f64 / count as f64)
}

/// System calls per request, by strace; a dash without it.
pub(crate) async fn system_calls(
    tools: &Tools,
    kind: Kind,
    mesh: &Mesh,
    load: &[&str],
    backend: &Backend,
) -> anyhow::Result<String> {
    const REQUESTS: usize = 5_000;
    let Some(peer) = Peer::start_mesh(tools, kind, mesh, backend, Some("0")).await? else {
        return Ok("-".into());
    };
    h2load(load, 500, &peer.url("/")).await?;
    let folder = tempfile::tempdir()?;
    let report = folder.path().join("strace");
    let strace = Command::new("strace")
        .args(["-c", "-f", "-o"])
        .arg(&report)
        .args(["-p", &peer.pid()?.to_string()])
        .stderr(std::process::Stdio::null())
        .spawn();
    let Ok(mut strace) = strace else {
        eprintln!("SKIPPED: strace is not installed");
        return Ok("-".into());
    };
    tokio::time::sleep(Duration::from_secs(1)).await;
    h2load(load, REQUESTS, &peer.url("/")).await?;
    let pid = i32::try_from(strace.id().context("strace has ended")?)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGINT)?;
    strace.wait().await?;
    let text = std::fs::read_to_string(&report)?;
    let mut parts = Vec::new();
    for line in text.lines().skip(2) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let (Some(name), Some(Ok(calls))) =
            (fields.last(), fields.get(3).map(|calls| calls.parse::<f64>()))
        {
            let each = calls / REQUESTS as f64;
            if each >= 0.05 && *name != "total" {
                parts.push(format!("{each:.2} {name}"));
            }
        }
    }
    Ok(parts.join(", "))
}

/// Instructions per request in user space, by callgrind; a dash without it. What it wrote stays in `SERIN_BENCH_KEEP`,
/// under `name`.
pub(crate) async fn instructions(
    tools: &Tools,
    kind: Kind,
    mesh: &Mesh,
    load: &[&str],
    backend: &Backend,
    name: &str,
) -> anyhow::Result<String> {
    const REQUESTS: usize = 3_000;
    // Envoy takes minutes to start there.
    const START: Duration = Duration::from_secs(600);
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("proxy.yaml");
    let out = folder.path().join("callgrind");
    let port = free_port().await?;
    let control = Ads::start(&folder.path().join("xds.sock"))?;
    control
        .source
        .put_all(mesh::resources(mesh, port, backend, &backend.identities));
    std::fs::write(&config, control.bootstrap("bench", kind == Kind::Envoy))?;
    let Some((program, args)) = tools.command(kind, &config) else {
        return Ok("-".into());
    };
    let child = Command::new("valgrind")
        .args(["--tool=callgrind", "--instr-atstart=no"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .args(args)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let Ok(child) = child else {
        eprintln!("SKIPPED: valgrind is not installed");
        return Ok("-".into());
    };
    listening(port, START).await?;
    let scheme = if mesh.down == Down::Plain { "http" } else { "https" };
    let url = format!("{scheme}://127.0.0.1:{port}/");
    let pid = child.id().context("valgrind has ended")?.to_string();
    let control = |arg: &'static str| {
        let mut command = Command::new("callgrind_control");
        match arg {
            "-d" => command.args(["-d", &pid]),
            state => command.args(["-i", state, &pid]),
        };
        command.output()
    };
    // Whatever becomes of them: the first connections may take longer than their limit there.
    h2load_on("1", load, 500, &url).await?;
    control("on").await?;
    h2load(load, REQUESTS, &url).await?;
    control("-d").await?;
    for entry in std::fs::read_dir(folder.path())? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let total = text
            .lines()
            .find_map(|line| line.strip_prefix("totals: ").or(line.strip_prefix("summary: ")));
        if let Some(Ok(total)) = total.map(|total| total.trim().parse::<f64>())
            && total > 0.0
        {
            if let Some(keep) = std::env::var_os("SERIN_BENCH_KEEP") {
                let file = format!("{name} {}", kind.name()).replace(|c: char| !c.is_alphanumeric(), "-");
                std::fs::copy(&path, Path::new(&keep).join(file))?;
            }
            return Ok(format!("{:.0}", total / REQUESTS as f64));
        }
    }
    bail!("callgrind wrote no totals")
}
