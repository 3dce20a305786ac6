//! The Kubernetes external metrics API (what the Datadog, KEDA and Prometheus adapters serve).
//!
//! Query: `<namespace>/<metric>?labelSelector=<selector>`; the namespace may be left out (`default`), as may the
//! selector. Request: `GET /apis/external.metrics.k8s.io/v1beta1/namespaces/<namespace>/<metric>?labelSelector=…` of the
//! cluster's API server, or of `address` with the Secret's `token` as Bearer. The cluster's own credentials are never
//! sent to an `address` (Flagger sends them).
//!
//! Value: the first item's quantity. None: no values.

use async_trait::async_trait;
use http::header::AUTHORIZATION;
use serde::Deserialize;

use crate::error::excerpt;
use crate::http::{Call, below};
use crate::{Ask, Config, Connector, Error, Provider, TIMEOUT};

const NAME: &str = "externalmetrics";

#[derive(Debug)]
pub(crate) struct ExternalMetrics {
    connector: Connector,
    config: Config,
}

impl ExternalMetrics {
    pub(crate) fn new(connector: Connector, config: &Config) -> Result<Self, Error> {
        match config.address.as_deref().filter(|address| !address.is_empty()) {
            Some(address) => {
                below(NAME, address, "")?;
            }
            None => {
                connector.cluster(NAME)?;
            }
        }
        Ok(Self {
            connector,
            config: config.clone(),
        })
    }
}

/// Path and query of the API.
fn path(query: &str) -> Result<(String, Option<String>), Error> {
    let bad = |reason: &str| {
        Error::Query(format!(
            "provider externalmetrics takes <namespace>/<metric>?labelSelector=<selector>: {reason}"
        ))
    };
    let query = query.trim();
    let (names, parameters) = match query.split_once('?') {
        Some((names, parameters)) => (names, Some(parameters)),
        None => (query, None),
    };
    let (namespace, metric) = match names.split_once('/') {
        Some((_, rest)) if rest.contains('/') => return Err(bad("there are too many slashes")),
        Some(("", metric)) => ("default", metric),
        Some(pair) => pair,
        None => ("default", names),
    };
    if metric.is_empty() {
        return Err(bad("the metric has no name"));
    }
    let fits = |name: &str| {
        name.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._|:@".contains(&byte))
    };
    if !fits(namespace) || !fits(metric) || metric.starts_with('.') || namespace.starts_with('.') {
        return Err(bad("a name has characters that a path cannot carry"));
    }
    let selector = parameters.and_then(|parameters| {
        // Any base will do: only the query string is read.
        let url = reqwest::Url::parse(&format!("http://q/?{parameters}")).ok()?;
        let (_, selector) = url.query_pairs().find(|(key, _)| key == "labelSelector")?;
        Some(selector.into_owned()).filter(|selector| !selector.is_empty())
    });
    Ok((
        format!("/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/{metric}"),
        selector,
    ))
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    value: String,
}

/// A Kubernetes quantity (`250m`, `1.5`, `2k`, `3Mi`, `1e3`) as a number.
pub(crate) fn quantity(text: &str) -> Option<f64> {
    let text = text.trim();
    if let Ok(number) = text.parse::<f64>() {
        return number.is_finite().then_some(number);
    }
    const SUFFIXES: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let (suffix, factor) = SUFFIXES.iter().find(|(suffix, _)| text.ends_with(suffix))?;
    let number = text.strip_suffix(suffix)?.parse::<f64>().ok()?;
    // 250m is a quarter: dividing keeps it exact where multiplying by 0.001 would not.
    Some(if *factor < 1.0 {
        number / (1.0 / factor).round()
    } else {
        number * factor
    })
}

#[async_trait]
impl Provider for ExternalMetrics {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let config = &self.config;
        let (path, selector) = path(ask.query)?;
        let list: List = match config.address.as_deref().filter(|address| !address.is_empty()) {
            Some(address) => {
                let mut url = below(NAME, address, &path)?;
                if let Some(selector) = &selector {
                    url.query_pairs_mut().append_pair("labelSelector", selector);
                }
                let mut call = Call::get(NAME, url).with_config(config)?;
                if let Some(token) = config.optional_secret("token") {
                    call = call.with_secret(AUTHORIZATION, "Bearer ", token)?;
                }
                self.connector.http.send(&call).await?.json(NAME)?
            }
            None => of_cluster(&self.connector.cluster(NAME)?, &path, selector.as_deref()).await?,
        };
        let first = list
            .items
            .first()
            .ok_or_else(|| Error::no_values(NAME, "there is no such metric"))?;
        quantity(&first.value)
            .ok_or_else(|| Error::answer(NAME, format!("{:?} is not a quantity", first.value)))
    }
}

async fn of_cluster(client: &kube::Client, path: &str, selector: Option<&str>) -> Result<List, Error> {
    let mut uri = path.to_owned();
    if let Some(selector) = selector
        && let Ok(mut url) = reqwest::Url::parse("http://q/")
    {
        url.query_pairs_mut().append_pair("labelSelector", selector);
        uri.push('?');
        uri.push_str(url.query().unwrap_or_default());
    }
    let request = http::Request::get(uri)
        .body(Vec::new())
        .map_err(|error| Error::Query(error.to_string()))?;
    let answered = tokio::time::timeout(TIMEOUT, client.request_text(request)).await;
    let text = answered
        .map_err(|_| Error::Timeout {
            provider: NAME,
            host: "the cluster".to_owned(),
            seconds: TIMEOUT.as_secs(),
        })?
        .map_err(|error| of_kube(NAME, error))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::answer(NAME, format!("{error}: {}", excerpt(text.as_bytes()))))
}

/// An API server's refusal.
pub(crate) fn of_kube(provider: &'static str, error: kube::Error) -> Error {
    let host = "the cluster".to_owned();
    match error {
        kube::Error::Api(status) => Error::Status {
            provider,
            host,
            status: status.code,
            excerpt: excerpt(status.message.as_bytes()),
        },
        other => Error::Unreachable {
            provider,
            host,
            reason: other.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, expected) in [
            ("250m", 0.25),
            ("1500u", 0.0015),
            ("3", 3.0),
            ("1.5", 1.5),
            ("2k", 2000.0),
            ("1Mi", 1_048_576.0),
            ("1e3", 1000.0),
            ("-5m", -0.005),
            ("2E", 2e18),
        ] {
            assert_eq!(quantity(text), Some(expected), "{text}");
        }
        for text in ["", "m", "x", "1x", "NaN", "inf"] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn queries_name_namespace_metric_and_selector() {
        let base = "/apis/external.metrics.k8s.io/v1beta1/namespaces";
        for (query, expected, selector) in [
            (
                "ns/errors?labelSelector=app%3Dweb,tier%3Da",
                format!("{base}/ns/errors"),
                Some("app=web,tier=a"),
            ),
            ("errors", format!("{base}/default/errors"), None),
            ("/errors\n", format!("{base}/default/errors"), None),
        ] {
            assert_eq!(
                path(query).unwrap(),
                (expected, selector.map(str::to_owned)),
                "{query}"
            );
        }
        for query in ["", "ns/", "a/b/c", "../x", "ns/..", "ns/a b"] {
            assert!(path(query).is_err(), "{query}");
        }
    }
}
