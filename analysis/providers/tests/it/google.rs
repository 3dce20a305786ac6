//! Google Cloud Monitoring and its tokens.

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::server::{Server, ok, pairs};
use crate::{NOW, ask, config, connector};

fn series(value: &Value) -> String {
    json!({"timeSeriesData": [{"pointData": [{"values": [value]}, {"values": [{"doubleValue": 9}]}]}]})
        .to_string()
}

#[tokio::test]
async fn stackdriver_with_a_service_accounts_key_signs_an_assertion_for_a_token() {
    let key = KeyPair::generate(KeySize::Rsa2048).unwrap();
    let public = key.public_key().as_ref().to_vec();
    let server = Server::start(move |seen| {
        if seen.path != "/token" {
            assert_eq!(seen.header("authorization"), ["Bearer ya29"]);
            return ok(series(&json!({"doubleValue": 1.25})));
        }
        let form = pairs(&seen.body);
        let assertion = &form.iter().find(|(key, _)| key == "assertion").unwrap().1;
        let (signed, signature) = assertion.rsplit_once('.').unwrap();
        UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &public)
            .verify(signed.as_bytes(), &URL_SAFE_NO_PAD.decode(signature).unwrap())
            .unwrap();
        let claims = signed.split('.').nth(1).unwrap();
        let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
        assert_eq!(claims["iss"], "me@p.iam");
        assert_eq!(claims["scope"], "https://www.googleapis.com/auth/monitoring.read");
        assert_eq!(
            (&claims["iat"], &claims["exp"]),
            (&json!(NOW), &json!(NOW + 3600))
        );
        ok(json!({"access_token": "ya29", "expires_in": 3599}))
    })
    .await;
    let der: Pkcs8V1Der<'_> = key.as_der().unwrap();
    let pem = format!(
        "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
        STANDARD.encode(der.as_ref())
    );
    let account = json!({
        "type": "service_account", "client_email": "me@p.iam", "private_key": pem,
        "token_uri": format!("{}/token", server.address),
    })
    .to_string();
    let config = config(
        "stackdriver",
        &server.address,
        &[("project", "my-project"), ("serviceAccountKey", &account)],
    );
    let connector = connector(&[]);
    for _ in 0..2 {
        assert_eq!(connector.query(&config, &ask("fetch x")).await.unwrap(), 1.25);
    }
    let seen = server.seen();
    assert_eq!(seen.len(), 3, "one token, two queries");
    let query = seen.last().unwrap();
    assert_eq!(
        (query.method.as_str(), query.path.as_str()),
        ("POST", "/v3/projects/my-project/timeSeries:query")
    );
    assert_eq!(
        serde_json::from_str::<Value>(&query.body).unwrap(),
        json!({"query": "fetch x"})
    );
}

#[tokio::test]
async fn stackdriver_without_a_key_asks_the_machine_for_token_and_project() {
    for (value, expected) in [(json!({"int64Value": "7"}), Some(7.0)), (Value::Null, None)] {
        let server = Server::start(move |seen| {
            if seen.path.starts_with("/computeMetadata") {
                assert_eq!(seen.header("metadata-flavor"), ["Google"]);
            }
            match seen.path.as_str() {
                "/computeMetadata/v1/project/project-id" => ok("here"),
                "/computeMetadata/v1/instance/service-accounts/default/token" => {
                    ok(json!({"access_token": "machine", "expires_in": 600}))
                }
                "/v3/projects/here/timeSeries:query" => {
                    assert_eq!(seen.header("authorization"), ["Bearer machine"]);
                    if value.is_null() {
                        ok("{}")
                    } else {
                        ok(series(&value))
                    }
                }
                other => (404, Vec::new(), other.to_owned()),
            }
        })
        .await;
        let host = server.address.trim_start_matches("http://");
        let connector = connector(&[("GCE_METADATA_HOST", host)]);
        let answer = connector
            .query(&config("stackdriver", &server.address, &[]), &ask("q"))
            .await;
        match expected {
            Some(expected) => assert_eq!(answer.unwrap(), expected),
            None => assert!(answer.unwrap_err().is_no_values()),
        }
    }
}

#[tokio::test]
async fn a_key_that_is_not_one_is_refused_without_being_repeated() {
    let secret = [
        ("project", "p"),
        (
            "serviceAccountKey",
            "{\"type\": \"service_account\", \"private_key\": \"hush-hush\"}",
        ),
    ];
    let error = connector(&[])
        .query(&config("stackdriver", "http://127.0.0.1:1", &secret), &ask("q"))
        .await;
    let text = error.unwrap_err().to_string();
    assert!(text.contains("private_key") && !text.contains("hush"), "{text}");
}
