//! serin-providers: asks the monitoring systems that people already have for one number.
//!
//! A Canary's metric may refer to a MetricTemplate: a provider (who is asked, with which credentials) and a query. Here
//! is what happens then, at the edge of the analysis, so that the judges themselves know no network:
//!
//! ```text
//! MetricTemplate.query ─▶ template ─▶ query text ─▶ Provider::query(Ask) ─▶ f64 | NoValues | error
//!        Canary fields ───────┘            Config (address, headers, Secret) ──┘
//! ```
//!
//! - [`template`]: Flagger's template functions over the subset of Go's template language that queries use.
//! - [`Provider`]: the one trait; [`Connector::provider`] makes one of a [`Config`]. Each module's header states the
//!   exact request, which value of the answer counts, and what an empty answer means.
//! - [`Error`]: *no values* is its own variant, never zero and never a failure (with InfluxDB as the one exception that
//!   Flagger's users rely on, see its module).
//! - [`Secret`], [`Credentials`]: typed, never printed; whatever of them an answer repeats is taken out of error texts.
//!
//! What every request has: a deadline (5 s, Flagger's, unless the module says otherwise) over all its attempts; at most
//! two retries of what is safe to repeat, taken from a budget per host; a place among a bounded number of requests, in
//! all and per host; an answer of at most [`ANSWER_MAX`]; TLS by rustls with aws-lc-rs and the system's roots;
//! redirects only within the origin, so that credentials stay where they belong.
//!
//! The requests go through one HTTP client of ours, also those to Prometheus: the crate `prometheus-http-query` reads
//! answers of any length into memory and knows neither repeated headers nor our retry budget.
//!
//! Limits: no range queries (a query yields one number), no OAuth flows other than Google's and AWS's own, SignalFlow
//! over server-sent events instead of WebSocket.

mod aws;
mod cloudwatch;
mod credentials;
mod datadog;
mod dynatrace;
mod error;
mod externalmetrics;
mod google;
mod graphite;
mod http;
mod influxdb;
mod job;
mod keptn;
mod newrelic;
mod prometheus;
mod service;
mod splunk;
mod stackdriver;
pub mod template;
mod tokens;
mod web;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serin_crds::flagger::MetricProviderType;

pub use credentials::{Credentials, Secret};
pub use error::Error;
pub use http::{ANSWER_MAX, Limits};
pub use tokens::Environment;

/// What Flagger gives a metric provider; 15 s for InfluxDB, 10 s for Keptn and the web.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// A question.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// The rendered query.
    pub query: &'a str,
    /// The metric's `interval`: what windows are computed from.
    pub interval: Duration,
    /// The time that windows end at.
    pub now: Timestamp,
    /// Namespace of the MetricTemplate: where a provider creates objects, if it does.
    pub namespace: &'a str,
    /// Names who asks, for example `podinfo-errors`; objects that a provider creates are named after it.
    pub asker: &'a str,
}

/// Somebody who knows a number.
#[async_trait]
pub trait Provider: Send + Sync + std::fmt::Debug {
    /// Its type as in `spec.provider.type`.
    fn name(&self) -> &'static str;

    /// Asks once. Ends by the provider's deadline, with a number that is not NaN or with an error.
    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error>;
}

/// `spec.provider` of a MetricTemplate with the Secret that it names.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Who is asked.
    pub kind: MetricProviderType,
    /// `address`.
    pub address: Option<String>,
    /// `headers`, each with its values.
    pub headers: BTreeMap<String, Vec<String>>,
    /// `region`.
    pub region: Option<String>,
    /// `insecureSkipVerify`.
    pub insecure_skip_verify: bool,
    /// Content of the Secret in `secretRef`; `None` without one.
    pub credentials: Option<Credentials>,
}

impl Config {
    fn address_or(&self, default: &'static str) -> String {
        self.address
            .clone()
            .filter(|address| !address.is_empty())
            .unwrap_or_else(|| default.to_owned())
    }

