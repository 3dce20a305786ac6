//! What the cluster manager and the listener manager count (`cluster_manager.*`, `listener_manager.*`).

use super::subscriptions::Subscriptions;

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
    /// What the control plane is asked for.
    pub subscriptions: Subscriptions,
}

#[derive(Debug, Default)]
pub(super) struct Changes {
    pub added: u64,
    pub modified: u64,
    pub removed: u64,
}

impl Counts {
    /// A listener that could not be opened.
    pub fn not_opened(&mut self) {
        self.not_created += 1;
    }

    /// A listener whose sockets that many workers have got.
    pub fn opened(&mut self, workers: usize) {
        self.created += workers as u64;
    }

    /// Names of families, help and values.
    pub fn told(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        [
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
        ]
        .into_iter()
    }
}
