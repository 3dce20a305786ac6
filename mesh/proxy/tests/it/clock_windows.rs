//! What the program decides over longer times, under a wall clock that jumps by hours: nothing is decided early or late. That
//! the time itself decides is shown by letting it pass.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Request, Response};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::certificates::{Authority, Issued};
use crate::clocked::{Clocked, HOURS, Held, JUMPS, Setup, cluster, now, route};
use crate::fixture::*;
use crate::policies::jwt::Issuer;
use crate::tls::handshake;

#[tokio::test]
async fn an_adaptive_limit_is_set_anew_when_its_interval_has_passed_whatever_the_wall_clock_says() {
    let (held, backend) = (Held::start().await, Backend::named("b").await);
    // One request at a time, until an hour of fast answers allows for more.
    let filters = r#"          - name: envoy.filters.http.adaptive_concurrency
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency
              gradient_controller_config:
                sample_aggregate_percentile: { value: 90 }
                concurrency_limit_params: { concurrency_update_interval: 3600s, min_concurrency_limit: 1 }
                min_rtt_calc_params: { fixed_value: 10s }
"#;
    let routes = [
        route("/held", "cluster: held, timeout: 0s", ""),
        route("/", "cluster: b", ""),
    ];
    let clusters = [
        cluster("held", "", &[held.at]),
        cluster("b", "", &[backend.address]),
    ];
    let setup = Setup {
        filters,
        routes: &routes.concat(),
        clusters: &clusters.concat(),
        ..Default::default()
    };
    let Some(mut proxy) = Clocked::start(setup).await else {
        return;
    };
    let at = proxy.at;
    let mut sent = 0;
    for shift in JUMPS {
        // It is on its way as the clock jumps, and has taken no hours for that.
        let first = tokio::spawn(async move { get(at, "/held").await });
        sent += 1;
        held.arrived(sent).await;
        proxy.jump(shift);
        let (status, _, body) = get(at, "/second").await;
        assert_eq!(
            (status, &*body),
            (503, "reached concurrency limit"),
            "a jump by {shift} s"
        );
        let line = proxy.line().await;
        assert_eq!(line["details"], "reached_concurrency_limit", "{line}");
        held.answer(sent);
        assert_eq!(soon("the answer", first).await.unwrap().0, 200);
        assert_eq!(proxy.line().await["path"], "/held");
        // What ended before its line was written has given its place back.
        assert_eq!(get(at, "/third").await.0, 200, "a jump by {shift} s");
        assert_eq!(proxy.line().await["path"], "/third");
    }
    proxy.jump(JUMPS[1]);
    proxy.pass(HOURS + 1).await;
    assert_eq!(get(at, "/closes-the-interval").await.0, 200);
    let first = tokio::spawn(async move { get(at, "/held").await });
    held.arrived(sent + 1).await;
    assert_eq!(
        get(at, "/second").await.0,
        200,
        "an hour of answers that took no time raises the limit"
    );
    held.answer(sent + 1);
    assert_eq!(soon("the answer", first).await.unwrap().0, 200);
    proxy.stop().await;
}

#[tokio::test]
async fn success_rates_are_compared_once_an_interval_whatever_the_wall_clock_says() {
    let good = [Backend::named("good").await, Backend::named("good").await];
    let bad = Backend::answering(|_| status(503)).await;
    let all = [good[0].address, good[1].address, bad.address];
    let more = "outlier_detection: { interval: 3600s, base_ejection_time: 36000s, max_ejection_time: 36000s, \
                max_ejection_percent: 100, enforcing_consecutive_5xx: 0, enforcing_consecutive_gateway_failure: 0, \
                enforcing_success_rate: 100, success_rate_minimum_hosts: 3, success_rate_request_volume: 5, \
                success_rate_stdev_factor: 1000 },";
    let setup = Setup {
        routes: &route("/", "cluster: c", ""),
        clusters: &cluster("c", more, &all),
        ..Default::default()
    };
    let Some(proxy) = Clocked::start(setup).await else {
        return;
    };
    let at = proxy.at;
    for shift in JUMPS {
        proxy.jump(shift);
        let mut failed = 0;
        for _ in 0..30 {
            failed += usize::from(get(at, "/").await.0 == 503);
        }
        assert_eq!(failed, 10, "a jump by {shift} s ended the interval");
    }
    // The clock is behind by now, and the hour over all the same.
    proxy.jump(JUMPS[1]);
    proxy.pass(HOURS + 1).await;
    soon("an ejection", async {
        while !proxy.admin("/clusters").await.contains("failed_outlier_check") {}
    })
    .await;
    for shift in JUMPS {
        proxy.jump(shift);
        for _ in 0..30 {
            let (status, _, body) = get(at, "/").await;
            assert_eq!((status, &*body), (200, "good"), "a jump by {shift} s");
        }
    }
    proxy.stop().await;
}

