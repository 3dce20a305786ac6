//! The filters of the chain, each over real sockets.

mod access_log;
mod chain;
mod compression;
mod ext_authz;
mod ext_authz_shadow;
mod ext_proc;
mod ext_proc_calls;
pub(crate) mod filter_state;
mod grpc_stats;
pub(crate) mod jwt;
mod log_services;
mod rate_limit;
mod rbac;
mod rbac_trees;
pub(crate) mod services;
mod tracing;

use std::net::SocketAddr;

use http::{HeaderMap, Request};
use http_body_util::Full;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::envoy::r#type::v3 as envoy_type;
use serin_xds::pb::google::protobuf as google;

use crate::fixture::*;

/// A connection manager with these filters before the router.
pub(crate) fn manager_with(filters: Vec<hcm::HttpFilter>) -> hcm::HttpConnectionManager {
    let mut manager = manager("80");
    manager.http_filters = filters;
    manager
        .http_filters
        .push(http_filter("envoy.filters.http.router", None));
    manager
}

/// A harness, a backend that answers "ok" behind cluster "c", and a listener with these filters and routes.
pub(crate) async fn served(
    filters: Vec<hcm::HttpFilter>,
    hosts: Vec<route::VirtualHost>,
) -> (Harness, Backend, SocketAddr) {
    let harness = Harness::start();
    let backend = Backend::named("ok").await;
    harness.cluster("c", &[backend.address]).await;
    harness.routes(hosts).await;
    let at = harness
        .listen(&manager_with(filters), core::TrafficDirection::Outbound)
        .await;
    (harness, backend, at)
}

/// One host with one route to cluster "c".
pub(crate) fn to_c() -> Vec<route::VirtualHost> {
    vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])]
}

pub(crate) async fn get_with(
    at: SocketAddr,
    path: &str,
    fields: &[(&str, &str)],
) -> (u16, HeaderMap, String) {
    let mut request = Request::get(path).header("host", "reviews");
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    send(at, request.body(Full::from("")).unwrap()).await
}

pub(crate) fn exact(text: &str) -> matcher::StringMatcher {
    matcher::StringMatcher {
        match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(text.into())),
        ..Default::default()
    }
}

pub(crate) fn percent(share: u32) -> Option<core::RuntimeFractionalPercent> {
    Some(core::RuntimeFractionalPercent {
        default_value: Some(envoy_type::FractionalPercent {
            numerator: share,
            denominator: 0,
        }),
        ..Default::default()
    })
}

/// A bucket that is not filled again while a test lasts.
pub(crate) fn bucket(tokens: u32) -> Option<envoy_type::TokenBucket> {
    Some(envoy_type::TokenBucket {
        max_tokens: tokens,
        tokens_per_fill: number(tokens),
        fill_interval: Some(google::Duration {
            seconds: 3600,
            nanos: 0,
        }),
    })
}

pub(crate) fn add_header(key: &str, value: &str) -> core::HeaderValueOption {
    core::HeaderValueOption {
        header: Some(core::HeaderValue {
            key: key.into(),
            value: value.into(),
            ..Default::default()
        }),
        append_action: core::header_value_option::HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
        ..Default::default()
    }
}
