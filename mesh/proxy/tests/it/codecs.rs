//! What is counted of HTTP/1 and HTTP/2 themselves (`http1.*`, `http2.*`), each by the event that it is of, beside Envoy
//! wherever Envoy can be brought to it.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::*;
use crate::frames::*;
use crate::statistics::backend;
use crate::twins::{Place, Started, Twins};

const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;

/// A manager: its name, its options, its place among the listeners.
fn manager_named(name: &str, options: &str, at: SocketAddr) -> String {
    const TEXT: &str = r#"
  - name: NAME
    address: { socket_address: { address: 127.0.0.1, port_value: PORT } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: NAME
          codec_type: AUTO
          OPTIONS
          http_filters:
          - name: envoy.filters.http.router
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
          route_config:
            name: NAME
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - { match: { path: /resets }, route: { cluster: resets } }
              - { match: { path: /refuses }, route: { cluster: refuses } }
              - { match: { path: /mangles }, route: { cluster: mangles } }
              - { match: { path: /trails }, route: { cluster: trails } }
              - { match: { path: /silent }, route: { cluster: silent, timeout: 30s } }
              - { match: { path: /late }, route: { cluster: silent, timeout: 0.2s } }
              - { match: { prefix: / }, route: { cluster: plain, timeout: 30s } }
"#;
    TEXT.trim_start_matches('\n')
        .replace("NAME", name)
        .replace("PORT", &at.port().to_string())
        .replace("OPTIONS", options)
}

fn cluster_named(name: &str, at: SocketAddr, http2: bool) -> String {
    let options = "typed_extension_protocol_options: { envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
        { \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
        explicit_http_config: { http2_protocol_options: {} } } },";
    format!(
        "  - {{ name: {name}, type: STATIC, connect_timeout: 1s, {} load_assignment: {{ cluster_name: {name}, endpoints: \
         [ {{ lb_endpoints: [ {{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }} }} ] }} ] }} }}\n",
        if http2 { options } else { "" },
        at.port()
    )
}

/// Endpoints that speak HTTP/2, by what they do to a request.
struct Endpoints {
    plain: SocketAddr,
    http2: [(&'static str, SocketAddr); 5],
}

/// Serves each connection with `answer`, which is told the stream of each request.
async fn endpoint<F, A>(answer: A) -> SocketAddr
where
    A: Fn(u32) -> F + Clone + Send + 'static,
    F: Future<Output = Vec<u8>> + Send,
{
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = socket.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let Ok(mut connection) = RawClient::accepted(stream, &[]).await else {
                    return;
                };
                while let Some(frame) = connection.listen().await {
                    if frame.kind == HEADERS {
                        let bytes = answer(frame.stream).await;
                        connection.send(&bytes).await;
                    }
                }
            });
        }
    });
    at
}

fn reset_of(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &code.to_be_bytes())
}

impl Endpoints {
    async fn start() -> Self {
        let resets = endpoint(async |stream| reset_of(stream, 2)).await;
        let refuses = endpoint(async |stream| reset_of(stream, REFUSED_STREAM)).await;
        // A field that HTTP/2 does not have.
        let mangles = endpoint(async |stream| {
            let block = block(&[(":status", "200"), ("connection", "close")]);
            frame(HEADERS, END_HEADERS | END_STREAM, stream, &block)
        })
        .await;
        let trails = endpoint(async |stream| {
            [
                frame(HEADERS, END_HEADERS, stream, &block(&[(":status", "200")])),
                frame(DATA, 0, stream, b"body"),
                frame(
                    HEADERS,
                    END_HEADERS | END_STREAM,
                    stream,
                    &block(&[("after", "1")]),
                ),
            ]
            .concat()
        })
        .await;
        let silent = endpoint(async |_| Vec::new()).await;
        Self {
            plain: backend().await,
            http2: [
                ("resets", resets),
                ("refuses", refuses),
                ("mangles", mangles),
                ("trails", trails),
                ("silent", silent),
            ],
        }
    }

