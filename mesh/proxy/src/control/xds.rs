//! Following a control plane: deliveries to the store, verdicts back, interests forward.
//!
//! Layers of the runtime are asked for first: everything else, listeners of the file included, waits for them, each for up
//! to its `initial_fetch_timeout` (Envoy). CDS and LDS are asked for whole; what they name decides what is asked of EDS, RDS, SDS and ECDS; virtual hosts come as
//! resources of their own where a route configuration says so. What requests wait for is asked for by name besides, as long
//! as it is used. With the control plane gone everything stays as it is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serin_xds::client::{
    AdsClient, AdsClientConfig, BackoffRange, ConnectionState, Delivery, Endpoint, Interest,
};
use serin_xds::{Refusal, ResourceType};
use tokio_util::sync::CancellationToken;

use super::Proxy;
use crate::clock::now_ms;
use crate::config::on_demand::{OnDemand, Wanted};
use crate::config::store::{Store, Update};

/// Follows the control plane at `endpoint` until cancelled.
pub async fn follow(proxy: Arc<Proxy>, endpoint: Endpoint, cancel: CancellationToken) {
    let config = AdsClientConfig {
        endpoint,
        node: proxy.node.clone(),
        backoff: BackoffRange::default(),
    };
    let (client, mut deliveries) = AdsClient::spawn(config, cancel.clone());
    proxy.control_plane.follow(client.connection());
    proxy.store(|store| store.counts().subscriptions.begin());
    let mut connection = client.connection();
    connection.mark_unchanged();
    client.set_interest(
        ResourceType::Runtime,
        Interest::names(proxy.store(|store| store.runtime().names())),
    );
    let began = tokio::time::Instant::now();
    let mut waits = proxy.store(|store| store.runtime().is_awaited());
    if !waits {
        ask_for_all(&client);
    }
    let on_demand = proxy.on_demand();
    let following = on_demand.follow();
    let idle = on_demand.limits().idle;
    let mut sweep = tokio::time::interval((idle / 4).max(Duration::from_millis(10)));
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut progress = Progress::default();
    loop {
        if waits && !proxy.store(|store| store.runtime().is_awaited()) {
            waits = false;
            ask_for_all(&client);
        }
        let patience = proxy.store(|store| store.runtime().patience()).filter(|_| waits);
        let delivery = tokio::select! {
            () = cancel.cancelled() => break,
            () = tokio::time::sleep_until(began + patience.unwrap_or_default()), if patience.is_some() => {
                tracing::warn!("layers of the runtime have not come in time: the start goes on without them");
                proxy.waited_for_runtime(Some(began.elapsed())).await;
                continue;
            }
            () = on_demand.changed(), if !waits => {
                ask_on_demand(&proxy, &client, &on_demand);
                continue;
            }
            Ok(()) = connection.changed() => {
                if has_failed(&connection.borrow_and_update()) {
                    proxy.store(Store::note_lost);
                }
                continue;
            }
            // Disuse is the passing of time, which nobody tells; without anything on demand nothing is looked at.
            _ = sweep.tick(), if !waits && on_demand.holds_any() => {
                give_up(&proxy, &client, &on_demand).await;
                continue;
            }
            delivery = deliveries.recv() => match delivery {
                Some(delivery) => delivery,
                None => break,
            },
        };
        let resource_type = delivery.resource_type;
        deliver(&proxy, &on_demand, delivery).await;
        progress.delivered(&proxy, &client, &on_demand, resource_type);
        if !proxy.was_ready() && progress.is_complete(&proxy) {
            tracing::info!("the first full configuration is live");
            proxy.set_ready();
        }
    }
    drop(following);
    client.join().await;
}

/// How far the configuration has come.
#[derive(Default)]
struct Progress {
    /// Types of which something has come.
    answered: BTreeSet<ResourceType>,
    /// Filters that are asked for by name.
    extensions: BTreeSet<Arc<str>>,
    /// Virtual hosts come as resources of their own.
    hosts_wanted: bool,
}

impl Progress {
    /// Asks for what a delivery names.
    fn delivered(
        &mut self,
        proxy: &Proxy,
        client: &AdsClient,
        on_demand: &OnDemand,
        resource_type: ResourceType,
    ) {
        self.answered.insert(resource_type);
        ask_for_names(proxy, client);
        if names_extensions(resource_type) {
            let names = proxy.store(|store| store.extension_names());
            if names != self.extensions {
                self.extensions.clone_from(&names);
                client.set_interest(ResourceType::Extension, Interest::names(names));
            }
        }
        if !self.hosts_wanted && proxy.store(|store| store.wants_virtual_hosts()) {
            self.hosts_wanted = true;
            ask_on_demand(proxy, client, on_demand);
        }
    }

    /// Whether all that there is to know at the start has come.
    fn is_complete(&self, proxy: &Proxy) -> bool {
        let has = |resource_type| self.answered.contains(&resource_type);
        let wants_hosts = proxy.store(|store| store.wants_virtual_hosts());
        has(ResourceType::Cluster)
            && has(ResourceType::Listener)
            && (!wants_hosts || has(ResourceType::VirtualHost))
            && proxy.store(|store| store.is_complete())
    }
}

fn has_failed(connection: &ConnectionState) -> bool {
    !connection.connected && connection.last_error.is_some()
}

