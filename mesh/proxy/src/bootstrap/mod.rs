//! What the process is told at its start: a bootstrap file in Envoy's shape ([`mod@file`]), or the environment of a pod as
//! Istio's agent reads it ([`agent`]); and listening sockets that the parent hands over ([`inherited`]).

#![allow(deprecated)] // files still hold fields that Envoy calls deprecated

pub mod agent;
pub mod file;
pub mod inherited;
mod json;
mod place;
#[cfg(test)]
mod recorded;
mod schema;
mod shown;

use prost::Message as _;
use serin_xds::pb::envoy::admin::v3 as admin;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use serin_xds::pb::envoy::service::discovery::v3 as discovery;

use crate::error::Refusal;

/// Shows encoded messages as protobuf's JSON. Made for one dump: the schema is indexed for it and forgotten after it.
pub(crate) struct Showing(schema::Schema);

impl Showing {
    /// Reads the schema.
    pub(crate) fn new() -> Self {
        Self(schema::Schema::load())
    }

    /// The bytes of a message of that name.
    pub(crate) fn show(&self, message: &str, bytes: &[u8]) -> serde_json::Value {
        shown::show(&self.0, message, bytes)
    }
}

/// A request to look at traffic, as YAML or JSON.
pub(crate) fn tap_request(text: &str) -> Result<admin::TapRequest, Refusal> {
    let value = file::document(text)?;
    let bytes = json::encode(&schema::Schema::load(), "envoy.admin.v3.TapRequest", &value)?;
    admin::TapRequest::decode(bytes.as_slice()).map_err(|error| Refusal::new("", error.to_string()))
}

/// The secrets of a file with a `DiscoveryResponse`, as YAML or JSON.
pub(crate) fn discovered_secrets(text: &str) -> Result<Vec<tls::Secret>, Refusal> {
    let value = file::document(text)?;
    let schema = schema::Schema::load();
    let bytes = json::encode(&schema, "envoy.service.discovery.v3.DiscoveryResponse", &value)?;
    let bad = |error: prost::DecodeError| Refusal::new("", error.to_string());
    let response = discovery::DiscoveryResponse::decode(bytes.as_slice()).map_err(bad)?;
    response
        .resources
        .iter()
        .enumerate()
        .map(|(index, any)| {
            if !any
                .type_url
                .ends_with("/envoy.extensions.transport_sockets.tls.v3.Secret")
            {
                return Err(Refusal::new(
                    format!("resources[{index}]"),
                    format!("{} is no secret", any.type_url),
                ));
            }
            tls::Secret::decode(any.value.as_slice()).map_err(bad)
        })
        .collect()
}
