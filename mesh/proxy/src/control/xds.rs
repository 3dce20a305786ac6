//! Following a control plane: deliveries to the store, verdicts back, interests forward.
//!
//! CDS and LDS are asked for whole; what they name decides what is asked of EDS and RDS; virtual hosts come as
//! resources of their own where a route configuration says so. With the control plane gone everything stays as it is.

use std::collections::BTreeSet;
use std::sync::Arc;

use serin_xds::client::{AdsClient, AdsClientConfig, BackoffRange, Delivery, Endpoint, Interest};
use serin_xds::{Refusal, ResourceType};
use tokio_util::sync::CancellationToken;

use super::Proxy;
use crate::config::store::Update;

/// Follows the control plane at `endpoint` until cancelled.
pub async fn follow(proxy: Arc<Proxy>, endpoint: Endpoint, cancel: CancellationToken) {
    let config = AdsClientConfig {
        endpoint,
        node: proxy.node.clone(),
        backoff: BackoffRange::default(),
    };
    let (client, mut deliveries) = AdsClient::spawn(config, cancel.clone());
    client.set_interest(ResourceType::Cluster, Interest::all());
    client.set_interest(ResourceType::Listener, Interest::all());
    let mut answered = BTreeSet::new();
    loop {
        let delivery = tokio::select! {
            () = cancel.cancelled() => break,
            delivery = deliveries.recv() => match delivery {
                Some(delivery) => delivery,
                None => break,
            },
        };
        let resource_type = delivery.resource_type;
        answered.insert(resource_type);
        deliver(&proxy, delivery).await;
        let (secrets, endpoints, routes, virtual_hosts, complete) = proxy.store(|store| {
            let endpoints: Vec<Arc<str>> = store.eds_names().map(Arc::from).collect();
            let cold = store.cold();
            if !cold.is_empty() {
                tracing::debug!(missing = ?cold, "configuration is not complete yet");
            }
            (
                store.secrets().wanted(),
                endpoints,
                store.rds_names(),
                store.wants_virtual_hosts(),
                cold.is_empty(),
            )
        });
        client.set_interest(ResourceType::Secret, Interest::names(secrets));
        client.set_interest(ResourceType::Endpoints, Interest::names(endpoints));
        client.set_interest(ResourceType::Route, Interest::names(routes));
        if virtual_hosts {
            client.set_interest(ResourceType::VirtualHost, Interest::all());
        }
        let first = [ResourceType::Cluster, ResourceType::Listener]
            .iter()
            .all(|ty| answered.contains(ty));
        let hosts = !virtual_hosts || answered.contains(&ResourceType::VirtualHost);
        if first && hosts && complete && !proxy.is_ready() {
            tracing::info!("the first full configuration is live");
            proxy.set_ready();
        }
    }
    client.join().await;
}

async fn deliver(proxy: &Proxy, delivery: Delivery) {
    let upserted: Vec<Update<'_>> = delivery
        .upserted
        .iter()
        .map(|received| Update {
            name: &received.name,
            body: &received.body,
        })
        .collect();
    let removed: Vec<&str> = delivery.removed.iter().map(|name| &**name).collect();
    let refused = proxy.apply(delivery.resource_type, &upserted, &removed).await;
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