/// Subscribes to everything that the rest follows from.
fn ask_for_all(client: &AdsClient) {
    client.set_interest(ResourceType::Cluster, Interest::all());
    client.set_interest(ResourceType::Listener, Interest::all());
}

/// Subscribes to what the configuration names since the last time, and leaves what it names no more.
fn ask_for_names(proxy: &Proxy, client: &AdsClient) {
    for (resource_type, changes) in proxy.store(Store::take_name_changes) {
        client.change_interest(resource_type, changes);
    }
}

/// Whether resources of that type name filters by ECDS, or are such.
fn names_extensions(resource_type: ResourceType) -> bool {
    matches!(
        resource_type,
        ResourceType::Listener | ResourceType::Extension | ResourceType::Route | ResourceType::VirtualHost
    )
}

/// Subscribes to what is asked for by name, beside everything.
fn ask_on_demand(proxy: &Proxy, client: &AdsClient, on_demand: &OnDemand) {
    let interest = |kind| Interest {
        all: true,
        names: on_demand.names(kind),
    };
    client.set_interest(ResourceType::Cluster, interest(Wanted::Cluster));
    if proxy.store(|store| store.wants_virtual_hosts()) {
        client.set_interest(ResourceType::VirtualHost, interest(Wanted::VirtualHost));
    }
}

/// Leaves what has not been used for a while.
async fn give_up(proxy: &Proxy, client: &AdsClient, on_demand: &OnDemand) {
    let freed = proxy.store(|store| on_demand.give_up(now_ms(), |kind, name| store.take_used(kind, name)));
    // First, so that what the control plane sends again because it is part of everything comes after its removal.
    for (kind, resource_type) in [
        (Wanted::VirtualHost, ResourceType::VirtualHost),
        (Wanted::Cluster, ResourceType::Cluster),
    ] {
        let names: Vec<&str> = freed
            .iter()
            .filter(|(of, _)| *of == kind)
            .map(|(_, name)| &**name)
            .collect();
        if !names.is_empty() {
            tracing::debug!(?resource_type, ?names, "not used any more");
            proxy.apply(resource_type, &[], &names).await;
        }
    }
    ask_on_demand(proxy, client, on_demand);
}

/// What a delivery brings, for the store.
pub(super) fn upserted(delivery: &Delivery) -> Vec<Update<'_>> {
    delivery
        .upserted
        .iter()
        .map(|received| Update {
            name: &received.name,
            body: &received.body,
        })
        .collect()
}

async fn deliver(proxy: &Proxy, on_demand: &OnDemand, delivery: Delivery) {
    let upserted = upserted(&delivery);
    let removed: Vec<&str> = delivery.removed.iter().map(|name| &**name).collect();
    let began = Instant::now();
    let refused = proxy.apply(delivery.resource_type, &upserted, &removed).await;
    let took = began.elapsed();
    proxy.store(|store| {
        let versions = delivery.upserted.iter().map(|one| (&*one.name, &one.version));
        store.note_versions(delivery.resource_type, versions);
        let names = delivery.upserted.iter().map(|one| &*one.name);
        let names = names.chain(delivery.removed.iter().map(|name| &**name));
        store.note_delivery(delivery.resource_type, &delivery.version, names, &refused, took);
    });
    settle(proxy, on_demand, &delivery, |name| {
        refused.iter().any(|(refused, _)| **refused == *name)
    });
    let refusals = refused
        .into_iter()
        .map(|(name, refusal)| {
            let reason = refusal.to_string();
            tracing::warn!(resource_type = ?delivery.resource_type, resource = %name, %reason, "refused");
            Refusal::new(&*name, reason)
        })
        .collect();
    delivery.answer(refusals);
}

/// Tells requests that wait what has come of it.
fn settle(proxy: &Proxy, on_demand: &OnDemand, delivery: &Delivery, refused: impl Fn(&str) -> bool) {
    match delivery.resource_type {
        ResourceType::VirtualHost => {
            for received in &delivery.upserted {
                let resource = (!refused(&received.name)).then_some(&received.name);
                for name in received.aliases.iter().chain([&received.name]) {
                    on_demand.settle(Wanted::VirtualHost, name, resource);
                }
            }
            for name in &delivery.removed {
                on_demand.settle(Wanted::VirtualHost, name, None);
            }
            // Of servers that do not say what a host was asked for as.
            for name in on_demand.pending(Wanted::VirtualHost) {
                if proxy.store(|store| store.host_is_live(&name)) {
                    on_demand.settle(Wanted::VirtualHost, &name, Some(&name));
                }
            }
        }
        ResourceType::Cluster => {
            for received in delivery
                .upserted
                .iter()
                .filter(|received| refused(&received.name))
            {
                on_demand.settle(Wanted::Cluster, &received.name, None);
            }
            for name in &delivery.removed {
                on_demand.settle(Wanted::Cluster, name, None);
            }
        }
        ResourceType::Endpoints
        | ResourceType::Secret
        | ResourceType::Extension
        | ResourceType::Listener
        | ResourceType::Route
        | ResourceType::Runtime => {}
    }
    // A cluster may have waited for its endpoints or secrets.
    if matches!(
        delivery.resource_type,
        ResourceType::Cluster | ResourceType::Endpoints | ResourceType::Secret
    ) {
        for name in on_demand.pending(Wanted::Cluster) {
            if proxy.store(|store| store.cluster_is_live(&name)) {
                on_demand.settle(Wanted::Cluster, &name, Some(&name));
            }
        }
    }
}
