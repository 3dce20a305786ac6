//! The incremental variant of the protocol (`DeltaAggregatedResources`), client end.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
};
use foldhash::fast::RandomState;

use super::state::{
    Announced, ClientState, Incoming, ProtocolError, Receipt, Received, WILDCARD, expected_type,
};
use crate::refusal::Refusal;
use crate::resource::ResourceType;

impl ClientState {
    /// The next request that the interests call for; call until `None` after each change of interest and after
    /// [`ClientState::connected`].
    pub fn next_delta_request(&mut self) -> Option<DeltaDiscoveryRequest> {
        let resource_type = ResourceType::ALL
            .into_iter()
            .find(|resource_type| self.types[resource_type.index()].is_to_be_announced())?;
        let node = self.node_once();
        let state = &mut self.types[resource_type.index()];
        let all = state.interest.all;
        let mut next = Announced {
            all,
            ..Announced::default()
        };
        // What the server believes to be held, and is not, is given up first and asked for with the next request.
        let mut given_up: Vec<String> = Vec::new();
        if let Some(known) = &mut state.announced {
            for name in known
                .gained
                .extract_if(.., |_, asked| *asked)
                .map(|(name, _)| name)
            {
                given_up.push(name.to_string());
                next.gained.insert(name, false);
            }
        }
        let wildcard = |now: bool| now.then(|| WILDCARD.to_owned()).into_iter();
        let text = |name: Arc<str>| name.to_string();
        let (subscribe, unsubscribe, held) = match state.announced.replace(next) {
            Some(known) => (
                wildcard(all && !known.all)
                    .chain(known.gained.into_keys().map(text))
                    .collect(),
                wildcard(known.all && !all)
                    .chain(known.lost.into_iter().map(text))
                    .chain(given_up)
                    .collect(),
                Default::default(),
            ),
            None => (
                wildcard(all)
                    .chain(state.interest.names.iter().cloned().map(text))
                    .collect(),
                Vec::new(),
                state
                    .held
                    .iter()
                    .map(|(name, version)| (name.to_string(), version.to_string()))
                    .collect(),
            ),
        };
        Some(DeltaDiscoveryRequest {
            node,
            type_url: resource_type.type_url().to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: held,
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// Takes a response apart. The receipt goes back with the verdict to [`ClientState::settle_delta`].
    pub fn receive_delta(
        &mut self,
        response: DeltaDiscoveryResponse,
    ) -> Result<(Incoming, Receipt), ProtocolError> {
        let resource_type = expected_type(self, &response.type_url)?;
        let state = &mut self.types[resource_type.index()];
        let total = response.resources.len();
        let mut malformed = Vec::new();
        let mut upserted = Vec::with_capacity(total);
        let mut absent = Vec::new();
        let contradicted = contradicted(&response.resources, &response.removed_resources);
        for name in &contradicted {
            let reason = "the response says several things about it; say one";
            malformed.push(Refusal::new(name.clone(), reason));
        }
        for resource in response.resources {
            if contradicted.contains(resource.name.as_str()) {
                continue;
            }
            let answers = state.note_aliases(&resource.name, &resource.aliases);
            if !state.is_news(&resource.name, &resource.version) && !answers {
                continue;
            }
            let Some(any) = resource.resource else {
                // For a virtual host that was asked for on demand: there is none. Else a heartbeat of a resource with a
                // time to live, which nobody sends us.
                if resource_type == ResourceType::VirtualHost && resource.ttl.is_none() {
                    absent.push(resource.name);
                    absent.extend(resource.aliases);
                }
                continue;
            };
            if any.type_url == response.type_url {
                let (name, version) = (resource.name.into(), resource.version.into());
                upserted.push(Received {
                    name,
                    version,
                    body: any.value.into(),
                    aliases: resource.aliases.into_iter().map(Arc::from).collect(),
                });
            } else {
                let reason = format!(
                    "the resource is a {} in a response about {}",
                    any.type_url, response.type_url
                );
                malformed.push(Refusal::new(resource.name, reason));
            }
        }
        let removed: Vec<Arc<str>> = response
            .removed_resources
            .into_iter()
            .chain(absent)
            .filter(|name| state.interest.includes(name) && !contradicted.contains(name.as_str()))
            .map(Arc::from)
            .collect();
        if !state.aliases.is_empty() && !removed.is_empty() {
            let gone: HashSet<&str> = removed.iter().map(|name| &**name).collect();
            state.aliases.retain(|_, resource| !gone.contains(&**resource));
        }
        let receipt = Receipt {
            resource_type,
            id: self.hand_over(resource_type, &upserted),
            nonce: response.nonce,
            version_info: String::new(),
            upserted: upserted
                .iter()
                .map(|one| (one.name.clone(), one.version.clone()))
                .collect(),
            removed: removed.clone(),
            total,
            malformed,
        };
        let version = response.system_version_info.into();
        let incoming = Incoming {
            upserted,
            removed,
            version,
        };
        Ok((incoming, receipt))
    }

    /// Takes over what was accepted (everything in the response but `refusals`) and returns the ACK or NACK.
    pub fn settle_delta(&mut self, receipt: &Receipt, refusals: Vec<Refusal>) -> DeltaDiscoveryRequest {
        let error_detail = self.settle(receipt, refusals);
        DeltaDiscoveryRequest {
            type_url: receipt.resource_type.type_url().to_owned(),
            response_nonce: receipt.nonce.clone(),
            error_detail,
            ..DeltaDiscoveryRequest::default()
        }
    }
}

/// Names that a response has more than once, or both has and removes. Envoy refuses the whole response.
fn contradicted(resources: &[Resource], removed: &[String]) -> BTreeSet<Arc<str>> {
    let mut seen: HashSet<&str, RandomState> =
        HashSet::with_capacity_and_hasher(resources.len() + removed.len(), RandomState::default());
    let mut out = BTreeSet::new();
    for resource in resources {
        if !seen.insert(&resource.name) {
            out.insert(resource.name.as_str().into());
        }
    }
    // That something is gone may be said twice.
    for name in removed {
        if seen.contains(name.as_str()) {
            out.insert(name.as_str().into());
        }
    }
    out
}
