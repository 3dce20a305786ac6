//! The program with clocks of its own: a wall clock that jumps by hours while it serves, and a monotonic one that can be made
//! to pass time at once. The clocks are the C library's, with shifts that the test writes into a file that the program has
//! mapped.

use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::fixture::*;

pub(crate) const HOURS: i64 = 3_600;
/// Later, much earlier, and right again.
pub(crate) const JUMPS: [i64; 3] = [10 * HOURS, -10 * HOURS, 0];

/// Every way to ask for the time of day, shifted by the seconds at the start of the file, and what counts time that passes,
/// shifted by the seconds that come next in it.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile int64_t *shift;
__attribute__((constructor)) static void start(void) {
  int file = open(getenv("SHIFT_FILE"), O_RDONLY);
  void *at = mmap(0, 4096, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  if (at == MAP_FAILED) abort();
  shift = at;
}
int clock_gettime(clockid_t clock, struct timespec *out) {
  int result = syscall(SYS_clock_gettime, clock, out);
  if (!result && shift && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) out->tv_sec += shift[0];
  if (!result && shift && clock == CLOCK_MONOTONIC) out->tv_sec += shift[1];
  return result;
}
int gettimeofday(struct timeval *out, void *zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  out->tv_sec = now.tv_sec;
  out->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
"#;

/// Seconds since 1970, truly.
pub(crate) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

/// A proxy with clocks of its own.
pub(crate) struct Clocked {
    pub(crate) at: SocketAddr,
    pub(crate) admin: SocketAddr,
    shift: std::fs::File,
    passed: AtomicI64,
    log: PathBuf,
    read: usize,
    child: tokio::process::Child,
    _folder: tempfile::TempDir,
}

/// What a proxy does, in YAML.
#[derive(Clone, Copy, Default)]
pub(crate) struct Setup<'a> {
    /// Filters before the router.
    pub(crate) filters: &'a str,
    pub(crate) routes: &'a str,
    pub(crate) clusters: &'a str,
    /// More fields of the connection manager.
    pub(crate) manager: &'a str,
    /// More fields of the filter chain.
    pub(crate) chain: &'a str,
}

impl Clocked {
    /// Nothing without a compiler for the shim.
    pub(crate) async fn start(setup: Setup<'_>) -> Option<Self> {
        let Setup {
            filters,
            routes,
            clusters,
            manager,
            chain,
        } = setup;
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("shift.c"), folder.path().join("shift.so"));
        std::fs::write(&source, SHIM).unwrap();
        let mut compiler = tokio::process::Command::new("cc");
        compiler
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(&library)
            .arg(&source);
        match compiler.output().await {
            Ok(output) if output.status.success() => {}
            other => {
                eprintln!("SKIPPED: a wall clock that jumps: cc does not make a library: {other:?}");
                return None;
            }
        }
        let mapped = folder.path().join("shift");
        std::fs::write(&mapped, [0; 4096]).unwrap();
        let (at, admin) = (free_port().await, free_port().await);
        let log = folder.path().join("access.log");
        let config = folder.path().join("proxy.yaml");
        let text = format!(
            r#"
node: {{ id: clocked, cluster: clocked }}
admin: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }}
static_resources:
  listeners:
  - name: l
    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }}
    traffic_direction: OUTBOUND
    filter_chains:
    - {chain}
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: l
          {manager}
          access_log:
          - name: envoy.access_loggers.file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: "{}"
              log_format: {{ json_format: {{ path: "%REQ(:PATH)%", code: "%RESPONSE_CODE%", flags: "%RESPONSE_FLAGS%", details: "%RESPONSE_CODE_DETAILS%", failure: "%UPSTREAM_TRANSPORT_FAILURE_REASON%", start: "%START_TIME(%s)%", duration: "%DURATION%", attempts: "%UPSTREAM_REQUEST_ATTEMPT_COUNT%" }} }}
          http_filters:
{filters}
          - name: envoy.filters.http.router
            typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
          route_config:
            name: r
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
{routes}
  clusters:
{clusters}
"#,
            admin.port(),
            at.port(),
            log.display(),
        );
        std::fs::write(&config, text).unwrap();
        let child = tokio::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"))
            .arg("--config")
            .arg(&config)
            .args(["--concurrency", "1"])
            .env("LD_PRELOAD", &library)
            .env("SHIFT_FILE", &mapped)
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        crate::interop::wait_for(at).await;
        Some(Self {
            at,
            admin,
            shift: std::fs::File::options().write(true).open(&mapped).unwrap(),
            log,
            passed: AtomicI64::new(0),
            read: 0,
            child,
            _folder: folder,
        })
    }

    /// The wall clock says from now on so many seconds more than it should.
    pub(crate) fn jump(&self, seconds: i64) {
        self.shift.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
    }

    /// So much time passes at once. Timers that are due by then run when the program wakes next, which is seen to.
    pub(crate) async fn pass(&self, seconds: i64) {
        let passed = self.passed.fetch_add(seconds, Ordering::SeqCst) + seconds;
        self.shift.write_all_at(&passed.to_ne_bytes(), 8).unwrap();
        self.wake().await;
    }

    /// The worker and the control thread have something to do.
    async fn wake(&self) {
        for at in [self.at, self.admin] {
            drop(soon("a connection", TcpStream::connect(at)).await.unwrap());
        }
    }

    /// What the admin port says.
    pub(crate) async fn admin(&self, path: &str) -> String {
        let (status, _, body) = get(self.admin, path).await;
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// The next line of the access log.
    pub(crate) async fn line(&mut self) -> Value {
        let line = soon("a line of the access log", async {
            loop {
                let text = std::fs::read_to_string(&self.log).unwrap_or_default();
                if let Some(line) = text.split_inclusive('\n').nth(self.read)
                    && line.ends_with('\n')
                {
                    return line.to_owned();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        self.read += 1;
        serde_json::from_str(&line).unwrap()
    }

    pub(crate) async fn stop(mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "the process lives");
        self.child.kill().await.unwrap();
    }
}

pub(crate) fn cluster(name: &str, more: &str, endpoints: &[SocketAddr]) -> String {
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|at| {
            format!(
                "{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }} }}",
                at.port()
            )
        })
        .collect();
    format!(
        "  - {{ name: {name}, type: STATIC, connect_timeout: 1s, {more} load_assignment: {{ cluster_name: {name}, \
         endpoints: [ {{ lb_endpoints: [ {} ] }} ] }} }}\n",
        endpoints.join(", ")
    )
}

pub(crate) fn route(path: &str, action: &str, more: &str) -> String {
    format!("              - {{ match: {{ prefix: {path} }}, route: {{ {action} }} {more} }}\n")
}

/// Answers once it is let go; says how many requests wait.
pub(crate) struct Held {
    pub(crate) at: SocketAddr,
    waiting: Arc<AtomicUsize>,
    go: watch::Sender<usize>,
    task: tokio::task::JoinHandle<()>,
}

impl Held {
    pub(crate) async fn start() -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = socket.local_addr().unwrap();
        let waiting = Arc::new(AtomicUsize::new(0));
        let (go, released) = watch::channel(0);
        let arrived = waiting.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((mut stream, _)) = socket.accept().await {
                let (arrived, mut released) = (arrived.clone(), released.clone());
                connections.spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        match stream.read_buf(&mut head).await {
                            Ok(count) if count > 0 => {}
                            _ => return,
                        }
                    }
                    let number = arrived.fetch_add(1, Ordering::SeqCst) + 1;
                    let _ = released.wait_for(|go| *go >= number).await;
                    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\nheld";
                    let _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        });
        Self {
            at,
            waiting,
            go,
            task,
        }
    }

    pub(crate) async fn arrived(&self, count: usize) {
        soon("a request that waits", async {
            while self.waiting.load(Ordering::SeqCst) < count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }

    /// The first so many requests are answered.
    pub(crate) fn answer(&self, count: usize) {
        self.go.send_replace(count);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.task.abort();
    }
}