    fn address(&self, provider: &'static str) -> Result<&str, Error> {
        self.address
            .as_deref()
            .filter(|address| !address.is_empty())
            .ok_or_else(|| Error::config(provider, "set spec.provider.address"))
    }

    fn secret(&self, provider: &'static str, key: &str) -> Result<&Secret, Error> {
        self.credentials
            .as_ref()
            .and_then(|credentials| credentials.get(key))
            .ok_or_else(|| Error::Credentials {
                provider,
                reason: format!("the Secret of spec.provider.secretRef has no key {key}"),
            })
    }

    fn optional_secret(&self, key: &str) -> Option<&Secret> {
        self.credentials.as_ref()?.get(key)
    }
}

/// What all providers of a process share: connections, limits, tokens.
#[derive(Clone)]
pub struct Connector {
    http: Arc<http::Http>,
    tokens: Arc<tokens::Tokens>,
    environment: Environment,
    kube: Option<kube::Client>,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connector")
    }
}

impl Connector {
    /// Connects with the given limits. `environment` is where the clouds' ambient credentials are looked for; `kube` is
    /// the cluster that the providers `keptn`, `job` and `externalmetrics` ask.
    pub fn new(limits: Limits, environment: Environment, kube: Option<kube::Client>) -> Result<Self, Error> {
        Ok(Self {
            http: Arc::new(http::Http::new(limits)?),
            tokens: Arc::default(),
            environment,
            kube,
        })
    }

    /// The provider that a configuration describes. Refuses one that could not work, naming what to set.
    pub fn provider(&self, config: &Config) -> Result<Box<dyn Provider>, Error> {
        let connector = self.clone();
        Ok(match &config.kind {
            MetricProviderType::Prometheus => Box::new(prometheus::Prometheus::new(connector, config)?),
            MetricProviderType::Influxdb => Box::new(influxdb::Influxdb::new(connector, config)?),
            MetricProviderType::Datadog => Box::new(datadog::Datadog::new(connector, config)?),
            MetricProviderType::Externalmetrics => {
                Box::new(externalmetrics::ExternalMetrics::new(connector, config)?)
            }
            MetricProviderType::Stackdriver => Box::new(stackdriver::Stackdriver::new(connector, config)?),
            MetricProviderType::Cloudwatch => Box::new(cloudwatch::CloudWatch::new(connector, config)?),
            MetricProviderType::Newrelic => Box::new(newrelic::NewRelic::new(connector, config)?),
            MetricProviderType::Graphite => Box::new(graphite::Graphite::new(connector, config)?),
            MetricProviderType::Dynatrace => Box::new(dynatrace::Dynatrace::new(connector, config)?),
            MetricProviderType::Keptn => Box::new(keptn::Keptn::new(&connector)?),
            MetricProviderType::Splunk => Box::new(splunk::Splunk::new(connector, config)?),
            MetricProviderType::Web => Box::new(web::Web::new(connector, config)?),
            MetricProviderType::Job => Box::new(job::JobProvider::new(&connector)?),
            MetricProviderType::Other(other) => return Err(Error::Unknown(other.clone())),
        })
    }

    /// Asks once, with whatever of the credentials an error repeats taken out of it.
    pub async fn query(&self, config: &Config, ask: &Ask<'_>) -> Result<f64, Error> {
        let scrub = |error: Error| match &config.credentials {
            Some(credentials) => error.scrubbed(credentials),
            None => error,
        };
        let provider = self.provider(config).map_err(scrub)?;
        let value = provider.query(ask).await.map_err(scrub)?;
        if value.is_nan() {
            return Err(Error::no_values(
                provider.name(),
                "the value is not a number (NaN)",
            ));
        }
        Ok(value)
    }

    fn cluster(&self, provider: &'static str) -> Result<kube::Client, Error> {
        self.kube
            .clone()
            .ok_or_else(|| Error::config(provider, "it needs a cluster, and there is none to ask"))
    }
}
