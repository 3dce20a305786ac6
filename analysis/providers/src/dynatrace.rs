//! Dynatrace.
//!
//! Request: `GET <address>/api/v2/metrics/query?metricSelector=…&resolution=Inf&from=…&to=…` (milliseconds; the window
//! is ten intervals), header `Authorization: Api-Token <dynatrace_token>` from the Secret.
//!
//! Value: the first of the *last* series of the first result. Nothing there, or null: no values.

use async_trait::async_trait;
use http::header::AUTHORIZATION;
use serde::Deserialize;

use crate::service::Service;
use crate::{Ask, Config, Connector, Error, Provider};

const NAME: &str = "dynatrace";
/// Intervals in the window (Flagger: the same).
const WINDOW: u32 = 10;
/// What the Secret must have.
const KEYS: [&str; 1] = ["dynatrace_token"];

#[derive(Debug)]
pub(crate) struct Dynatrace(Service);

impl Dynatrace {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        Ok(Self(Service::new(NAME, None, &KEYS, connector, config)?))
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
        let Self(service) = self;
        let to = ask.now.as_second() * 1000;
        let from = to - i64::try_from((ask.interval * WINDOW).as_millis()).unwrap_or(i64::MAX / 2);
        let mut url = service.url("api/v2/metrics/query")?;
        url.query_pairs_mut()
            .append_pair("metricSelector", ask.query)
            .append_pair("resolution", "Inf")
            .append_pair("from", &from.to_string())
            .append_pair("to", &to.to_string());
        let token = service.secret("dynatrace_token")?;
        let call = service
            .get(url)?
            .with_secret(AUTHORIZATION, "Api-Token ", token)?;
        let response: Response = service.json(&call).await?;
        response
            .result
            .first()
            .and_then(|metric| metric.data.last())
            .and_then(|series| *series.values.first()?)
            .ok_or_else(|| Error::no_values(NAME, "the selector matches no data"))
    }
}
