//! Logs of pods for the API server, out of the files that the node keeps.

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use serde_json::Value;
use serin_apiserver::{LogOptions, PodLogs};
use serin_workloads::logs::{self, LogTarget};

use super::Cluster;

/// Logs of the cluster's node.
pub(crate) struct NodeLogs {
    logs: logs::PodLogs,
}

impl NodeLogs {
    /// Reads the logs of `cluster`.
    pub(crate) fn new(cluster: &Cluster) -> Self {
        Self {
            logs: logs::PodLogs::new(cluster.directory()),
        }
    }
}

#[async_trait]
impl PodLogs for NodeLogs {
    async fn logs(
        &self,
        namespace: &str,
        pod: &Value,
        options: LogOptions,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, String> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let target = LogTarget {
            namespace: namespace.to_owned(),
            pod: text(&pod["metadata"]["name"]),
            uid: text(&pod["metadata"]["uid"]),
            container: options.container.clone(),
        };
        let count = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
        let options = logs::LogOptions {
            follow: options.follow,
            previous: options.previous,
            tail_lines: options.tail_lines.map(count),
            since: since(&options)?,
            timestamps: options.timestamps,
            limit_bytes: options.limit_bytes.map(count),
        };
        let stream = self
            .logs
            .open(&target, options)
            .map_err(|error| error.to_string())?;
        Ok(stream.boxed())
    }
}

fn since(options: &LogOptions) -> Result<Option<jiff::Timestamp>, String> {
    if let Some(seconds) = options.since_seconds {
        let ago = jiff::SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
        return Ok(jiff::Timestamp::now().checked_sub(ago).ok());
    }
    options
        .since_time
        .as_deref()
        .map(|time| {
            time.parse()
                .map_err(|error| format!("sinceTime {time:?}: {error}"))
        })
        .transpose()
}
