//! A short soak: a process of its own under churn of connections, clients that vanish, failing upstreams and changing
//! configuration, a fixed amount of each. What it held after the first rounds it holds after many more: memory,
//! descriptors, connections. `make soak` does the same for as long as one likes.

use std::net::SocketAddr;
use std::process::Stdio;

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::server::Event;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::ads::Ads;
use crate::fixture::*;

/// Requests of each kind in a round.
const REQUESTS: usize = 150;
/// What may be more at the end, KB: allocators and tables breathe.
const BREATH: usize = 3_000;

/// Answers, but breaks every 13th connection off in the middle.
async fn moody() -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        let mut count = 0usize;
        while let Ok((mut stream, _)) = socket.accept().await {
            count += 1;
            let number = count;
            connections.spawn(async move {
                let mut chunk = vec![0; 8192];
                while let Ok(read) = stream.read(&mut chunk).await {
                    let answer: &[u8] = if number.is_multiple_of(13) {
                        b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\nhalf"
                    } else {
                        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
                    };
                    if read == 0 || stream.write_all(answer).await.is_err() || number.is_multiple_of(13) {
                        return;
                    }
                }
            });
            while connections.try_join_next().is_some() {}
        }
    });
    (at, task)
}

fn table(change: usize) -> route::RouteConfiguration {
    let mut hosts: Vec<_> = (0..20)
        .map(|index| {
            host(
                &format!("h{index}"),
                &format!("h{index}-{change}.example"),
                vec![prefix_route("/", to_cluster("c"))],
            )
        })
        .collect();
    hosts.push(host("all", "*", vec![prefix_route("/", to_cluster("c"))]));
    route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: hosts,
        ..Default::default()
    }
}

async fn once(at: SocketAddr, index: usize) {
    let mut stream = soon("a connection", TcpStream::connect(at)).await.unwrap();
    let connection = if index.is_multiple_of(2) {
        "close"
    } else {
        "keep-alive"
    };
    let request = format!("GET /{index} HTTP/1.1\r\nhost: a\r\nconnection: {connection}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    // Every seventh goes away before its answer.
    if !index.is_multiple_of(7) {
        let mut answer = [0; 12];
        let _ = soon("an answer", stream.read_exact(&mut answer)).await;
    }
}

struct Held {
    resident: usize,
    descriptors: usize,
}

fn held(pid: u32) -> Held {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    Held {
        resident: resident.trim().trim_end_matches(" kB").parse().unwrap(),
        descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
    }
}

#[tokio::test]
async fn a_process_under_churn_holds_its_memory_and_its_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let mut ads = Ads::start(&folder.path().join("xds.sock")).unwrap();
    let (upstream, upstream_task) = moody().await;
    let port = free_port().await;
    let mut message = listener_of(
        "l",
        core::TrafficDirection::Outbound,
        vec![http_chain(&manager("80"))],
    );
    message.address = address(port);
    ads.source.put(ResourceType::Cluster, "c", &eds_cluster("c"));
    ads.source
        .put(ResourceType::Endpoints, "c", &assignment("c", &[(upstream, "")]));
    ads.source.put(ResourceType::Listener, "l", &message);
    ads.source.put(ResourceType::Route, "80", &table(0));
    let config = folder.path().join("bootstrap.yaml");
    std::fs::write(&config, ads.bootstrap("soak", false)).unwrap();
    let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"))
        .arg("--config")
        .arg(&config)
        .args(["--concurrency", "2"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    crate::interop::wait_for(port).await;
    let pid = child.id().unwrap();
    let mut change = 0;
    let mut round = async || {
        for index in 0..REQUESTS {
            once(port, index).await;
            if index.is_multiple_of(10) {
                change += 1;
                ads.source.put(ResourceType::Route, "80", &table(change));
                ads.source
                    .put(ResourceType::Endpoints, "c", &assignment("c", &[(upstream, "")]));
            }
        }
        // Everything that was sent has been taken.
        let mark = table(change + 1_000_000);
        ads.source.put(ResourceType::Route, "80", &mark);
        soon("the acknowledgement", async {
            let version = serin_xds::Resource::new(ResourceType::Route, "80", &mark, []).version;
            while let Some((_, event)) = ads.events.recv().await {
                if matches!(&event, Event::Held(held) if held.version == version) {
                    return;
                }
            }
        })
        .await;
    };
    for _ in 0..3 {
        round().await;
    }
    let early = held(pid);
    for _ in 0..8 {
        round().await;
    }
    // Connections of clients that are gone close a moment later.
    soon("descriptors as before", async {
        while held(pid).descriptors > early.descriptors + 8 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    let late = held(pid);
    assert!(
        late.resident <= early.resident + BREATH,
        "{} KB became {} KB",
        early.resident,
        late.resident
    );
    assert!(child.try_wait().unwrap().is_none(), "the process lives");
    child.kill().await.unwrap();
    upstream_task.abort();
}
