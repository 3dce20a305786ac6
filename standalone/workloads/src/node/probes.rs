//! Probes: running one, and the schedule of a container's three.
//!
//! Kubernetes probes every `periodSeconds`, so that an application that needs 50 ms to listen is found ready after
//! ten seconds. Here a startup or readiness probe that has not succeeded yet is tried again after 10, 20, 40 … ms, up
//! to the period; only one failure per period counts towards `failureThreshold`. The period stays the upper bound,
//! `initialDelaySeconds` is kept, and after the first success everything is as in Kubernetes.

mod grpc;
mod tls;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::shim_client::ShimClient;

/// First delay between tries before the first success.
const FIRST_RETRY: Duration = Duration::from_millis(10);
/// Bytes of an HTTP probe's answer that are read; kubelet's limit.
const MAX_BODY: usize = 10 * 1024;

/// Which of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Startup,
    Readiness,
    Liveness,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Readiness => "Readiness",
            Self::Liveness => "Liveness",
        }
    }
}

/// What a container's probes found. `attempt` tells a run of the container from its successor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProbeEvent {
    pub(crate) container: String,
    pub(crate) attempt: u32,
    pub(crate) kind: Kind,
    pub(crate) finding: Finding,
}

/// See [`ProbeEvent`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Finding {
    /// `successThreshold` reached.
    Passed,
    /// `failureThreshold` reached.
    Failed(String),
    /// One counted failure: worth an event, changes nothing.
    Unhealthy(String),
}

/// What a probe is run against.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) address: String,
    pub(crate) shim: Arc<ShimClient>,
    pub(crate) container: Arc<Container>,
    pub(crate) env: Arc<Vec<(String, String)>>,
    /// Turns an exec command into one of this machine (image catalogue).
    pub(crate) command: Arc<dyn Fn(&[String]) -> Vec<String> + Send + Sync>,
    pub(crate) attempt: u32,
}

/// The numbers of a probe, with Kubernetes' defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Schedule {
    pub(crate) initial_delay: Duration,
    pub(crate) period: Duration,
    pub(crate) timeout: Duration,
    pub(crate) success_threshold: u32,
    pub(crate) failure_threshold: u32,
}

impl Schedule {
    fn of(probe: &Probe) -> Self {
        let seconds = |value: Option<i32>, default: i32| {
            Duration::from_secs(
                u64::try_from(value.filter(|v| *v > 0).unwrap_or(default)).unwrap_or_default(),
            )
        };
        let count = |value: Option<i32>, default: i32| value.filter(|v| *v > 0).unwrap_or(default) as u32;
        Self {
            initial_delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10),
            timeout: seconds(probe.timeout_seconds, 1),
            success_threshold: count(probe.success_threshold, 1),
            failure_threshold: count(probe.failure_threshold, 3),
        }
    }
}

/// The counting of one probe: pure.
#[derive(Debug)]
pub(crate) struct Counter {
    schedule: Schedule,
    eager: bool,
    successes: u32,
    failures: u32,
    retry: Duration,
    last_counted: Option<Instant>,
    passed: Option<bool>,
}

impl Counter {
    pub(crate) fn new(schedule: Schedule, kind: Kind) -> Self {
        Self {
            schedule,
            eager: kind != Kind::Liveness,
            successes: 0,
            failures: 0,
            retry: FIRST_RETRY,
            last_counted: None,
            passed: None,
        }
    }

    /// Takes in one result: what to report and how long to wait until the next try.
    pub(crate) fn on_result(
        &mut self,
        result: Result<(), String>,
        now: Instant,
    ) -> (Option<Finding>, Duration) {
        let period = self.schedule.period;
        match result {
            Ok(()) => {
                self.failures = 0;
                self.successes += 1;
                if self.successes < self.schedule.success_threshold || self.passed == Some(true) {
                    return (None, period);
                }
                self.eager = false;
                self.passed = Some(true);
                (Some(Finding::Passed), period)
            }
            Err(reason) => {
                self.successes = 0;
                let wait = if self.eager {
                    let wait = self.retry.min(period);
                    self.retry = (self.retry * 2).min(period);
                    wait
                } else {
                    period
                };
                // Tries in between are gifts, not verdicts.
                if self.eager
                    && self
                        .last_counted
                        .is_some_and(|last| now.duration_since(last) < period)
                {
                    return (None, wait);
                }
                self.last_counted = Some(now);
                self.failures += 1;
                if self.failures < self.schedule.failure_threshold || self.passed == Some(false) {
                    return (Some(Finding::Unhealthy(reason)), wait);
                }
                self.passed = Some(false);
                (Some(Finding::Failed(reason)), wait)
            }
        }
    }
}

