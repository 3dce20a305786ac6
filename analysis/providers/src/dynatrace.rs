//! Dynatrace.
//!
//! Request: `GET <address>/api/v2/metrics/query?metricSelector=…&resolution=Inf&from=…&to=…` (milliseconds; the window
//! is ten intervals), header `Authorization: Api-Token <dynatrace_token>` from the Secret.
//!
//! Value: the first of the *last* series of the first result. Nothing there, or null: no values.

use async_trait::async_trait;
use http::header::AUTHORIZATION;
use serde::Deserialize;

use crate::http::{Call, below};
use crate::{Ask, Config, Connector, Error, Provider};

const NAME: &str = "dynatrace";
/// Intervals in the window (Flagger: the same).
const WINDOW: u32 = 10;

#[derive(Debug)]
pub(crate) struct Dynatrace {
    connector: Connector,
    config: Config,
}

impl Dynatrace {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        below(NAME, config.address(NAME)?, "")?;
        config.secret(NAME, "dynatrace_token")?;
        Ok(Self {
            connector,
            config: config.clone(),
        })
    }
}

#[derive(Deserialize)]
struct Response {
    #[serde(default)]
    result: Vec<Metric>,
}

#[derive(Deserialize)]
struct Metric {
    #[serde(default)]
    data: Vec<Series>,
}

#[derive(Deserialize)]
struct Series {
    #[serde(default)]
    values: Vec<Option<f64>>,
}

#[async_trait]
impl Provider for Dynatrace {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let config = &self.config;
        let to = ask.now.as_second() * 1000;
        let from = to - i64::try_from((ask.interval * WINDOW).as_millis()).unwrap_or(i64::MAX / 2);
        let mut url = below(NAME, config.address(NAME)?, "api/v2/metrics/query")?;
        url.query_pairs_mut()
            .append_pair("metricSelector", ask.query)
            .append_pair("resolution", "Inf")
            .append_pair("from", &from.to_string())
            .append_pair("to", &to.to_string());
        let token = config.secret(NAME, "dynatrace_token")?;
        let call =
            Call::get(NAME, url)
                .with_config(config)?
                .with_secret(AUTHORIZATION, "Api-Token ", token)?;
        let response: Response = self.connector.http.send(&call).await?.json(NAME)?;
        response
            .result
            .first()
            .and_then(|metric| metric.data.last())
            .and_then(|series| *series.values.first()?)
            .ok_or_else(|| Error::no_values(NAME, "the selector matches no data"))
    }
}
