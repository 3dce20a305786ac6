//! The incremental variant of the protocol (`DeltaAggregatedResources`), server end.

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource,
};
use envoy_types::pb::google::protobuf::Any;

use super::connection::{Connection, Response};
use crate::client::state::WILDCARD;
use crate::resource::ResourceType;

/// Applies a request. One of a type that we do not serve is ignored, as istiod does: the client waits in vain for what
/// nobody has.
pub(super) fn receive(connection: &mut Connection, request: &DeltaDiscoveryRequest) {
    let Some(resource_type) = ResourceType::from_type_url(&request.type_url) else {
        return;
    };
    if !request.response_nonce.is_empty() {
        let error = request
            .error_detail
            .as_ref()
            .map(|status| status.message.as_str());
        // Nonces are ours; one that is no number is an answer to somebody else's response.
        if let Ok(nonce) = request.response_nonce.parse() {
            connection.answer(resource_type, nonce, error);
        }
    }
    let first = !connection.has_asked(resource_type);
    let subscribe = &request.resource_names_subscribe;
    // An empty first request means everything.
    let all = subscribe.iter().any(|name| name == WILDCARD) || (first && subscribe.is_empty());
    if first {
        let held = request
            .initial_resource_versions
            .iter()
            .filter(|(name, _)| all || subscribe.contains(name));
        connection.state_held(
            resource_type,
            held.map(|(name, version)| (name.as_str(), version.as_str())),
        );
    }
    if first || !subscribe.is_empty() {
        let names = subscribe
            .iter()
            .map(String::as_str)
            .filter(|name| *name != WILDCARD);
        connection.subscribe(resource_type, all, names);
    }
    let unsubscribe = &request.resource_names_unsubscribe;
    if !unsubscribe.is_empty() {
        let all = unsubscribe.iter().any(|name| name == WILDCARD);
        connection.unsubscribe(resource_type, all, unsubscribe.iter().map(String::as_str));
    }
}

/// A response as it goes on the wire.
pub(super) fn response(response: &Response) -> DeltaDiscoveryResponse {
    let type_url = response.resource_type.type_url();
    DeltaDiscoveryResponse {
        resources: response
            .upserted
            .iter()
            .map(|resource| WireResource {
                name: resource.name.to_string(),
                version: resource.version.to_string(),
                resource: Some(Any {
                    type_url: type_url.to_owned(),
                    value: resource.body.to_vec(),
                }),
                ..WireResource::default()
            })
            .collect(),
        type_url: type_url.to_owned(),
        removed_resources: response.removed.iter().map(ToString::to_string).collect(),
        nonce: response.nonce.to_string(),
        ..DeltaDiscoveryResponse::default()
    }
}
