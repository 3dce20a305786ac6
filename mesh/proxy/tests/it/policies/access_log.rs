//! Access logs in Envoy's format language.

use std::path::Path;

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::accesslog::v3 as accesslog;
use serin_xds::pb::envoy::extensions::access_loggers::file::v3 as file;

use super::*;

fn log_to(path: &Path, format: file::file_access_log::AccessLogFormat) -> accesslog::AccessLog {
    accesslog::AccessLog {
        name: "envoy.access_loggers.file".into(),
        filter: None,
        config_type: Some(accesslog::access_log::ConfigType::TypedConfig(any(
            &file::FileAccessLog {
                path: path.to_str().unwrap().into(),
                access_log_format: Some(format),
            },
        ))),
    }
}

fn text(path: &Path, format: &str) -> accesslog::AccessLog {
    log_to(
        path,
        file::file_access_log::AccessLogFormat::Format(format.into()),
    )
}

fn filtered(
    mut log: accesslog::AccessLog,
    spec: accesslog::access_log_filter::FilterSpecifier,
) -> accesslog::AccessLog {
    log.filter = Some(accesslog::AccessLogFilter {
        filter_specifier: Some(spec),
    });
    log
}

async fn logging(logs: Vec<accesslog::AccessLog>) -> (Harness, Backend, SocketAddr) {
    let harness = Harness::start();
    let backend = Backend::named("ok").await;
    harness.cluster("c", &[backend.address]).await;
    harness
        .routes(vec![host(
            "all",
            "*",
            vec![
                prefix_route("/missing", to_cluster("none")),
                prefix_route("/", {
                    let mut action = to_cluster("c");
                    action.prefix_rewrite = "/app/".into();
                    action
                }),
            ],
        )])
        .await;
    let mut manager = manager("80");
    manager.access_log = logs;
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    (harness, backend, at)
}

