//! Keptn (`metrics.keptn.sh/v1beta1`), through the cluster's API.
//!
//! Query: `keptnmetric/<namespace>/<name>` reads `status.value` of a KeptnMetric.
//! `analysis/<namespace>/<definition>/<duration>/<key=value;…>` creates an Analysis of that AnalysisDefinition over the
//! last `duration` (`1m` unless given), watches it until it is completed (at most 10 s), deletes it, and yields 1 when
//! it passed, else 0. The query is taken in lower case, as in Flagger.
//!
//! The Analysis is named after the definition and who asks, so that one which a crash left behind is replaced by the
//! next instead of staying for ever (Flagger names them at random).
//!
//! No value: an error, as in Flagger: nothing says that a metric which Keptn has not computed would be empty.

use std::time::Duration;

use async_trait::async_trait;
use kube::Api;
use kube::api::{ApiResource, DeleteParams, DynamicObject, PostParams};
use kube::core::GroupVersionKind;
use kube::runtime::wait::await_condition;
use serde_json::{Map, Value, json};

use crate::externalmetrics::of_kube;
use crate::{Ask, Connector, Error, Provider, TIMEOUT};

const NAME: &str = "keptn";
/// Flagger's.
const ANALYSIS_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Keptn {
    client: Client,
}

/// A client has no `Debug`.
struct Client(kube::Client);

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

#[derive(Debug, PartialEq)]
enum Wanted {
    Metric {
        namespace: String,
        name: String,
    },
    Analysis {
        namespace: String,
        definition: String,
        duration: String,
        arguments: Map<String, Value>,
    },
}

fn wanted(query: &str) -> Result<Wanted, Error> {
    const FORM: &str = "provider keptn takes keptnmetric/<namespace>/<name> or \
                        analysis/<namespace>/<definition>/<duration>/<key=value;...>";
    let query = query.trim().to_lowercase();
    let parts: Vec<&str> = query.split('/').collect();
    let &[kind, namespace, name, ref rest @ ..] = parts.as_slice() else {
        return Err(Error::Query(FORM.to_owned()));
    };
    match kind {
        "keptnmetric" | "keptnmetrics" => Ok(Wanted::Metric {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }),
        "analysis" | "analyses" => Ok(Wanted::Analysis {
            namespace: namespace.to_owned(),
            definition: name.to_owned(),
            duration: rest.first().copied().unwrap_or("1m").to_owned(),
            arguments: rest
                .get(1)
                .into_iter()
                .flat_map(|arguments| arguments.split(';'))
                .filter_map(|argument| argument.split_once('='))
                .map(|(key, value)| (key.to_owned(), Value::String(value.to_owned())))
                .collect(),
        }),
        other => Err(Error::Query(format!(
            "{other:?} is neither keptnmetric nor analysis; {FORM}"
        ))),
    }
}

impl Keptn {
    pub(crate) fn new(connector: &Connector) -> Result<Self, Error> {
        Ok(Self {
            client: Client(connector.cluster(NAME)?),
        })
    }

    fn api(&self, kind: &str, plural: &str, namespace: &str) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("metrics.keptn.sh", "v1beta1", kind);
        let resource = ApiResource::from_gvk_with_plural(&kind, plural);
        Api::namespaced_with(self.client.0.clone(), namespace, &resource)
    }

    async fn metric(&self, namespace: &str, name: &str) -> Result<f64, Error> {
        let api = self.api("KeptnMetric", "keptnmetrics", namespace);
        let metric = within(TIMEOUT, async {
            api.get(name).await.map_err(|error| of_kube(NAME, error))
        })
        .await?;
        let value = metric.data["status"]["value"]
            .as_str()
            .ok_or_else(|| Error::answer(NAME, format!("KeptnMetric {namespace}/{name} has no value yet")))?;
        value
            .parse()
            .map_err(|_| Error::answer(NAME, format!("{value:?} of KeptnMetric {namespace}/{name}")))
    }

    async fn analysis(&self, api: &Api<DynamicObject>, name: &str, spec: Value) -> Result<f64, Error> {
        let failed = |error| of_kube(NAME, error);
        let object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "metrics.keptn.sh/v1beta1",
            "kind": "Analysis",
            "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "serin"}},
            "spec": spec,
        }))
        .map_err(|error| Error::Query(error.to_string()))?;
        match api.create(&PostParams::default(), &object).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {
                api.delete(name, &DeleteParams::default()).await.map_err(failed)?;
                api.create(&PostParams::default(), &object)
                    .await
                    .map_err(failed)?;
            }
            other => {
                other.map_err(failed)?;
            }
        }
        let completed = |object: Option<&DynamicObject>| {
            object.is_some_and(|object| {
                object.data["status"]["state"] == "Completed" && object.data["status"]["pass"].is_boolean()
            })
        };
        let done = await_condition(api.clone(), name, completed)
            .await
            .map_err(|error| Error::answer(NAME, error.to_string()))?;
        let passed = done.is_some_and(|object| object.data["status"]["pass"] == true);
        Ok(if passed { 1.0 } else { 0.0 })
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Timeout {
            provider: NAME,
            host: "the cluster".to_owned(),
            seconds: limit.as_secs(),
        }),
    }
}

#[async_trait]
impl Provider for Keptn {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        match wanted(ask.query)? {
            Wanted::Metric { namespace, name } => self.metric(&namespace, &name).await,
            Wanted::Analysis {
                namespace,
                definition,
                duration,
                arguments,
            } => {
                let api = self.api("Analysis", "analyses", &namespace);
                let name = crate::job::object_name(&definition, ask);
                let spec = json!({
                    "analysisDefinition": {"name": definition},
                    "timeframe": {"recent": duration},
                    "args": arguments,
                });
                let result = within(ANALYSIS_TIMEOUT, self.analysis(&api, &name, spec)).await;
                let gone = within(TIMEOUT, async {
                    api.delete(&name, &DeleteParams::default())
                        .await
                        .map_err(|error| of_kube(NAME, error))
                })
                .await;
                if let Err(error) = gone {
                    tracing::debug!(%error, analysis = %name, "the Analysis stays until the next query");
                }
                result
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_those_of_flagger() {
        assert_eq!(
            wanted(" KeptnMetric/Ns/Response-Time\n").unwrap(),
            Wanted::Metric {
                namespace: "ns".to_owned(),
                name: "response-time".to_owned()
            }
        );
        let Wanted::Analysis {
            duration, arguments, ..
        } = wanted("analysis/ns/def/5m/a=1;b=2;c").unwrap()
        else {
            panic!("an analysis")
        };
        assert_eq!((duration.as_str(), arguments.len()), ("5m", 2));
        assert!(
            matches!(wanted("analysis/ns/def").unwrap(), Wanted::Analysis { duration, .. } if duration == "1m")
        );
        for query in ["", "keptnmetric/ns", "metric/ns/x"] {
            assert!(wanted(query).is_err(), "{query}");
        }
    }
}
