//! A service like podinfo: its paths and flags, with knobs for errors and latency.
//!
//! | knob | meaning |
//! |---|---|
//! | `--random-error`, `PODINFO_RANDOM_ERROR` | one third of the answers fail, as in podinfo |
//! | `PODINFO_ERROR_PERCENT` | exactly this share of the answers to `/` and `/api/*` is a 500 |
//! | `PODINFO_DELAY_MS` | every answer to `/` and `/api/*` takes this much longer |
//! | `PODINFO_UNREADY` | `/readyz` fails until `/readyz/enable` is posted |
//!
//! The version is that of the image's tag (`ghcr.io/stefanprodan/podinfo:6.1.0`), or `PODINFO_VERSION`; every answer
//! carries it in the header `x-podinfo-version`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use axum::extract::{Path, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use clap::Args;
use http::{HeaderMap, HeaderValue, StatusCode};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::{podcli, serve};

/// The flags of podinfo that matter here; the others are accepted by name so that its manifests run.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// `podcli`, which podinfo's image brings for its probes: does this instead of serving
    #[command(subcommand)]
    pub(crate) podcli: Option<podcli::Command>,
    /// HTTP port
    // Not from PODINFO_PORT: Kubernetes sets it to `tcp://…` beside a Service called podinfo.
    #[arg(long, default_value_t = 9898)]
    port: u16,
    /// Port for metrics alone; 0 serves them on the HTTP port only
    #[arg(long, default_value_t = 0)]
    port_metrics: u16,
    /// Accepted for podinfo's manifests; there is no gRPC server
    #[arg(long, hide = true)]
    grpc_port: Option<u16>,
    /// Accepted for podinfo's manifests
    #[arg(long, hide = true)]
    grpc_service_name: Option<String>,
    /// Accepted for podinfo's manifests; requests are not logged
    #[arg(long, hide = true)]
    level: Option<String>,
    /// Accepted for podinfo's manifests
    #[arg(long, hide = true)]
    cache_server: Option<String>,
    /// Delay answers by a random time of up to 5 s
    #[arg(long, env = "PODINFO_RANDOM_DELAY", num_args = 0..=1, default_value_t = false, default_missing_value = "true", require_equals = true)]
    random_delay: bool,
    /// Fail one third of the answers
    #[arg(long, env = "PODINFO_RANDOM_ERROR", num_args = 0..=1, default_value_t = false, default_missing_value = "true", require_equals = true)]
    random_error: bool,
    /// Share of answers that fail, in percent
    #[arg(long, env = "PODINFO_ERROR_PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=100))]
    error_percent: u64,
    /// How much longer each answer takes, in milliseconds
    #[arg(long, env = "PODINFO_DELAY_MS", default_value_t = 0)]
    delay_ms: u64,
    /// Start unready
    #[arg(long, env = "PODINFO_UNREADY", num_args = 0..=1, default_value_t = false, default_missing_value = "true", require_equals = true)]
    unready: bool,
    /// Colour in the answer
    #[arg(long, env = "PODINFO_UI_COLOR", default_value = "#34577c")]
    ui_color: String,
    /// Message in the answer
    #[arg(long, env = "PODINFO_UI_MESSAGE")]
    ui_message: Option<String>,
    /// Version in the answer; otherwise the tag of the image
    #[arg(long, env = "PODINFO_VERSION")]
    app_version: Option<String>,
    /// Reference of the image that this process stands for
    #[arg(long, env = "SERIN_IMAGE", hide = true)]
    image: Option<String>,
}

/// Upper bounds of the duration histogram, in seconds (Prometheus' defaults).
const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// The longest delay that `/delay/N` accepts, in seconds.
const DELAY_MAX: u64 = 60;
/// podinfo's random delay is below this.
const RANDOM_DELAY_MAX_MS: u64 = 5000;

struct Podinfo {
    options: Options,
    version: String,
    hostname: String,
    ready: AtomicBool,
    healthy: AtomicBool,
    /// Numbers the requests that the knobs apply to; errors are spread evenly over it.
    turn: AtomicU64,
    metrics: Mutex<Metrics>,
}

