//! Every parser and the xDS compiler against mutations of good input: no panic, no hang, no good configuration lost.
//!
//! Bounded and repeatable: a fixed number of mutations from a seeded generator, so that a failure comes back. The corpus
//! is what the other tests use as good input, the example file, and llhttp's vectors where `../shared` is.

use std::path::Path;

use prost::Message;
use serin_proxy::bootstrap::file;
use serin_proxy::config::store::{Store, Update};
use serin_proxy::http1::request::valid_host;
use serin_proxy::hygiene::path::normalize;
use serin_proxy::metrics::peer::Workload;
use serin_proxy::worker::sniff::detect;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;

use crate::fixture::*;
use crate::harness::{read, read_answers};

/// splitmix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// `seed` with a few changes of the kinds that break parsers; `other` gives pieces.
    pub(crate) fn mutate(&mut self, seed: &[u8], other: &[u8]) -> Vec<u8> {
        const INTERESTING: [&[u8]; 12] = [
            b"\0",
            b"\r",
            b"\n",
            b"\r\n",
            b"\r\n\r\n",
            b"\xff\xff\xff\xff\x0f",
            b"\x80",
            b":",
            b" ",
            b"%",
            b"chunked",
            b"0",
        ];
        let mut out = seed.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(out.len() + 1);
            match self.below(7) {
                0 if at < out.len() => out[at] ^= 1 << self.below(8),
                1 if at < out.len() => out[at] = self.next() as u8,
                2 => out.truncate(at),
                3 => {
                    let piece = INTERESTING[self.below(INTERESTING.len())];
                    out.splice(at..at, piece.iter().copied());
                }
                4 => {
                    let end = (at + self.below(40)).min(out.len());
                    out.drain(at..end);
                }
                5 => {
                    let from = self.below(other.len());
                    let end = (from + self.below(60)).min(other.len());
                    let piece = other[from.min(end)..end].to_vec();
                    out.splice(at..at, piece);
                }
                _ => {
                    let end = (at + self.below(60)).min(out.len());
                    let piece = out[at..end].to_vec();
                    out.extend(piece);
                }
            }
        }
        out
    }
}

/// Good resources of every type.
pub(crate) fn resources() -> Vec<(ResourceType, &'static str, Vec<u8>)> {
    let mut rich = to_weighted(&[("c", 90), ("d", 10)]);
    rich.retry_policy = istio_retries();
    rich.prefix_rewrite = "/there".into();
    let regex = route::Route {
        r#match: Some(route::RouteMatch {
            path_specifier: Some(route::route_match::PathSpecifier::SafeRegex(
                serin_xds::pb::envoy::r#type::matcher::v3::RegexMatcher {
                    regex: "/v[0-9]+/.*".into(),
                    ..Default::default()
                },
            )),
            ..Default::default()
        }),
        ..prefix_route("/", to_cluster("c"))
    };
    let table = route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: vec![
            host("one", "one.example", vec![regex, prefix_route("/x", rich)]),
            host("all", "*", vec![prefix_route("/", to_cluster("c"))]),
        ],
        ..Default::default()
    };
    let listener = listener_of(
        "l",
        core::TrafficDirection::Outbound,
        vec![http_chain(&manager("80"))],
    );
    vec![
        (ResourceType::Cluster, "c", eds_cluster("c").encode_to_vec()),
        (
            ResourceType::Endpoints,
            "c",
            assignment(
                "c",
                &[("127.0.0.1:80".parse().unwrap(), "reviews-v1;prod;reviews;v1;k")],
            )
            .encode_to_vec(),
        ),
        (ResourceType::Route, "80", table.encode_to_vec()),
        (ResourceType::Listener, "l", listener.encode_to_vec()),
        (
            ResourceType::VirtualHost,
            "80/one",
            host("80/one", "two.example", vec![prefix_route("/", to_cluster("c"))]).encode_to_vec(),
        ),
    ]
}

