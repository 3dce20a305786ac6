//! Access logs to log services (ALS and OTLP) and the log lines of connections.

use prost::Message;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::accesslog::v3 as accesslog;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::data::accesslog::v3 as data;
use serin_xds::pb::envoy::extensions::access_loggers::{
    file::v3 as file, grpc::v3 as grpc, open_telemetry::v3 as open_telemetry,
};
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
use serin_xds::pb::envoy::service::accesslog::v3 as als;
use serin_xds::pb::opentelemetry::proto::common::v1 as otlp;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::services::service_cluster;
use super::*;

fn logger(config: google::Any) -> accesslog::AccessLog {
    accesslog::AccessLog {
        name: "log".into(),
        filter: None,
        config_type: Some(accesslog::access_log::ConfigType::TypedConfig(config)),
    }
}

/// Entries are sent as they come.
fn common(name: &str) -> Option<grpc::CommonGrpcAccessLogConfig> {
    Some(grpc::CommonGrpcAccessLogConfig {
        log_name: name.into(),
        grpc_service: Some(to_service()),
        buffer_size_bytes: number(0),
        ..Default::default()
    })
}

fn to_service() -> core::GrpcService {
    core::GrpcService {
        target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(
            core::grpc_service::EnvoyGrpc {
                cluster_name: "svc".into(),
                ..Default::default()
            },
        )),
        timeout: millis(5000),
        ..Default::default()
    }
}

/// Takes every call.
async fn log_service() -> Backend {
    Backend::answering(|_| {
        let mut response = http::Response::new(Full::from(&b"\0\0\0\0\0"[..]));
        let headers = response.headers_mut();
        headers.insert("content-type", "application/grpc".parse().unwrap());
        headers.insert("grpc-status", "0".parse().unwrap());
        response
    })
    .await
}

/// The message of the next call.
async fn taken<M: Message + Default>(service: &mut Backend, path: &str) -> M {
    let seen = service.next().await;
    assert_eq!(seen.path, path);
    M::decode(&seen.body[5..]).unwrap()
}

const ALS: &str = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";

async fn entries(
    service: &mut Backend,
) -> (
    als::stream_access_logs_message::Identifier,
    als::stream_access_logs_message::LogEntries,
) {
    let message: als::StreamAccessLogsMessage = taken(service, ALS).await;
    (message.identifier.unwrap(), message.log_entries.unwrap())
}

