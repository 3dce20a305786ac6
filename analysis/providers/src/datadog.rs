//! Datadog.
//!
//! Request: `GET <address>/api/v1/query?query=…&from=…&to=…` (seconds; the window is ten intervals), headers
//! `DD-API-KEY` and `DD-APPLICATION-KEY` from the Secret's `datadog_api_key` and `datadog_application_key`. Address:
//! `https://api.datadoghq.com` unless set.
//!
//! Value: the *oldest* point of the first series, since the newest is almost always an incomplete bucket. Points
//! without a value are skipped (Flagger reads them as 0). No series, no point: no values.

use async_trait::async_trait;
use http::header::HeaderName;
use serde::Deserialize;

use crate::service::Service;
use crate::{Ask, Config, Connector, Error, Provider};

const NAME: &str = "datadog";
const ADDRESS: &str = "https://api.datadoghq.com";
/// Intervals in the window (Flagger: the same).
const WINDOW: u32 = 10;
/// What the Secret must have.
const KEYS: [&str; 2] = ["datadog_api_key", "datadog_application_key"];

#[derive(Debug)]
pub(crate) struct Datadog(Service);

impl Datadog {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        Ok(Self(Service::new(NAME, Some(ADDRESS), &KEYS, connector, config)?))
    }
}

#[derive(Deserialize)]
struct Response {
    #[serde(default)]
    series: Vec<Series>,
    #[serde(default)]
    error: Option<String>,
}

#[derive(Deserialize)]
struct Series {
    #[serde(default)]
    pointlist: Vec<Vec<Option<f64>>>,
}

#[async_trait]
impl Provider for Datadog {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let Self(service) = self;
        let to = ask.now.as_second();
        let from = to - i64::try_from((ask.interval * WINDOW).as_secs()).unwrap_or(i64::MAX / 2);
        let mut url = service.url("api/v1/query")?;
        url.query_pairs_mut()
            .append_pair("query", ask.query)
            .append_pair("from", &from.to_string())
            .append_pair("to", &to.to_string());
        let call = service
            .get(url)?
            .with_secret(
                HeaderName::from_static("dd-api-key"),
                "",
                service.secret("datadog_api_key")?,
            )?
            .with_secret(
                HeaderName::from_static("dd-application-key"),
                "",
                service.secret("datadog_application_key")?,
            )?;
        let response: Response = service.json(&call).await?;
        if let Some(error) = response.error.filter(|error| !error.is_empty()) {
            return Err(Error::answer(NAME, error));
        }
        let series = response
            .series
            .first()
            .ok_or_else(|| Error::no_values(NAME, "the query matches no series"))?;
        series
            .pointlist
            .iter()
            .find_map(|point| *point.get(1)?)
            .ok_or_else(|| Error::no_values(NAME, "the first series has no point with a value"))
    }
}
