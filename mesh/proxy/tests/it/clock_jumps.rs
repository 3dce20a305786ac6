//! The program with a wall clock that jumps by hours while it serves: what users see. Whatever lasts goes by the monotonic
//! clock (timeouts, limits, ejection, back-off, probes); only what is told as a time of day or is good until one follows the
//! jump, in both directions. What is decided over longer times is in `clock_windows`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use http::Response;
use http_body_util::Full;
use serde_json::{Value, json};

use crate::certificates::Authority;
use crate::clocked::{Clocked, HOURS, Held, JUMPS, Setup, cluster, now, route};
use crate::fixture::*;
use crate::policies::jwt::Issuer;
use crate::tls_upstream::Front;

#[tokio::test]
async fn requests_on_their_way_neither_time_out_nor_hang_when_the_wall_clock_jumps() {
    let held = Held::start().await;
    let backend = Backend::named("b").await;
    let routes = [
        route("/long", "cluster: held, timeout: 600s", ""),
        route("/short", "cluster: held, timeout: 0.4s", ""),
        route("/", "cluster: b", ""),
    ];
    let clusters = [
        cluster("held", "", &[held.at]),
        cluster("b", "", &[backend.address]),
    ];
    let Some(mut proxy) = Clocked::start(Setup {
        routes: &routes.concat(),
        clusters: &clusters.concat(),
        ..Default::default()
    })
    .await
    else {
        return;
    };
    let at = proxy.at;
    let mut sent = 0;
    for shift in JUMPS {
        // On its way as the clock jumps, with ten minutes to go.
        let long = tokio::spawn(async move { get(at, "/long").await });
        held.arrived(sent + 1).await;
        // And one that has less than a second, whatever the clock says.
        let short = tokio::spawn(async move { get(at, "/short").await });
        held.arrived(sent + 2).await;
        proxy.jump(shift);
        assert_eq!(get(at, "/now").await.0, 200, "a jump by {shift} s");
        let (status, headers, _) = soon("the timeout", short).await.unwrap();
        assert_eq!(
            (status, headers["x-serin-response-flags"].to_str().unwrap()),
            (504, "UT"),
            "a jump by {shift} s"
        );
        assert!(!long.is_finished(), "a jump by {shift} s ended a request");
        sent += 2;
        held.answer(sent);
        let (status, _, body) = soon("the answer", long).await.unwrap();
        assert_eq!((status, &*body), (200, "held"), "a jump by {shift} s");
        let mut ends = Vec::new();
        for _ in 0..3 {
            let line = proxy.line().await;
            let number = |key: &str| -> i64 {
                match &line[key] {
                    Value::Number(number) => number.as_i64().unwrap(),
                    other => other.as_str().unwrap().parse().unwrap(),
                }
            };
            let text = |key: &str| line[key].as_str().unwrap_or("-").to_owned();
            ends.push((text("path"), text("flags")));
            // What lasted less than a minute is not told to have lasted hours, or less than nothing.
            let duration = number("duration");
            assert!(
                (0..HOURS * 1000).contains(&duration),
                "a jump by {shift} s: {line}"
            );
            // The time of day is what the clock says.
            let told = number("start") - now() - shift;
            assert!(told.abs() < HOURS, "a jump by {shift} s: {line}");
        }
        // Which of the first two ended first is a matter of how busy the machine is.
        ends.sort();
        let expected = [("/long", "-"), ("/now", "-"), ("/short", "UT")];
        assert_eq!(ends, expected.map(|(path, flags)| (path.into(), flags.into())));
    }
    // How long it has been up is no matter of the time of day.
    let info: Value = serde_json::from_str(&get(proxy.admin, "/server_info").await.2).unwrap();
    let uptime = info["uptime_all_epochs"].as_str().unwrap().trim_end_matches('s');
    assert!(uptime.parse::<f64>().unwrap() < HOURS as f64, "{info}");
    proxy.stop().await;
}

const LIMIT: &str = r#", typed_per_filter_config: { envoy.filters.http.local_ratelimit: { "@type": type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit, stat_prefix: l, token_bucket: { max_tokens: TOKENS, tokens_per_fill: TOKENS, fill_interval: FILL }, filter_enabled: { default_value: { numerator: 100 } }, filter_enforced: { default_value: { numerator: 100 } } } }"#;

