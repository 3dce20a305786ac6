//! Google Cloud Monitoring (once Stackdriver), queries in MQL.
//!
//! Request: `POST <address>/v3/projects/<project>/timeSeries:query` with the query as JSON, a Bearer token for reading
//! metrics (see `google`). From the Secret `project`, and optionally `serviceAccountKey`; without one the process's own
//! identity. Address: `https://monitoring.googleapis.com` unless set. Flagger calls the same method over gRPC.
//!
//! Value: the first of the first point of the first series; integers count too (Flagger reads them as 0). None: no
//! values.

use async_trait::async_trait;
use http::header::AUTHORIZATION;
use serde_json::{Value, json};

use crate::http::{Call, below};
use crate::{Ask, Config, Connector, Error, Provider, google};

const NAME: &str = "stackdriver";
const ADDRESS: &str = "https://monitoring.googleapis.com";

#[derive(Debug)]
pub(crate) struct Stackdriver {
    connector: Connector,
    config: Config,
}

impl Stackdriver {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        below(NAME, &config.address_or(ADDRESS), "")?;
        if config.credentials.is_some() {
            config.secret(NAME, "project")?;
        }
        Ok(Self {
            connector,
            config: config.clone(),
        })
    }
}

fn value(body: &Value) -> Result<f64, Error> {
    let first = &body["timeSeriesData"][0]["pointData"][0]["values"][0];
    let number = match (&first["doubleValue"], &first["int64Value"], &first["boolValue"]) {
        (Value::Number(number), _, _) => number.as_f64(),
        // 64-bit integers are strings in Google's JSON; so are infinities and NaN.
        (Value::String(text), _, _) | (_, Value::String(text), _) => text.parse().ok(),
        (_, Value::Number(number), _) => number.as_f64(),
        (_, _, Value::Bool(value)) => Some(f64::from(u8::from(*value))),
        _ => None,
    };
    match (number, first) {
        (Some(number), _) => Ok(number),
        (None, Value::Null) => Err(Error::no_values(NAME, "the query yields no point")),
        (None, _) => Err(Error::answer(
            NAME,
            "the first value is neither a number nor a boolean",
        )),
    }
}

#[async_trait]
impl Provider for Stackdriver {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let config = &self.config;
        let project = match config.optional_secret("project") {
            Some(project) => project.expose().unwrap_or_default().to_owned(),
            None => google::project(&self.connector, NAME).await?,
        };
        // It is a part of the path: nothing but a project's name may lead elsewhere.
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b':');
        if project.is_empty() || !project.bytes().all(is_name) {
            return Err(Error::Credentials {
                provider: NAME,
                reason: "project is not a project's name".to_owned(),
            });
        }
        let key = config.optional_secret("serviceAccountKey");
        let token = google::token(&self.connector, NAME, key, ask.now).await?;
        let url = below(
            NAME,
            &config.address_or(ADDRESS),
            &format!("v3/projects/{project}/timeSeries:query"),
        )?;
        let body = json!({"query": ask.query}).to_string();
        let call = Call::post(NAME, url, "application/json", body)
            .with_config(config)?
            .with_secret(AUTHORIZATION, "Bearer ", &token)?;
        value(&self.connector.http.send(&call).await?.json(NAME)?)
    }
}
