//! The state-of-the-world variant of the protocol (`StreamAggregatedResources`), server end.
//!
//! The same [`Connection`] decides what is to be sent; here its responses become whole worlds for clusters and
//! listeners, whose absence means removal. For endpoints and routes absence means nothing, so that a removal needs no
//! message.

use std::collections::HashSet;

use envoy_types::pb::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse};
use envoy_types::pb::google::protobuf::Any;

use super::connection::{Connection, Response};
use crate::client::state::WILDCARD;
use crate::resource::ResourceType;

fn is_complete(resource_type: ResourceType) -> bool {
    matches!(resource_type, ResourceType::Cluster | ResourceType::Listener)
}

/// Applies a request. One with a nonce that is not the last one of its type was overtaken by a response and says
/// nothing; the client's answer to that response repeats what it wants.
pub(super) fn receive(connection: &mut Connection, request: &DiscoveryRequest) {
    let Some(resource_type) = ResourceType::from_type_url(&request.type_url) else {
        return;
    };
    // Virtual hosts exist only in the incremental variant.
    if resource_type == ResourceType::VirtualHost {
        return;
    }
    let first = !connection.has_asked(resource_type);
    if !first {
        let nonce = request.response_nonce.parse().ok();
        match (connection.outstanding(resource_type), nonce) {
            (Some(outstanding), Some(nonce)) if outstanding == nonce => {
                let error = request
                    .error_detail
                    .as_ref()
                    .map(|status| status.message.as_str());
                connection.answer(resource_type, nonce, error);
            }
            (Some(_), _) => return,
            // A change of names between two responses.
            (None, _) => {}
        }
    }
    let all = request.resource_names.iter().any(|name| name == WILDCARD)
        || (first && is_complete(resource_type) && request.resource_names.is_empty());
    let names: HashSet<&str> = request
        .resource_names
        .iter()
        .map(String::as_str)
        .filter(|name| *name != WILDCARD)
        .collect();
    let known: HashSet<String> = connection
        .subscribed_names(resource_type)
        .map(ToString::to_string)
        .collect();
    let gained: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| !known.contains(*name))
        .collect();
    if first || all || !gained.is_empty() {
        connection.subscribe(resource_type, all, gained);
    }
    let lost: Vec<&str> = known
        .iter()
        .map(String::as_str)
        .filter(|name| !names.contains(name))
        .collect();
    if !lost.is_empty() {
        connection.unsubscribe(resource_type, false, lost);
    }
}

/// A response as it goes on the wire; `None` if this variant has no words for it, in which case the client has, as far
/// as anybody can tell, taken it.
pub(super) fn response(connection: &mut Connection, response: &Response) -> Option<DiscoveryResponse> {
    let resource_type = response.resource_type;
    let resources = if is_complete(resource_type) {
        connection.world(resource_type)
    } else if response.upserted.is_empty() {
        connection.answer(resource_type, response.nonce, None);
        return None;
    } else {
        response.upserted.clone()
    };
    let type_url = resource_type.type_url();
    Some(DiscoveryResponse {
        // Counts on the stream; the versions of the resources are not visible in this variant.
        version_info: response.nonce.to_string(),
        resources: resources
            .iter()
            .map(|resource| Any {
                type_url: type_url.to_owned(),
                value: resource.body.to_vec(),
            })
            .collect(),
        type_url: type_url.to_owned(),
        nonce: response.nonce.to_string(),
        ..DiscoveryResponse::default()
    })
}
