//! Amazon CloudWatch.
//!
//! Request: `GetMetricData` of the region's endpoint in the JSON protocol (`POST /`, header `X-Amz-Target:
//! GraniteServiceVersion20100801.GetMetricData`), signed with the process's ambient keys (see `aws`), or with
//! `aws_access_key_id`, `aws_secret_access_key` and `aws_session_token` of a Secret. The query is the JSON list of
//! MetricDataQueries; names are taken in any case, as Go's decoder does. Window: ten intervals; at most 20 points.
//! `region` is required; `address` replaces the endpoint.
//!
//! Value: the first of the first result (the newest: the API sorts by descending time). None: no values.

use async_trait::async_trait;
use http::header::{HeaderName, HeaderValue};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::aws::{self, Keys};
use crate::http::{Call, below};
use crate::{Ask, Config, Connector, Error, Provider};

const NAME: &str = "cloudwatch";
/// Intervals in the window (Flagger: the same).
const WINDOW: u32 = 10;
/// Points asked for (Flagger: the same).
const POINTS: u32 = 20;
/// Every name of a MetricDataQuery.
const NAMES: [&str; 15] = [
    "Id",
    "Expression",
    "Label",
    "MetricStat",
    "Metric",
    "Namespace",
    "MetricName",
    "Dimensions",
    "Name",
    "Value",
    "Period",
    "Stat",
    "Unit",
    "ReturnData",
    "AccountId",
];

#[derive(Debug)]
pub(crate) struct CloudWatch {
    connector: Connector,
    config: Config,
    region: String,
    address: String,
}

impl CloudWatch {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        let region = config
            .region
            .clone()
            .filter(|region| {
                !region.is_empty()
                    && region
                        .bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            })
            .ok_or_else(|| Error::config(NAME, "set spec.provider.region to a region's name"))?;
        let address = config
            .address
            .clone()
            .filter(|address| !address.is_empty())
            .or_else(|| {
                let set = connector.environment.get("AWS_ENDPOINT_URL_CLOUDWATCH");
                set.map(str::to_owned)
            })
            .unwrap_or_else(|| format!("https://monitoring.{region}.{}", aws::domain(&region)));
        below(NAME, &address, "")?;
        Ok(Self {
            connector,
            config: config.clone(),
            region,
            address,
        })
    }

    async fn keys(&self, now: jiff::Timestamp) -> Result<Keys, Error> {
        let config = &self.config;
        let Some(secret) = config.optional_secret("aws_secret_access_key") else {
            return aws::ambient(&self.connector, NAME, &self.region, now).await;
        };
        let id = config.secret(NAME, "aws_access_key_id")?;
        let id = id.expose().map_err(|_| Error::Credentials {
            provider: NAME,
            reason: "aws_access_key_id is not UTF-8".to_owned(),
        })?;
        let trimmed = |secret: &crate::Secret| crate::Secret::new(secret.expose_bytes().trim_ascii());
        Ok(Keys {
            id: id.to_owned(),
            secret: trimmed(secret),
            session: config.optional_secret("aws_session_token").map(trimmed),
        })
    }
}

/// The names as the API spells them.
fn spelled(value: Value) -> Result<Value, Error> {
    Ok(match value {
        Value::Array(items) => Value::Array(items.into_iter().map(spelled).collect::<Result<_, _>>()?),
        Value::Object(fields) => {
            let mut out = Map::new();
            for (name, value) in fields {
                let known = NAMES.iter().find(|known| known.eq_ignore_ascii_case(&name));
                let known = known.ok_or_else(|| {
                    Error::Query(format!(
                        "{name:?} is not a field of a MetricDataQuery of CloudWatch"
                    ))
                })?;
                out.insert((*known).to_owned(), spelled(value)?);
            }
            Value::Object(out)
        }
        other => other,
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Response {
    #[serde(default)]
    metric_data_results: Vec<MetricData>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct MetricData {
    #[serde(default)]
    values: Vec<f64>,
}

#[async_trait]
impl Provider for CloudWatch {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let queries: Value = serde_json::from_str(ask.query).map_err(|error| {
            Error::Query(format!(
                "provider cloudwatch takes a list of MetricDataQueries as JSON: {error}"
            ))
        })?;
        if !queries.is_array() {
            return Err(Error::Query(
                "provider cloudwatch takes a list of MetricDataQueries as JSON".to_owned(),
            ));
        }
        let end = ask.now.as_second();
        let start = end - i64::try_from((ask.interval * WINDOW).as_secs()).unwrap_or(i64::MAX / 2);
        let body = json!({
            "StartTime": start,
            "EndTime": end,
            "MaxDatapoints": POINTS,
            "MetricDataQueries": spelled(queries)?,
        });
        let mut call = Call::post(
            NAME,
            below(NAME, &self.address, "")?,
            "application/x-amz-json-1.0",
            body.to_string(),
        );
        call.insecure = self.config.insecure_skip_verify;
        call.headers.insert(
            HeaderName::from_static("x-amz-target"),
            HeaderValue::from_static("GraniteServiceVersion20100801.GetMetricData"),
        );
        let keys = self.keys(ask.now).await?;
        aws::sign(&mut call, &keys, &self.region, "monitoring", ask.now)?;
        let response: Response = self.connector.http.send(&call).await?.json(NAME)?;
        let first = response
            .metric_data_results
            .first()
            .ok_or_else(|| Error::no_values(NAME, "the queries yield no result"))?;
        first
            .values
            .first()
            .copied()
            .ok_or_else(|| Error::no_values(NAME, "the first result has no values"))
    }
}