    fn config(&self, place: &Place) -> String {
        let options = [
            (
                "drops",
                "common_http_protocol_options: { headers_with_underscores_action: DROP_HEADER }",
            ),
            (
                "rejects",
                "common_http_protocol_options: { headers_with_underscores_action: REJECT_REQUEST }",
            ),
            (
                "short",
                "common_http_protocol_options: { max_connection_duration: 0.3s }\n          drain_timeout: 0.1s",
            ),
        ];
        let managers = options.iter().zip(&place.listeners);
        let managers: Vec<_> = managers
            .map(|((name, options), at)| manager_named(name, options, *at))
            .collect();
        let clusters = self.http2.iter().map(|(name, at)| cluster_named(name, *at, true));
        let clusters: String = clusters
            .chain([cluster_named("plain", self.plain, false)])
            .collect();
        format!(
            "admin: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }}\n\
             node: {{ id: codecs, cluster: codecs }}\nstatic_resources:\n  listeners:\n{}  clusters:\n{clusters}",
            place.admin.port(),
            managers.concat()
        )
    }
}

/// One request on a connection of its own, and how its stream has ended.
async fn fate_of(at: SocketAddr, block: &[u8]) -> Fate {
    let mut client = RawClient::connect(at, &[]).await;
    client.get(1, block).await;
    client.fate(1).await
}

/// The head of an answer over HTTP/1.
async fn head_of(at: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut raw = vec![0; 12];
    soon("an answer", stream.read_exact(&mut raw)).await.unwrap();
    String::from_utf8(raw).unwrap()
}

/// Everything that is counted, at one proxy.
async fn everything(place: &Place) {
    let [drops, rejects, short] = place.listeners[..] else {
        panic!("three listeners");
    };
    // Underscores, in both versions.
    let underscored = [("a_b", "1"), ("c_d", "2")];
    let plain = "GET /ok HTTP/1.1\r\nhost: a\r\na_b: 1\r\nc_d: 2\r\n\r\n";
    assert_eq!(head_of(drops, plain).await, "HTTP/1.1 200");
    assert_eq!(head_of(rejects, plain).await, "HTTP/1.1 400");
    let block = request("GET", "/ok", &underscored);
    assert_eq!(fate_of(drops, &block).await, Fate::Status(200));
    assert!(fate_of(rejects, &block).await.refused());
    // What endpoints do to streams.
    let asked = |path: &str| request("GET", path, &[]);
    assert_eq!(fate_of(drops, &asked("/resets")).await, Fate::Status(503));
    assert!(fate_of(drops, &asked("/mangles")).await.refused());
    assert_eq!(fate_of(drops, &asked("/trails")).await, Fate::Status(200));
    // What takes too long is reset towards the endpoint.
    assert_eq!(fate_of(drops, &asked("/late")).await, Fate::Status(504));
    // An answer that ends early is reset towards the client.
    let mut client = RawClient::connect(drops, &[]).await;
    client.get(1, &asked("/cut")).await;
    assert_eq!(client.fate(1).await, Fate::Status(200));
    assert!(matches!(client.fate(1).await, Fate::Reset(_)));
    drop(client);
    // Trailers of a request.
    let mut client = RawClient::connect(drops, &[]).await;
    let head = request("POST", "/ok", &[]);
    client.send(&frame(HEADERS, END_HEADERS, 1, &head)).await;
    client.send(&frame(DATA, 0, 1, b"body")).await;
    let trailers = crate::frames::block(&[("after", "1")]);
    client
        .send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &trailers))
        .await;
    assert_eq!(client.fate(1).await, Fate::Status(200));
    drop(client);
    // A request that its client gives up, which is given up towards the endpoint.
    let mut client = RawClient::connect(drops, &[]).await;
    client.get(1, &asked("/silent")).await;
    // Requests of a connection are taken in their order: the first is on its way when the second is answered.
    client.get(3, &asked("/ok")).await;
    assert_eq!(client.fate(3).await, Fate::Status(200));
    client.send(&reset_of(1, CANCEL)).await;
    client.get(5, &asked("/ok")).await;
    assert_eq!(client.fate(5).await, Fate::Status(200));
    drop(client);
    // A connection that becomes too old.
    let mut client = RawClient::connect(short, &[]).await;
    client.get(1, &asked("/ok")).await;
    assert_eq!(client.fate(1).await, Fate::Status(200));
    assert_eq!(client.end().await, Some(0));
}

