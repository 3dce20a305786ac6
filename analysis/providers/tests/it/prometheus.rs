//! Prometheus: a stand-in, Flagger's recorded queries, and a real one where it is installed.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use serin_crds::flagger::{Canary, MetricTemplate};
use serin_providers::template::{self, Model};
use serin_providers::{Config, Error};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::server::{Server, ok};
use crate::{config, query};

fn vector(values: &[&str]) -> Value {
    let series: Vec<Value> = values
        .iter()
        .map(|value| json!({"metric": {}, "value": [1.5, value]}))
        .collect();
    json!({"status": "success", "data": {"resultType": "vector", "result": series}})
}

#[tokio::test]
async fn prometheus_gets_the_query_in_one_line_with_headers_and_token() {
    let server = Server::answering(vector(&["1", "12.5"])).await;
    let mut config = config(
        "prometheus",
        &format!("{}/base/", server.address),
        &[("token", "secret\n")],
    );
    config
        .headers
        .insert("X-Scope-OrgID".to_owned(), vec!["t1".to_owned(), "t2".to_owned()]);
    assert_eq!(query(&config, "  a{\n  b=\"c\"\n}\n").await.unwrap(), 12.5);
    let seen = server.only();
    assert_eq!(
        (seen.method.as_str(), seen.path.as_str()),
        ("GET", "/base/api/v1/query")
    );
    assert_eq!(seen.parameter("query"), Some(" a{ b=\"c\" } "));
    assert_eq!(seen.header("authorization"), ["Bearer secret"]);
    assert_eq!(seen.header("x-scope-orgid"), ["t1", "t2"]);
}

#[tokio::test]
async fn prometheus_without_series_or_with_nan_has_no_values() {
    for answer in [vector(&[]), vector(&["1", "NaN"])] {
        let server = Server::answering(answer).await;
        let error = query(&config("prometheus", &server.address, &[]), "q")
            .await
            .unwrap_err();
        assert!(error.is_no_values(), "{error}");
    }
    let scalar = json!({"status": "success", "data": {"resultType": "scalar", "result": [1, "+Inf"]}});
    let server = Server::answering(scalar).await;
    let value = query(&config("prometheus", &server.address, &[]), "q")
        .await
        .unwrap();
    assert_eq!(value, f64::INFINITY);
}

#[tokio::test]
async fn prometheus_that_yields_a_range_or_an_error_is_no_value_at_all() {
    for answer in [
        json!({"status": "success", "data": {"resultType": "matrix", "result": [{"values": [[1, "2"]]}]}}),
        json!({"status": "error", "error": "bad"}),
        json!({"status": "success"}),
        json!([]),
    ] {
        let server = Server::answering(&answer).await;
        let error = query(&config("prometheus", &server.address, &[]), "q")
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Answer { .. }), "{answer}: {error}");
    }
}

#[tokio::test]
async fn a_prometheus_secret_needs_a_token_or_a_name_and_a_password() {
    let error = query(
        &config("prometheus", "http://127.0.0.1:1", &[("username", "u")]),
        "q",
    )
    .await
    .unwrap_err();
    assert!(error.to_string().contains("password"), "{error}");
    let error = query(&config("prometheus", "", &[]), "q").await.unwrap_err();
    assert!(error.to_string().contains("spec.provider.address"), "{error}");
}

fn model(canary: &Canary, metric: &serin_crds::flagger::CanaryMetric) -> Model {
    let name = canary.metadata.name.clone().unwrap();
    Model {
        namespace: canary.metadata.namespace.clone().unwrap(),
        target: name.clone(),
        service: name.clone(),
        ingress: name.clone(),
        route: name.clone(),
        name,
        interval: metric.interval.clone().unwrap_or_default(),
        variables: metric.template_variables.clone(),
    }
}

