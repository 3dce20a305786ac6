//! What the embedder plugs in: admission of writes and the source of pod logs.

use bytes::Bytes;
use futures::stream::BoxStream;
use serde_json::Value;

/// A write that is about to be validated and stored.
#[derive(Debug, Clone)]
pub struct AdmissionRequest {
    /// `CREATE`, `UPDATE` or `DELETE`.
    pub operation: Operation,
    /// API group, empty for core.
    pub group: String,
    /// API version, as in the request path.
    pub version: String,
    /// Kind, as in `Pod`.
    pub kind: String,
    /// Plural name, as in `pods`.
    pub resource: String,
    /// `status`, `scale`, or empty.
    pub subresource: String,
    /// Empty for cluster-scoped objects.
    pub namespace: String,
    /// Name of the object; may be empty at creation with `generateName` by older clients (the server generates it before admission).
    pub name: String,
    /// Who asks.
    pub user: String,
    /// The object as it would be stored; `Null` for a deletion.
    pub object: Value,
    /// The object as it is; `Null` for a creation.
    pub old_object: Value,
    /// The write will not be kept.
    pub dry_run: bool,
}

/// Kind of write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A new object.
    Create,
    /// A change, by PUT, PATCH or apply.
    Update,
    /// A removal.
    Delete,
}

/// A refused write: HTTP status 403 with this message unless another code is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denied {
    /// Shown to the client.
    pub message: String,
    /// HTTP status; 403 is usual.
    pub code: u16,
}

/// Mutates or refuses writes before they are validated and stored.
#[async_trait::async_trait]
pub trait Admission: Send + Sync + 'static {
    /// Whether this hook wants to see writes of this resource at all (called for every write; must be cheap).
    fn wants(&self, group: &str, resource: &str) -> bool;

    /// `Ok(None)` accepts the object as it is, `Ok(Some(object))` replaces it.
    async fn admit(&self, request: &AdmissionRequest) -> Result<Option<Value>, Denied>;
}

/// What `kubectl logs` asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Container; the server has resolved it where the pod has only one.
    pub container: String,
    /// Keep the stream open.
    pub follow: bool,
    /// The container's former run.
    pub previous: bool,
    /// Prefix each line with its time.
    pub timestamps: bool,
    /// Last lines only.
    pub tail_lines: Option<u64>,
    /// Lines of the last seconds only.
    pub since_seconds: Option<u64>,
    /// Lines since this RFC 3339 time only.
    pub since_time: Option<String>,
    /// Stop after so many bytes.
    pub limit_bytes: Option<u64>,
}

/// Where the logs of pods come from.
#[async_trait::async_trait]
pub trait PodLogs: Send + Sync + 'static {
    /// Stream the log of a container. The error text reaches the client as a 400.
    async fn logs(
        &self,
        namespace: &str,
        pod: &Value,
        options: LogOptions,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, String>;
}
