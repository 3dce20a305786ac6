use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use proptest::prelude::*;
use serde_json::json;

use super::super::record::Kept;
use super::*;
use crate::config::matchers::RequestView;
use crate::metrics::flags::Flags;
use crate::policy::metadata::{Metadata, of_json};

fn kept(wants: &Wants) -> Kept {
    let mut kept = Kept::default();
    let mut headers = HeaderMap::new();
    headers.insert("x-a", HeaderValue::from_static("value \"a\""));
    headers.insert("user-agent", HeaderValue::from_static("curl"));
    let view = RequestView {
        method: "GET",
        path: "/p",
        query: Some("q=1"),
        authority: Some("shop"),
        scheme: Some("http"),
        headers: &headers,
    };
    wants.keep_request(&view, &mut kept);
    let mut response = HeaderMap::new();
    response.insert("x-envoy-upstream-service-time", HeaderValue::from(7));
    wants.keep_response(&response, &mut kept);
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(0));
    wants.keep_trailers(&trailers, &mut kept);
    kept
}

pub(in crate::observe) fn record<'a>(kept: &'a Kept, metadata: &'a Metadata) -> Record<'a> {
    let mut flags = Flags::UPSTREAM_CONNECTION_FAILURE;
    flags.add(Flags::RETRY_LIMIT);
    Record {
        kind: super::super::record::LogType::DownstreamEnd,
        local_close: "",
        downstream_failure: None,
        start: Duration::from_millis(1_709_210_096_007),
        duration: Duration::from_millis(42),
        request: Some(Duration::from_millis(3)),
        response: Some(Duration::from_millis(30)),
        kept,
        method: "GET",
        path: "/p?q=1",
        authority: "shop",
        scheme: "http",
        protocol: "HTTP/1.1",
        upstream_protocol: None,
        request_id: Some("id"),
        code: 503,
        details: "via_upstream",
        termination: "",
        grpc_status: Some(7),
        flags,
        received: 10,
        sent: 20,
        attempts: 3,
        upstream_host: Some("10.0.0.9:80"),
        upstream_local: Some("10.0.0.9:4321".parse().unwrap()),
        virtual_cluster: Some("reads"),
        upstream_cluster: Some("outbound|80||shop"),
        upstream_failure: None,
        route: Some("default"),
        direct_remote: "10.0.0.1:5".parse().unwrap(),
        remote: "9.9.9.9:0".parse().unwrap(),
        local: "10.0.0.2:80".parse().unwrap(),
        server_name: None,
        peer: None,
        downstream_tls: None,
        upstream_tls: None,
        upstream_name: Some("shop.internal:8080"),
        upstream_metadata: None,
        cluster_metadata: None,
        tls: Some(("TLSv1.3", "TLS_AES_128_GCM_SHA256")),
        metadata,
        connection: 17,
        trace: Some(("abc", true)),
    }
}

fn metadata() -> Metadata {
    let mut metadata = Metadata::default();
    metadata.set("ns", "k", of_json(&json!({"n": 1, "l": ["x"]})));
    metadata.set("ns", "t", crate::policy::metadata::text("text"));
    metadata
}

fn render(format: &str) -> String {
    let mut wants = Wants::default();
    let template = Template::parse(format, false, &mut wants).unwrap();
    let (kept, metadata) = (kept(&wants), metadata());
    let mut out = String::new();
    template.write(&record(&kept, &metadata), &mut out);
    out
}