#[tokio::test]
async fn a_jump_of_the_wall_clock_neither_fills_a_rate_limit_nor_stops_it_from_filling() {
    let backend = Backend::named("b").await;
    let limit = |tokens: &str, fill: &str| LIMIT.replace("TOKENS", tokens).replace("FILL", fill);
    let routes = [
        route("/hourly", "cluster: b", &limit("2", "3600s")),
        route("/quick", "cluster: b", &limit("1", "0.25s")),
    ];
    let filters = r#"          - name: envoy.filters.http.local_ratelimit
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit, stat_prefix: l }
"#;
    let clusters = cluster("b", "", &[backend.address]);
    let Some(proxy) = Clocked::start(Setup {
        filters,
        routes: &routes.concat(),
        clusters: &clusters,
        ..Default::default()
    })
    .await
    else {
        return;
    };
    let at = proxy.at;
    for expected in [200, 200, 429] {
        assert_eq!(get(at, "/hourly").await.0, expected);
    }
    for shift in JUMPS {
        proxy.jump(shift);
        let (status, headers, _) = get(at, "/hourly").await;
        assert_eq!(status, 429, "a jump by {shift} s filled the bucket");
        assert_eq!(headers["x-serin-response-flags"], "RL");
        // Emptied after the jump, full again soon.
        // In one breath, so that the bucket does not fill between two of them.
        let several = [
            "GET /quick HTTP/1.1\r\nhost: a\r\n\r\n".repeat(4),
            "GET /quick HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".into(),
        ]
        .concat();
        soon("an empty bucket", async {
            while !raw(at, several.as_bytes()).await.contains("HTTP/1.1 429 ") {}
        })
        .await;
        soon("a full bucket", async {
            while get(at, "/quick").await.0 != 200 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
    // An hour fills it.
    proxy.pass(HOURS).await;
    for expected in [200, 200, 429] {
        assert_eq!(get(at, "/hourly").await.0, expected);
    }
    proxy.stop().await;
}

/// Two backends, one of which answers 503, behind a cluster that ejects after one error.
fn ejecting(name: &str, time: &str, endpoints: &[SocketAddr]) -> String {
    let more = format!(
        "outlier_detection: {{ consecutive_5xx: 1, interval: 0.05s, base_ejection_time: {time}, max_ejection_time: {time}, \
         max_ejection_percent: 50, enforcing_success_rate: 0 }},"
    );
    cluster(name, &more, endpoints)
}

#[tokio::test]
async fn a_jump_of_the_wall_clock_neither_ends_an_ejection_nor_keeps_a_host_out() {
    let good = Backend::named("good").await;
    let bad = Backend::answering(|_| status(503)).await;
    let both = [good.address, bad.address];
    let routes = [
        route("/long", "cluster: long", ""),
        route("/short", "cluster: short", ""),
    ];
    let clusters = [ejecting("long", "3600s", &both), ejecting("short", "0.1s", &both)];
    let Some(proxy) = Clocked::start(Setup {
        routes: &routes.concat(),
        clusters: &clusters.concat(),
        ..Default::default()
    })
    .await
    else {
        return;
    };
    let at = proxy.at;
    soon("an ejection", async { while get(at, "/long").await.0 == 200 {} }).await;
    for shift in JUMPS {
        proxy.jump(shift);
        // The bad one comes back and is ejected again, so that the sweep has run since the jump, more than once.
        for _ in 0..2 {
            soon("a host that is back", async {
                while get(at, "/short").await.0 == 200 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
        }
        for _ in 0..20 {
            let (status, _, body) = get(at, "/long").await;
            assert_eq!(
                (status, &*body),
                (200, "good"),
                "a jump by {shift} s ended an ejection"
            );
        }
    }
    proxy.stop().await;
}

#[tokio::test]
async fn retries_and_probes_go_on_when_the_wall_clock_jumps() {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let flaky = Backend::answering(move |_| {
        if counted.fetch_add(1, Ordering::SeqCst).is_multiple_of(2) {
            status(503)
        } else {
            Response::new(Full::from("again"))
        }
    })
    .await;
    let probed = Backend::named("probed").await;
    let routes = [
        route(
            "/retry",
            "cluster: flaky, retry_policy: { retry_on: 5xx, num_retries: 1, retry_back_off: { base_interval: 0.05s, max_interval: 0.1s } }",
            "",
        ),
        route("/", "cluster: probed", ""),
    ];
    let check = "health_checks: [ { timeout: 1s, interval: 0.02s, no_traffic_interval: 0.02s, unhealthy_threshold: 1, healthy_threshold: 1, \
                 http_health_check: { path: /health } } ],";
    let clusters = [
        cluster("flaky", "", &[flaky.address]),
        cluster("probed", check, &[probed.address]),
    ];
    let Some(mut proxy) = Clocked::start(Setup {
        routes: &routes.concat(),
        clusters: &clusters.concat(),
        ..Default::default()
    })
    .await
    else {
        return;
    };
    let at = proxy.at;
    for shift in JUMPS {
        let before = count.load(Ordering::SeqCst);
        let asked = tokio::spawn(async move { get(at, "/retry").await });
        soon("the first try", async {
            while count.load(Ordering::SeqCst) == before {
                tokio::task::yield_now().await;
            }
        })
        .await;
        // While the back-off lasts, or just after.
        proxy.jump(shift);
        let (status, _, body) = soon("the second try", asked).await.unwrap();
        assert_eq!((status, &*body), (200, "again"), "a jump by {shift} s");
        assert_eq!(count.load(Ordering::SeqCst), before + 2, "a jump by {shift} s");
        let line = proxy.line().await;
        assert_eq!(line["attempts"].to_string().trim_matches('"'), "2", "{line}");
        let hits = probed.hits();
        soon("three more probes", async {
            while probed.hits() < hits + 3 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        assert_eq!(get(at, "/probed").await.0, 200);
        assert_eq!(proxy.line().await["path"], "/probed");
    }
    proxy.stop().await;
}

#[tokio::test]
async fn tokens_and_certificates_are_good_until_the_time_of_day_that_they_name() {
    let issuer = Issuer::new("k");
    let authority = Authority::new("ca");
    let served = authority.issue_with(&["backend.example"], |params| {
        let hours = |hours: u64| Duration::from_secs(hours * HOURS as u64);
        params.not_before = (SystemTime::now() - hours(1)).into();
        params.not_after = (SystemTime::now() + hours(1)).into();
    });
    let backend = Backend::named("b").await;
    let front = Front::start(&served, None, &["http/1.1"], backend.address).await;
    let filters = format!(
        r#"          - name: envoy.filters.http.jwt_authn
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication
              providers: {{ p: {{ issuer: me, local_jwks: {{ inline_string: {:?} }} }} }}
              rules: [ {{ match: {{ prefix: /token }}, requires: {{ provider_name: p }} }} ]
"#,
        issuer.jwks()
    );
    let routes = [
        route("/token", "cluster: b", ""),
        route("/tls", "cluster: tls", ""),
    ];
    let tls = format!(
        "max_requests_per_connection: 1, transport_socket: {{ name: envoy.transport_sockets.tls, typed_config: {{ \"@type\": \
         type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, sni: backend.example, \
         max_session_keys: 0, common_tls_context: {{ validation_context: {{ trusted_ca: {{ inline_string: {:?} }} }} }} }} }},",
        authority.pem
    );
    let clusters = [
        cluster("b", "", &[backend.address]),
        cluster("tls", &tls, &[front.address]),
    ];
    let Some(mut proxy) = Clocked::start(Setup {
        filters: &filters,
        routes: &routes.concat(),
        clusters: &clusters.concat(),
        ..Default::default()
    })
    .await
    else {
        return;
    };
    let token = issuer.token(&json!({"iss": "me", "nbf": now() - HOURS, "exp": now() + HOURS}));
    for (shift, status, details, tls_status, failure) in [
        (0, 200, "via_upstream", 200, "-"),
        (
            10 * HOURS,
            401,
            "jwt_authn_access_denied{Jwt_is_expired}",
            503,
            "expired",
        ),
        (0, 200, "via_upstream", 200, "-"),
        (
            -10 * HOURS,
            401,
            "jwt_authn_access_denied{Jwt_not_yet_valid}",
            503,
            "not yet valid",
        ),
        (0, 200, "via_upstream", 200, "-"),
    ] {
        proxy.jump(shift);
        let request = http::Request::get("/token")
            .header("host", "a")
            .header("authorization", format!("Bearer {token}"))
            .body(Full::from(""))
            .unwrap();
        assert_eq!(send(proxy.at, request).await.0, status, "a shift of {shift} s");
        let line = proxy.line().await;
        assert_eq!(line["details"], details, "a shift of {shift} s: {line}");
        assert_eq!(get(proxy.at, "/tls").await.0, tls_status, "a shift of {shift} s");
        let line = proxy.line().await;
        let told = line["failure"].as_str().unwrap_or("-").to_lowercase();
        assert!(told.contains(failure), "a shift of {shift} s: {line}");
        assert_eq!(
            line["flags"].as_str().unwrap_or("-"),
            if tls_status == 200 { "-" } else { "UF" },
            "a shift of {shift} s: {line}"
        );
    }
    drop(front);
    proxy.stop().await;
}
