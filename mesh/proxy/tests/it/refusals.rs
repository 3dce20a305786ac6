//! What this proxy does not have is refused by the path of its field, wherever it stands in a file.

use serde_json::{Value, json};
use serin_proxy::bootstrap::file;
use serin_proxy::control::run::check;

/// A file with a listener, a route and a cluster, each with one more field or several.
fn document(part: &str, more: &Value) -> Value {
    let with = |mut value: Value, name: &str| {
        if name == part {
            let fields = more.as_object().expect("fields").clone();
            value.as_object_mut().expect("a message").extend(fields);
        }
        value
    };
    let filters = match part {
        "filter" => vec![more.clone()],
        _ => Vec::new(),
    };
    let typed = |name: &str| format!("type.googleapis.com/envoy.extensions.filters.{name}");
    let router = with(json!({ "@type": typed("http.router.v3.Router") }), "router");
    let filters: Vec<Value> = filters
        .into_iter()
        .chain([json!({ "name": "router", "typed_config": router })])
        .collect();
    let route = with(json!({ "cluster": "c" }), "action");
    let host = with(
        json!({ "name": "all", "domains": ["*"], "routes": [
            with(json!({ "match": { "prefix": "/" }, "route": route }), "route") ] }),
        "host",
    );
    let manager = with(
        json!({
            "@type": typed("network.http_connection_manager.v3.HttpConnectionManager"),
            "stat_prefix": "p", "http_filters": filters,
            "route_config": { "name": "r", "virtual_hosts": [host] },
        }),
        "manager",
    );
    let listener = with(
        json!({
            "name": "l", "address": { "socket_address": { "address": "127.0.0.1", "port_value": 0 } },
            "filter_chains": [ { "filters": [ { "name": "hcm", "typed_config": manager } ] } ],
        }),
        "listener",
    );
    let cluster = with(
        json!({ "name": "c", "load_assignment": { "cluster_name": "c", "endpoints": [] } }),
        "cluster",
    );
    json!({ "static_resources": { "listeners": [listener], "clusters": [cluster] } })
}

/// What is said against a document.
fn told(document: &Value) -> Option<String> {
    let plan = match file::parse(&document.to_string(), 1) {
        Ok(plan) => plan,
        Err(error) => return Some(error.to_string()),
    };
    check(&plan.static_resources).err().map(|error| error.to_string())
}

#[test]
fn what_is_listed_as_refused_is_refused_by_the_path_of_its_field() {
    assert_eq!(told(&document("", &json!({}))), None, "the document itself");
    let filter = |kind: &str, mut fields: Value| {
        fields["@type"] = json!(format!(
            "type.googleapis.com/envoy.extensions.filters.http.{kind}"
        ));
        json!({ "name": "f", "typed_config": fields })
    };
    let threshold = |field: &str| json!({ "circuit_breakers": { "thresholds": [ { field: 1 } ] } });
    let cases = [
        (
            "cluster",
            threshold("max_connection_pools"),
            "max_connection_pools",
        ),
        (
            "cluster",
            json!({ "preconnect_policy": { "per_upstream_preconnect_ratio": 2.0 } }),
            "preconnect_policy",
        ),
        (
            "cluster",
            json!({ "health_checks": [ { "timeout": "1s", "interval": "1s", "unhealthy_threshold": 1,
            "healthy_threshold": 1, "custom_health_check": { "name": "redis" } } ] }),
            "health_checks[0]",
        ),
        (
            "cluster",
            json!({ "transport_socket": { "name": "quic", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.quic.v3.QuicUpstreamTransport" } } }),
            "transport_socket",
        ),
        ("listener", json!({ "transparent": true }), "transparent"),
        (
            "listener",
            json!({ "udp_listener_config": {} }),
            "udp_listener_config",
        ),
        (
            "router",
            json!({ "upstream_log": [ { "name": "l" } ] }),
            "upstream_log",
        ),
        (
            "router",
            json!({ "upstream_http_filters": [ { "name": "f" } ] }),
            "upstream_http_filters",
        ),
        (
            "manager",
            json!({ "upgrade_configs": [ { "upgrade_type": "websocket", "filters": [ { "name": "f" } ] } ] }),
            "upgrade_configs",
        ),
        (
            "action",
            json!({ "internal_redirect_policy": {} }),
            "internal_redirect_policy",
        ),
        (
            "action",
            json!({ "cluster": null, "inline_cluster_specifier_plugin": { "extension": { "name": "p" } } }),
            "cluster_specifier_plugin",
        ),
        (
            "action",
            json!({ "retry_policy": { "retry_on": "5xx", "retry_host_predicate": [ { "name": "mine" } ] } }),
            "retry_host_predicate",
        ),
        (
            "action",
            json!({ "retry_policy": { "retry_on": "5xx", "retry_priority": { "name": "mine" } } }),
            "retry_priority",
        ),
        (
            "action",
            json!({ "rate_limits": [ { "actions": [ { "extension": { "name": "mine" } } ] } ] }),
            "rate_limits[0]",
        ),
        (
            "action",
            json!({ "hash_policy": [ { "filter_state": { "key": "" } } ] }),
            "hash_policy[0]",
        ),
        (
            "host",
            json!({ "request_body_buffer_limit": 5 }),
            "request_body_buffer_limit",
        ),
        (
            "filter",
            filter("fault.v3.HTTPFault", json!({ "filter_metadata": { "a": "b" } })),
            "filter_metadata",
        ),
        (
            "filter",
            filter(
                "ext_authz.v3.ExtAuthz",
                json!({ "grpc_service": { "envoy_grpc": { "cluster_name": "c" } },
            "typed_metadata_context_namespaces": ["a"] }),
            ),
            "typed_metadata_context_namespaces",
        ),
        (
            "filter",
            filter(
                "compressor.v3.Compressor",
                json!({ "request_direction_config": {},
            "compressor_library": { "name": "g", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.compression.gzip.compressor.v3.Gzip" } } }),
            ),
            "request_direction_config",
        ),
        (
            "filter",
            filter("decompressor.v3.Decompressor", json!({})),
            "decompressor",
        ),
        ("filter", filter("lua.v3.Lua", json!({})), "lua"),
        (
            "filter",
            filter(
                "jwt_authn.v3.JwtAuthentication",
                json!({ "rules": [ { "match": { "prefix": "/" },
            "requires": { "extract_only_without_validation": {} } } ] }),
            ),
            "extract_only_without_validation",
        ),
    ];
    let mut wrong = String::new();
    for (part, more, path) in &cases {
        match told(&document(part, more)) {
            Some(text) if text.to_lowercase().contains(path) => {}
            other => wrong.push_str(&format!("{part} {more}: {other:?}, not {path}\n")),
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}
