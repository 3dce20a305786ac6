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

/// A Prometheus that answers every query with one value, or with none, and those for the primary with another.
struct Prometheus {
    address: String,
    value: Arc<Mutex<Option<f64>>>,
    primary: Arc<Mutex<f64>>,
    requests: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl Prometheus {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let value = Arc::new(Mutex::new(Some(0.4)));
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let primary = Arc::new(Mutex::new(0.4));
        let (answer, of_primary, log) = (value.clone(), primary.clone(), requests.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (answer, of_primary, log) = (answer.clone(), of_primary.clone(), log.clone());
                connections.spawn(async move {
                    let mut buffer = vec![0; 8192];
                    // One read is one request: they are short and sent whole.
                    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                        let request = String::from_utf8_lossy(&buffer[..length]).into_owned();
                        // No two measurements are quite the same.
                        let noise = 0.01 * (log.lock().len() % 7) as f64;
                        let value = if request.contains("podinfo-primary") {
                            Some(*of_primary.lock() + noise)
                        } else {
                            let exact = *answer.lock();
                            exact.map(|value| if value == 0.9 { value + noise } else { value })
                        };
                        log.lock().push(request);
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
            primary,
            requests,
            _tasks: tasks,
        }
    }
}

fn analysis(metric: Value) -> Value {
    json!({"analysis": {"interval": "1s", "threshold": 1, "stepWeights": [50], "metrics": [metric]}})
}

async fn with_template(prometheus: &Prometheus) -> Cluster {
    let query = "errors{target='{{ target }}',dir='{{ variables.dir }}'}[{{ interval }}]";
    let cluster = with_comparison(prometheus, query, Value::Null).await;
    let metric = json!({"name": "errors", "templateRef": {"name": "errors"}, "interval": "30s",
        "templateVariables": {"dir": "in"}, "thresholdRange": {"max": 1}});
    cluster.podinfo(analysis(metric)).await;
    cluster
}

/// A template with `spec.comparison`.
async fn with_comparison(prometheus: &Prometheus, query: &str, comparison: Value) -> Cluster {
    let cluster = Cluster::start().await;
    cluster
        .create(
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "prometheus"},
            "stringData": {"token": "hush-hush"}}),
        )
        .await;
    let mut template = json!({"apiVersion": "flagger.app/v1beta1", "kind": "MetricTemplate", "metadata": {"name": "errors"},
        "spec": {"provider": {"type": "prometheus", "address": prometheus.address, "secretRef": {"name": "prometheus"}},
            "query": query}});
    if !comparison.is_null() {
        template["spec"]["comparison"] = comparison;
    }
    cluster.create(template).await;
    cluster
}

/// A run of many short steps with a metric that has no bounds of its own: only the template's rule speaks.
async fn many_steps(cluster: &Cluster) {
    let metric = json!({"name": "errors", "templateRef": {"name": "errors"}, "interval": "30s",
        "thresholdRange": {"max": 100}});
    let mut spec = analysis(metric);
    spec["analysis"]["stepWeights"] = json!([5, 10, 15, 20, 25, 30, 35, 40, 45, 50]);
    cluster.podinfo(spec).await;
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

/// Within its bounds, and twice the primary's.
async fn worse_than_the_primary(comparison: Value) -> (Canary, Vec<String>) {
    let prometheus = Prometheus::start().await;
    let mut cluster = with_comparison(&prometheus, "errors{target='{{ target }}'}", comparison).await;
    many_steps(&cluster).await;
    cluster.start_controller();
    cluster.phase(CanaryPhase::Initialized).await;
    *prometheus.value.lock() = Some(0.9);
    cluster.push("podinfo:2").await;
    let canary = cluster.phase(CanaryPhase::Failed).await;
    let requests = prometheus.requests.lock().clone();
    (canary, requests)
}

#[tokio::test]
async fn a_templates_plan_of_looks_compares_with_the_primary_and_rolls_back_within_its_bounds() {
    let comparison = json!({"judge": "GroupSequential", "looks": 10, "alpha": 0.01});
    let (canary, requests) = worse_than_the_primary(comparison).await;
    let of = |workload: &str| {
        let needle = format!("target%3D%27{workload}%27");
        requests
            .iter()
            .filter(|request| request.contains(&needle))
            .count()
    };
    assert!(
        of("podinfo") >= 5 && of("podinfo") == of("podinfo-primary"),
        "{requests:?}"
    );
    let (verdict, why) = metric_verdict(&canary).unwrap();
    assert_eq!(verdict, "bad");
    assert!(why.contains("primary"), "{why}");
}

#[tokio::test]
async fn a_template_that_is_compared_as_kayenta_does_rolls_back_within_its_bounds() {
    let (canary, _) = worse_than_the_primary(json!({"judge": "MannWhitney", "allowedIncrease": 1.2})).await;
    let (verdict, why) = metric_verdict(&canary).unwrap();
    assert_eq!(verdict, "bad");
    assert!(why.contains("times the primary's on average"), "{why}");
}

#[tokio::test]
async fn a_template_that_is_like_the_primarys_is_promoted() {
    let prometheus = Prometheus::start().await;
    *prometheus.value.lock() = Some(0.9);
    *prometheus.primary.lock() = 0.9;
    let query = "errors{target='{{ target }}'}";
    let mut cluster = with_comparison(
        &prometheus,
        query,
        json!({"judge": "GroupSequential", "looks": 10}),
    )
    .await;
    many_steps(&cluster).await;
    cluster.start_controller();
    let first = applied(&cluster.phase(CanaryPhase::Initialized).await);
    cluster.push("podinfo:2").await;
    let canary = cluster.phase_of_new(CanaryPhase::Succeeded, &first).await;
    let (verdict, why) = metric_verdict(&canary).unwrap();
    assert!(
        ["undecided", "good"].contains(&verdict.as_str()),
        "{verdict}: {why}"
    );
}

#[tokio::test]
async fn a_comparing_template_that_asks_the_same_of_both_is_refused_with_what_is_missing() {
    let prometheus = Prometheus::start().await;
    let mut cluster = with_comparison(&prometheus, "errors", json!({"judge": "MannWhitney"})).await;
    many_steps(&cluster).await;
    cluster.start_controller();
    cluster.phase(CanaryPhase::Initialized).await;
    cluster.push("podinfo:2").await;
    cluster
        .until("podinfo", "a refusal", |canary: &Canary| {
            metric_verdict(canary).is_some_and(|(verdict, why)| {
                verdict == "provider error" && why.contains("it must contain {{ target }}")
            })
        })
        .await;
    assert_eq!(prometheus.requests.lock().len(), 0, "nothing is asked");
}
