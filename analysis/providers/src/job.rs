//! A Kubernetes Job as a check (Argo Rollouts' `job` provider; not in Flagger).
//!
//! Query: the manifest of a `batch/v1` Job, YAML or JSON. It is created in the MetricTemplate's namespace (a namespace or
//! a name in it is replaced), watched until it is complete or failed, and deleted with its pods. Deadline:
//! `activeDeadlineSeconds`, 600 s unless given, at most an hour, and 30 s more for the scheduler.
//!
//! Value: 1 when it is complete, 0 when it failed.

use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::batch::v1::Job;
use kube::Api;
use kube::api::{DeleteParams, PostParams, PropagationPolicy};
use kube::runtime::wait::await_condition;
use serde_json::json;

use crate::externalmetrics::of_kube;
use crate::{Ask, Connector, Error, Provider, TIMEOUT};

const NAME: &str = "job";
/// Deadline of a Job that names none.
const DEADLINE_DEFAULT: i64 = 600;
const DEADLINE_MAX: i64 = 3600;
/// Scheduling and reporting, on top of the Job's own deadline.
const MARGIN: Duration = Duration::from_secs(30);
/// After this long the cluster removes a finished Job that a crash of ours left behind.
const TTL_SECONDS: i32 = 600;
/// A Job's pods carry its name as a label.
const NAME_MAX: usize = 52;

pub(crate) struct JobProvider {
    client: kube::Client,
}

impl std::fmt::Debug for JobProvider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job")
    }
}

impl JobProvider {
    pub(crate) fn new(connector: &Connector) -> Result<Self, Error> {
        Ok(Self {
            client: connector.cluster(NAME)?,
        })
    }
}

/// `<base>-<hash of who asks>`: the same question has the same name, so nothing piles up.
pub(crate) fn object_name(base: &str, ask: &Ask<'_>) -> String {
    use aws_lc_rs::digest;
    let who = format!("{}/{}/{}", ask.namespace, ask.asker, base);
    let hash = digest::digest(&digest::SHA256, who.as_bytes());
    let tail = crate::aws::hex(&hash.as_ref()[..4]);
    let base: String = base
        .chars()
        .filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.'))
        .take(NAME_MAX - tail.len() - 1)
        .collect();
    format!("{}-{tail}", base.trim_end_matches(['-', '.']))
}

/// The Job to create, and how long to wait for it.
fn job(ask: &Ask<'_>) -> Result<(Job, Duration), Error> {
    let bad = |reason: String| {
        Error::Query(format!(
            "provider job takes the manifest of a batch/v1 Job: {reason}"
        ))
    };
    let documents =
        serin_manifests::parse_documents(ask.query, "query").map_err(|error| bad(error.to_string()))?;
    let [document] = documents.as_slice() else {
        return Err(bad(format!("there are {} documents in it", documents.len())));
    };
    if document.api_version() != "batch/v1" || document.kind() != "Job" {
        return Err(bad(format!(
            "it is a {} {}",
            document.api_version(),
            document.kind()
        )));
    }
    let mut value = document.to_json().map_err(|error| bad(error.to_string()))?;
    let labels = value["metadata"]["labels"].take();
    value["metadata"] =
        json!({"name": object_name(&format!("metric-{}", ask.asker), ask), "namespace": ask.namespace});
    value["metadata"]["labels"] = if labels.is_object() { labels } else { json!({}) };
    value["metadata"]["labels"]["app.kubernetes.io/managed-by"] = json!("serin");
    let deadline = value["spec"]["activeDeadlineSeconds"]
        .as_i64()
        .unwrap_or(DEADLINE_DEFAULT)
        .clamp(1, DEADLINE_MAX);
    value["spec"]["activeDeadlineSeconds"] = json!(deadline);
    if value["spec"]["ttlSecondsAfterFinished"].is_null() {
        value["spec"]["ttlSecondsAfterFinished"] = json!(TTL_SECONDS);
    }
    let job = serde_json::from_value(value).map_err(|error| bad(error.to_string()))?;
    Ok((job, Duration::from_secs(deadline.unsigned_abs()) + MARGIN))
}