#[test]
fn the_xds_compiler_survives_mutated_resources_and_keeps_the_good_ones() {
    let good = resources();
    let mut store = Store::new(2);
    let put = |store: &mut Store, (ty, name, body): &(ResourceType, &str, Vec<u8>)| {
        store.apply(*ty, &[Update { name, body }], &[])
    };
    for resource in &good {
        assert!(put(&mut store, resource).is_empty(), "{} is good", resource.1);
    }
    let mut random = Random(1);
    let (mut taken, mut refused) = (0, 0);
    for round in 0..4_000 {
        let (ty, name, body) = &good[round % good.len()];
        let other = &good[random.below(good.len())].2;
        let body = random.mutate(body, other);
        if put(&mut store, &(*ty, name, body)).is_empty() {
            taken += 1;
        } else {
            refused += 1;
            if *ty == ResourceType::Cluster {
                let slot = store.clusters().find(|slot| &*slot.name == "c").unwrap();
                assert!(
                    slot.config().is_some(),
                    "a refused resource leaves the last good one"
                );
            }
        }
        store.take_listener_changes();
    }
    assert!(taken > 100 && refused > 100, "{taken} taken, {refused} refused");
    for resource in &good {
        assert!(
            put(&mut store, resource).is_empty(),
            "{} is good again",
            resource.1
        );
    }
}

#[test]
fn garbage_of_every_size_is_refused_by_the_xds_compiler() {
    let mut store = Store::new(1);
    let mut random = Random(2);
    for round in 0..2_000 {
        let body: Vec<u8> = (0..random.below(300)).map(|_| random.next() as u8).collect();
        let ty = ResourceType::ALL[round % ResourceType::ALL.len()];
        store.apply(
            ty,
            &[Update {
                name: "x",
                body: &body,
            }],
            &["x", "never-there"],
        );
    }
    assert!(store.clusters().all(|slot| &*slot.name == "x"));
}

fn streams() -> Vec<Vec<u8>> {
    let mut out: Vec<Vec<u8>> = [
        "GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=1\r\nhello\r\n0\r\nT: v\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec();
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/http/llhttp/request");
    if let Ok(entries) = std::fs::read_dir(vectors) {
        for entry in entries.flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let blocks = text
                .split("```http\n")
                .skip(1)
                .filter_map(|part| part.split("\n```").next());
            out.extend(blocks.map(|block| block.replace('\n', "\r\n").into_bytes()));
        }
    } else {
        eprintln!("SKIPPED: llhttp's vectors as a corpus: ../shared is not here");
    }
    out
}

#[test]
fn what_is_read_of_mutated_streams_does_not_depend_on_how_they_are_cut() {
    let corpus = streams();
    let mut random = Random(3);
    for round in 0..6_000 {
        let other = corpus[random.below(corpus.len())].clone();
        let stream = random.mutate(&corpus[round % corpus.len()], &other);
        let whole = read(&stream, || usize::MAX);
        let mut cuts = Random(round as u64);
        let cut = read(&stream, || cuts.below(20));
        assert_eq!(whole, cut, "{:?}", String::from_utf8_lossy(&stream));
    }
}

#[test]
fn what_is_read_of_mutated_answers_does_not_depend_on_how_they_are_cut() {
    let corpus = [
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.0 204 No\r\n\r\n",
        "HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n5;x=1\r\nhello\r\n0\r\nT: v\r\n\r\nHTTP/1.1 304 x\r\n\r\n",
        "HTTP/1.1 200\nConnection: close, x\nServer: a\n\nuntil it closes",
    ];
    let mut random = Random(5);
    for round in 0..6_000 {
        let other = corpus[random.below(corpus.len())].as_bytes().to_vec();
        let stream = random.mutate(corpus[round % corpus.len()].as_bytes(), &other);
        let whole = read_answers(&stream, || usize::MAX);
        let mut cuts = Random(round as u64);
        let cut = read_answers(&stream, || cuts.below(20));
        assert_eq!(whole, cut, "{:?}", String::from_utf8_lossy(&stream));
    }
}

