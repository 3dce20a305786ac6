//! Every provider against a server on loopback that speaks its protocol.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests may fail like tests

mod aws;
mod cluster;
mod google;
mod limits;
mod prometheus;
mod server;
mod services;

use std::time::Duration;

use jiff::Timestamp;
use serin_crds::flagger::MetricProviderType;
use serin_providers::{Ask, Config, Connector, Credentials, Environment, Error, Limits};

/// 2026-01-02T03:04:05Z.
const NOW: i64 = 1_767_323_045;

fn ask(query: &str) -> Ask<'_> {
    Ask {
        query,
        interval: Duration::from_secs(60),
        now: Timestamp::from_second(NOW).unwrap(),
        namespace: "test",
        asker: "podinfo-errors",
    }
}

fn connector(environment: &[(&str, &str)]) -> Connector {
    let environment: Environment = environment
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    Connector::new(Limits::default(), environment, None).unwrap()
}

fn config(kind: &str, address: &str, secret: &[(&str, &str)]) -> Config {
    Config {
        kind: MetricProviderType::from(kind.to_owned()),
        address: (!address.is_empty()).then(|| address.to_owned()),
        credentials: (!secret.is_empty()).then(|| secret.iter().copied().collect::<Credentials>()),
        ..Config::default()
    }
}

async fn query(config: &Config, text: &str) -> Result<f64, Error> {
    connector(&[]).query(config, &ask(text)).await
}
