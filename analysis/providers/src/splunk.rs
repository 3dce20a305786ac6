//! Splunk Observability (SignalFlow).
//!
//! Request: `POST <stream address>/v2/signalflow/execute?start=…&stop=…&immediate=true` (milliseconds; the window is ten
//! intervals) with the programme as text, header `X-SF-Token` from the Secret's `sf_token_key`. The address may be given
//! as Flagger takes it, `https://api.<realm>.signalfx.com` or `wss://stream.<realm>.signalfx.com`; both mean
//! `https://stream.<realm>.signalfx.com`. Flagger speaks the WebSocket flavour of the same API; this is the one over
//! server-sent events.
//!
//! Value: the last one of the computation. More than one time series: refused. None: no values.

use std::collections::BTreeSet;

use async_trait::async_trait;
use http::header::{ACCEPT, HeaderName, HeaderValue};
use serde_json::Value;

use crate::http::{Call, below};
use crate::{Ask, Config, Connector, Error, Provider};

const NAME: &str = "splunk";
/// Intervals in the window (Flagger: the same).
const WINDOW: u32 = 10;

#[derive(Debug)]
pub(crate) struct Splunk {
    connector: Connector,
    config: Config,
}

/// The address of the stream: `ws` means `http`, and `api` in the host's name means `stream`.
fn stream_address(address: &str) -> String {
    let address = match address.strip_prefix("ws") {
        Some(rest) => format!("http{rest}"),
        None => address.to_owned(),
    };
    match address.split_once("://api.") {
        Some((scheme, rest)) => format!("{scheme}://stream.{rest}"),
        None => address,
    }
}

impl Splunk {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        below(NAME, &stream_address(config.address(NAME)?), "")?;
        config.secret(NAME, "sf_token_key")?;
        Ok(Self {
            connector,
            config: config.clone(),
        })
    }
}

/// The events of a stream: name and joined data lines.
fn events(text: &str) -> impl Iterator<Item = (String, String)> + '_ {
    text.split("\n\n").filter_map(|block| {
        let (mut name, mut data) = (String::new(), Vec::new());
        for line in block.lines() {
            let line = line.trim_end_matches('\r');
            if let Some(value) = line.strip_prefix("event:") {
                value.trim().clone_into(&mut name);
            } else if let Some(value) = line.strip_prefix("data:") {
                data.push(value.strip_prefix(' ').unwrap_or(value));
            }
        }
        (!data.is_empty()).then(|| (name, data.join("\n")))
    })
}

fn value(stream: &str) -> Result<f64, Error> {
    let mut series = BTreeSet::new();
    let mut last = None;
    let stream = stream.replace("\r\n", "\n");
    for (name, data) in events(&stream) {
        let body: Value = serde_json::from_str(&data)
            .map_err(|error| Error::answer(NAME, format!("event {name}: {error}")))?;
        match name.as_str() {
            "error" => {
                let message = body["message"].as_str().unwrap_or("the programme failed");
                return Err(Error::answer(NAME, message));
            }
            "control-message" if body["event"] == "CHANNEL_ABORT" => {
                return Err(Error::answer(
                    NAME,
                    format!("the computation was aborted: {}", body["abortInfo"]),
                ));
            }
            "data" => {
                for point in body["data"].as_array().into_iter().flatten() {
                    if let Some(value) = point["value"].as_f64() {
                        series.insert(point["tsId"].as_str().unwrap_or_default().to_owned());
                        last = Some(value);
                    }
                }
            }
            _ => {}
        }
    }
    if series.len() > 1 {
        return Err(Error::answer(
            NAME,
            format!("{} time series; aggregate them to one", series.len()),
        ));
    }
    last.ok_or_else(|| Error::no_values(NAME, "the computation published no value"))
}

#[async_trait]
impl Provider for Splunk {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let config = &self.config;
        let stop = ask.now.as_millisecond();
        let start = stop - i64::try_from((ask.interval * WINDOW).as_millis()).unwrap_or(i64::MAX / 2);
        let mut url = below(
            NAME,
            &stream_address(config.address(NAME)?),
            "v2/signalflow/execute",
        )?;
        url.query_pairs_mut()
            .append_pair("start", &start.to_string())
            .append_pair("stop", &stop.to_string())
            .append_pair("immediate", "true");
        let mut call = Call::post(NAME, url, "text/plain", ask.query.to_owned())
            .with_config(config)?
            .with_secret(
                HeaderName::from_static("x-sf-token"),
                "",
                config.secret(NAME, "sf_token_key")?,
            )?;
        call.headers
            .insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        let answer = self.connector.http.send(&call).await?;
        value(&String::from_utf8_lossy(&answer.body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_flagger_takes_lead_to_the_stream() {
        for address in ["https://api.us1.signalfx.com", "wss://stream.us1.signalfx.com"] {
            assert_eq!(stream_address(address), "https://stream.us1.signalfx.com");
        }
        assert_eq!(stream_address("http://127.0.0.1:8080"), "http://127.0.0.1:8080");
    }

    #[test]
    fn an_aborted_computation_is_an_error_and_not_an_empty_one() {
        let text = "event: control-message\ndata: {\"event\":\"CHANNEL_ABORT\",\"abortInfo\":{\"sf_job_abortReason\":\"x\"}}\n\n";
        assert!(!value(text).unwrap_err().is_no_values());
        assert!(value("event: metadata\ndata: {}\n\n").unwrap_err().is_no_values());
    }
}
