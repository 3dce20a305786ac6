//! New Relic (Insights query API).
//!
//! Request: `GET <address>/v1/accounts/<newrelic_account_id>/query?nrql=<query> SINCE <interval> seconds ago`, header
//! `X-Query-Key` from the Secret's `newrelic_query_key`. Address: `https://insights-api.newrelic.com` unless set.
//!
//! Value: `results[0].result`, or, for aggregates that the API names after themselves (`average`, `count`, …), the only
//! number of `results[0]`. None or more than one result: no values, as in Flagger.

use async_trait::async_trait;
use http::header::HeaderName;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::service::Service;
use crate::{Ask, Config, Connector, Error, Provider};

const NAME: &str = "newrelic";
const ADDRESS: &str = "https://insights-api.newrelic.com";
/// What the Secret must have.
const KEYS: [&str; 2] = ["newrelic_account_id", "newrelic_query_key"];

#[derive(Debug)]
pub(crate) struct NewRelic(Service);

impl NewRelic {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        Ok(Self(Service::new(NAME, Some(ADDRESS), &KEYS, connector, config)?))
    }
}

#[derive(Deserialize)]
struct Response {
    #[serde(default)]
    results: Vec<Map<String, Value>>,
}

fn value(response: &Response) -> Result<f64, Error> {
    let [only] = response.results.as_slice() else {
        let count = response.results.len();
        return Err(Error::no_values(NAME, format!("{count} results instead of one")));
    };
    if let Some(result) = only.get("result") {
        return result
            .as_f64()
            .ok_or_else(|| Error::no_values(NAME, "the result is null"));
    }
    let mut numbers = only.values().filter_map(Value::as_f64);
    match (numbers.next(), numbers.next()) {
        (Some(value), None) => Ok(value),
        _ => Err(Error::no_values(NAME, "the result has no single number")),
    }
}

#[async_trait]
impl Provider for NewRelic {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let Self(service) = self;
        let account = service.secret("newrelic_account_id")?.expose().ok();
        // The account is a part of the path: nothing but digits may lead elsewhere.
        let account = account
            .filter(|account| !account.is_empty() && account.bytes().all(|byte| byte.is_ascii_alphanumeric()))
            .ok_or_else(|| Error::Credentials {
                provider: NAME,
                reason: "newrelic_account_id is not an account's number".to_owned(),
            })?;
        let mut url = service.url(&format!("v1/accounts/{account}/query"))?;
        let query = format!("{} SINCE {} seconds ago", ask.query, ask.interval.as_secs());
        url.query_pairs_mut().append_pair("nrql", &query);
        let call = service.get(url)?.with_secret(
            HeaderName::from_static("x-query-key"),
            "",
            service.secret("newrelic_query_key")?,
        )?;
        value(&service.json(&call).await?)
    }
}