#[test]
fn the_other_parsers_survive_mutated_input() {
    use serin_proxy::config::hcm::EscapedSlashes;
    let texts: [&[u8]; 6] = [
        b"/a/b/../c/%2e%2E/d//e?x=%00",
        b"shop.example:8080",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00\x40\x01\x00\x00\x3c\x03\x03aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\x00\x00\x02\x13\x01\x01\x00\x00\x12\x00\x00\x00\x0e\x00\x0c\x00\x00\x09shop.test",
        b"CgkKBGFwcBIBGgUa",
        b"[::1]:80",
    ];
    let mut random = Random(4);
    for round in 0..20_000 {
        let other = texts[random.below(texts.len())];
        let bytes = random.mutate(texts[round % texts.len()], other);
        let _ = detect(&bytes);
        let _ = valid_host(&bytes);
        let _ = Workload::of_header(&bytes);
        if let Ok(text) = std::str::from_utf8(&bytes) {
            for slashes in [
                EscapedSlashes::Keep,
                EscapedSlashes::Reject,
                EscapedSlashes::Forward,
            ] {
                let _ = normalize(text, true, true, slashes);
            }
        }
    }
}

#[test]
fn a_mutated_bootstrap_file_is_taken_or_refused_and_nothing_else() {
    let example = include_bytes!("../../example/bootstrap.yaml");
    let mut random = Random(5);
    let mut refused = 0;
    for _ in 0..400 {
        let text = random.mutate(example, example);
        if let Ok(text) = std::str::from_utf8(&text) {
            refused += usize::from(file::parse(text, 1).is_err());
        }
    }
    assert!(refused > 50, "{refused}");
}

#[tokio::test]
async fn configuration_that_comes_in_any_order_or_contradicts_itself_ends_up_serving() {
    let backend = Backend::named("b").await;
    let table = |cluster: &str| route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: vec![host("all", "*", vec![prefix_route("/", to_cluster(cluster))])],
        ..Default::default()
    };
    // Listener first, endpoints before their cluster, routes to what is not there yet.
    let harness = Harness::start();
    let chains = vec![http_chain(&manager("80"))];
    let listener = listener_of("l", core::TrafficDirection::Outbound, chains);
    harness.put(ResourceType::Listener, "l", &listener).await;
    harness.endpoints("c", &[backend.address]).await;
    harness.put(ResourceType::Route, "80", &table("c")).await;
    let at = harness.proxy.listener_address("l").expect("bound");
    assert_eq!(get(at, "/").await.0, 503);
    harness.put(ResourceType::Cluster, "c", &eds_cluster("c")).await;
    harness.endpoints("c", &[backend.address]).await;
    assert_eq!(get(at, "/").await.0, 200);
    // Twice in one batch: the later one holds. A domain twice: refused, the former stays.
    let (first, second) = (table("nowhere").encode_to_vec(), table("c").encode_to_vec());
    let update = |body| Update { name: "80", body };
    let refused = harness
        .proxy
        .apply(ResourceType::Route, &[update(&first), update(&second)], &[])
        .await;
    assert!(refused.is_empty(), "{refused:?}");
    assert_eq!(get(at, "/").await.0, 200);
    let mut twice = table("nowhere");
    twice
        .virtual_hosts
        .push(host("again", "*", vec![prefix_route("/", to_cluster("nowhere"))]));
    let refusal = harness.try_put(ResourceType::Route, "80", &twice).await;
    assert!(
        refusal.is_some_and(|refusal| refusal.contains("domain")),
        "a domain twice"
    );
    assert_eq!(get(at, "/").await.0, 200);
    // Added and removed in one batch, and what was never there.
    harness
        .proxy
        .apply(ResourceType::Cluster, &[], &["never", "nor-this"])
        .await;
    assert_eq!(get(at, "/").await.0, 200);
    // Huge: ten thousand virtual hosts, then one again.
    let mut huge = table("c");
    huge.virtual_hosts.extend((0..10_000).map(|index| {
        host(
            &format!("h{index}"),
            &format!("h{index}.example"),
            vec![prefix_route("/", to_cluster("c"))],
        )
    }));
    harness.put(ResourceType::Route, "80", &huge).await;
    assert_eq!(get(at, "/").await.0, 200);
    harness.put(ResourceType::Route, "80", &table("c")).await;
    assert_eq!(get(at, "/").await.0, 200);
}