#[tokio::test]
async fn the_access_log_service_gets_an_entry_of_each_request() {
    let mut service = log_service().await;
    let (harness, backend, _) = served(vec![], to_c()).await;
    service_cluster(&harness, service.address).await;
    let mut manager = manager("80");
    manager.access_log = vec![logger(any(&grpc::HttpGrpcAccessLogConfig {
        common_config: common("http"),
        additional_request_headers_to_log: vec!["x-tenant".into()],
        additional_response_headers_to_log: vec!["content-length".into()],
        ..Default::default()
    }))];
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    get_with(at, "/a?q=1", &[("x-tenant", "blue"), ("user-agent", "test/1")]).await;
    let (who, entries) = entries(&mut service).await;
    assert_eq!(who.log_name, "http");
    assert_eq!(who.node.unwrap().id, harness.proxy.node.id);
    let als::stream_access_logs_message::LogEntries::HttpLogs(logs) = entries else {
        panic!("no HTTP entries");
    };
    let entry = &logs.log_entry[0];
    let (request, response) = (entry.request.as_ref().unwrap(), entry.response.as_ref().unwrap());
    assert_eq!(
        (
            &*request.path,
            &*request.authority,
            &*request.user_agent,
            request.request_method
        ),
        ("/a?q=1", "reviews", "test/1", core::RequestMethod::Get as i32)
    );
    assert_eq!(request.request_headers["x-tenant"], "blue");
    assert_eq!(response.response_code.unwrap().value, 200);
    assert_eq!(
        (
            response.response_body_bytes,
            &*response.response_headers["content-length"]
        ),
        (2, "2")
    );
    let common = entry.common_properties.as_ref().unwrap();
    assert_eq!((&*common.upstream_cluster, &*common.route_name), ("c", "r"));
    assert_eq!(common.upstream_remote_address, address(backend.address));
    assert_eq!(common.access_log_type, data::AccessLogType::DownstreamEnd as i32);
    soon("the count", async {
        while harness.counter("envoy_access_logs_grpc_access_log_logs_written", &[]) < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_log_service_that_is_away_costs_entries_and_no_request() {
    let (harness, _backend, _) = served(vec![], to_c()).await;
    service_cluster(&harness, closed_port().await).await;
    let mut manager = manager("80");
    manager.access_log = vec![logger(any(&grpc::HttpGrpcAccessLogConfig {
        common_config: common("http"),
        ..Default::default()
    }))];
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    for _ in 0..3 {
        assert_eq!(get(at, "/").await.0, 200);
    }
    soon("the count", async {
        while harness.counter("envoy_access_logs_grpc_access_log_logs_dropped", &[]) < 3.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// As a collector reads it.
#[derive(Clone, PartialEq, Message)]
struct Export {
    #[prost(message, repeated, tag = "1")]
    resource_logs: Vec<ResourceLogs>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceLogs {
    #[prost(message, optional, tag = "1")]
    resource: Option<otlp::KeyValueList>,
    #[prost(message, repeated, tag = "2")]
    scope_logs: Vec<ScopeLogs>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeLogs {
    #[prost(message, repeated, tag = "2")]
    log_records: Vec<LogRecord>,
}

#[derive(Clone, PartialEq, Message)]
struct LogRecord {
    #[prost(fixed64, tag = "1")]
    time_unix_nano: u64,
    #[prost(message, optional, tag = "5")]
    body: Option<otlp::AnyValue>,
    #[prost(message, repeated, tag = "6")]
    attributes: Vec<otlp::KeyValue>,
}

fn text(value: &str) -> Option<otlp::AnyValue> {
    Some(otlp::AnyValue {
        value: Some(otlp::any_value::Value::StringValue(value.into())),
    })
}

fn pair(key: &str, value: &str) -> otlp::KeyValue {
    otlp::KeyValue {
        key: key.into(),
        value: text(value),
        ..Default::default()
    }
}

#[tokio::test]
async fn an_otlp_collector_gets_a_record_of_each_request_as_it_was_configured() {
    let mut service = log_service().await;
    let (harness, _backend, _) = served(vec![], to_c()).await;
    service_cluster(&harness, service.address).await;
    let mut manager = manager("80");
    manager.access_log = vec![logger(any(&open_telemetry::OpenTelemetryAccessLogConfig {
        common_config: common("shop"),
        resource_attributes: Some(otlp::KeyValueList {
            values: vec![pair("service.name", "shop")],
        }),
        body: text("%REQ(:METHOD)% %RESPONSE_CODE%"),
        attributes: Some(otlp::KeyValueList {
            values: vec![pair("path", "%REQ(:PATH)%"), pair("fixed", "100%%")],
        }),
        ..Default::default()
    }))];
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    get(at, "/a").await;
    let export: Export = taken(
        &mut service,
        "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
    )
    .await;
    let logs = &export.resource_logs[0];
    let resource = &logs.resource.as_ref().unwrap().values;
    assert!(resource.contains(&pair("log_name", "shop")), "{resource:?}");
    assert!(
        resource.contains(&pair("node_name", &harness.proxy.node.id)),
        "{resource:?}"
    );
    assert!(resource.contains(&pair("service.name", "shop")), "{resource:?}");
    let record = &logs.scope_logs[0].log_records[0];
    assert_eq!(record.body, text("GET 200"));
    assert_eq!(record.attributes, [pair("path", "/a"), pair("fixed", "100%")]);
    assert!(record.time_unix_nano > 1_600_000_000_000_000_000);
}

#[tokio::test]
async fn an_otlp_collector_over_http_gets_the_same_records_with_the_fields_that_it_asks_for() {
    use prost::Message as _;
    let mut collector = Backend::named("").await;
    let (harness, _backend, _) = served(vec![], to_c()).await;
    harness.cluster("otel", &[collector.address]).await;
    let mut manager = manager("80");
    manager.access_log = vec![logger(any(&open_telemetry::OpenTelemetryAccessLogConfig {
        http_service: Some(core::HttpService {
            http_uri: Some(core::HttpUri {
                uri: "http://collector.example/v1/logs".into(),
                timeout: millis(5000),
                http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster("otel".into())),
            }),
            request_headers_to_add: vec![core::HeaderValueOption {
                header: Some(core::HeaderValue {
                    key: "x-key".into(),
                    value: "k".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        }),
        log_name: "shop".into(),
        buffer_flush_interval: millis(10),
        body: text("%REQ(:PATH)%"),
        ..Default::default()
    }))];
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    get(at, "/a").await;
    let request = collector.next().await;
    assert_eq!((&*request.method, &*request.path), ("POST", "/v1/logs"));
    assert_eq!(request.headers["host"], "collector.example");
    assert_eq!(request.headers["content-type"], "application/x-protobuf");
    assert_eq!(request.headers["x-key"], "k");
    let export = Export::decode(request.body).unwrap();
    assert_eq!(
        export.resource_logs[0].scope_logs[0].log_records[0].body,
        text("/a")
    );
}

fn to_file(path: &std::path::Path, format: &str) -> accesslog::AccessLog {
    logger(any(&file::FileAccessLog {
        path: path.to_str().unwrap().into(),
        access_log_format: Some(file::file_access_log::AccessLogFormat::Format(format.into())),
    }))
}

async fn line(path: &std::path::Path) -> String {
    soon("a log line", async {
        loop {
            let text = tokio::fs::read_to_string(path).await.unwrap_or_default();
            if text.ends_with('\n') {
                return text;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

fn tcp_listener(proxy: &tcp_proxy::TcpProxy, logs: Vec<accesslog::AccessLog>) -> listener::Listener {
    let chain = listener::FilterChain {
        filters: vec![network_filter(
            "envoy.filters.network.tcp_proxy",
            Some(any(proxy)),
        )],
        ..Default::default()
    };
    let mut message = listener_of("l", core::TrafficDirection::Outbound, vec![chain]);
    message.access_log = logs;
    message
}

fn proxy_to(cluster: &str, logs: Vec<accesslog::AccessLog>) -> tcp_proxy::TcpProxy {
    tcp_proxy::TcpProxy {
        stat_prefix: "tcp".into(),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster(cluster.into())),
        access_log: logs,
        ..Default::default()
    }
}

const CONNECTION: &str = "%BYTES_RECEIVED% %BYTES_SENT% %RESPONSE_FLAGS% %UPSTREAM_CLUSTER% %UPSTREAM_HOST% \
    %UPSTREAM_REQUEST_ATTEMPT_COUNT% %ACCESS_LOG_TYPE% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\n";

#[tokio::test]
async fn a_tcp_proxy_and_its_listener_log_each_connection_with_bytes_and_endpoint() {
    let directory = tempfile::tempdir().unwrap();
    let (of_proxy, of_listener) = (directory.path().join("proxy"), directory.path().join("listener"));
    let mut service = log_service().await;
    let harness = Harness::start();
    service_cluster(&harness, service.address).await;
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let backend = socket.local_addr().unwrap();
    harness.cluster("tcp", &[backend]).await;
    let als = logger(any(&grpc::TcpGrpcAccessLogConfig {
        common_config: common("tcp"),
    }));
    let proxy = proxy_to("tcp", vec![to_file(&of_proxy, CONNECTION), als]);
    let message = tcp_listener(&proxy, vec![to_file(&of_listener, CONNECTION)]);
    harness.put(ResourceType::Listener, "l", &message).await;
    let at = harness.proxy.listener_address("l").unwrap();
    let mut client = TcpStream::connect(at).await.unwrap();
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let (mut server, _) = soon("the connection", socket.accept()).await.unwrap();
    let mut all = Vec::new();
    server.read_to_end(&mut all).await.unwrap();
    server.write_all(b"you").await.unwrap();
    drop(server);
    soon("the end", client.read_to_end(&mut all)).await.unwrap();
    let expected = format!("5 3 - tcp {backend} 1 TcpConnectionEnd 127.0.0.1\n");
    assert_eq!(line(&of_proxy).await, expected);
    assert_eq!(line(&of_listener).await, expected);
    let (_, entries) = entries(&mut service).await;
    let als::stream_access_logs_message::LogEntries::TcpLogs(logs) = entries else {
        panic!("no TCP entries");
    };
    let bytes = logs.log_entry[0].connection_properties.unwrap();
    assert_eq!((bytes.received_bytes, bytes.sent_bytes), (5, 3));
}

#[tokio::test]
async fn a_connection_without_an_upstream_is_logged_with_flag_and_reason_and_no_second_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("proxy");
    let mut harness = Harness::start();
    harness.cluster("tcp", &[closed_port().await]).await;
    let format = "%RESPONSE_FLAGS% %UPSTREAM_CLUSTER% %UPSTREAM_REQUEST_ATTEMPT_COUNT% \
        %UPSTREAM_TRANSPORT_FAILURE_REASON%\n";
    let mut proxy = proxy_to("tcp", vec![to_file(&path, format)]);
    proxy.max_connect_attempts = number(2);
    harness
        .put(ResourceType::Listener, "l", &tcp_listener(&proxy, vec![]))
        .await;
    assert_eq!(raw(harness.proxy.listener_address("l").unwrap(), b"").await, "");
    let line = line(&path).await;
    assert!(
        line.starts_with("UF,URX tcp 2 ") && line.contains("refused"),
        "{line}"
    );
    assert!(harness.log.try_recv().is_err(), "told twice");
}

#[tokio::test]
async fn lines_of_a_long_connection_come_when_it_is_made_and_at_intervals() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("proxy");
    let harness = Harness::start();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    harness.cluster("tcp", &[socket.local_addr().unwrap()]).await;
    let mut proxy = proxy_to(
        "tcp",
        vec![to_file(&path, "%ACCESS_LOG_TYPE% %BYTES_RECEIVED%\n")],
    );
    proxy.access_log_options = Some(tcp_proxy::tcp_proxy::TcpAccessLogOptions {
        access_log_flush_interval: millis(20),
        flush_access_log_on_connected: true,
        ..Default::default()
    });
    harness
        .put(ResourceType::Listener, "l", &tcp_listener(&proxy, vec![]))
        .await;
    let mut client = TcpStream::connect(harness.proxy.listener_address("l").unwrap())
        .await
        .unwrap();
    client.write_all(b"hello").await.unwrap();
    let _server = soon("the connection", socket.accept()).await.unwrap();
    soon("two intervals", async {
        while line(&path).await.matches("TcpPeriodic 5\n").count() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(line(&path).await.starts_with("TcpUpstreamConnected 0\n"));
}

#[tokio::test]
async fn a_listener_logs_its_http_connections_and_those_that_no_chain_takes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("listener");
    let (harness, _backend, _) = served(vec![], to_c()).await;
    let format = "%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %ACCESS_LOG_TYPE%\n";
    let mut message = listener_of(
        "l",
        core::TrafficDirection::Outbound,
        vec![http_chain(&manager("80"))],
    );
    message.access_log = vec![to_file(&path, format)];
    harness.put(ResourceType::Listener, "l", &message).await;
    let at = harness.proxy.listener_address("l").unwrap();
    assert_eq!(get(at, "/").await.0, 200);
    assert_eq!(line(&path).await, "- - TcpConnectionEnd\n");
    let path = directory.path().join("no chain");
    message.access_log = vec![to_file(&path, format)];
    message.filter_chains[0].filter_chain_match = Some(listener::FilterChainMatch {
        destination_port: number(1),
        ..Default::default()
    });
    harness.put(ResourceType::Listener, "l", &message).await;
    raw(harness.proxy.listener_address("l").unwrap(), b"").await;
    assert_eq!(line(&path).await, "NR filter_chain_not_found TcpConnectionEnd\n");
}

#[tokio::test]
async fn log_services_that_cannot_be_used_as_configured_are_refused_with_the_field() {
    let harness = Harness::start();
    let refused = async |config: google::Any| {
        let mut manager = manager("80");
        manager.access_log = vec![logger(config)];
        let message = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
        harness
            .try_put(ResourceType::Listener, "l", &message)
            .await
            .expect("refused")
    };
    let mut nameless = common("");
    let refusal = refused(any(&grpc::HttpGrpcAccessLogConfig {
        common_config: nameless.clone(),
        ..Default::default()
    }))
    .await;
    assert!(
        refusal.contains("access_log[0].typed_config.common_config.log_name"),
        "{refusal}"
    );
    nameless.as_mut().unwrap().log_name = "n".into();
    nameless.as_mut().unwrap().grpc_service = None;
    let refusal = refused(any(&grpc::TcpGrpcAccessLogConfig {
        common_config: nameless,
    }))
    .await;
    assert!(refusal.contains("common_config.grpc_service"), "{refusal}");
    let refusal = refused(any(&open_telemetry::OpenTelemetryAccessLogConfig {
        common_config: common("n"),
        http_service: Some(core::HttpService::default()),
        ..Default::default()
    }))
    .await;
    assert!(refusal.contains("http_service"), "{refusal}");
}