/// Runs one of a container's probes for as long as the container lives (the caller aborts it then).
pub(crate) async fn run(target: Target, kind: Kind, probe: Probe, events: mpsc::Sender<ProbeEvent>) {
    let schedule = Schedule::of(&probe);
    let mut counter = Counter::new(schedule, kind);
    tokio::time::sleep(schedule.initial_delay).await;
    loop {
        let result = once(&target, &probe, schedule.timeout).await;
        let (finding, wait) = counter.on_result(result, Instant::now());
        if let Some(finding) = finding {
            let passed = finding == Finding::Passed;
            let event = ProbeEvent {
                container: target.container.name.clone(),
                attempt: target.attempt,
                kind,
                finding,
            };
            if events.send(event).await.is_err() || (kind == Kind::Startup && passed) {
                return;
            }
        }
        tokio::time::sleep(wait).await;
    }
}

async fn once(target: &Target, probe: &Probe, timeout: Duration) -> Result<(), String> {
    if let Some(action) = &probe.exec {
        let argv = (target.command)(action.command.as_deref().unwrap_or_default());
        let env = target.env.as_ref().clone();
        return match target
            .shim
            .exec(&target.container.name, argv, env, timeout)
            .await?
        {
            (Some(0), _) => Ok(()),
            (Some(_), output) => Err(output.trim_end().to_owned()),
            (None, _) => Err(format!("command timed out after {}s", timeout.as_secs())),
        };
    }
    let limited = |result: Result<Result<(), String>, tokio::time::error::Elapsed>, what: &str| {
        result.unwrap_or_else(|_| {
            Err(format!(
                "{what}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
            ))
        })
    };
    if let Some(get) = &probe.http_get {
        let port = port(&get.port, &target.container)?;
        let host = get.host.clone().unwrap_or_else(|| target.address.clone());
        let path = get.path.as_deref().unwrap_or("/");
        let path = if path.starts_with('/') {
            path.to_owned()
        } else {
            format!("/{path}")
        };
        let scheme = if is_https(get) { "https" } else { "http" };
        let shown = format!("Get \"{scheme}://{host}:{port}{path}\"");
        return limited(
            tokio::time::timeout(timeout, http_get(&host, port, &path, get)).await,
            &shown,
        )
        .map_err(|reason| {
            if reason.starts_with("HTTP probe") {
                reason
            } else {
                prefixed(&shown, &reason)
            }
        });
    }
    if let Some(tcp) = &probe.tcp_socket {
        let port = port(&tcp.port, &target.container)?;
        let host = tcp.host.clone().unwrap_or_else(|| target.address.clone());
        let connect = async {
            TcpStream::connect((host.as_str(), port))
                .await
                .map(|_| ())
                .map_err(|error| not_connected(&host, port, &error))
        };
        return limited(
            tokio::time::timeout(timeout, connect).await,
            &format!("dial tcp {host}:{port}"),
        );
    }
    if let Some(grpc) = &probe.grpc {
        let port = u16::try_from(grpc.port).map_err(|_| format!("{} is not a port", grpc.port))?;
        let service = grpc.service.as_deref().unwrap_or_default();
        let check = grpc::check(&target.address, port, service);
        return tokio::time::timeout(timeout, check).await.unwrap_or_else(|_| {
            Err(format!(
                "timeout: health rpc did not complete within {}s",
                timeout.as_secs()
            ))
        });
    }
    Err("the probe has no exec, httpGet, tcpSocket or grpc handler".to_owned())
}

/// Why there is no connection, as kubelet words it.
fn not_connected(host: &str, port: u16, error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => {
            format!("dial tcp {host}:{port}: connect: connection refused")
        }
        _ => format!("dial tcp {host}:{port}: {error}"),
    }
}

fn prefixed(shown: &str, reason: &str) -> String {
    if reason.starts_with(shown) {
        reason.to_owned()
    } else {
        format!("{shown}: {reason}")
    }
}

pub(crate) fn port(port: &IntOrString, container: &Container) -> Result<u16, String> {
    match port {
        IntOrString::Int(number) => u16::try_from(*number).map_err(|_| format!("{number} is not a port")),
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|port| port.name.as_deref() == Some(name))
            .and_then(|port| u16::try_from(port.container_port).ok())
            .or_else(|| name.parse().ok())
            .ok_or_else(|| format!("couldn't find port: {name}")),
    }
}

