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

    /// Takes a change in. `None` asks for a reset; `Some(Some(service))` names the Service whose endpoints changed.
    pub(crate) fn apply(&self, change: &Change<EndpointSlice>) -> Option<Option<Service>> {
        let mut ready = self.ready.lock();
        match change {
            Change::Applied(slice) => Some(service_of(slice).and_then(|service| {
                let slices = ready.entry(service.clone()).or_default();
                let count = count(slice);
                (slices.insert(slice.name_any(), count) != Some(count)).then_some(service)
            })),
            Change::Deleted(slice) => Some(service_of(slice).inspect(|service| {
                if let Some(slices) = ready.get_mut(service) {
                    slices.remove(&slice.name_any());
                    if slices.is_empty() {
                        ready.remove(service);
                    }
                }
            })),
            Change::Resync => None,
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