#[derive(Default)]
struct Metrics {
    by_status: BTreeMap<u16, u64>,
    buckets: [u64; BUCKETS.len()],
    sum_seconds: f64,
    count: u64,
}

/// Serves until asked to stop.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    if let Some(command) = &options.podcli {
        return podcli::run(command).await;
    }
    let (port, metrics_port) = (options.port, options.port_metrics);
    let state = Arc::new(Podinfo::new(options));
    if metrics_port != 0 && metrics_port != port {
        let listener = tokio::net::TcpListener::bind(("0.0.0.0", metrics_port))
            .await
            .with_context(|| format!("listen on metrics port {metrics_port}"))?;
        let router = Router::new()
            .route("/metrics", get(metrics))
            .with_state(state.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
    }
    serve::run(port, router(state)).await
}

fn router(state: Arc<Podinfo>) -> Router {
    let knobs = Router::new()
        .route("/", get(info))
        .route("/api/info", get(info))
        .route("/api/echo", post(echo))
        .route("/echo", post(echo))
        .route_layer(from_fn_with_state(state.clone(), misbehave));
    Router::new()
        .merge(knobs)
        .route("/version", get(version))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route(
            "/readyz/enable",
            post(|State(state): State<Arc<Podinfo>>| set_ready(state, true)),
        )
        .route(
            "/readyz/disable",
            post(|State(state): State<Arc<Podinfo>>| set_ready(state, false)),
        )
        .route("/status/{code}", any(status))
        .route("/delay/{seconds}", any(delay))
        .route("/headers", any(headers))
        .route("/env", get(env))
        .route("/panic", get(panic))
        .route("/metrics", get(metrics))
        .layer(from_fn_with_state(state.clone(), observe))
        .with_state(state)
}

impl Podinfo {
    fn new(options: Options) -> Self {
        let version = options
            .app_version
            .clone()
            .or_else(|| options.image.as_deref().and_then(tag_of_image))
            .unwrap_or_else(|| env!("CARGO_PKG_VERSION").to_owned());
        Self {
            version,
            hostname: std::env::var("HOSTNAME").unwrap_or_else(|_| "unknown".to_owned()),
            ready: AtomicBool::new(!options.unready),
            healthy: AtomicBool::new(true),
            turn: AtomicU64::new(0),
            metrics: Mutex::default(),
            options,
        }
    }
}

fn tag_of_image(reference: &str) -> Option<String> {
    let name = reference.split('@').next()?.rsplit('/').next()?;
    name.split_once(':').map(|(_, tag)| tag.to_owned())
}

/// Counts and times every request and states the version.
async fn observe(State(state): State<Arc<Podinfo>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let mut response = next.run(request).await;
    let seconds = started.elapsed().as_secs_f64();
    if let Ok(version) = HeaderValue::from_str(&state.version) {
        response.headers_mut().insert("x-podinfo-version", version);
    }
    let mut metrics = state.metrics.lock();
    *metrics.by_status.entry(response.status().as_u16()).or_default() += 1;
    metrics.count += 1;
    metrics.sum_seconds += seconds;
    if let Some(index) = BUCKETS.iter().position(|bound| seconds <= *bound) {
        metrics.buckets[index] += 1;
    }
    response
}

/// Applies the error and latency knobs.
async fn misbehave(State(state): State<Arc<Podinfo>>, request: Request, next: Next) -> Response {
    let options = &state.options;
    let turn = state.turn.fetch_add(1, Ordering::Relaxed);
    if options.delay_ms > 0 {
        tokio::time::sleep(Duration::from_millis(options.delay_ms)).await;
    }
    if options.random_delay {
        tokio::time::sleep(Duration::from_millis(scatter(turn) % RANDOM_DELAY_MAX_MS)).await;
    }
    let fails = fails(turn, options.error_percent) || (options.random_error && turn % 3 == 2);
    if fails {
        return (
            StatusCode::INTERNAL_SERVER_ERROR,
            Json(json!({ "code": 500, "message": "made to fail" })),
        )
            .into_response();
    }
    next.run(request).await
}

