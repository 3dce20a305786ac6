//! CloudWatch, and the places that keys come from.

use serde_json::{Value, json};
use serin_providers::{Config, Error};

use crate::server::{Seen, Server, ok, pairs};
use crate::{NOW, ask, config, connector};

const QUERY: &str = r#"[{"id": "e1", "Expression": "m1 / m2", "label": "ErrorRate"},
    {"Id": "m1", "MetricStat": {"Metric": {"Namespace": "N", "MetricName": "M",
      "Dimensions": [{"Name": "a", "Value": "b"}]}, "Period": 60, "Stat": "Sum"}, "ReturnData": false}]"#;

fn metrics() -> String {
    json!({"MetricDataResults": [{"Id": "e1", "Values": [0.5, 0.25]}, {"Id": "x", "Values": [9]}]})
        .to_string()
}

fn cloudwatch(address: &str) -> Config {
    Config {
        region: Some("eu-west-1".to_owned()),
        ..config("cloudwatch", address, &[])
    }
}

/// The access key that a request was signed with.
fn key_of(seen: &Seen) -> String {
    let value = seen.header("authorization")[0];
    let (_, rest) = value.split_once("Credential=").unwrap();
    rest.split('/').next().unwrap().to_owned()
}

#[tokio::test]
async fn cloudwatch_gets_a_signed_request_for_ten_intervals_and_the_first_value_counts() {
    let server = Server::answering(metrics()).await;
    let connector = connector(&[
        ("AWS_ACCESS_KEY_ID", "AKID"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_SESSION_TOKEN", "session"),
    ]);
    let value = connector
        .query(&cloudwatch(&server.address), &ask(QUERY))
        .await
        .unwrap();
    assert_eq!(value, 0.5);
    let seen = server.only();
    assert_eq!((seen.method.as_str(), seen.path.as_str()), ("POST", "/"));
    assert_eq!(
        seen.header("x-amz-target"),
        ["GraniteServiceVersion20100801.GetMetricData"]
    );
    assert_eq!(seen.header("x-amz-security-token"), ["session"]);
    assert_eq!(seen.header("x-amz-date"), ["20260102T030405Z"]);
    let authorization = seen.header("authorization")[0];
    assert!(
        authorization.starts_with(
            "AWS4-HMAC-SHA256 Credential=AKID/20260102/eu-west-1/monitoring/aws4_request, \
             SignedHeaders=content-type;host;x-amz-date;x-amz-security-token;x-amz-target, Signature="
        ),
        "{authorization}"
    );
    let body: Value = serde_json::from_str(&seen.body).unwrap();
    assert_eq!(
        (&body["StartTime"], &body["EndTime"]),
        (&json!(NOW - 600), &json!(NOW))
    );
    assert_eq!(body["MaxDatapoints"], 20);
    let queries = &body["MetricDataQueries"];
    assert_eq!(
        (&queries[0]["Id"], &queries[0]["Label"]),
        (&json!("e1"), &json!("ErrorRate"))
    );
    assert_eq!(queries[1]["MetricStat"]["Metric"]["Dimensions"][0]["Value"], "b");
}

#[tokio::test]
async fn cloudwatch_without_results_has_no_values() {
    for answer in [
        json!({"MetricDataResults": []}),
        json!({"MetricDataResults": [{"Values": []}]}),
    ] {
        let server = Server::answering(answer).await;
        let connector = connector(&[("AWS_ACCESS_KEY_ID", "AKID"), ("AWS_SECRET_ACCESS_KEY", "secret")]);
        let error = connector
            .query(&cloudwatch(&server.address), &ask("[]"))
            .await
            .unwrap_err();
        assert!(error.is_no_values(), "{error}");
    }
}

#[tokio::test]
async fn a_cloudwatch_query_that_is_not_a_list_of_queries_is_refused() {
    for query in ["", "{}", "[{\"Idd\": 1}]"] {
        let error = connector(&[])
            .query(&cloudwatch("http://127.0.0.1:1"), &ask(query))
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Query(_)), "{query}: {error}");
    }
}

#[tokio::test]
async fn a_web_identity_is_exchanged_once_for_keys() {
    let server = Server::start(|seen| {
        if seen.header("x-amz-target").is_empty() {
            let form = pairs(&seen.body);
            let has = |key: &str, value: &str| form.contains(&(key.to_owned(), value.to_owned()));
            assert!(
                has("Action", "AssumeRoleWithWebIdentity") && has("WebIdentityToken", "jwt"),
                "{form:?}"
            );
            assert!(has("RoleArn", "arn:aws:iam::1:role/r"), "{form:?}");
            ok(
                "<r><AccessKeyId>ASIA</AccessKeyId><SecretAccessKey>s+/=</SecretAccessKey>\
                <SessionToken>t</SessionToken><Expiration>2026-01-02T04:04:05Z</Expiration></r>",
            )
        } else {
            ok(metrics())
        }
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "jwt\n").unwrap();
    let connector = connector(&[
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token.to_str().unwrap()),
        ("AWS_ROLE_ARN", "arn:aws:iam::1:role/r"),
        ("AWS_ENDPOINT_URL_STS", &server.address),
    ]);
    for _ in 0..2 {
        connector
            .query(&cloudwatch(&server.address), &ask(QUERY))
            .await
            .unwrap();
    }
    let seen = server.seen();
    assert_eq!(seen.len(), 3, "one exchange, two queries");
    assert_eq!(key_of(&seen[2]), "ASIA");
}

#[tokio::test]
async fn keys_come_from_a_file_an_agent_or_the_instance() {
    let keys = |id: &str| json!({"AccessKeyId": id, "SecretAccessKey": "s", "Token": "t", "Expiration": "2026-01-02T05:00:00Z"});
    let server = Server::start(move |seen| match seen.path.as_str() {
        "/agent" => {
            assert_eq!(seen.header("authorization"), ["pod-token"]);
            ok(keys("AGENT"))
        }
        "/latest/api/token" => {
            assert_eq!(seen.method, "PUT");
            ok("imds")
        }
        "/latest/meta-data/iam/security-credentials/" => ok("role\n"),
        "/latest/meta-data/iam/security-credentials/role" => {
            assert_eq!(seen.header("x-aws-ec2-metadata-token"), ["imds"]);
            ok(keys("INSTANCE"))
        }
        _ => ok(metrics()),
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("credentials");
    std::fs::write(
        &file,
        "[default]\naws_access_key_id = FILE\naws_secret_access_key = s\n",
    )
    .unwrap();
    let agent = format!("{}/agent", server.address);
    for (environment, expected) in [
        (
            vec![("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap())],
            "FILE",
        ),
        (
            vec![
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", agent.as_str()),
                ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "pod-token"),
            ],
            "AGENT",
        ),
        (
            vec![("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.address.as_str())],
            "INSTANCE",
        ),
    ] {
        let connector = connector(&environment);
        connector
            .query(&cloudwatch(&server.address), &ask(QUERY))
            .await
            .unwrap();
        assert_eq!(key_of(server.seen().last().unwrap()), expected);
    }
    let secret = [("aws_access_key_id", "SECRET"), ("aws_secret_access_key", "s")];
    let of_secret = Config {
        region: Some("eu-west-1".to_owned()),
        ..config("cloudwatch", &server.address, &secret)
    };
    connector(&[]).query(&of_secret, &ask(QUERY)).await.unwrap();
    assert_eq!(key_of(server.seen().last().unwrap()), "SECRET");
}
