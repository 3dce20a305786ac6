//! Objects of the filter state: set on requests and connections, seen by rules, routes, hashes, logs, services, TCP.

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::accesslog::v3 as accesslog;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::access_loggers::file::v3 as file;
use serin_xds::pb::envoy::extensions::filters::common::set_filter_state::v3 as set;
use serin_xds::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use serin_xds::pb::envoy::extensions::filters::http::set_filter_state::v3 as http_state;
use serin_xds::pb::envoy::extensions::filters::network::set_filter_state::v3 as network_state;

use super::*;

/// An object of `factory` with what a format says.
pub(crate) fn object(key: &str, factory: &str, format: &str) -> set::FilterStateValue {
    set::FilterStateValue {
        key: Some(set::filter_state_value::Key::ObjectKey(key.into())),
        factory_key: factory.into(),
        value: Some(set::filter_state_value::Value::FormatString(
            core::SubstitutionFormatString {
                format: Some(core::substitution_format_string::Format::TextFormat(
                    format.into(),
                )),
                omit_empty_values: true,
                ..Default::default()
            },
        )),
        skip_if_empty: true,
        ..Default::default()
    }
}

pub(crate) fn on_requests(objects: Vec<set::FilterStateValue>) -> hcm::HttpFilter {
    http_filter(
        "envoy.filters.http.set_filter_state",
        Some(any(&http_state::Config {
            on_request_headers: objects,
            clear_route_cache: true,
        })),
    )
}

fn state_is(key: &str, value: &str) -> matcher::FilterStateMatcher {
    matcher::FilterStateMatcher {
        key: key.into(),
        matcher: Some(matcher::filter_state_matcher::Matcher::StringMatch(exact(value))),
    }
}

/// Denies whom the state names like this.
fn denied(key: &str, value: &str) -> hcm::HttpFilter {
    let policy = rbac::Policy {
        permissions: vec![rbac::Permission {
            rule: Some(rbac::permission::Rule::Any(true)),
        }],
        principals: vec![rbac::Principal {
            identifier: Some(rbac::principal::Identifier::FilterState(state_is(key, value))),
        }],
        ..Default::default()
    };
    let rules = rbac::Rbac {
        action: rbac::rbac::Action::Deny as i32,
        policies: [("p".to_owned(), policy)].into(),
        ..Default::default()
    };
    http_filter(
        "envoy.filters.http.rbac",
        Some(any(&http_rbac::Rbac {
            rules: Some(rules),
            ..Default::default()
        })),
    )
}

pub(crate) fn log_to(path: &std::path::Path, format: &str) -> accesslog::AccessLog {
    accesslog::AccessLog {
        name: "envoy.access_loggers.file".into(),
        filter: None,
        config_type: Some(accesslog::access_log::ConfigType::TypedConfig(any(
            &file::FileAccessLog {
                path: path.to_str().unwrap().into(),
                access_log_format: Some(file::file_access_log::AccessLogFormat::Format(format.into())),
            },
        ))),
    }
}

