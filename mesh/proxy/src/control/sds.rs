//! Following services of secrets: SDS by `api_config_source`, beside what comes with the other resources.
//!
//! Each service is a cluster and has one stream, which asks for the names that listeners and clusters refer to. A service
//! that is no longer referred to is left; one that is away is tried again for ever, and what it gave stays in use.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use serin_xds::client::{AdsClient, AdsClientConfig, BackoffRange, Deliveries, Delivery, Interest, Service};
use serin_xds::{Refusal, ResourceType};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::xds::upserted;
use super::{Proxy, dial};
use crate::tls::table::SdsService;

struct Followed {
    client: Arc<AdsClient>,
    cancel: CancellationToken,
}

/// Follows every service that is referred to until cancelled.
pub async fn run(proxy: Arc<Proxy>, cancel: CancellationToken) {
    let mut changes = proxy.changes();
    let mut followed: HashMap<SdsService, Followed> = HashMap::new();
    let tasks = TaskTracker::new();
    loop {
        changes.borrow_and_update();
        let wanted = proxy.store(|store| store.secrets().services());
        followed.retain(|service, one| {
            let keep = wanted.contains_key(service);
            if !keep {
                one.cancel.cancel();
            }
            keep
        });
        for (service, names) in wanted {
            let one = followed
                .entry(service)
                .or_insert_with_key(|service| follow(&proxy, service, &cancel, &tasks));
            one.client
                .set_interest(ResourceType::Secret, Interest::names(names));
        }
        tokio::select! {
            () = cancel.cancelled() => break,
            changed = changes.changed() => if changed.is_err() { break },
        }
    }
    for one in followed.values() {
        one.cancel.cancel();
    }
    tasks.close();
    tasks.wait().await;
}

fn follow(
    proxy: &Arc<Proxy>,
    service: &SdsService,
    cancel: &CancellationToken,
    tasks: &TaskTracker,
) -> Followed {
    let cancel = cancel.child_token();
    let config = AdsClientConfig {
        endpoint: dial::cluster(proxy, &service.cluster),
        node: proxy.node.clone(),
        backoff: BackoffRange::default(),
    };
    let kind = Service::Secrets { delta: service.delta };
    let (client, deliveries) = AdsClient::spawn_for(kind, config, cancel.clone());
    tasks.spawn(take(proxy.clone(), service.clone(), deliveries));
    Followed {
        client: Arc::new(client),
        cancel,
    }
}

/// Ends with the client, which ends when it is cancelled.
async fn take(proxy: Arc<Proxy>, service: SdsService, mut deliveries: Deliveries) {
    while let Some(delivery) = deliveries.recv().await {
        deliver(&proxy, &service, delivery).await;
    }
}

async fn deliver(proxy: &Proxy, service: &SdsService, delivery: Delivery) {
    let upserted = upserted(&delivery);
    let began = Instant::now();
    let refused = proxy.apply_secrets_of(service, &upserted).await;
    let took = began.elapsed();
    proxy.store(|store| {
        let names = delivery.upserted.iter().map(|one| &*one.name);
        store.note_delivery(ResourceType::Secret, &delivery.version, names, &refused, took);
    });
    let refusals = refused
        .into_iter()
        .map(|(name, refusal)| {
            let reason = refusal.to_string();
            tracing::warn!(service = %service.cluster, secret = %name, %reason, "refused");
            Refusal::new(&*name, reason)
        })
        .collect();
    // A secret that is gone stays with whoever has it, as those of the control plane do.
    delivery.answer(refusals);
}