/// Flagger repeats the Authorization header at each query, which is a fault of its own; here it is sent once.
#[tokio::test]
async fn queries_and_headers_are_those_that_flagger_was_recorded_with() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/flagger-recorded");
    let Ok(text) = std::fs::read_to_string(root.join("istio-metric-templates.json")) else {
        eprintln!("SKIPPED: the recorded queries are compared with ../shared, and ../shared is not here");
        return;
    };
    let recording: Value = serde_json::from_str(&text).unwrap();
    let of_kind = |kind: &str| -> Vec<Value> {
        let inputs = recording["inputs"].as_array().unwrap().iter();
        inputs.filter(|input| input["kind"] == kind).cloned().collect()
    };
    let canary: Canary = serde_json::from_value(of_kind("Canary")[0].clone()).unwrap();
    let mut compared = 0;
    for metric in &canary.spec.analysis.metrics {
        let wanted = metric.template_ref.as_ref().unwrap();
        let templates = of_kind("MetricTemplate");
        let found = templates.iter().find(|template| {
            template["metadata"]["name"] == wanted.name.as_str()
                && wanted
                    .namespace
                    .as_ref()
                    .is_none_or(|namespace| template["metadata"]["namespace"] == namespace.as_str())
        });
        let Some(found) = found else { continue };
        let template: MetricTemplate = serde_json::from_value(found.clone()).unwrap();
        let provider = &template.spec.provider;
        let secret = provider.secret_ref.as_ref().unwrap();
        let secrets = of_kind("Secret");
        let secret = secrets
            .iter()
            .find(|found| found["metadata"]["name"] == secret.name.as_str())
            .unwrap();
        let pairs = secret["stringData"].as_object().unwrap();
        let server = Server::answering(vector(&["1"])).await;
        let config = Config {
            kind: provider.r#type.clone(),
            address: Some(server.address.clone()),
            headers: provider.headers.clone(),
            credentials: Some(
                pairs
                    .iter()
                    .map(|(key, value)| (key.clone(), value.as_str().unwrap()))
                    .collect(),
            ),
            ..Config::default()
        };
        let rendered = template::render(&template.spec.query, &model(&canary, metric)).unwrap();
        query(&config, &rendered).await.unwrap();
        let seen = server.only();
        let recorded = recording["queries"].as_object().unwrap().values();
        let same: Vec<&Value> = recorded
            .filter(|recorded| recorded["query"].as_str() == seen.parameter("query"))
            .collect();
        assert!(
            !same.is_empty(),
            "{:?} was not sent by Flagger",
            seen.parameter("query")
        );
        assert!(same.iter().all(|recorded| recorded["path"] == seen.path.as_str()));
        let mut headers: Vec<(String, String)> = same[0]["headers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pair| {
                (
                    pair[0].as_str().unwrap().to_lowercase(),
                    pair[1].as_str().unwrap().to_owned(),
                )
            })
            .collect();
        headers.sort();
        headers.dedup();
        let mut sent: Vec<(String, String)> = seen.headers;
        sent.retain(|(name, _)| matches!(name.as_str(), "authorization" | "x-scope-orgid"));
        sent.sort();
        assert_eq!(sent, headers);
        compared += 1;
    }
    assert!(compared >= 2, "{compared} metrics were compared");
}

/// Waits for the line in which Prometheus says that it is ready. What it says later is read as well: it ends when it cannot write.
async fn ready(child: &mut tokio::process::Child) -> bool {
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let (tell, told) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut tell = Some(tell);
        while let Ok(Some(line)) = lines.next_line().await {
            if line.contains("ready to receive web requests")
                && let Some(tell) = tell.take()
            {
                let _ = tell.send(());
            }
        }
    });
    matches!(
        tokio::time::timeout(Duration::from_secs(30), told).await,
        Ok(Ok(()))
    )
}

#[tokio::test]
async fn a_real_prometheus_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("prometheus.yml");
    std::fs::write(&file, "global: {}\n").unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let spawned = Command::new("prometheus")
        .arg(format!("--config.file={}", file.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            directory.path().join("data").display()
        ))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let Ok(mut child) = spawned else {
        eprintln!("SKIPPED: a real Prometheus is asked, and prometheus is not here");
        return;
    };
    assert!(ready(&mut child).await, "Prometheus did not become ready");
    let config = config("prometheus", &format!("http://127.0.0.1:{port}"), &[]);
    assert_eq!(query(&config, "vector(2) +\n  3").await.unwrap(), 5.0);
    assert_eq!(query(&config, "scalar(vector(7))").await.unwrap(), 7.0);
    assert!(query(&config, "absent_metric").await.unwrap_err().is_no_values());
    assert!(query(&config, "vector(0) / 0").await.unwrap_err().is_no_values());
    let error = query(&config, "rate(").await.unwrap_err();
    assert!(
        matches!(&error, Error::Status { status: 400, excerpt, .. } if excerpt.contains("parse error")),
        "{error}"
    );
    child.kill().await.unwrap();
}

#[tokio::test]
async fn basic_credentials_win_over_a_header_of_the_template() {
    let server = Server::start(|_| ok(vector(&["0"]))).await;
    let mut config = config(
        "prometheus",
        &server.address,
        &[("username", "u"), ("password", "p")],
    );
    config
        .headers
        .insert("Authorization".to_owned(), vec!["Bearer x".to_owned()]);
    query(&config, "q").await.unwrap();
    assert_eq!(server.only().header("authorization"), ["Basic dTpw"]);
}
