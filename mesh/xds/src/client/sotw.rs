//! The state-of-the-world variant of the protocol (`StreamAggregatedResources`), client end, for servers that have no
//! other.
//!
//! Resources have no versions of their own here; a hash of their content stands in, so that the consumer is handed
//! only what changed. Clusters and listeners come complete (what is absent has been removed); endpoints and routes
//! come as the server likes, and absence means nothing. Virtual hosts exist only in the incremental variant.

use std::collections::HashSet;
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse, Resource};
use envoy_types::pb::google::protobuf::Any;
use prost::Message;

use super::state::{Announced, ClientState, Incoming, ProtocolError, Receipt, Received, expected_type};
use crate::digest;
use crate::refusal::Refusal;
use crate::resource::ResourceType;

/// Field 1 of clusters, load assignments, listeners and route configurations: the name.
#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

const WRAPPER: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";

impl ClientState {
    /// The next request that the interests call for; call until `None` after each change of interest and after
    /// [`ClientState::connected`].
    pub fn next_sotw_request(&mut self) -> Option<DiscoveryRequest> {
        let resource_type = ResourceType::ALL.into_iter().find(|resource_type| {
            *resource_type != ResourceType::VirtualHost
                && self.types[resource_type.index()].is_to_be_announced()
        })?;
        Some(self.sotw_request(resource_type))
    }

    fn sotw_request(&mut self, resource_type: ResourceType) -> DiscoveryRequest {
        let node = self.node_once();
        let state = &mut self.types[resource_type.index()];
        state.announced = Some(Announced {
            all: state.interest.all,
            ..Announced::default()
        });
        DiscoveryRequest {
            version_info: state.version_info.clone(),
            node,
            resource_names: if state.interest.all {
                Vec::new()
            } else {
                state.interest.names.iter().map(ToString::to_string).collect()
            },
            type_url: resource_type.type_url().to_owned(),
            response_nonce: state.nonce.clone(),
            ..DiscoveryRequest::default()
        }
    }

    /// Takes a response apart. The receipt goes back with the verdict to [`ClientState::settle_sotw`].
    pub fn receive_sotw(
        &mut self,
        response: DiscoveryResponse,
    ) -> Result<(Incoming, Receipt), ProtocolError> {
        let resource_type = expected_type(self, &response.type_url)?;
        let state = &mut self.types[resource_type.index()];
        state.nonce.clone_from(&response.nonce);
        let total = response.resources.len();
        let mut present = HashSet::with_capacity(total);
        let mut upserted = Vec::new();
        let mut malformed = Vec::new();
        for (index, any) in response.resources.into_iter().enumerate() {
            match open(any, &response.type_url) {
                Ok((name, body)) => {
                    let version = digest::content_version(&body);
                    if state.is_news(&name, &version) {
                        upserted.push(Received {
                            name: name.as_str().into(),
                            version: version.into(),
                            body: body.into(),
                            aliases: Vec::new(),
                        });
                    }
                    present.insert(name);
                }
                Err(reason) => malformed.push(Refusal::new(format!("#{index}"), reason)),
            }
        }
        let complete = matches!(resource_type, ResourceType::Cluster | ResourceType::Listener);
        // With a resource that has no readable name it is not known which one is absent.
        let removed: Vec<Arc<str>> = if complete && malformed.is_empty() {
            state
                .held
                .keys()
                .filter(|name| !present.contains(name.as_ref()))
                .cloned()
                .collect()
        } else {
            Vec::new()
        };
        let receipt = Receipt {
            resource_type,
            id: self.hand_over(resource_type, &upserted),
            nonce: response.nonce,
            version_info: response.version_info.clone(),
            upserted: upserted
                .iter()
                .map(|one| (one.name.clone(), one.version.clone()))
                .collect(),
            removed: removed.clone(),
            total,
            malformed,
        };
        let version = response.version_info.into();
        let incoming = Incoming {
            upserted,
            removed,
            version,
        };
        Ok((incoming, receipt))
    }

    /// Takes over what was accepted (everything in the response but `refusals`) and returns the ACK or NACK.
    pub fn settle_sotw(&mut self, receipt: &Receipt, refusals: Vec<Refusal>) -> DiscoveryRequest {
        let error_detail = self.settle(receipt, refusals);
        let state = &mut self.types[receipt.resource_type.index()];
        if error_detail.is_none() {
            state.version_info.clone_from(&receipt.version_info);
        }
        let mut request = self.sotw_request(receipt.resource_type);
        request.response_nonce.clone_from(&receipt.nonce);
        request.error_detail = error_detail;
        request
    }
}

/// Name and encoding of a resource, taken out of its wrapper if it has one.
fn open(any: Any, type_url: &str) -> Result<(String, Vec<u8>), String> {
    if any.type_url == WRAPPER {
        let wrapped = Resource::decode(any.value.as_slice())
            .map_err(|error| format!("the wrapper of the resource cannot be read: {error}"))?;
        let inner = wrapped
            .resource
            .ok_or_else(|| format!("the wrapper of {:?} is empty", wrapped.name))?;
        return open(inner, type_url);
    }
    if any.type_url != type_url {
        return Err(format!(
            "the resource is a {} in a response about {type_url}",
            any.type_url
        ));
    }
    let named = Named::decode(any.value.as_slice())
        .map_err(|error| format!("the name of the resource cannot be read: {error}"))?;
    Ok((named.name, any.value))
}