#[tokio::test]
async fn a_series_ends_when_it_was_unused_for_long_and_not_because_the_wall_clock_jumps() {
    let backend = Backend::named("b").await;
    let routes = [
        route("/used", "cluster: b", ""),
        "              - { match: { prefix: / }, direct_response: { status: 404 } }\n".into(),
    ];
    let setup = Setup {
        routes: &routes.concat(),
        clusters: &cluster("b", "", &[backend.address]),
        ..Default::default()
    };
    let Some(proxy) = Clocked::start(setup).await else {
        return;
    };
    let told = async |code: &str| {
        let code = format!("response_code=\"{code}\"");
        let text = proxy.admin("/stats/prometheus").await;
        let mut requests = text
            .lines()
            .filter(|line| line.starts_with("istio_requests_total{"));
        requests.any(|line| line.contains(&code))
    };
    for shift in JUMPS {
        assert_eq!(get(proxy.at, "/used").await.0, 200);
        assert!(told("200").await);
        proxy.pass(10 * 60).await;
        assert_eq!(get(proxy.at, "/").await.0, 404);
        proxy.jump(shift);
        assert!(told("200").await && told("404").await, "a jump by {shift} s");
        // Sixteen minutes for the one, six for the other.
        proxy.pass(6 * 60).await;
        soon("the end of a series", async {
            while told("200").await {
                proxy.pass(3).await;
            }
        })
        .await;
        assert!(told("404").await, "a jump by {shift} s ended a series");
    }
    proxy.stop().await;
}

#[tokio::test]
async fn fetched_keys_are_kept_for_as_long_as_they_may_be_whatever_the_wall_clock_says() {
    let issuer = Issuer::new("k");
    let keys = issuer.jwks();
    let source = Backend::answering(move |_| Response::new(Full::from(keys.clone()))).await;
    let backend = Backend::named("b").await;
    let filters = r#"          - name: envoy.filters.http.jwt_authn
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication
              providers:
                p:
                  issuer: me
                  remote_jwks: { http_uri: { uri: "http://keys.example/keys", cluster: keys, timeout: 5s }, cache_duration: 600s }
              rules: [ { match: { prefix: / }, requires: { provider_name: p } } ]
"#;
    let clusters = [
        cluster("b", "", &[backend.address]),
        cluster("keys", "", &[source.address]),
    ];
    let setup = Setup {
        filters,
        routes: &route("/", "cluster: b", ""),
        clusters: &clusters.concat(),
        ..Default::default()
    };
    let Some(proxy) = Clocked::start(setup).await else {
        return;
    };
    // Good at any time of day.
    let token = issuer.token(&json!({"iss": "me"}));
    let asked = async || {
        let request = Request::get("/")
            .header("host", "a")
            .header("authorization", format!("Bearer {token}"))
            .body(Full::from(""))
            .unwrap();
        send(proxy.at, request).await.0
    };
    assert_eq!(asked().await, 200);
    for (round, shift) in JUMPS.into_iter().enumerate() {
        proxy.jump(shift);
        for _ in 0..3 {
            assert_eq!(asked().await, 200, "a jump by {shift} s");
        }
        assert_eq!(source.hits(), round + 1, "a jump by {shift} s made the keys old");
        proxy.pass(601).await;
        soon("fresh keys", async {
            while source.hits() < round + 2 {
                assert_eq!(asked().await, 200, "a jump by {shift} s");
            }
        })
        .await;
    }
    proxy.stop().await;
}