/// Whether the request with this number fails: exactly `percent` of every hundred, spread evenly (Bresenham).
fn fails(turn: u64, percent: u64) -> bool {
    let turn = turn % 100;
    (turn + 1) * percent / 100 > turn * percent / 100
}

/// A fixed scrambling of the request's number (SplitMix64), random enough for a delay.
fn scatter(turn: u64) -> u64 {
    let mut z = turn.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB) >> 20
}

async fn info(State(state): State<Arc<Podinfo>>) -> Json<Value> {
    let message = state
        .options
        .ui_message
        .clone()
        .unwrap_or_else(|| format!("greetings from podinfo v{}", state.version));
    Json(json!({
        "hostname": state.hostname,
        "version": state.version,
        "color": state.options.ui_color,
        "message": message,
        "runtime": "rust",
        "num_cpu": std::thread::available_parallelism().map_or(1, usize::from).to_string(),
    }))
}

async fn version(State(state): State<Arc<Podinfo>>) -> Json<Value> {
    Json(json!({ "version": state.version, "commit": "unknown" }))
}

async fn healthz(State(state): State<Arc<Podinfo>>) -> Response {
    probe(state.healthy.load(Ordering::Relaxed))
}

async fn readyz(State(state): State<Arc<Podinfo>>) -> Response {
    probe(state.ready.load(Ordering::Relaxed))
}

fn probe(good: bool) -> Response {
    if good {
        Json(json!({ "status": "OK" })).into_response()
    } else {
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    }
}

async fn set_ready(state: Arc<Podinfo>, ready: bool) -> StatusCode {
    state.ready.store(ready, Ordering::Relaxed);
    StatusCode::ACCEPTED
}

async fn status(Path(code): Path<u16>) -> Response {
    match StatusCode::from_u16(code) {
        Ok(code) => (code, Json(json!({ "status": code.as_u16() }))).into_response(),
        Err(_) => (
            StatusCode::BAD_REQUEST,
            Json(json!({ "code": 400, "message": "not a status code" })),
        )
            .into_response(),
    }
}

async fn delay(Path(seconds): Path<u64>) -> Response {
    if seconds > DELAY_MAX {
        return (
            StatusCode::BAD_REQUEST,
            Json(json!({ "code": 400, "message": "at most 60 seconds" })),
        )
            .into_response();
    }
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    Json(json!({ "delay": seconds })).into_response()
}

async fn headers(headers: HeaderMap) -> Json<Value> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in &headers {
        all.entry(name.to_string())
            .or_default()
            .push(String::from_utf8_lossy(value.as_bytes()).into_owned());
    }
    Json(json!(all))
}

async fn echo(body: bytes::Bytes) -> (StatusCode, bytes::Bytes) {
    (StatusCode::ACCEPTED, body)
}

/// The environment, but for what looks like a secret.
async fn env() -> Json<Value> {
    let secret = |name: &str| {
        let name = name.to_uppercase();
        ["TOKEN", "SECRET", "PASSWORD", "KEY"]
            .iter()
            .any(|word| name.contains(word))
    };
    let all: Vec<String> = std::env::vars()
        .map(|(name, value)| {
            if secret(&name) {
                format!("{name}=<redacted>")
            } else {
                format!("{name}={value}")
            }
        })
        .collect();
    Json(json!(all))
}

/// Ends the process, as podinfo's `/panic` does, to show what a crash looks like.
async fn panic() -> StatusCode {
    eprintln!("asked to panic");
    std::process::exit(255)
}