/// The lines of a file, once there are that many.
async fn lines(path: &Path, count: usize) -> Vec<String> {
    soon("the log lines", async {
        loop {
            let text = tokio::fs::read_to_string(path).await.unwrap_or_default();
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            if lines.len() >= count && (count == 0 || text.ends_with('\n')) {
                return lines;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

#[tokio::test]
async fn a_text_line_tells_of_each_request_what_its_format_asks_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let format = "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %REQ(:PATH)% %PROTOCOL% %RESPONSE_CODE% \
        %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %BYTES_RECEIVED% %BYTES_SENT% %REQ(X-ASK)% %RESP(X-NONE)% \
        %UPSTREAM_HOST% %UPSTREAM_CLUSTER% %ROUTE_NAME% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\n";
    let (_harness, backend, at) = logging(vec![text(&path, format)]).await;
    get_with(at, "/a?q=1", &[("x-ask", "me")]).await;
    get(at, "/missing").await;
    let lines = lines(&path, 2).await;
    assert_eq!(
        lines[0],
        format!(
            "GET /a?q=1 /app/a?q=1 HTTP/1.1 200 - via_upstream 0 2 me - {} c r 127.0.0.1",
            backend.address
        )
    );
    assert_eq!(
        lines[1],
        "GET /missing /missing HTTP/1.1 503 NC cluster_not_found 0 0 - - - none r 127.0.0.1"
    );
}

#[tokio::test]
async fn a_json_line_keeps_numbers_as_numbers_and_envoys_default_line_is_the_default() {
    let directory = tempfile::tempdir().unwrap();
    let (json, standard) = (
        directory.path().join("json.log"),
        directory.path().join("text.log"),
    );
    let fields = string_struct(&[
        ("response_code", "%RESPONSE_CODE%"),
        ("path", "%REQ(:PATH)%"),
        ("agent", "%REQ(USER-AGENT)%"),
        ("duration", "%DURATION%"),
    ]);
    let logs = vec![
        log_to(&json, file::file_access_log::AccessLogFormat::JsonFormat(fields)),
        text(&standard, ""),
    ];
    let (_harness, _backend, at) = logging(logs).await;
    get_with(at, "/a", &[("x-request-id", "the-id")]).await;
    let line: serde_json::Value = serde_json::from_str(&lines(&json, 1).await[0]).unwrap();
    assert_eq!(
        (&line["response_code"], &line["path"], &line["agent"]),
        (&200.into(), &"/app/a".into(), &().into())
    );
    assert!(line["duration"].is_u64());
    let line = &lines(&standard, 1).await[0];
    assert!(
        line.starts_with("[20") && line.contains("\"GET /a HTTP/1.1\" 200 - 0 2 "),
        "{line}"
    );
    assert!(line.contains("\"the-id\" \"reviews\" \"127.0.0.1:"), "{line}");
}

#[tokio::test]
async fn filters_choose_which_requests_are_logged() {
    use accesslog::access_log_filter::FilterSpecifier as Spec;
    let directory = tempfile::tempdir().unwrap();
    let at_least_500 = || {
        Spec::StatusCodeFilter(accesslog::StatusCodeFilter {
            comparison: Some(accesslog::ComparisonFilter {
                op: accesslog::comparison_filter::Op::Ge as i32,
                value: Some(core::RuntimeUInt32 {
                    default_value: 500,
                    runtime_key: "k".into(),
                }),
            }),
        })
    };
    let debugged = || {
        Spec::HeaderFilter(accesslog::HeaderFilter {
            header: Some(route::HeaderMatcher {
                name: "x-debug".into(),
                ..Default::default()
            }),
        })
    };
    let wrap = |spec| accesslog::AccessLogFilter {
        filter_specifier: Some(spec),
    };
    let flags = |codes: &[&str]| {
        Spec::ResponseFlagFilter(accesslog::ResponseFlagFilter {
            flags: codes.iter().map(|code| (*code).to_owned()).collect(),
        })
    };
    let share = |numerator| {
        Spec::RuntimeFilter(accesslog::RuntimeFilter {
            runtime_key: "k".into(),
            percent_sampled: Some(envoy_type::FractionalPercent {
                numerator,
                denominator: 0,
            }),
            ..Default::default()
        })
    };
    // Each request has a digit; the file of each filter must hold exactly these.
    let cases: Vec<(&str, Spec, &str)> = vec![
        ("status", at_least_500(), "2"),
        ("header", debugged(), "3"),
        (
            "or",
            Spec::OrFilter(accesslog::OrFilter {
                filters: vec![wrap(at_least_500()), wrap(debugged())],
            }),
            "23",
        ),
        (
            "and",
            Spec::AndFilter(accesslog::AndFilter {
                filters: vec![wrap(at_least_500()), wrap(debugged())],
            }),
            "",
        ),
        ("flag", flags(&["NC"]), "2"),
        ("other flag", flags(&["UF"]), ""),
        ("any flag", flags(&[]), "2"),
        ("all", share(100), "123"),
        ("none", share(0), ""),
        (
            "not health check",
            Spec::NotHealthCheckFilter(accesslog::NotHealthCheckFilter {}),
            "123",
        ),
        (
            "duration",
            Spec::DurationFilter(accesslog::DurationFilter {
                comparison: Some(accesslog::ComparisonFilter {
                    op: accesslog::comparison_filter::Op::Ge as i32,
                    value: Some(core::RuntimeUInt32 {
                        default_value: 3_600_000,
                        runtime_key: "k".into(),
                    }),
                }),
            }),
            "",
        ),
    ];
    let path = |name: &str| directory.path().join(name.replace(' ', "_"));
    let mut logs: Vec<_> = cases
        .iter()
        .map(|(name, spec, _)| filtered(text(&path(name), "%REQ(X-N)%\n"), spec.clone()))
        .collect();
    logs.push(text(&path("end"), "%REQ(X-N)%\n"));
    let (_harness, _backend, at) = logging(logs).await;
    get_with(at, "/", &[("x-n", "1")]).await;
    get_with(at, "/missing", &[("x-n", "2")]).await;
    get_with(at, "/", &[("x-n", "3"), ("x-debug", "1")]).await;
    lines(&path("end"), 3).await;
    for (name, _, expected) in &cases {
        let found = lines(&path(name), expected.len()).await.concat();
        assert_eq!(&found, expected, "{name}");
    }
}

#[tokio::test]
async fn what_filters_said_and_a_policy_that_denied_are_in_the_line() {
    use serin_xds::pb::envoy::config::rbac::v3 as rbac;
    use serin_xds::pb::envoy::extensions::filters::http::{
        rbac::v3 as http_rbac, set_metadata::v3 as set_metadata,
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let harness = Harness::start();
    harness.routes(to_c()).await;
    let deny = super::rbac::rules(
        rbac::rbac::Action::Deny,
        "ns[a]-policy[p]-rule[0]",
        rbac::Permission {
            rule: Some(rbac::permission::Rule::Any(true)),
        },
    );
    let mut manager = manager_with(vec![
        http_filter(
            "envoy.filters.http.set_metadata",
            Some(any(&set_metadata::Config {
                metadata: vec![set_metadata::Metadata {
                    metadata_namespace: "ns".into(),
                    value: Some(string_struct(&[("tier", "gold")])),
                    ..Default::default()
                }],
                ..Default::default()
            })),
        ),
        http_filter(
            "envoy.filters.http.rbac",
            Some(any(&http_rbac::Rbac {
                rules: Some(deny),
                ..Default::default()
            })),
        ),
    ]);
    manager.access_log = vec![text(
        &path,
        "%RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %DYNAMIC_METADATA(ns:tier)%\n",
    )];
    let at = harness.listen(&manager, core::TrafficDirection::Inbound).await;
    get(at, "/").await;
    assert_eq!(
        lines(&path, 1).await,
        ["403 rbac_access_denied_matched_policy[ns[a]-policy[p]-rule[0]] gold"]
    );
}

#[tokio::test]
async fn a_format_or_file_that_cannot_be_used_is_refused() {
    let harness = Harness::start();
    let refusal = async |log: accesslog::AccessLog| {
        let mut manager = manager("80");
        manager.access_log = vec![log];
        let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
        harness
            .try_put(ResourceType::Listener, "l", &listener)
            .await
            .unwrap()
    };
    let error = refusal(text(Path::new("/dev/null"), "%NOT_AN_OPERATOR%")).await;
    assert!(
        error.contains("access_log[0].typed_config.format") && error.contains("NOT_AN_OPERATOR"),
        "{error}"
    );
    let error = refusal(text(Path::new("/nonexistent/dir/x"), "")).await;
    assert!(error.contains("/nonexistent/dir/x"), "{error}");
}

#[tokio::test]
async fn a_cel_expression_chooses_which_requests_are_logged() {
    use serin_xds::pb::envoy::extensions::access_loggers::filters::cel::v3 as cel;
    let with = |log, expression: &str| {
        filtered(
            log,
            accesslog::access_log_filter::FilterSpecifier::ExtensionFilter(accesslog::ExtensionFilter {
                name: "cel".into(),
                config_type: Some(accesslog::extension_filter::ConfigType::TypedConfig(any(
                    &cel::ExpressionFilter {
                        expression: expression.into(),
                        ..Default::default()
                    },
                ))),
            }),
        )
    };
    let directory = tempfile::tempdir().unwrap();
    let (some, all) = (directory.path().join("some"), directory.path().join("all"));
    let line = "%REQ(X-N)%\n";
    let (harness, _backend, at) = logging(vec![
        with(
            text(&some, line),
            "response.code >= 500 || request.headers['x-n'] == '3' && request.useragent.startsWith('t')",
        ),
        text(&all, line),
    ])
    .await;
    get_with(at, "/", &[("x-n", "1")]).await;
    get_with(at, "/missing", &[("x-n", "2")]).await;
    get_with(at, "/", &[("x-n", "3"), ("user-agent", "test")]).await;
    get_with(at, "/", &[("x-n", "3"), ("user-agent", "other")]).await;
    get_with(at, "/", &[("x-n", "5")]).await;
    assert_eq!(lines(&all, 5).await.len(), 5);
    assert_eq!(lines(&some, 2).await, ["2", "3"]);
    let mut manager = manager("80");
    manager.access_log = vec![with(text(&some, line), "request.colour == 'red'")];
    let message = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
    let refusal = harness
        .try_put(ResourceType::Listener, "l", &message)
        .await
        .expect("refused");
    assert!(
        refusal.contains("expression") && refusal.contains("request.colour"),
        "{refusal}"
    );
}

#[tokio::test]
async fn virtual_clusters_are_counted_and_named_and_the_proxys_own_end_is_told() {
    use serin_xds::pb::envoy::config::route::v3 as route;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let (harness, _backend, at) = logging(vec![text(
        &path,
        "%VIRTUAL_CLUSTER_NAME% %UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %UPSTREAM_LOCAL_PORT%\n",
    )])
    .await;
    let mut virtual_host = host("shop", "*", vec![prefix_route("/", to_cluster("c"))]);
    virtual_host.virtual_clusters = vec![route::VirtualCluster {
        name: "reads".into(),
        headers: vec![route::HeaderMatcher {
            name: ":method".into(),
            header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::ExactMatch(
                "GET".into(),
            )),
            ..Default::default()
        }],
    }];
    harness.routes(vec![virtual_host]).await;
    assert_eq!(get(at, "/").await.0, 200);
    let request = http::Request::put("/")
        .header("host", "a")
        .body(http_body_util::Full::from(""));
    assert_eq!(send(at, request.unwrap()).await.0, 200);
    let lines = lines(&path, 2).await;
    let port = lines[0].strip_prefix("reads 127.0.0.1 ").expect(&lines[0]);
    assert!(port.parse::<u16>().unwrap() > 0, "{port}");
    assert!(lines[1].starts_with("- 127.0.0.1 "), "{lines:?}");
    for (name, count) in [("reads", 1.0), ("other", 1.0)] {
        let labels = [
            ("envoy_response_code_class", "2"),
            ("envoy_virtual_cluster", name),
            ("envoy_virtual_host", "shop"),
        ];
        assert_eq!(
            harness.counter("envoy_vhost_vcluster_upstream_rq_xx", &labels),
            count,
            "{name}"
        );
    }
}
