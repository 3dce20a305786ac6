//! Prometheus.
//!
//! Request: `GET <address>/api/v1/query?query=…` with white space folded; `headers` are sent, and from the Secret
//! `token` as Bearer or `username` and `password` as Basic. The credentials win over an `Authorization` header.
//!
//! Value: that of the *last* series of the vector. A scalar counts too (Flagger refuses it). Empty, or NaN: no values.
//! A matrix (a range vector) is refused.

use async_trait::async_trait;
use http::header::AUTHORIZATION;
use serde::Deserialize;
use serde_json::Value;

use crate::http::{Call, below, one_line};
use crate::{Ask, Config, Connector, Error, Provider};

const NAME: &str = "prometheus";

#[derive(Debug)]
pub(crate) struct Prometheus {
    connector: Connector,
    config: Config,
}

impl Prometheus {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        below(NAME, config.address(NAME)?, "")?;
        if config.credentials.is_some() && config.optional_secret("token").is_none() {
            config.secret(NAME, "username")?;
            config.secret(NAME, "password")?;
        }
        Ok(Self {
            connector,
            config: config.clone(),
        })
    }
}

#[derive(Deserialize)]
struct Response {
    #[serde(default)]
    status: String,
    #[serde(default)]
    error: String,
    data: Option<Data>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    result_type: String,
    result: Value,
}

/// The value of an answer.
fn value(body: Response) -> Result<f64, Error> {
    if body.status == "error" {
        return Err(Error::answer(NAME, body.error));
    }
    let data = body
        .data
        .ok_or_else(|| Error::answer(NAME, "there is no data in it"))?;
    let pair = match data.result_type.as_str() {
        "vector" => match data.result.as_array().and_then(|series| series.last()) {
            Some(series) => series["value"].clone(),
            None => return Err(Error::no_values(NAME, "the query matches no series")),
        },
        "scalar" => data.result,
        other => {
            return Err(Error::answer(
                NAME,
                format!("a {other}; the query must yield an instant vector of one series"),
            ));
        }
    };
    let text = pair[1]
        .as_str()
        .ok_or_else(|| Error::answer(NAME, "a sample without a value"))?;
    match text.parse::<f64>() {
        Ok(value) if value.is_nan() => Err(Error::no_values(NAME, "the value is NaN")),
        Ok(value) => Ok(value),
        Err(_) => Err(Error::answer(NAME, format!("{text:?} is not a number"))),
    }
}

#[async_trait]
impl Provider for Prometheus {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let config = &self.config;
        let mut url = below(NAME, config.address(NAME)?, "api/v1/query")?;
        url.query_pairs_mut().append_pair("query", &one_line(ask.query));
        let mut call = Call::get(NAME, url).with_config(config)?;
        if let Some(token) = config.optional_secret("token") {
            call = call.with_secret(AUTHORIZATION, "Bearer ", token)?;
        } else if config.credentials.is_some() {
            call = call.with_basic(config.secret(NAME, "username")?, config.secret(NAME, "password")?)?;
        }
        value(self.connector.http.send(&call).await?.json(NAME)?)
    }
}
