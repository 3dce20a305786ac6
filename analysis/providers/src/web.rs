//! Any web service that answers with JSON (Argo Rollouts' `web` provider; not in Flagger).
//!
//! Request: `GET <address>` with `headers`; from the Secret `token` as Bearer or `username` and `password` as Basic. The
//! address is a template like the query. Deadline 10 s. Other statuses than 2xx are errors.
//!
//! Value: what the query, a JSONPath (RFC 9535; the braces of Kubernetes' flavour, `{$.data.value}`, may stay), selects:
//! one number, a string that holds one, or a boolean (1 or 0). Nothing selected, or null: no values. More than one value
//! is refused.

use std::time::Duration;

use async_trait::async_trait;
use http::header::{ACCEPT, AUTHORIZATION, HeaderValue};
use jsonpath_rust::JsonPath;
use serde_json::Value;

use crate::http::{Call, below};
use crate::{Ask, Config, Connector, Error, Provider};

const NAME: &str = "web";
/// Argo Rollouts' default.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Web {
    connector: Connector,
    config: Config,
}

impl Web {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        below(NAME, config.address(NAME)?, "")?;
        Ok(Self {
            connector,
            config: config.clone(),
        })
    }
}

/// `{.a.b}`, `.a.b` and `$.a.b` are the same path.
fn path(query: &str) -> Result<String, Error> {
    let query = query.trim();
    let bare = match query.strip_prefix('{') {
        Some(rest) => rest
            .strip_suffix('}')
            .ok_or_else(|| Error::Query(format!("{query:?} has an open brace")))?
            .trim(),
        None => query,
    };
    Ok(match bare {
        "" => {
            return Err(Error::Query(
                "the query of provider web is a JSONPath, and it is empty".to_owned(),
            ));
        }
        bare if bare.starts_with('$') => bare.to_owned(),
        bare if bare.starts_with(['.', '[']) => format!("${bare}"),
        bare => format!("$.{bare}"),
    })
}

fn value(query: &str, body: &Value) -> Result<f64, Error> {
    let path = path(query)?;
    let found = body
        .query(&path)
        .map_err(|error| Error::Query(format!("{path} is not a JSONPath: {error}")))?;
    match found.as_slice() {
        [] | [Value::Null] => Err(Error::no_values(NAME, format!("{path} selects nothing"))),
        [Value::Bool(value)] => Ok(if *value { 1.0 } else { 0.0 }),
        [Value::Number(number)] => number
            .as_f64()
            .ok_or_else(|| Error::answer(NAME, format!("{number} is too large"))),
        [Value::String(text)] => text
            .trim()
            .parse()
            .map_err(|_| Error::answer(NAME, format!("{path} selects {text:?}"))),
        [_] => Err(Error::answer(NAME, format!("{path} selects an object or a list"))),
        many => Err(Error::answer(
            NAME,
            format!("{path} selects {} values", many.len()),
        )),
    }
}

#[async_trait]
impl Provider for Web {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let config = &self.config;
        let address = config.address(NAME)?;
        below(NAME, address, "")?;
        let url = reqwest::Url::parse(address).map_err(|error| Error::config(NAME, error.to_string()))?;
        let mut call = Call::get(NAME, url).with_config(config)?.with_timeout(TIMEOUT);
        call.headers
            .entry(ACCEPT)
            .or_insert(HeaderValue::from_static("application/json"));
        if let Some(token) = config.optional_secret("token") {
            call = call.with_secret(AUTHORIZATION, "Bearer ", token)?;
        } else if config.credentials.is_some() {
            call = call.with_basic(config.secret(NAME, "username")?, config.secret(NAME, "password")?)?;
        }
        let body: Value = self.connector.http.send(&call).await?.json(NAME)?;
        value(ask.query, &body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn one_number_is_selected_in_any_flavour_of_jsonpath() {
        let body = json!({"data": {"rate": 0.5, "text": " 1.5 ", "ok": true, "none": null, "many": [1, 2]}});
        for (query, expected) in [
            ("{$.data.rate}", 0.5),
            ("{.data.rate}", 0.5),
            ("data.rate", 0.5),
            ("$.data.text", 1.5),
            ("$['data']['ok']", 1.0),
            ("$.data.many[1]", 2.0),
        ] {
            assert_eq!(value(query, &body).unwrap(), expected, "{query}");
        }
        assert!(value("$.data.none", &body).unwrap_err().is_no_values());
        assert!(value("$.absent", &body).unwrap_err().is_no_values());
        for query in ["$.data", "$.data.many[*]", "{$.data", "", "$.data["] {
            assert!(!value(query, &body).unwrap_err().is_no_values(), "{query}");
        }
    }
}
