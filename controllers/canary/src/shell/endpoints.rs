//! Ready endpoints by Service, kept from EndpointSlices as they change.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use parking_lot::Mutex;
use serin_kit::cache::Change;

/// Label of an EndpointSlice that names its Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

type Service = (String, String);

/// What a change of an EndpointSlice means.
pub(crate) enum Effect {
    /// The ready endpoints of this Service (namespace, name) changed.
    Changed(String, String),
    /// Nothing that counts.
    Nothing,
    /// Changes may have been missed.
    Reset,
}

#[derive(Default)]
pub(crate) struct Endpoints {
    ready: Mutex<HashMap<Service, HashMap<String, usize>>>,
}

impl Endpoints {
    /// Ready endpoints of a Service.
    pub(crate) fn ready(&self, namespace: &str, service: &str) -> usize {
        self.ready
            .lock()
            .get(&(namespace.to_owned(), service.to_owned()))
            .map_or(0, |slices| slices.values().sum())
    }

    pub(crate) fn reset(&self, slices: &[Arc<EndpointSlice>]) {
        let mut ready = self.ready.lock();
        ready.clear();
        for slice in slices {
            if let Some(service) = service_of(slice) {
                ready
                    .entry(service)
                    .or_default()
                    .insert(slice.name_any(), count(slice));
            }
        }
    }

    /// Takes a change in.
    pub(crate) fn apply(&self, change: &Change<EndpointSlice>) -> Effect {
        let (slice, now) = match change {
            Change::Applied(slice) => (slice, Some(count(slice))),
            Change::Deleted(slice) => (slice, None),
            Change::Resync => return Effect::Reset,
        };
        let Some(service) = service_of(slice) else {
            return Effect::Nothing;
        };
        let mut ready = self.ready.lock();
        let slices = ready.entry(service.clone()).or_default();
        let before = match now {
            Some(now) => slices.insert(slice.name_any(), now),
            None => slices.remove(&slice.name_any()),
        };
        if slices.is_empty() {
            ready.remove(&service);
        }
        if before == now {
            Effect::Nothing
        } else {
            Effect::Changed(service.0, service.1)
        }
    }
}

fn service_of(slice: &EndpointSlice) -> Option<Service> {
    let name = slice.metadata.labels.as_ref()?.get(SERVICE_LABEL)?;
    Some((slice.namespace().unwrap_or_default(), name.clone()))
}

/// An endpoint whose readiness is unknown counts as ready, as the API says it should.
fn count(slice: &EndpointSlice) -> usize {
    slice
        .endpoints
        .iter()
        .filter(|endpoint| {
            endpoint
                .conditions
                .as_ref()
                .and_then(|conditions| conditions.ready)
                .unwrap_or(true)
        })
        .map(|endpoint| endpoint.addresses.len())
        .sum()
}