async fn metrics(State(state): State<Arc<Podinfo>>) -> String {
    let metrics = state.metrics.lock();
    let mut text = String::from("# TYPE http_requests_total counter\n");
    for (status, count) in &metrics.by_status {
        let _ = writeln!(text, "http_requests_total{{status=\"{status}\"}} {count}");
    }
    text.push_str("# TYPE http_request_duration_seconds histogram\n");
    let mut cumulative = 0;
    for (bound, count) in BUCKETS.iter().zip(metrics.buckets) {
        cumulative += count;
        let _ = writeln!(
            text,
            "http_request_duration_seconds_bucket{{le=\"{bound}\"}} {cumulative}"
        );
    }
    let _ = writeln!(
        text,
        "http_request_duration_seconds_bucket{{le=\"+Inf\"}} {}",
        metrics.count
    );
    let _ = writeln!(text, "http_request_duration_seconds_sum {}", metrics.sum_seconds);
    let _ = writeln!(text, "http_request_duration_seconds_count {}", metrics.count);
    text
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use clap::Parser;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        options: Options,
    }

    fn app(arguments: &[&str]) -> Router {
        let command = Command::parse_from(std::iter::once(&"podinfo").chain(arguments));
        router(Arc::new(Podinfo::new(command.options)))
    }

    async fn call(app: &Router, method: &str, path: &str) -> (StatusCode, HeaderMap, String) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .body(Body::empty())
            .unwrap();
        let response = app.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (
            parts.status,
            parts.headers,
            String::from_utf8(body.to_vec()).unwrap(),
        )
    }

    #[test]
    fn the_version_is_the_tag_of_the_image() {
        assert_eq!(
            tag_of_image("ghcr.io/stefanprodan/podinfo:6.1.0").as_deref(),
            Some("6.1.0")
        );
        assert_eq!(
            tag_of_image("localhost:5000/podinfo:2@sha256:abc").as_deref(),
            Some("2")
        );
        assert_eq!(tag_of_image("localhost:5000/podinfo"), None);
    }

    #[test]
    fn the_error_knob_fails_exactly_its_share_of_every_hundred() {
        for percent in [0, 1, 30, 50, 99, 100] {
            for start in [0, 17] {
                let failed = (start..start + 100).filter(|turn| fails(*turn, percent)).count() as u64;
                assert_eq!(failed, percent);
            }
        }
    }

    #[tokio::test]
    async fn answers_state_their_version() {
        let app = app(&["--image=x/podinfo:2.0.0"]);
        let (status, headers, body) = call(&app, "GET", "/version").await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(headers["x-podinfo-version"], "2.0.0");
        assert!(body.contains("\"version\":\"2.0.0\""));
    }

    #[tokio::test]
    async fn knobs_fail_the_front_page_and_leave_probes_alone() {
        let app = app(&["--error-percent=100"]);
        assert_eq!(call(&app, "GET", "/").await.0, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(call(&app, "GET", "/healthz").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn readiness_is_switched_by_request() {
        let app = app(&["--unready"]);
        assert_eq!(
            call(&app, "GET", "/readyz").await.0,
            StatusCode::SERVICE_UNAVAILABLE
        );
        assert_eq!(call(&app, "POST", "/readyz/enable").await.0, StatusCode::ACCEPTED);
        assert_eq!(call(&app, "GET", "/readyz").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn any_status_can_be_asked_for_and_is_counted() {
        let app = app(&[]);
        assert_eq!(call(&app, "GET", "/status/418").await.0, StatusCode::IM_A_TEAPOT);
        assert_eq!(call(&app, "GET", "/status/42").await.0, StatusCode::BAD_REQUEST);
        let (_, _, metrics) = call(&app, "GET", "/metrics").await;
        assert!(metrics.contains("http_requests_total{status=\"418\"} 1"));
    }

    #[test]
    fn the_flags_of_podinfos_own_manifests_are_accepted() {
        let arguments = [
            "podinfo",
            "--port=9898",
            "--port-metrics=9797",
            "--grpc-port=9999",
            "--grpc-service-name=podinfo",
            "--level=info",
            "--random-delay=false",
            "--random-error=false",
        ];
        assert_eq!(Command::parse_from(arguments).options.port_metrics, 9797);
    }
}
