//! Watches Services and pods and carries out [`super::endpointslice::plan`].

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serin_kit::events::Recorder;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::endpointslice::{MANAGED_BY_LABEL, MANAGER, plan, selects};
use super::queue::Queue;
use crate::Error;
use crate::mirror::{Change, Key, key};
use crate::services::rules::SERVICE_NAME_LABEL;
use crate::services::slices_of;

struct Controller {
    shared: Shared,
    recorder: Recorder,
}

pub(crate) async fn run(shared: Shared, recorder: Recorder, cancel: CancellationToken) {
    let mut services = shared.services.changes();
    let mut pods = shared.pods.changes();
    let mut slices = shared.slices.changes();
    let controller = Controller { shared, recorder };
    let mut queue = Queue::default();
    queue.add_all(controller.everything());
    loop {
        while !cancel.is_cancelled()
            && let Some(key) = queue.pop()
        {
            let outcome = controller.sync(&key).await.map(|()| None);
            queue.settle(key, "sync the endpoints of a Service", outcome);
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = queue.wait() => {}
            change = services.next() => match change {
                Change::Applied(service) | Change::Deleted(service) => queue.add(key(service.as_ref())),
                Change::Resync => queue.add_all(controller.everything()),
            },
            change = pods.next() => match change {
                Change::Applied(pod) | Change::Deleted(pod) => queue.add_all(controller.services_of(&pod)),
                Change::Resync => queue.add_all(controller.everything()),
            },
            change = slices.next() => match change {
                // Somebody changed or removed a slice of ours.
                Change::Applied(slice) | Change::Deleted(slice) => queue.add_all(service_of(&slice)),
                Change::Resync => queue.add_all(controller.everything()),
            },
        }
    }
}

fn service_of(slice: &EndpointSlice) -> Option<Key> {
    let name = slice.labels().get(SERVICE_NAME_LABEL)?;
    Some((slice.namespace().unwrap_or_default(), name.clone()))
}

impl Controller {
    /// All Services, and the owners of slices whose Service may be gone.
    fn everything(&self) -> Vec<Key> {
        let services = self.shared.services.all();
        let slices = self.shared.slices.all();
        services
            .iter()
            .map(|service| key(service.as_ref()))
            .chain(slices.iter().filter_map(|slice| service_of(slice)))
            .collect()
    }

    /// The Services that select a pod, or have it as an endpoint although its labels changed.
    fn services_of(&self, pod: &Pod) -> Vec<Key> {
        let namespace = pod.namespace().unwrap_or_default();
        let services = self.shared.services.in_namespace(&namespace);
        let mut keys: Vec<Key> = services
            .iter()
            .filter(|service| selects(service, pod))
            .map(|service| key(service.as_ref()))
            .collect();
        let uid = pod.uid();
        let has_pod = |slice: &Arc<EndpointSlice>| {
            slice.endpoints.iter().any(|endpoint| {
                endpoint
                    .target_ref
                    .as_ref()
                    .is_some_and(|target| target.uid == uid)
            })
        };
        keys.extend(
            self.shared
                .slices
                .in_namespace(&namespace)
                .iter()
                .filter(|slice| has_pod(slice))
                .filter_map(|slice| service_of(slice)),
        );
        keys
    }

    async fn sync(&self, key: &Key) -> Result<(), Error> {
        let (namespace, name) = key;
        let Some(service) = self.shared.services.get(namespace, name) else {
            return Ok(());
        };
        if service.metadata.deletion_timestamp.is_some() {
            return Ok(());
        }
        let slices: Vec<Arc<EndpointSlice>> = slices_of(&self.shared.slices, namespace, name)
            .into_iter()
            .filter(|slice| {
                slice
                    .labels()
                    .get(MANAGED_BY_LABEL)
                    .is_some_and(|manager| manager == MANAGER)
            })
            .collect();
        let pods = self.shared.pods.in_namespace(namespace);
        let plan = plan::<_, Arc<Pod>>(service.as_ref(), &pods, &slices);
        let api: Api<EndpointSlice> = Api::namespaced(self.shared.client.clone(), namespace);
        let result = async {
            for slice in &plan.create {
                let created = api.create(&PostParams::default(), slice).await?;
                self.shared.slices.note(created);
            }
            for slice in &plan.update {
                let updated = api
                    .replace(&slice.name_any(), &PostParams::default(), slice)
                    .await?;
                self.shared.slices.note(updated);
            }
            for slice in &plan.delete {
                match api.delete(slice, &DeleteParams::default()).await {
                    Ok(_) => {}
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    Err(error) => return Err(error),
                }
                if let Some(known) = self.shared.slices.get(namespace, slice) {
                    self.shared.slices.note_deleted(&known);
                }
            }
            Ok(())
        };
        result.await.map_err(|error: kube::Error| {
            if !matches!(&error, kube::Error::Api(status) if status.code == 409) {
                let about = Service::object_ref(&service, &());
                let note = format!("Error updating Endpoint Slices for Service {namespace}/{name}: {error}");
                self.recorder
                    .warning(&about, "FailedToUpdateEndpointSlices", "Update", &note);
            }
            Error::api(
                format!("write the endpoints of Service {namespace}/{name}"),
                error,
            )
        })
    }
}