/// A GET as kubelet makes it: redirects count as success, so does everything from 200 to 399.
pub(crate) async fn http_get(host: &str, port: u16, path: &str, get: &HTTPGetAction) -> Result<(), String> {
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|error| not_connected(host, port, &error))?;
    if is_https(get) {
        exchange(tls::connect(stream, host).await?, host, port, path, get).await
    } else {
        exchange(stream, host, port, path, get).await
    }
}

fn is_https(get: &HTTPGetAction) -> bool {
    let scheme = get.scheme.as_deref();
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"))
}

async fn exchange<S>(stream: S, host: &str, port: u16, path: &str, get: &HTTPGetAction) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let mut request = http::Request::builder()
        .uri(path)
        .header("User-Agent", "kube-probe/1.33")
        .header("Connection", "close");
    let mut has_host = false;
    for header in get.http_headers.iter().flatten() {
        has_host |= header.name.eq_ignore_ascii_case("host");
        request = request.header(&header.name, &header.value);
    }
    if !has_host {
        request = request.header("Host", format!("{host}:{port}"));
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let exchange = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| error.to_string())?;
        let status = response.status().as_u16();
        let mut body = response.into_body();
        let mut read = 0;
        while read < MAX_BODY {
            match body.frame().await {
                Some(Ok(frame)) => read += frame.data_ref().map_or(0, Bytes::len),
                Some(Err(_)) | None => break,
            }
        }
        if (200..400).contains(&status) {
            Ok(())
        } else {
            Err(format!("HTTP probe failed with statuscode: {status}"))
        }
    };
    tokio::pin!(connection);
    tokio::pin!(exchange);
    let mut connected = true;
    loop {
        tokio::select! {
            result = &mut exchange => return result,
            _ = &mut connection, if connected => connected = false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(period: u64, success: u32, failure: u32) -> Schedule {
        Schedule {
            initial_delay: Duration::ZERO,
            period: Duration::from_secs(period),
            timeout: Duration::from_secs(1),
            success_threshold: success,
            failure_threshold: failure,
        }
    }

    fn failed() -> Result<(), String> {
        Err("no".to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_readiness_probe_is_retried_quickly_until_it_first_passes_and_only_one_failure_per_period_counts()
     {
        let mut counter = Counter::new(schedule(10, 1, 3), Kind::Readiness);
        let mut counted = 0;
        let mut waits = Vec::new();
        let start = Instant::now();
        while Instant::now() - start < Duration::from_secs(5) {
            let (finding, wait) = counter.on_result(failed(), Instant::now());
            counted += u32::from(finding.is_some());
            waits.push(wait.as_millis());
            tokio::time::advance(wait).await;
        }
        assert_eq!(counted, 1);
        assert_eq!(waits[..5], [10, 20, 40, 80, 160]);
        let (finding, wait) = counter.on_result(Ok(()), Instant::now());
        assert_eq!((finding, wait), (Some(Finding::Passed), Duration::from_secs(10)));
        let (_, wait) = counter.on_result(failed(), Instant::now());
        assert_eq!(wait, Duration::from_secs(10));
    }

    #[tokio::test(start_paused = true)]
    async fn thresholds_count_consecutive_results() {
        let mut counter = Counter::new(schedule(1, 2, 2), Kind::Liveness);
        let mut feed = |ok: bool| {
            counter
                .on_result(if ok { Ok(()) } else { failed() }, Instant::now())
                .0
        };
        assert_eq!(feed(true), None);
        assert_eq!(feed(true), Some(Finding::Passed));
        assert_eq!(feed(false), Some(Finding::Unhealthy("no".into())));
        assert_eq!(feed(true), None);
        assert_eq!(feed(false), Some(Finding::Unhealthy("no".into())));
        assert_eq!(feed(false), Some(Finding::Failed("no".into())));
        assert_eq!(feed(false), Some(Finding::Unhealthy("no".into())));
        assert_eq!(feed(true), None);
        assert_eq!(feed(true), Some(Finding::Passed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_startup_probe_fails_after_its_threshold_of_periods() {
        let mut counter = Counter::new(schedule(10, 1, 3), Kind::Startup);
        let start = Instant::now();
        loop {
            let (finding, wait) = counter.on_result(failed(), Instant::now());
            if matches!(finding, Some(Finding::Failed(_))) {
                break;
            }
            tokio::time::advance(wait).await;
        }
        let took = (Instant::now() - start).as_secs();
        assert!((20..40).contains(&took), "{took} s");
    }
}
