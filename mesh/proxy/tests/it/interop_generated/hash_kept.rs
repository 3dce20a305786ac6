//! Consistent hashing where hosts depend on what came before: bounded loads, and cookies that a proxy has made.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::client::{Ask, Client};
use super::hash::{HOSTS, Where, by_header, hosts, newer, route, setup};
use super::{clusters, echo, resources, until_ready};
use crate::fixture::*;
use crate::interop_ads::Pair;

/// Seven hosts, and both proxies with these routes and clusters; nothing without Envoy.
async fn pair(
    clusters_of: &[(&str, Value)],
    routes: Vec<Value>,
) -> Option<(Vec<Backend>, Pair, [SocketAddr; 2])> {
    crate::envoy::program()?;
    let mut backends = Vec::new();
    for name in HOSTS {
        backends.push(echo(name).await);
    }
    let list: Vec<Value> = clusters_of
        .iter()
        .map(|(name, config)| hosts(name, &backends, Where::Localities, config))
        .collect();
    let setup = setup("kept", routes, Vec::new());
    let mut all = clusters(&list);
    all.extend(resources(&setup, "/dev/null"));
    let pair = Pair::start(all).await?;
    let at = pair.listener("kept").await;
    for at in at {
        until_ready(at, &[]).await;
    }
    Some((backends, pair, at))
}

/// A request whose content has not come to its end: its host is busy until it has.
struct Held(TcpStream);

impl Held {
    /// Sends it; gives the host that has got it.
    async fn send(at: SocketAddr, path: &str, key: &str, backends: &[Backend]) -> (Self, usize) {
        let before: Vec<usize> = backends.iter().map(Backend::hits).collect();
        let mut stream = TcpStream::connect(at).await.unwrap();
        let head = format!(
            "POST /{path}/x HTTP/1.1\r\nhost: a.test\r\nx-key: {key}\r\nconnection: close\r\ncontent-length: 2\r\n\r\n1"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let reached = async {
            loop {
                let found = backends
                    .iter()
                    .zip(&before)
                    .position(|(backend, before)| backend.hits() > *before);
                match found {
                    Some(host) => return host,
                    // Nobody tells of a head that has come before its content.
                    None => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
        };
        let host = soon("a held request at a host", reached).await;
        (Self(stream), host)
    }

    /// Ends it, and waits for its answer.
    async fn end(mut self) {
        self.0.write_all(b"2").await.unwrap();
        let mut answer = Vec::new();
        soon("the answer to a held request", self.0.read_to_end(&mut answer))
            .await
            .unwrap();
        assert!(
            answer.starts_with(b"HTTP/1.1 200"),
            "{:?}",
            String::from_utf8_lossy(&answer)
        );
    }
}

/// The hosts of requests for few keys, of which many are on their way, and some end between.
async fn hosts_under_load(at: SocketAddr, path: &str, backends: &[Backend]) -> String {
    let mut held = Vec::new();
    let mut out = String::new();
    for number in 0..60 {
        let (one, host) = Held::send(at, path, &format!("key-{}", number % 5), backends).await;
        out.push_str(&host.to_string());
        held.push(one);
        if number % 20 == 19 {
            // Every other one, so that hosts that were full have room again.
            let mut keep = Vec::new();
            for (index, one) in held.into_iter().enumerate() {
                if index % 2 == 0 {
                    one.end().await;
                } else {
                    keep.push(one);
                }
            }
            held = keep;
        }
    }
    for one in held {
        one.end().await;
    }
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_move_on_from_full_hosts_to_the_same_others_through_envoy_and_serin_proxy() {
    let bounded = |policy: &str, factor: u32| json!({ "lb_policy": policy, "common_lb_config": { "consistent_hashing_lb_config": { "hash_balance_factor": factor } } });
    let bound = json!({ "consistent_hashing_lb_config": { "hash_balance_factor": 130 } });
    let all = [
        ("ring", bounded("RING_HASH", 120)),
        ("ring-tight", bounded("RING_HASH", 100)),
        ("ring-loose", bounded("RING_HASH", 150)),
        ("ring-newer", newer("ring_hash.v3.RingHash", bound.clone())),
        ("maglev", bounded("MAGLEV", 120)),
        ("maglev-newer", newer("maglev.v3.Maglev", bound)),
    ];
    let routes = all
        .iter()
        .map(|(name, _)| route(name, name, &by_header()))
        .collect();
    let Some((backends, pair, at)) = pair(&all, routes).await else {
        return;
    };
    for (name, _) in &all {
        let mut seen = Vec::new();
        for at in at {
            seen.push(hosts_under_load(at, name, &backends).await);
        }
        assert_eq!(seen[0], seen[1], "{name}");
        let several = |key: usize| {
            let first = seen[0].as_bytes()[key];
            seen[0].bytes().skip(key).step_by(5).any(|host| host != first)
        };
        assert!((0..5).any(several), "no key has moved: {name} {}", seen[0]);
    }
    pair.stop().await;
}

/// A request without a cookie, or with this one.
fn ask(path: &str, cookie: Option<&str>) -> Ask {
    let mut fields = vec![("host".to_owned(), "a.test".to_owned())];
    if let Some(cookie) = cookie {
        fields.push(("cookie".to_owned(), format!("a=b; {cookie}")));
    }
    Ask {
        case: path.to_owned(),
        method: "GET",
        target: format!("/{path}/x"),
        fields,
        body: String::new(),
        who: 0,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cookie_that_one_proxy_has_made_brings_its_client_to_the_same_host_through_the_other() {
    let policies = [
        ("plain", json!({ "name": "made", "ttl": "3600s" })),
        ("session", json!({ "name": "made", "ttl": "0s" })),
        (
            "attributes",
            json!({ "name": "made", "ttl": "1.5s", "path": "/p", "attributes": [
                { "name": "SameSite", "value": "Strict" }, { "name": "Secure" } ] }),
        ),
    ];
    let all = [
        ("ring", json!({ "lb_policy": "RING_HASH" })),
        ("maglev", json!({ "lb_policy": "MAGLEV" })),
    ];
    let mut paths = Vec::new();
    let mut routes = Vec::new();
    for (name, cookie) in &policies {
        for (cluster, _) in &all {
            let path = format!("{name}-{cluster}");
            routes.push(route(&path, cluster, &json!([ { "cookie": cookie } ])));
            paths.push(path);
        }
    }
    let Some((_backends, pair, at)) = pair(&all, routes).await else {
        return;
    };
    for path in &paths {
        let mut attributes = Vec::new();
        for maker in at {
            for _ in 0..15 {
                let first = Client::new(maker).ask(&ask(path, None)).await;
                let host = &first.headers["x-backend"];
                let [made] = &first.headers["set-cookie"][..] else {
                    panic!("{path}: {first:?}");
                };
                let (cookie, rest) = made.split_once(';').unwrap();
                attributes.push(rest.to_owned());
                for asked in at {
                    let again = Client::new(asked).ask(&ask(path, Some(cookie))).await;
                    assert_eq!(&again.headers["x-backend"], host, "{path} {made}");
                    assert!(!again.headers.contains_key("set-cookie"), "{path} {made}");
                }
            }
        }
        attributes.dedup();
        assert_eq!(attributes.len(), 1, "{path}: {attributes:?}");
    }
    pair.stop().await;
}