#[test]
fn every_operator_is_written_as_envoy_writes_it() {
    let cases = [
        ("%START_TIME%", "2024-02-29T12:34:56.007Z"),
        ("%START_TIME(%Y/%m/%d %s)%", "2024/02/29 1709210096"),
        ("%EMIT_TIME(%3f)%", "049"),
        ("%REQ(X-A)%", "value \"a\""),
        ("%REQ(X-A):5%", "value"),
        ("%REQ(X-NONE?USER-AGENT)%", "curl"),
        ("%REQ(X-NONE)%", "-"),
        (
            "%PATH% %PATH(NQ)% %PATH(WQ:PATH)% %PATH(NQ:ORIG)%",
            "/p?q=1 /p /p?q=1 -",
        ),
        ("%QUERY_PARAM(q)% %QUERY_PARAM(none)%", "1 -"),
        (
            "%UPSTREAM_HOST_NAME% %UPSTREAM_HOST_NAME_WITHOUT_PORT%",
            "shop.internal:8080 shop.internal",
        ),
        (
            "%DOWNSTREAM_PEER_ISSUER% %UPSTREAM_PEER_CERT_V_END(%Y)% %UPSTREAM_TLS_VERSION%",
            "- - -",
        ),
        (
            "%REQ(:METHOD)% %REQ(:PATH)% %REQ(:AUTHORITY)% %REQ(:SCHEME)%",
            "GET /p?q=1 shop http",
        ),
        ("%REQ_WITHOUT_QUERY(X-ENVOY-ORIGINAL-PATH?:PATH)%", "/p"),
        ("%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% %RESP(:STATUS)%", "7 503"),
        ("%TRAILER(grpc-status)%", "0"),
        ("%PROTOCOL% %UPSTREAM_PROTOCOL%", "HTTP/1.1 -"),
        (
            "%RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS%",
            "503 via_upstream -",
        ),
        ("%RESPONSE_FLAGS%", "UF,URX"),
        (
            "%RESPONSE_FLAGS_LONG%",
            "UpstreamConnectionFailure,UpstreamRetryLimitExceeded",
        ),
        ("%BYTES_RECEIVED% %BYTES_SENT%", "10 20"),
        (
            "%DURATION% %REQUEST_DURATION% %RESPONSE_DURATION% %RESPONSE_TX_DURATION%",
            "42 3 30 12",
        ),
        ("%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "3"),
        (
            "%UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT%",
            "10.0.0.9:80 10.0.0.9 80",
        ),
        (
            "%UPSTREAM_CLUSTER% %UPSTREAM_LOCAL_ADDRESS%",
            "outbound|80||shop 10.0.0.9:4321",
        ),
        (
            "%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %UPSTREAM_LOCAL_PORT% %VIRTUAL_CLUSTER_NAME%",
            "10.0.0.9 4321 reads",
        ),
        ("%UPSTREAM_TRANSPORT_FAILURE_REASON% %ROUTE_NAME%", "- default"),
        (
            "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
            "9.9.9.9 10.0.0.1:5",
        ),
        (
            "%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_PORT%",
            "10.0.0.2:80 80",
        ),
        (
            "%REQUESTED_SERVER_NAME% %DOWNSTREAM_PEER_URI_SAN% %DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_TLS_CIPHER%",
            "- - TLSv1.3 TLS_AES_128_GCM_SHA256",
        ),
        (
            "%GRPC_STATUS% %GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS_NUMBER%",
            "PermissionDenied PERMISSION_DENIED 7",
        ),
        (
            "%DYNAMIC_METADATA(ns:k)% %DYNAMIC_METADATA(ns:t)% %DYNAMIC_METADATA(ns:t):2%",
            "{\"l\":[\"x\"],\"n\":1} text te",
        ),
        ("%METADATA(DYNAMIC:ns:k:n)% %DYNAMIC_METADATA(none)%", "1 -"),
        ("%STREAM_ID% %CONNECTION_ID% %TRACE_ID%", "id 17 abc"),
        ("100%%", "100%"),
    ];
    for (format, expected) in cases {
        assert_eq!(render(format), expected, "{format}");
    }
}

#[test]
fn the_default_line_and_istios_are_as_envoy_writes_them() {
    assert_eq!(
        render(DEFAULT),
        "[2024-02-29T12:34:56.007Z] \"GET /p?q=1 HTTP/1.1\" 503 UF,URX 10 20 42 7 \"-\" \"curl\" \"-\" \"shop\" \
         \"10.0.0.9:80\"\n"
    );
    let istio = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% \
        %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
        \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
        %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
        \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% \
        %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% \
        %ROUTE_NAME%\n";
    assert_eq!(
        render(istio),
        "[2024-02-29T12:34:56.007Z] \"GET /p?q=1 HTTP/1.1\" 503 UF,URX via_upstream - \"-\" 10 20 42 7 \"-\" \"curl\" \
         \"-\" \"shop\" \"10.0.0.9:80\" outbound|80||shop 10.0.0.9:4321 10.0.0.2:80 9.9.9.9:0 - default\n"
    );
}

#[test]
fn json_keeps_types_nests_and_escapes() {
    let Some(Kind::StructValue(fields)) = of_json(&json!({
        "code": "%RESPONSE_CODE%",
        "a": "%REQ(X-A)%",
        "none": "%REQ(X-NONE)%",
        "both": "%REQ(:METHOD)% %REQ(X-NONE)%",
        "nested": {"meta": "%DYNAMIC_METADATA(ns:k)%", "list": ["%DURATION%", "fixed", 3, true]},
    }))
    .kind
    else {
        panic!("an object is a struct");
    };
    for (omit, none, both) in [(false, true, "GET -"), (true, false, "GET ")] {
        let mut wants = Wants::default();
        let format = Format::json(&fields, omit, &mut wants).unwrap();
        let (kept, metadata) = (kept(&wants), metadata());
        let mut out = String::new();
        format.write(&record(&kept, &metadata), &mut out);
        assert!(out.ends_with("}\n"));
        let parsed: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(parsed["code"], 503);
        assert_eq!(parsed["a"], "value \"a\"");
        assert_eq!(parsed.get("none").is_some(), none, "{out}");
        assert_eq!(parsed["both"], both);
        assert_eq!(
            parsed["nested"],
            json!({"meta": {"n": 1, "l": ["x"]}, "list": [42, "fixed", 3, true]})
        );
    }
}

#[test]
fn what_is_no_operator_is_refused() {
    for bad in [
        "%NOT_AN_OPERATOR%",
        "%REQ%",
        "%REQ(%",
        "%REQ(a?b?c)%",
        "%REQ(a b)%",
        "%REQ(a):x%",
        "%START_TIME",
        "% %",
        "50%",
        "%DURATION(x)%",
        "%START_TIME(%Q)%",
        "%DYNAMIC_METADATA()%",
    ] {
        assert!(
            Template::parse(bad, false, &mut Wants::default()).is_err(),
            "{bad}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn any_format_is_parsed_and_written_without_panic(
        free in ".{0,60}",
        parts in proptest::collection::vec(
            prop_oneof![
                Just("%".to_owned()),
                Just("%%".to_owned()),
                Just("REQ(".to_owned()),
                Just("):".to_owned()),
                Just("%START_TIME(%".to_owned()),
                Just("é".to_owned()),
                "[A-Z_:()?0-9]{0,12}",
                Just("%REQ(X-A):3%".to_owned()),
                Just("%DYNAMIC_METADATA(ns:k:n):2%".to_owned()),
            ],
            0..8,
        ),
    ) {
        for text in [free, parts.concat()] {
            let mut wants = Wants::default();
            if let Ok(template) = Template::parse(&text, false, &mut wants) {
                let (kept, metadata) = (kept(&wants), metadata());
                let mut out = String::new();
                template.write(&record(&kept, &metadata), &mut out);
            }
        }
    }

    #[test]
    fn a_quoted_text_is_json(text in any::<String>()) {
        let mut out = String::new();
        quote(&text, &mut out);
        let back: String = serde_json::from_str(&out).unwrap();
        prop_assert_eq!(back, text);
    }
}