/// Whether a Job is complete (`Some(true)`), failed (`Some(false)`) or still at it.
fn outcome(job: &Job) -> Option<bool> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    conditions
        .iter()
        .filter(|condition| condition.status == "True")
        .find_map(|condition| match condition.type_.as_str() {
            "Complete" => Some(true),
            "Failed" => Some(false),
            _ => None,
        })
}

async fn run(api: &Api<Job>, job: &Job, name: &str) -> Result<f64, Error> {
    let failed = |error| of_kube(NAME, error);
    match api.create(&PostParams::default(), job).await {
        Err(kube::Error::Api(status)) if status.code == 409 => {
            // Left behind by a controller that died while it waited.
            api.delete(name, &delete()).await.map_err(failed)?;
            let gone = |job: Option<&Job>| job.is_none();
            await_condition(api.clone(), name, gone)
                .await
                .map_err(|error| Error::answer(NAME, error.to_string()))?;
            api.create(&PostParams::default(), job).await.map_err(failed)?;
        }
        other => {
            other.map_err(failed)?;
        }
    }
    let finished = |job: Option<&Job>| job.is_none_or(|job| outcome(job).is_some());
    let done = await_condition(api.clone(), name, finished)
        .await
        .map_err(|error| Error::answer(NAME, error.to_string()))?;
    match done.as_ref().and_then(outcome) {
        Some(complete) => Ok(if complete { 1.0 } else { 0.0 }),
        None => Err(Error::answer(
            NAME,
            format!("Job {name} was deleted before it finished"),
        )),
    }
}

fn delete() -> DeleteParams {
    DeleteParams {
        propagation_policy: Some(PropagationPolicy::Background),
        ..DeleteParams::default()
    }
}

#[async_trait]
impl Provider for JobProvider {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn query(&self, ask: &Ask<'_>) -> Result<f64, Error> {
        let (job, limit) = job(ask)?;
        let name = job.metadata.name.clone().unwrap_or_default();
        let api: Api<Job> = Api::namespaced(self.client.clone(), ask.namespace);
        let timeout = |limit: Duration| Error::Timeout {
            provider: NAME,
            host: format!("Job {}/{name}", ask.namespace),
            seconds: limit.as_secs(),
        };
        let result = tokio::time::timeout(limit, run(&api, &job, &name))
            .await
            .unwrap_or_else(|_| Err(timeout(limit)));
        let deletion = delete();
        match tokio::time::timeout(TIMEOUT, api.delete(&name, &deletion)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                tracing::debug!(%error, job = %name, "the Job stays until its time to live is over")
            }
            Err(_) => tracing::debug!(job = %name, "the Job stays until its time to live is over"),
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(query: &str) -> Ask<'_> {
        Ask {
            query,
            interval: Duration::from_secs(60),
            now: jiff::Timestamp::UNIX_EPOCH,
            namespace: "test",
            asker: "podinfo-smoke",
        }
    }

    #[test]
    fn a_job_gets_a_name_of_its_own_and_a_deadline() {
        let manifest = "apiVersion: batch/v1\nkind: Job\nmetadata: {name: x, namespace: elsewhere, labels: {a: b}}\nspec:\n  template:\n    spec:\n      restartPolicy: Never\n      containers: [{name: c, image: i, command: [\"yes\"]}]\n";
        let (made, limit) = job(&ask(manifest)).unwrap();
        let metadata = &made.metadata;
        assert!(
            metadata
                .name
                .as_deref()
                .unwrap()
                .starts_with("metric-podinfo-smoke-")
        );
        assert_eq!(metadata.namespace.as_deref(), Some("test"));
        assert_eq!(metadata.labels.as_ref().unwrap().len(), 2);
        assert_eq!(made.spec.unwrap().active_deadline_seconds, Some(600));
        assert_eq!(limit, Duration::from_secs(630));
        for query in [
            "",
            "kind: Job",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n",
        ] {
            assert!(job(&ask(query)).is_err(), "{query}");
        }
    }
}
