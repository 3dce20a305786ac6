//! `serin load`: the load generator by itself.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use http::{HeaderName, HeaderValue, Method, Uri};

use super::parse_duration;
use crate::load::{Load, Plan, Protocol, Report};
use crate::output::{Format, print_structured};

/// Options of `serin load`.
#[derive(Debug, Args)]
#[command(
    after_help = "Latency counts from when a request was due on the schedule, not from when it left.\nExit code 2 when a request failed between this program and the application.\n\nExamples:\n  serin load http://127.0.0.1:8080/ --rate 200 --duration 30s -H 'host: podinfo.example.com'\n  serin load http://127.0.0.1:8080/ --rate 50 --http2 --group-by x-podinfo-version -o json"
)]
pub(crate) struct Options {
    /// Absolute http:// URL
    url: Uri,
    /// Requests a second
    #[arg(short, long, default_value_t = 100.0)]
    rate: f64,
    /// How long to send, for example 30s; until Ctrl-C if not given
    #[arg(short, long, value_parser = parse_duration)]
    duration: Option<Duration>,
    /// Method of the requests
    #[arg(short = 'X', long, default_value = "GET")]
    method: Method,
    /// A header of the requests, `name: value`; may be repeated
    #[arg(short = 'H', long = "header", value_parser = parse_header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Most connections open at a time (HTTP/1.1)
    #[arg(short, long, default_value_t = 64)]
    connections: usize,
    /// How long a request may take
    #[arg(long, value_parser = parse_duration, default_value = "10s")]
    timeout: Duration,
    /// Speak HTTP/2 with prior knowledge
    #[arg(long)]
    http2: bool,
    /// Count answers apart by this response header
    #[arg(long)]
    group_by: Option<HeaderName>,
    /// How to print the report
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Runs the load and prints its report.
pub(crate) async fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut plan = Plan::new(options.url.clone(), options.rate)?;
    plan.method = options.method.clone();
    plan.headers.clone_from(&options.headers);
    plan.duration = options.duration;
    plan.connections = options.connections;
    plan.timeout = options.timeout;
    plan.protocol = if options.http2 {
        Protocol::Http2
    } else {
        Protocol::Http1
    };
    plan.group_by.clone_from(&options.group_by);
    let cancel = serin_kit::shutdown::on_signal().context("watch for Ctrl-C")?;
    let started = Instant::now();
    let counters = Load::start(plan, cancel).finish().await?;
    let report = Report::new(
        options.url.to_string(),
        options.rate,
        started.elapsed(),
        &counters,
    );
    if !print_structured(&report, options.output)? {
        println!("{}", report.to_text());
    }
    Ok(if report.is_clean() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(2)
    })
}

fn parse_header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("a header is written `name: value`")?;
    let name = name
        .trim()
        .parse()
        .map_err(|error| format!("header name {name:?}: {error}"))?;
    let value = value
        .trim()
        .parse()
        .map_err(|error| format!("header value {value:?}: {error}"))?;
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_a_name_and_a_value() {
        let (name, value) = parse_header("Host: a.example.com").unwrap();
        assert_eq!(
            (name.as_str(), value.to_str().unwrap()),
            ("host", "a.example.com")
        );
        assert!(parse_header("nothing").is_err());
    }
}
