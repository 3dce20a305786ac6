//! Services that are asked over plain HTTP.

use serde_json::{Value, json};

use crate::server::{Server, ok};
use crate::{NOW, config, query};

#[tokio::test]
async fn datadog_is_asked_for_ten_intervals_and_the_oldest_point_counts() {
    let series = json!({"pointlist": [[1.0, null], [2.0, 0.5], [3.0, 9.0]]});
    let server = Server::answering(json!({"series": [series, {"pointlist": [[1.0, 7.0]]}]})).await;
    let secret = [
        ("datadog_api_key", "api"),
        ("datadog_application_key", "application"),
    ];
    let config = config("datadog", &server.address, &secret);
    assert_eq!(query(&config, "avg:x{a:b}").await.unwrap(), 0.5);
    let seen = server.only();
    assert_eq!(seen.path, "/api/v1/query");
    assert_eq!(seen.parameter("query"), Some("avg:x{a:b}"));
    assert_eq!(seen.parameter("from"), Some((NOW - 600).to_string().as_str()));
    assert_eq!(seen.parameter("to"), Some(NOW.to_string().as_str()));
    assert_eq!(seen.header("dd-api-key"), ["api"]);
    assert_eq!(seen.header("dd-application-key"), ["application"]);
}

#[tokio::test]
async fn new_relic_gets_a_since_clause_and_answers_one_result() {
    let server = Server::answering(json!({"results": [{"result": 3.5}]})).await;
    let secret = [("newrelic_account_id", "51312"), ("newrelic_query_key", "key")];
    let config = config("newrelic", &server.address, &secret);
    assert_eq!(query(&config, "SELECT average(x)").await.unwrap(), 3.5);
    let seen = server.only();
    assert_eq!(seen.path, "/v1/accounts/51312/query");
    assert_eq!(
        seen.parameter("nrql"),
        Some("SELECT average(x) SINCE 60 seconds ago")
    );
    assert_eq!(seen.header("x-query-key"), ["key"]);
}

#[tokio::test]
async fn a_new_relic_account_cannot_lead_elsewhere() {
    let secret = [("newrelic_account_id", "../../x"), ("newrelic_query_key", "key")];
    let error = query(&config("newrelic", "http://127.0.0.1:1", &secret), "q")
        .await
        .unwrap_err();
    assert!(error.to_string().contains("newrelic_account_id"), "{error}");
}

#[tokio::test]
async fn graphite_renders_json_and_the_last_point_that_is_not_null_counts() {
    let server = Server::answering(json!([
        {"target": "a", "datapoints": [[1.5, 10], [null, 20]]},
        {"target": "b", "datapoints": [[2.5, 10], ["4.5", 20], [null, 30]]},
    ]))
    .await;
    let config = config(
        "graphite",
        &server.address,
        &[("username", "u"), ("password", "p")],
    );
    let text = "target=sumSeries(a.*.b)&from=-1min&format=csv&\n  target=c";
    assert_eq!(query(&config, text).await.unwrap(), 4.5);
    let seen = server.only();
    assert_eq!(seen.path, "/render");
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert_eq!(
        seen.query,
        [
            pair("target", "sumSeries(a.*.b)"),
            pair("from", "-1min"),
            pair(" target", "c"),
            pair("format", "json")
        ]
    );
    assert_eq!(seen.header("authorization"), ["Basic dTpw"]);
}

#[tokio::test]
async fn influxdb_gets_flux_and_answers_annotated_csv() {
    let csv = "#datatype,string,long,double\r\n#group,false,false,false\r\n#default,_result,,\r\n,result,table,_value\r\n,,0,0.125\r\n\r\n";
    let server = Server::answering(csv).await;
    let config = config("influxdb", &server.address, &[("token", "t"), ("org", "my org")]);
    assert_eq!(query(&config, "from(bucket: \"b\")").await.unwrap(), 0.125);
    let seen = server.only();
    assert_eq!(
        (seen.method.as_str(), seen.path.as_str()),
        ("POST", "/api/v2/query")
    );
    assert_eq!(seen.parameter("org"), Some("my org"));
    assert_eq!(seen.header("authorization"), ["Token t"]);
    assert_eq!(seen.header("accept"), ["text/csv"]);
    let body: Value = serde_json::from_str(&seen.body).unwrap();
    assert_eq!(
        (&body["query"], &body["type"]),
        (&json!("from(bucket: \"b\")"), &json!("flux"))
    );
}

