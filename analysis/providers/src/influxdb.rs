//! InfluxDB 2 (Flux).
//!
//! Request: `POST <address>/api/v2/query?org=<org>` with the query and the dialect as JSON, `Accept: text/csv`, header
//! `Authorization: Token <token>`; `token` and `org` from the Secret. Deadline 15 s.
//!
//! Value: `_value` of the first record of the annotated CSV. A record without a value: no values. *No record at all is
//! 0*: Flagger answers so, and templates that count errors rely on it (a bucket without errors has no record).

use std::time::Duration;

use async_trait::async_trait;
use http::header::{ACCEPT, AUTHORIZATION, HeaderValue};
use serde_json::json;

use crate::http::{Call, below};
use crate::{Ask, Config, Connector, Error, Provider};

const NAME: &str = "influxdb";
/// Flagger's.
const TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Debug)]
pub(crate) struct Influxdb {
    connector: Connector,
    config: Config,
}

impl Influxdb {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        below(NAME, config.address(NAME)?, "")?;
        if config.credentials.is_some() {
            config.secret(NAME, "token")?;
            config.secret(NAME, "org")?;
        }
        Ok(Self {
            connector,
            config: config.clone(),
        })
    }
}

/// The fields of one line of CSV (RFC 4180), whose quoted fields may hold line breaks; and what comes after it.
fn record(text: &str) -> Option<(Vec<String>, &str)> {
    if text.is_empty() {
        return None;
    }
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = text.char_indices().peekable();
    let push = |fields: &mut Vec<String>, c: char| {
        if let Some(field) = fields.last_mut() {
            field.push(c);
        }
    };
    while let Some((at, c)) = chars.next() {
        match c {
            '"' if quoted && chars.peek().is_some_and(|(_, next)| *next == '"') => {
                chars.next();
                push(&mut fields, '"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            '\r' if !quoted => {}
            '\n' if !quoted => return Some((fields, &text[at + 1..])),
            c => push(&mut fields, c),
        }
    }
    Some((fields, ""))
}

/// `_value` of the first record.
fn value(csv: &str) -> Result<f64, Error> {
    let mut rest = csv;
    let mut header: Option<Vec<String>> = None;
    let mut defaults = Vec::new();
    while let Some((fields, after)) = record(rest) {
        rest = after;
        match fields.first().map(String::as_str) {
            Some("") if fields.len() == 1 => {
                // An empty line ends a table; the next one has a header of its own.
                header = None;
            }
            Some("#default") => defaults = fields,
            Some(annotation) if annotation.starts_with('#') => {}
            _ => match &header {
                None => {
                    if fields.get(1).is_some_and(|field| field == "error") {
                        let message = record(rest).map(|(fields, _)| fields[1..].join(" "));
                        return Err(Error::answer(NAME, message.unwrap_or_default()));
                    }
                    header = Some(fields);
                }
                Some(names) => {
                    let column = names
                        .iter()
                        .position(|name| name == "_value")
                        .ok_or_else(|| Error::answer(NAME, "the records have no column _value"))?;
                    let text = fields.get(column).filter(|text| !text.is_empty());
                    let text = text.or_else(|| defaults.get(column).filter(|text| !text.is_empty()));
                    let text = text.ok_or_else(|| Error::no_values(NAME, "the first record has no value"))?;
                    return text
                        .parse()
                        .map_err(|_| Error::answer(NAME, format!("{text:?} is not a number")));
                }
            },
        }
    }
    Ok(0.0)
}

#[async_trait]
impl Provider for Influxdb {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let config = &self.config;
        let mut url = below(NAME, config.address(NAME)?, "api/v2/query")?;
        let org = config.optional_secret("org").and_then(|org| org.expose().ok());
        url.query_pairs_mut().append_pair("org", org.unwrap_or_default());
        let body = json!({
            "type": "flux",
            "query": ask.query,
            "dialect": {"header": true, "delimiter": ",", "annotations": ["datatype", "group", "default"]},
        });
        let mut call = Call::post(NAME, url, "application/json", body.to_string())
            .with_config(config)?
            .with_timeout(TIMEOUT);
        call.headers.insert(ACCEPT, HeaderValue::from_static("text/csv"));
        if let Some(token) = config.optional_secret("token") {
            call = call.with_secret(AUTHORIZATION, "Token ", token)?;
        }
        let answer = self.connector.http.send(&call).await?;
        let csv = std::str::from_utf8(&answer.body).map_err(|_| Error::answer(NAME, "it is not UTF-8"))?;
        value(csv)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "#datatype,string,long,double,string\r\n#group,false,false,false,true\r\n\
                        #default,_result,,,\r\n,result,table,_value,host\r\n";

    #[test]
    fn the_first_records_value_counts() {
        let csv = format!("{HEAD},,0,0.25,\"a,\"\"b\"\"\nc\"\r\n,,0,7,x\r\n\r\n");
        assert_eq!(value(&csv).unwrap(), 0.25);
    }

    #[test]
    fn no_record_is_zero_as_in_flagger_and_a_record_without_a_value_is_not() {
        assert_eq!(value("\r\n").unwrap(), 0.0);
        assert_eq!(value(HEAD).unwrap(), 0.0);
        assert!(value(&format!("{HEAD},,0,,a\r\n")).unwrap_err().is_no_values());
    }

    #[test]
    fn an_error_in_the_middle_of_an_answer_is_told() {
        let error = value(
            "#datatype,string,string\r\n#group,true,true\r\n#default,,\r\n,error,reference\r\n,too many points,897\r\n",
        );
        assert!(error.unwrap_err().to_string().contains("too many points"));
    }
}