#[tokio::test]
async fn spans_begin_at_the_time_of_day_and_last_as_long_as_their_requests() {
    let (held, mut collector) = (Held::start().await, Backend::named("").await);
    let manager = r#"tracing:
            random_sampling: { value: 100 }
            provider:
              name: envoy.tracers.zipkin
              typed_config: { "@type": type.googleapis.com/envoy.config.trace.v3.ZipkinConfig, collector_cluster: collector, collector_endpoint: /spans, collector_endpoint_version: HTTP_JSON }"#;
    let clusters = [
        cluster("held", "", &[held.at]),
        cluster("collector", "", &[collector.address]),
    ];
    let setup = Setup {
        routes: &route("/", "cluster: held, timeout: 600s", ""),
        clusters: &clusters.concat(),
        manager,
        ..Default::default()
    };
    let Some(proxy) = Clocked::start(setup).await else {
        return;
    };
    let at = proxy.at;
    for (round, shift) in JUMPS.into_iter().enumerate() {
        let request = tokio::spawn(async move { get(at, "/").await });
        held.arrived(round + 1).await;
        proxy.jump(shift);
        held.answer(round + 1);
        assert_eq!(soon("the answer", request).await.unwrap().0, 200);
        let report: Value = serde_json::from_slice(&collector.next().await.body).unwrap();
        let span = &report[0];
        let micros = |key: &str| span[key].as_i64().unwrap();
        assert!(
            (0..HOURS * 1_000_000).contains(&micros("duration")),
            "a jump by {shift} s: {span}"
        );
        let off = micros("timestamp") / 1_000_000 - now() - shift;
        assert!(off.abs() < HOURS, "a jump by {shift} s: {span}");
    }
    proxy.stop().await;
}

/// What comes back for a request in a TLS connection of its own, or why nothing does.
async fn asked_over_tls(at: SocketAddr, client: &Arc<rustls::ClientConfig>) -> Result<String, String> {
    let told = |error: std::io::Error| error.to_string();
    let mut stream = handshake(at, client, "client.example").await.map_err(told)?;
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: client.example\r\nconnection: close\r\n\r\n")
        .await
        .map_err(told)?;
    let mut answer = Vec::new();
    soon("the end of the answer", stream.read_to_end(&mut answer))
        .await
        .map_err(told)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[tokio::test]
async fn certificates_of_clients_are_good_at_the_handshake_or_not_by_the_time_of_day() {
    let authority = Authority::new("ca");
    let of_hours = |hours: u64| {
        authority.issue_with(&["client.example"], |params| {
            let hours = Duration::from_secs(hours * HOURS as u64);
            params.not_before = (SystemTime::now() - hours).into();
            params.not_after = (SystemTime::now() + hours).into();
        })
    };
    let server = of_hours(100);
    let backend = Backend::named("b").await;
    let chain = format!(
        "transport_socket: {{ name: envoy.transport_sockets.tls, typed_config: {{ \"@type\": \
         type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, require_client_certificate: true, \
         common_tls_context: {{ tls_certificates: [ {{ certificate_chain: {{ inline_string: {:?} }}, private_key: {{ \
         inline_string: {:?} }} }} ], validation_context: {{ trusted_ca: {{ inline_string: {:?} }} }} }} }} }}",
        server.chain, server.key, authority.pem
    );
    let setup = Setup {
        routes: &route("/", "cluster: b", ""),
        clusters: &cluster("b", "", &[backend.address]),
        chain: &chain,
        ..Default::default()
    };
    let Some(proxy) = Clocked::start(setup).await else {
        return;
    };
    let refused = async || {
        let text = proxy.admin("/stats?filter=ssl.fail_verify_error").await;
        let line = text.lines().find(|line| line.starts_with("listener."));
        line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
    };
    let (short, long) = (of_hours(1), of_hours(100));
    // Each a client of its own, which resumes nothing.
    let client = |issued: &Issued| authority.client().identity(issued).build_unverified();
    for (shift, alert) in [
        (0, None),
        (JUMPS[0], Some("CertificateExpired")),
        (0, None),
        (JUMPS[1], Some("fatal alert")),
        (0, None),
    ] {
        proxy.jump(shift);
        let before = refused().await;
        let answer = asked_over_tls(proxy.at, &client(&long)).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200 "),
            "a jump by {shift} s: {answer}"
        );
        let asked = asked_over_tls(proxy.at, &client(&short)).await;
        match alert {
            None => assert!(asked.unwrap().starts_with("HTTP/1.1 200 ")),
            Some(alert) => {
                let error = asked.unwrap_err();
                assert!(error.contains(alert), "a jump by {shift} s: {error}");
                soon("a count", async { while refused().await != before + 1 {} }).await;
            }
        }
        assert_eq!(
            refused().await,
            before + u64::from(alert.is_some()),
            "a jump by {shift} s"
        );
    }
    // Bytes of requests that were not let in reached nobody.
    assert_eq!(backend.hits(), 8);
    proxy.stop().await;
}
