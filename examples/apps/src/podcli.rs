//! `podcli check`, as podinfo's image has it for exec probes: `podcli check http localhost:9898/readyz`.

use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What podcli does.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Command {
    /// Checks that something answers
    #[command(subcommand)]
    Check(Check),
}

/// What is checked.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Check {
    /// That a GET is answered with a status from 200 to 399
    Http(Address),
    /// That a connection opens
    Tcp(Address),
}

/// Where, and how patiently.
#[derive(Clone, Debug, Args)]
pub(crate) struct Address {
    /// `host:port` and, for http, a path
    address: String,
    /// How long one try may take, in seconds
    #[arg(long, default_value = "10s", value_parser = seconds)]
    timeout: Duration,
    /// Further tries
    #[arg(long, default_value_t = 0)]
    retry: u32,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.strip_suffix('s').unwrap_or(text);
    number
        .parse()
        .map(Duration::from_secs)
        .map_err(|error| format!("{text:?}: say seconds, for example 10s: {error}"))
}

/// Checks, and fails with the reason when the last try has failed.
pub(crate) async fn run(command: &Command) -> anyhow::Result<()> {
    let Command::Check(check) = command;
    let (Check::Http(address) | Check::Tcp(address)) = check;
    let mut tries_left = address.retry;
    loop {
        let attempt = async {
            match check {
                Check::Http(address) => http(&address.address).await,
                Check::Tcp(address) => tcp(&address.address).await.map(|_| ()),
            }
        };
        let outcome = tokio::time::timeout(address.timeout, attempt)
            .await
            .unwrap_or_else(|_| bail!("no answer from {} in time", address.address));
        match outcome {
            Err(error) if tries_left == 0 => return Err(error),
            Err(_) => tries_left -= 1,
            Ok(()) => return Ok(()),
        }
    }
}

async fn tcp(authority: &str) -> anyhow::Result<TcpStream> {
    TcpStream::connect(authority)
        .await
        .with_context(|| format!("connect to {authority}"))
}

async fn http(address: &str) -> anyhow::Result<()> {
    let address = address.strip_prefix("http://").unwrap_or(address);
    let (authority, path) = address.split_once('/').unwrap_or((address, ""));
    let mut stream = tcp(authority).await?;
    let request = format!("GET /{path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    // `HTTP/1.1 200`
    let mut head = [0; 12];
    stream
        .read_exact(&mut head)
        .await
        .with_context(|| format!("read the answer of {address}"))?;
    let status: u16 = std::str::from_utf8(&head)
        .ok()
        .filter(|head| head.starts_with("HTTP/1."))
        .and_then(|head| head.get(9..12)?.parse().ok())
        .with_context(|| format!("{address} does not answer in HTTP/1"))?;
    if !(200..400).contains(&status) {
        bail!("{address} answers with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn check(answer: &'static str) -> anyhow::Result<()> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 512];
            let read = stream.read(&mut request).await.unwrap();
            assert!(request[..read].starts_with(b"GET /readyz HTTP/1.1\r\n"));
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        let address = Address {
            address: format!("{address}/readyz"),
            timeout: Duration::from_secs(10),
            retry: 0,
        };
        let command = Command::Check(Check::Http(address));
        let ((), outcome) = tokio::join!(serve, run(&command));
        outcome
    }

    #[tokio::test]
    async fn a_check_succeeds_on_a_good_answer_and_names_a_bad_one() {
        assert!(check("HTTP/1.1 200 OK\r\n\r\n").await.is_ok());
        let error = check("HTTP/1.1 503 Service Unavailable\r\n\r\n")
            .await
            .unwrap_err();
        assert!(error.to_string().contains("answers with 503"), "{error}");
    }

    #[tokio::test]
    async fn a_check_of_a_port_where_nobody_listens_fails_after_its_last_try() {
        let address = Address {
            address: "127.0.0.1:1".to_owned(),
            timeout: Duration::from_secs(10),
            retry: 2,
        };
        let error = run(&Command::Check(Check::Tcp(address))).await.unwrap_err();
        assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    }
}
