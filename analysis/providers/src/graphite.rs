//! Graphite.
//!
//! Request: `GET <address>/render?<query>&format=json`; the query is the render API's query string (`target=…&from=-1min`),
//! white space folded, a `format` in it replaced. Secret: `username` and `password` as Basic.
//!
//! Value: the last one that is not null, over all targets in order. None: no values.

use async_trait::async_trait;
use serde::Deserialize;
use serde_json::Value;

use crate::http::{Call, below, one_line};
use crate::{Ask, Config, Connector, Error, Provider};

const NAME: &str = "graphite";

#[derive(Debug)]
pub(crate) struct Graphite {
    connector: Connector,
    config: Config,
}

impl Graphite {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        below(NAME, config.address(NAME)?, "")?;
        if config.credentials.is_some() {
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
struct Target {
    #[serde(default)]
    datapoints: Vec<(Value, Value)>,
}

#[async_trait]
impl Provider for Graphite {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let config = &self.config;
        let mut url = below(NAME, config.address(NAME)?, "render")?;
        url.set_query(Some(one_line(ask.query).trim()));
        let pairs: Vec<(String, String)> = url
            .query_pairs()
            .filter(|(key, _)| key != "format")
            .map(|(key, value)| (key.into_owned(), value.into_owned()))
            .collect();
        url.query_pairs_mut()
            .clear()
            .extend_pairs(pairs)
            .append_pair("format", "json");
        let mut call = Call::get(NAME, url).with_config(config)?;
        if config.credentials.is_some() {
            call = call.with_basic(config.secret(NAME, "username")?, config.secret(NAME, "password")?)?;
        }
        let targets: Vec<Target> = self.connector.http.send(&call).await?.json(NAME)?;
        let mut last = None;
        for (value, _) in targets.iter().flat_map(|target| &target.datapoints) {
            last = match value {
                Value::Null => last,
                Value::Number(number) => number.as_f64(),
                Value::String(text) => Some(
                    text.parse()
                        .map_err(|_| Error::answer(NAME, format!("{text:?} is not a number")))?,
                ),
                other => return Err(Error::answer(NAME, format!("{other} is not a number"))),
            };
        }
        last.ok_or_else(|| Error::no_values(NAME, "every point is null, or the query matches no target"))
    }
}
