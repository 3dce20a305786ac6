//! Metrics of MetricTemplates, with a provider on loopback.

use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};
use serin_canary::objects;
use serin_crds::flagger::{Canary, CanaryPhase};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::cluster::{Cluster, applied};

/// A Prometheus that answers every query with one value, or with none.
struct Prometheus {
    address: String,
    value: Arc<Mutex<Option<f64>>>,
    requests: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl Prometheus {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let value = Arc::new(Mutex::new(Some(0.4)));
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let (answer, log) = (value.clone(), requests.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (answer, log) = (answer.clone(), log.clone());
                connections.spawn(async move {
                    let mut buffer = vec![0; 8192];
                    // One read is one request: they are short and sent whole.
                    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                        log.lock()
                            .push(String::from_utf8_lossy(&buffer[..length]).into_owned());
                        let value = *answer.lock();
                        let series: Vec<Value> = value
                            .map(|value| json!({"metric": {}, "value": [1, value.to_string()]}))
                            .into_iter()
                            .collect();
                        let body =
                            json!({"status": "success", "data": {"resultType": "vector", "result": series}});
                        let body = body.to_string();
                        let answer =
                            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        Self {
            address,
            value,
            requests,
            _tasks: tasks,
        }
    }
}

fn analysis(metric: Value) -> Value {
    json!({"analysis": {"interval": "1s", "threshold": 1, "stepWeights": [50], "metrics": [metric]}})
}

async fn with_template(prometheus: &Prometheus) -> Cluster {
    let cluster = Cluster::start().await;
    cluster
        .create(
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "prometheus"},
            "stringData": {"token": "hush-hush"}}),
        )
        .await;
    cluster
        .create(json!({"apiVersion": "flagger.app/v1beta1", "kind": "MetricTemplate", "metadata": {"name": "errors"},
            "spec": {"provider": {"type": "prometheus", "address": prometheus.address, "secretRef": {"name": "prometheus"}},
                "query": "errors{target='{{ target }}',dir='{{ variables.dir }}'}[{{ interval }}]"}}))
        .await;
    let metric = json!({"name": "errors", "templateRef": {"name": "errors"}, "interval": "30s",
        "templateVariables": {"dir": "in"}, "thresholdRange": {"max": 1}});
    cluster.podinfo(analysis(metric)).await;
    cluster
}

fn metric_verdict(canary: &Canary) -> Option<(String, String)> {
    let status = canary.status.as_ref()?;
    let metric = status.metrics.iter().find(|metric| metric.name == "errors")?;
    Some((metric.verdict.clone(), metric.message.clone().unwrap_or_default()))
}

#[tokio::test]
async fn a_metric_template_is_asked_at_the_end_of_each_window_and_its_bounds_decide() {
    let prometheus = Prometheus::start().await;
    let mut cluster = with_template(&prometheus).await;
    cluster.start_controller();
    let first = applied(&cluster.phase(CanaryPhase::Initialized).await);

    cluster.push("podinfo:2").await;
    let canary = cluster.phase_of_new(CanaryPhase::Succeeded, &first).await;
    let requests = prometheus.requests.lock().clone();
    assert_eq!(requests.len(), 1, "one window, one question: {requests:?}");
    assert!(
        requests[0].starts_with(
            "GET /api/v1/query?query=errors%7Btarget%3D%27podinfo%27%2Cdir%3D%27in%27%7D%5B30s%5D "
        ),
        "{}",
        requests[0]
    );
    assert!(
        requests[0].contains("authorization: Bearer hush-hush"),
        "{}",
        requests[0]
    );

    *prometheus.value.lock() = Some(12.345);
    cluster.push("podinfo:3").await;
    let canary = cluster.phase_of_new(CanaryPhase::Failed, &applied(&canary)).await;
    let message = canary.status.as_ref().unwrap().message.clone().unwrap();
    assert_eq!(
        message,
        "rolled back: failed checks threshold reached 1: errors 12.35 > 1"
    );
    assert_eq!(
        metric_verdict(&canary).unwrap(),
        ("bad".to_owned(), "errors is 12.35, above the max of 1".to_owned())
    );
}

#[tokio::test]
async fn a_provider_without_values_halts_the_run_until_it_has_some() {
    let prometheus = Prometheus::start().await;
    *prometheus.value.lock() = None;
    let mut cluster = with_template(&prometheus).await;
    cluster.start_controller();
    let first = applied(&cluster.phase(CanaryPhase::Initialized).await);
    cluster.push("podinfo:2").await;
    let canary = cluster
        .until("podinfo", "a halt", |canary: &Canary| {
            let message = canary.status.as_ref().and_then(|status| status.message.clone());
            message.is_some_and(|message| message.contains("matches no series"))
        })
        .await;
    let status = canary.status.unwrap();
    assert_eq!(
        (status.phase, status.failed_checks),
        (Some(CanaryPhase::Progressing), Some(0))
    );
    *prometheus.value.lock() = Some(1.0);
    cluster.phase_of_new(CanaryPhase::Succeeded, &first).await;
}

#[tokio::test]
async fn a_template_of_another_namespace_is_not_read_where_that_is_blocked() {
    let mut cluster = Cluster::start().await;
    let metric = json!({"name": "errors", "templateRef": {"name": "errors", "namespace": "shared"},
        "thresholdRange": {"max": 1}});
    cluster.podinfo(analysis(metric)).await;
    for (blocked, needle) in [
        (true, "cross-namespace references are blocked"),
        (false, "shared/errors does not exist"),
    ] {
        cluster.start_controller_with(objects::Options {
            no_cross_namespace_refs: blocked,
            ..objects::Options::default()
        });
        if blocked {
            cluster.phase(CanaryPhase::Initialized).await;
            cluster.push("podinfo:2").await;
        }
        cluster
            .until("podinfo", needle, |canary: &Canary| {
                metric_verdict(canary)
                    .is_some_and(|(verdict, why)| verdict == "provider error" && why.contains(needle))
            })
            .await;
        cluster.stop_controller().await;
    }
}