pub(crate) async fn lines(path: &std::path::Path, count: usize) -> Vec<String> {
    soon("the log lines", async {
        loop {
            let text = tokio::fs::read_to_string(path).await.unwrap_or_default();
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            if lines.len() >= count && text.ends_with('\n') {
                return lines;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

#[tokio::test]
async fn objects_of_a_request_choose_its_route_are_judged_and_logged() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let harness = Harness::start();
    let (blue, other) = (Backend::named("blue").await, Backend::named("other").await);
    harness.cluster("blue", &[blue.address]).await;
    harness.cluster("c", &[other.address]).await;
    let mut to_blue = prefix_route("/", to_cluster("blue"));
    to_blue.r#match.as_mut().unwrap().filter_state = vec![state_is("tenant", "blue")];
    let mut own = prefix_route("/own", to_cluster("c"));
    own.typed_per_filter_config = [(
        "envoy.filters.http.set_filter_state".to_owned(),
        any(&http_state::Config {
            on_request_headers: vec![object("tenant", "envoy.string", "of-the-route")],
            ..Default::default()
        }),
    )]
    .into();
    harness
        .routes(vec![host(
            "all",
            "*",
            vec![own, to_blue, prefix_route("/", to_cluster("c"))],
        )])
        .await;
    let mut manager = manager_with(vec![
        on_requests(vec![
            object("tenant", "envoy.string", "%REQ(x-tenant)%"),
            object("copy", "envoy.string", "<%FILTER_STATE(tenant:PLAIN)%>"),
            // No address: there is no object.
            object("from", "envoy.network.ip", "%REQ(x-tenant)%"),
        ]),
        denied("tenant", "evil"),
    ]);
    manager.access_log = vec![log_to(
        &path,
        "%FILTER_STATE(tenant)% %FILTER_STATE(tenant:PLAIN)% %FILTER_STATE(copy:PLAIN)% %FILTER_STATE(from)% \
         %FILTER_STATE(tenant:PLAIN):2%\n",
    )];
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    let ask = async |path: &str, tenant: &str| {
        let (status, _, body) = get_with(at, path, &[("x-tenant", tenant)]).await;
        (status, body)
    };
    assert_eq!(ask("/", "blue").await, (200, "blue".into()));
    assert_eq!(ask("/", "red").await, (200, "other".into()));
    assert_eq!(ask("/", "evil").await.0, 403);
    assert_eq!(ask("/own", "blue").await, (200, "other".into()));
    // Empty, and so not set.
    assert_eq!(get(at, "/").await.2, "other");
    assert_eq!(
        lines(&path, 5).await,
        [
            "\"blue\" blue <blue> - bl",
            "\"red\" red <red> - re",
            "\"evil\" evil <evil> - ev",
            "\"of-the-route\" of-the-route <blue> - of",
            "- - <> - -",
        ]
    );
}

#[tokio::test]
async fn an_object_that_may_be_hashed_finds_the_same_host() {
    let harness = Harness::start();
    let backends = [
        Backend::named("a").await,
        Backend::named("b").await,
        Backend::named("c").await,
    ];
    let ring = cluster::Cluster {
        lb_policy: cluster::cluster::LbPolicy::RingHash as i32,
        ..eds_cluster("c")
    };
    harness.put(ResourceType::Cluster, "c", &ring).await;
    harness
        .endpoints("c", &backends.each_ref().map(|backend| backend.address))
        .await;
    let mut action = to_cluster("c");
    action.hash_policy = vec![route::route_action::HashPolicy {
        policy_specifier: Some(route::route_action::hash_policy::PolicySpecifier::FilterState(
            route::route_action::hash_policy::FilterState { key: "user".into() },
        )),
        terminal: false,
    }];
    harness
        .routes(vec![host("all", "*", vec![prefix_route("/", action)])])
        .await;
    let hosts_of = async |factory: &str, user: &str| {
        let filter = on_requests(vec![object("user", factory, "%REQ(x-user)%")]);
        let at = harness
            .listen(&manager_with(vec![filter]), core::TrafficDirection::Outbound)
            .await;
        let mut found = std::collections::BTreeSet::new();
        for _ in 0..40 {
            found.insert(get_with(at, "/", &[("x-user", user)]).await.2);
        }
        found
    };
    let mut all = std::collections::BTreeSet::new();
    // As many as make it unlikely that the ring, which depends on the backends' ports, has all of them at one.
    for user in [
        "ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida", "jim", "kay", "leo",
    ] {
        let hosts = hosts_of("envoy.hashable_string", user).await;
        assert_eq!(hosts.len(), 1, "{user}");
        all.extend(hosts);
    }
    assert!(all.len() > 1, "users are spread");
    // Other objects cannot be hashed: chance decides.
    assert!(hosts_of("envoy.string", "ann").await.len() > 1);
}

#[tokio::test]
async fn objects_of_a_connection_choose_its_cluster_and_are_seen_by_its_requests() {
    let mut harness = Harness::start();
    let (chosen, other) = (Backend::named("chosen").await, Backend::named("other").await);
    harness.cluster("chosen", &[chosen.address]).await;
    harness.cluster("c", &[other.address]).await;
    harness.routes(to_c()).await;
    let setting = |value: set::FilterStateValue| {
        network_filter(
            "envoy.filters.network.set_filter_state",
            Some(any(&network_state::Config {
                on_new_connection: vec![value],
                ..Default::default()
            })),
        )
    };
    let joined = tcp_filter("c");
    let listen = async |harness: &Harness, name: &str, filters: Vec<listener::Filter>| {
        let chain = listener::FilterChain {
            filters,
            ..Default::default()
        };
        let message = listener_of(name, core::TrafficDirection::Outbound, vec![chain]);
        harness.put(ResourceType::Listener, name, &message).await;
        harness.proxy.listener_address(name).unwrap()
    };
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    for (name, value, answer) in [
        ("there", object("envoy.tcp_proxy.cluster", "", "chosen"), "chosen"),
        // A text is no cluster, whatever its key.
        (
            "text",
            object("envoy.tcp_proxy.cluster", "envoy.string", "chosen"),
            "other",
        ),
        (
            "elsewhere",
            object("cluster", "envoy.tcp_proxy.cluster", "chosen"),
            "other",
        ),
    ] {
        let at = listen(&harness, name, vec![setting(value), joined.clone()]).await;
        let text = raw(at, request).await;
        assert!(text.ends_with(answer), "{name}: {text}");
    }
    // A cluster that does not exist is not replaced by another one.
    let absent = object("envoy.tcp_proxy.cluster", "", "absent");
    let at = listen(&harness, "absent", vec![setting(absent), joined]).await;
    assert_eq!(raw(at, b"").await, "");
    let line = harness.line().await;
    assert_eq!(
        (&line["response_flags"], &line["upstream_cluster"]),
        (&"NC".into(), &"absent".into())
    );
    // Requests see what was set on their connection.
    let manager = manager_with(vec![denied("from", "127.0.0.1")]);
    let mut filters = http_chain(&manager).filters;
    filters.insert(
        0,
        setting(object(
            "from",
            "envoy.network.ip",
            "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        )),
    );
    let at = listen(&harness, "http", filters).await;
    assert_eq!(get(at, "/").await.0, 403);
}

#[tokio::test]
async fn state_that_cannot_be_made_is_refused_with_its_path() {
    let harness = Harness::start();
    for (object, field) in [
        (
            object("a", "envoy.unknown", "x"),
            "on_request_headers[0].factory_key",
        ),
        (object("a", "", "x"), "on_request_headers[0].object_key"),
        (
            object("a", "envoy.string", "%NONE%"),
            "on_request_headers[0].format_string",
        ),
        (
            set::FilterStateValue {
                shared_with_upstream: 9,
                ..object("a", "envoy.string", "x")
            },
            "on_request_headers[0].shared_with_upstream",
        ),
    ] {
        let manager = manager_with(vec![on_requests(vec![object])]);
        let message = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
        let refusal = harness.try_put(ResourceType::Listener, "l", &message).await;
        assert!(
            refusal.as_ref().is_some_and(|text| text.contains(field)),
            "{refusal:?}"
        );
    }
}
