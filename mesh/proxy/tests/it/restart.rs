//! Hot restart: a process hands its sockets to the next one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::*;

fn bootstrap(answer: &str, gateway: u16, admin: u16) -> String {
    format!(
        r#"
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}
static_resources:
  listeners:
    - name: l
      address: {{socket_address: {{address: 127.0.0.1, port_value: {gateway}}}}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                route_config:
                  virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200, body: {{inline_string: {answer}}}}}}}]}}]
                http_filters: [{{name: envoy.filters.http.router}}]
"#
    )
}

struct Process(tokio::process::Child);

fn start(directory: &std::path::Path, name: &str, text: &str, concurrency: &str) -> Process {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    Process(
        tokio::process::Command::new(env!("CARGO_BIN_EXE_serin-proxy"))
            .args(["--concurrency", concurrency, "--restart-socket"])
            .arg(directory.join("restart.sock"))
            .arg("--config")
            .arg(&path)
            .kill_on_drop(true)
            .spawn()
            .unwrap(),
    )
}

/// The body of an answer over a connection of its own.
async fn ask(at: std::net::SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(at).await?;
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => Err(std::io::Error::other(answer)),
    }
}

/// The restart socket is there a moment after the listener is.
async fn station(directory: &std::path::Path) {
    let path = directory.join("restart.sock");
    soon("the restart socket", async {
        while std::os::unix::net::UnixStream::connect(&path).is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

async fn until(at: std::net::SocketAddr, body: &str) {
    soon(body, async {
        while ask(at).await.ok().as_deref() != Some(body) {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_successor_takes_the_sockets_over_and_no_connection_is_refused_or_lost() {
    let directory = tempfile::tempdir().unwrap();
    let (gateway, admin) = (free_port().await, free_port().await);
    let text = |answer| bootstrap(answer, gateway.port(), admin.port());
    let mut first = start(directory.path(), "first.yaml", &text("first"), "2");
    until(gateway, "first").await;
    station(directory.path()).await;
    let (done, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (done, served) = (done.clone(), served.clone());
            tokio::spawn(async move {
                while !done.load(Ordering::SeqCst) {
                    ask(gateway).await.expect("served");
                    served.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    // Another number of workers, so that sockets are spread anew.
    let _second = start(directory.path(), "second.yaml", &text("second"), "1");
    until(gateway, "second").await;
    let status = soon("the end of the first process", first.0.wait())
        .await
        .unwrap();
    assert!(status.success(), "{status}");
    let before = served.load(Ordering::SeqCst);
    soon("more requests", async {
        while served.load(Ordering::SeqCst) < before + 50 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    done.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.expect("every connection was served");
    }
    assert_eq!(ask(gateway).await.unwrap(), "second");
    let info = get(admin, "/ready").await;
    assert_eq!(info.0, 200, "the admin port has gone over as well");
}

#[tokio::test]
async fn a_successor_that_does_not_start_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (gateway, admin) = (free_port().await, free_port().await);
    let text = bootstrap("first", gateway.port(), admin.port());
    let mut first = start(directory.path(), "first.yaml", &text, "1");
    until(gateway, "first").await;
    station(directory.path()).await;
    // Its listener is refused after it has taken the sockets.
    let broken = text.replace("envoy.filters.http.router", "envoy.filters.http.unknown");
    let mut second = start(directory.path(), "second.yaml", &broken, "1");
    let status = soon("the end of the second process", second.0.wait())
        .await
        .unwrap();
    assert!(!status.success(), "{status}");
    for _ in 0..20 {
        assert_eq!(ask(gateway).await.unwrap(), "first");
    }
    assert!(first.0.try_wait().unwrap().is_none(), "still running");
}

/// The value of a line of `/stats`, from whichever process has the admin port.
async fn stat(admin: std::net::SocketAddr, name: &str) -> Option<u64> {
    let stream = TcpStream::connect(admin).await.ok()?;
    drop(stream);
    let text = get(admin, &format!("/stats?filter={name}")).await.2;
    text.trim().strip_prefix(name)?.strip_prefix(": ")?.parse().ok()
}

#[tokio::test]
async fn counters_go_on_where_the_processes_before_have_left_them() {
    let directory = tempfile::tempdir().unwrap();
    let (gateway, admin) = (free_port().await, free_port().await);
    let text = |answer| {
        bootstrap(answer, gateway.port(), admin.port()).replace(
            "route_config:",
            "stat_prefix: ingress\n                route_config:",
        )
    };
    let name = "http.ingress.downstream_rq_total";
    let mut before = start(directory.path(), "zero.yaml", &text("zero"), "1");
    until(gateway, "zero").await;
    station(directory.path()).await;
    let mut least = 0;
    assert_eq!(stat(admin, "server.hot_restart_epoch").await, Some(0));
    for (epoch, next) in (1..).zip(["one", "two"]) {
        for _ in 0..10 {
            ask(gateway).await.unwrap();
        }
        let counted = stat(admin, name).await.unwrap();
        assert!(counted >= least + 10, "{counted} of {least}");
        let after = start(directory.path(), &format!("{next}.yaml"), &text(next), "1");
        until(gateway, next).await;
        assert!(
            soon("the end of the process before", before.0.wait())
                .await
                .unwrap()
                .success()
        );
        before = after;
        // The last report comes with the end of the process before.
        soon("its counters", async {
            while stat(admin, name).await.is_none_or(|now| now < counted) {
                tokio::task::yield_now().await;
            }
        })
        .await;
        station(directory.path()).await;
        assert_eq!(stat(admin, "server.hot_restart_epoch").await, Some(epoch));
        assert_eq!(
            stat(admin, "server.hot_restart_generation").await,
            Some(epoch + 1)
        );
        least = counted;
    }
}
