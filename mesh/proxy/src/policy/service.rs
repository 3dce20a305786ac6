//! Where the services are that policies, logs and traces ask.

use std::sync::Arc;
use std::time::Duration;

use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Uri};
use serin_xds::pb::envoy::config::core::v3 as core;

use crate::config::convert::{self, each};
use crate::config::route::Context;
use crate::config::slot::ClusterSlot;
use crate::error::{Refusal, Within};

/// A compiled `GrpcService`.
#[derive(Clone, Debug)]
pub struct GrpcTarget {
    /// The cluster.
    pub cluster: Arc<ClusterSlot>,
    /// `:authority`; the cluster's name where nothing else is said, as in Envoy.
    pub authority: HeaderValue,
    /// Fields for every call.
    pub metadata: Box<[(HeaderName, HeaderValue)]>,
    /// Limit of a call, where the service says one.
    pub timeout: Option<Duration>,
}

impl GrpcTarget {
    /// Compiles the message.
    pub(crate) fn compile(
        from: Option<&core::GrpcService>,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        use core::grpc_service::TargetSpecifier;
        let from = from.ok_or_else(|| Refusal::new("grpc_service", "is missing"))?;
        let envoy = match &from.target_specifier {
            Some(TargetSpecifier::EnvoyGrpc(envoy)) => envoy,
            Some(TargetSpecifier::GoogleGrpc(_)) => {
                return Err(Refusal::new("google_grpc", "not supported, use envoy_grpc"));
            }
            None => return Err(Refusal::new("target_specifier", "is missing")),
        };
        if envoy.cluster_name.is_empty() {
            return Err(Refusal::new("envoy_grpc.cluster_name", "is missing"));
        }
        let authority = if envoy.authority.is_empty() {
            // A cluster's name may hold characters that no authority has.
            if crate::http1::request::valid_host(envoy.cluster_name.as_bytes()) {
                envoy.cluster_name.as_str()
            } else {
                "cluster"
            }
        } else {
            &envoy.authority
        };
        let metadata = each(&from.initial_metadata, "initial_metadata", header_pair)?;
        Ok(Self {
            cluster: context.slots.cluster(&envoy.cluster_name),
            authority: HeaderValue::from_str(authority)
                .map_err(|_| Refusal::new("envoy_grpc.authority", "is not a header value"))?,
            metadata,
            timeout: convert::timeout(from.timeout.as_ref()).within("timeout")?,
        })
    }
}

impl GrpcTarget {
    /// The same service, called with these fields in place of those of the same name.
    pub fn with_fields(&self, fields: &[(HeaderName, HeaderValue)]) -> Self {
        let kept = self
            .metadata
            .iter()
            .filter(|(name, _)| !fields.iter().any(|(own, _)| own == name));
        Self {
            metadata: kept.chain(fields).cloned().collect(),
            ..self.clone()
        }
    }
}

/// A fixed field.
pub(crate) fn header_pair(from: &core::HeaderValue) -> Result<(HeaderName, HeaderValue), Refusal> {
    let name = HeaderName::from_bytes(from.key.as_bytes())
        .map_err(|_| Refusal::new("key", format!("{:?} is not a header name", from.key)))?;
    let value = if from.raw_value.is_empty() {
        HeaderValue::from_str(&from.value)
    } else {
        HeaderValue::from_bytes(&from.raw_value)
    };
    Ok((
        name,
        value.map_err(|_| Refusal::new("value", "is not a header value"))?,
    ))
}

/// A compiled `HttpUri`.
#[derive(Clone, Debug)]
pub struct HttpTarget {
    /// The cluster.
    pub cluster: Arc<ClusterSlot>,
    /// `host`.
    pub authority: HeaderValue,
    /// Path and query.
    pub path: PathAndQuery,
    /// Limit of a request.
    pub timeout: Duration,
}

impl HttpTarget {
    /// Compiles the message.
    pub(crate) fn compile(from: Option<&core::HttpUri>, context: &mut Context<'_>) -> Result<Self, Refusal> {
        use core::http_uri::HttpUpstreamType;
        let from = from.ok_or_else(|| Refusal::new("http_uri", "is missing"))?;
        let wrong = || Refusal::new("uri", format!("{:?} is no URI", from.uri));
        let uri: Uri = from.uri.parse().map_err(|_| wrong())?;
        let Some(HttpUpstreamType::Cluster(cluster)) = &from.http_upstream_type else {
            return Err(Refusal::new("cluster", "is missing"));
        };
        let authority = uri
            .authority()
            .map_or(cluster.as_str(), |authority| authority.as_str());
        Ok(Self {
            cluster: context.slots.cluster(cluster),
            authority: HeaderValue::from_str(authority).map_err(|_| wrong())?,
            path: uri
                .path_and_query()
                .cloned()
                .unwrap_or_else(|| PathAndQuery::from_static("/")),
            timeout: convert::timeout(from.timeout.as_ref())
                .within("timeout")?
                .ok_or_else(|| Refusal::new("timeout", "is missing"))?,
        })
    }
}

/// The bytes of a `DataSource`, read when the configuration arrives.
pub(crate) fn data(from: Option<&core::DataSource>) -> Result<Vec<u8>, Refusal> {
    use core::data_source::Specifier;
    match from.and_then(|source| source.specifier.as_ref()) {
        None => Err(Refusal::new("specifier", "is missing")),
        Some(Specifier::InlineString(text)) => Ok(text.clone().into_bytes()),
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes.clone()),
        Some(Specifier::Filename(path)) => {
            std::fs::read(path).map_err(|error| Refusal::new("filename", format!("{path}: {error}")))
        }
        Some(Specifier::EnvironmentVariable(name)) => std::env::var(name)
            .map(String::into_bytes)
            .map_err(|error| Refusal::new("environment_variable", format!("{name}: {error}"))),
    }
}