#[tokio::test]
async fn dynatrace_is_asked_for_one_point_over_ten_intervals() {
    let server = Server::answering(json!({"result": [{"data": [
        {"timestamps": [1], "values": [1.0]}, {"timestamps": [1], "values": [2.0, 3.0]}]}]}))
    .await;
    let config = config("dynatrace", &server.address, &[("dynatrace_token", "t")]);
    assert_eq!(query(&config, "builtin:x:avg").await.unwrap(), 2.0);
    let seen = server.only();
    assert_eq!(seen.path, "/api/v2/metrics/query");
    assert_eq!(seen.parameter("metricSelector"), Some("builtin:x:avg"));
    assert_eq!(seen.parameter("resolution"), Some("Inf"));
    assert_eq!(
        seen.parameter("from"),
        Some(((NOW - 600) * 1000).to_string().as_str())
    );
    assert_eq!(seen.parameter("to"), Some((NOW * 1000).to_string().as_str()));
    assert_eq!(seen.header("authorization"), ["Api-Token t"]);
}

#[tokio::test]
async fn splunk_streams_a_computation_and_its_last_value_counts() {
    let stream = "event: control-message\ndata: {\"event\":\"STREAM_START\"}\n\n\
                  event: metadata\ndata: {\"tsId\":\"AAA\"}\n\n\
                  event: data\ndata: {\"data\":[{\"tsId\":\"AAA\",\"value\":1}]}\n\n\
                  event: data\ndata: {\"data\":[{\"tsId\":\"AAA\",\ndata: \"value\":2.5}]}\n\n\
                  event: data\ndata: {\"data\":[{\"tsId\":\"AAA\",\"value\":null}]}\n\n\
                  event: control-message\ndata: {\"event\":\"END_OF_CHANNEL\"}\n\n";
    let server = Server::answering(stream).await;
    let config = config(
        "splunk",
        &server.address.replace("http://", "ws://"),
        &[("sf_token_key", "t")],
    );
    assert_eq!(query(&config, "data('x').mean().publish()").await.unwrap(), 2.5);
    let seen = server.only();
    assert_eq!(
        (seen.method.as_str(), seen.path.as_str()),
        ("POST", "/v2/signalflow/execute")
    );
    assert_eq!(seen.body, "data('x').mean().publish()");
    assert_eq!(
        seen.parameter("start"),
        Some(((NOW - 600) * 1000).to_string().as_str())
    );
    assert_eq!(seen.parameter("stop"), Some((NOW * 1000).to_string().as_str()));
    assert_eq!(seen.parameter("immediate"), Some("true"));
    assert_eq!(seen.header("x-sf-token"), ["t"]);
}

#[tokio::test]
async fn splunk_refuses_several_time_series() {
    let stream =
        "event: data\ndata: {\"data\":[{\"tsId\":\"A\",\"value\":1},{\"tsId\":\"B\",\"value\":2}]}\n\n";
    let server = Server::answering(stream).await;
    let config = config("splunk", &server.address, &[("sf_token_key", "t")]);
    let error = query(&config, "p").await.unwrap_err();
    assert!(
        !error.is_no_values() && error.to_string().contains("2 time series"),
        "{error}"
    );
}

