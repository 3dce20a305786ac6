//! What the cluster manager and the listener manager count (`cluster_manager.*`, `listener_manager.*`).

use serin_xds::ResourceType;

/// See the module. Written by the control thread only.
#[derive(Debug, Default)]
pub struct Counts {
    pub(super) clusters: Changes,
    pub(super) listeners: Changes,
    /// Listeners whose filter chains were replaced while their sockets stayed.
    pub(super) in_place: u64,
    /// Listeners that workers were told to serve, once for each worker.
    pub(super) created: u64,
    /// Listeners that could not be opened.
    pub(super) not_created: u64,
    cds: Deliveries,
    lds: Deliveries,
}

#[derive(Debug, Default)]
pub(super) struct Changes {
    pub added: u64,
    pub modified: u64,
    pub removed: u64,
}

/// Updates of a type of resources.
#[derive(Debug, Default)]
struct Deliveries {
    attempts: u64,
    taken: u64,
    refused: u64,
}

impl Counts {
    /// The control plane is asked for clusters and listeners.
    pub fn asked(&mut self) {
        self.cds.attempts += 1;
        self.lds.attempts += 1;
    }

    /// The control plane has delivered something, of which all was taken or not.
    pub fn delivered(&mut self, resource_type: ResourceType, taken: bool) {
        let deliveries = match resource_type {
            ResourceType::Cluster => &mut self.cds,
            ResourceType::Listener => &mut self.lds,
            _ => return,
        };
        // Each answer asks for the next.
        deliveries.attempts += 1;
        if taken {
            deliveries.taken += 1;
        } else {
            deliveries.refused += 1;
        }
    }

    /// A listener that could not be opened.
    pub fn not_opened(&mut self) {
        self.not_created += 1;
    }

    /// A listener whose sockets that many workers have got.
    pub fn opened(&mut self, workers: usize) {
        self.created += workers as u64;
    }

    /// Names of families, help and values. Of deliveries only where there were any.
    pub fn told(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        let fixed = [
            (
                "envoy_cluster_manager_cluster_added",
                "Clusters that came.",
                self.clusters.added,
            ),
            (
                "envoy_cluster_manager_cluster_modified",
                "Clusters that were replaced.",
                self.clusters.modified,
            ),
            (
                "envoy_cluster_manager_cluster_removed",
                "Clusters that went.",
                self.clusters.removed,
            ),
            (
                "envoy_listener_manager_listener_added",
                "Listeners that came.",
                self.listeners.added,
            ),
            (
                "envoy_listener_manager_listener_modified",
                "Listeners that were replaced.",
                self.listeners.modified,
            ),
            (
                "envoy_listener_manager_listener_removed",
                "Listeners that went.",
                self.listeners.removed,
            ),
            (
                "envoy_listener_manager_listener_in_place_updated",
                "Listeners whose sockets stayed while they were replaced.",
                self.in_place,
            ),
            (
                "envoy_listener_manager_listener_create_success",
                "Listeners that workers serve.",
                self.created,
            ),
            (
                "envoy_listener_manager_listener_create_failure",
                "Listeners that could not be opened.",
                self.not_created,
            ),
        ];
        let of = |deliveries: &Deliveries, names: [&'static str; 3]| {
            let values = [
                ("Times that updates were asked for.", deliveries.attempts),
                ("Updates that were taken.", deliveries.taken),
                ("Updates of which something was refused.", deliveries.refused),
            ];
            let any = deliveries.attempts > 0;
            names
                .into_iter()
                .zip(values)
                .filter(move |_| any)
                .map(|(name, (help, value))| (name, help, value))
        };
        let cds = of(
            &self.cds,
            [
                "envoy_cluster_manager_cds_update_attempt",
                "envoy_cluster_manager_cds_update_success",
                "envoy_cluster_manager_cds_update_rejected",
            ],
        );
        let lds = of(
            &self.lds,
            [
                "envoy_listener_manager_lds_update_attempt",
                "envoy_listener_manager_lds_update_success",
                "envoy_listener_manager_lds_update_rejected",
            ],
        );
        fixed.into_iter().chain(cds).chain(lds)
    }
}