/// Which numbers differ, and why.
fn is_pardoned(name: &str) -> bool {
    // Envoy ends the connection to an endpoint whose answer is no message, unless it is told to reset the stream only.
    name == "cluster.mangles.http2.tx_reset"
        // And it resets a stream for an underscore, where this proxy answers with 400.
        || name == "http2.tx_reset"
}

/// What is counted of HTTP itself, but for how many heads and bytes there were.
async fn codecs(place: &Place) -> BTreeMap<String, String> {
    let mut numbers = place.numbers("/stats").await;
    numbers.retain(|name, _| {
        name.starts_with("http1.") || name.starts_with("http2.") || name.contains(".http2.")
    });
    numbers
}

#[tokio::test]
async fn envoy_and_serin_proxy_count_the_same_of_http_itself() {
    let endpoints = Endpoints::start().await;
    let Some(twins) = Twins::start(3, |place| endpoints.config(place)).await else {
        return;
    };
    for place in twins.places() {
        everything(place).await;
    }
    let (ours, both) = twins.agree(codecs, is_pardoned).await;
    assert!(both > 25, "{both}: {ours:?}");
    twins.stop().await;
}

#[tokio::test]
async fn each_event_of_http_itself_is_counted_where_it_happens() {
    let endpoints = Endpoints::start().await;
    let place = Place::with(3).await;
    let started = Started::from(&endpoints.config(&place), place.admin).await;
    assert!(codecs(&place).await.is_empty(), "nobody has spoken HTTP yet");
    everything(&place).await;
    assert_eq!(
        fate_of(place.listeners[0], &request("GET", "/refuses", &[])).await,
        Fate::Status(503)
    );
    let expected = [
        ("http1.dropped_headers_with_underscores", 2),
        ("http1.requests_rejected_with_underscores_in_headers", 1),
        ("http2.dropped_headers_with_underscores", 2),
        ("http2.requests_rejected_with_underscores_in_headers", 1),
        ("http2.goaway_sent", 1),
        ("http2.rx_reset", 1),
        ("http2.trailers", 1),
        ("http2.tx_reset", 1),
        ("cluster.resets.http2.rx_reset", 1),
        ("cluster.mangles.http2.rx_messaging_error", 1),
        ("cluster.mangles.http2.tx_reset", 1),
        ("cluster.silent.http2.tx_reset", 2),
        ("cluster.silent.http2.rx_reset", 0),
        ("cluster.resets.http2.stream_refused_errors", 0),
    ];
    let mut seen = BTreeMap::new();
    let counted = async {
        loop {
            seen = codecs(&place).await;
            let is = |(name, value): &(&str, u64)| seen.get(*name) == Some(&value.to_string());
            if expected.iter().all(is) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    if tokio::time::timeout(std::time::Duration::from_secs(10), counted)
        .await
        .is_err()
    {
        let wrong = expected
            .iter()
            .filter(|(name, value)| seen.get(*name) != Some(&value.to_string()));
        let wrong: Vec<_> = wrong
            .map(|(name, value)| (name, value, seen.get(*name)))
            .collect();
        panic!("{wrong:?}");
    }
    // However often a request that was not processed is sent again.
    let number = |name: &str| seen[name].parse::<u64>().unwrap();
    let refused = number("cluster.refuses.http2.stream_refused_errors");
    assert!(refused >= 1);
    assert_eq!(number("cluster.refuses.http2.rx_reset"), refused);
    assert!(
        !seen.keys().any(|name| name.starts_with("cluster.plain.")),
        "it speaks HTTP/1"
    );
    started.stop().await;
}