#[tokio::test]
async fn a_web_service_is_asked_and_a_jsonpath_selects_the_number() {
    let server = Server::answering(json!({"data": [{"rate": "0.75"}]})).await;
    let mut config = config(
        "web",
        &format!("{}/api/m?service=podinfo", server.address),
        &[("token", "t")],
    );
    config.headers.insert("X-Team".to_owned(), vec!["a".to_owned()]);
    assert_eq!(query(&config, "{$.data[0].rate}").await.unwrap(), 0.75);
    let seen = server.only();
    assert_eq!(seen.path, "/api/m");
    assert_eq!(seen.parameter("service"), Some("podinfo"));
    assert_eq!(seen.header("authorization"), ["Bearer t"]);
    assert_eq!(seen.header("x-team"), ["a"]);
}

#[tokio::test]
async fn external_metrics_of_another_address_get_its_token_and_nobody_elses() {
    let server = Server::answering(json!({"items": [{"value": "250m"}, {"value": "1"}]})).await;
    let config = config("externalmetrics", &server.address, &[("token", "t")]);
    assert_eq!(
        query(&config, "ns/errors?labelSelector=app%3Dweb").await.unwrap(),
        0.25
    );
    let seen = server.only();
    assert_eq!(
        seen.path,
        "/apis/external.metrics.k8s.io/v1beta1/namespaces/ns/errors"
    );
    assert_eq!(seen.parameter("labelSelector"), Some("app=web"));
    assert_eq!(seen.header("authorization"), ["Bearer t"]);
}

#[tokio::test]
async fn an_empty_answer_is_no_values_for_every_service_but_influxdb() {
    let datadog = [("datadog_api_key", "a"), ("datadog_application_key", "b")];
    let newrelic = [("newrelic_account_id", "1"), ("newrelic_query_key", "k")];
    for (kind, secret, answers) in [
        (
            "datadog",
            &datadog[..],
            vec![json!({"series": []}), json!({"series": [{"pointlist": []}]})],
        ),
        (
            "newrelic",
            &newrelic[..],
            vec![
                json!({"results": []}),
                json!({"results": [{"result": null}]}),
                json!({"results": [{}, {}]}),
            ],
        ),
        (
            "graphite",
            &[],
            vec![json!([]), json!([{"datapoints": [[null, 1]]}])],
        ),
        (
            "dynatrace",
            &[("dynatrace_token", "t")],
            vec![
                json!({"result": []}),
                json!({"result": [{"data": [{"values": [null]}]}]}),
            ],
        ),
        ("externalmetrics", &[("token", "t")], vec![json!({"items": []})]),
        ("web", &[], vec![json!({"x": null}), json!({})]),
    ] {
        for answer in answers {
            let server = Server::answering(&answer).await;
            let text = if kind == "web" { "$.x" } else { "ns/q" };
            let error = query(&config(kind, &server.address, secret), text)
                .await
                .unwrap_err();
            assert!(error.is_no_values(), "{kind} {answer}: {error}");
        }
    }
    let server = Server::start(|_| ok("\r\n")).await;
    assert_eq!(
        query(&config("influxdb", &server.address, &[]), "q")
            .await
            .unwrap(),
        0.0
    );
}

#[tokio::test]
async fn a_provider_without_what_it_needs_says_what_to_set() {
    for (kind, address, needle) in [
        ("datadog", "", "datadog_api_key"),
        ("newrelic", "", "newrelic_account_id"),
        ("graphite", "", "spec.provider.address"),
        ("influxdb", "", "spec.provider.address"),
        ("dynatrace", "http://h", "dynatrace_token"),
        ("dynatrace", "", "spec.provider.address"),
        ("splunk", "http://h", "sf_token_key"),
        ("cloudwatch", "", "spec.provider.region"),
        ("web", "", "spec.provider.address"),
        ("keptn", "", "cluster"),
        ("job", "", "cluster"),
        ("externalmetrics", "", "cluster"),
        ("wavefront", "", "not known"),
        ("prometheus", "prometheus.monitoring:9090", "http://"),
    ] {
        let error = query(&config(kind, address, &[]), "q")
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(needle), "{kind}: {error}");
    }
}
