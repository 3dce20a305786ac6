//! What the translator makes, compiled by our own proxy: nothing that we send may be refused by whom we send it to.

use serin_model::MeshConfig;
use serin_proxy::config::store::{Store, Update};
use serin_xds::resource::ResourceType;

use super::super::Translator;
use super::{parity, world};
use crate::proxy_identity::Features;

/// Part of the refusal, and why we send it all the same.
const REFUSED: [(&str, &str); 0] = [];

#[test]
fn our_proxy_takes_everything_that_it_is_sent_for_every_recorded_world() {
    let Some(dir) = parity::recorded() else { return };
    let nodes = parity::read_json(&dir.join("baseline/nodes.json"));
    let (mut taken, mut refused) = (0, Vec::new());
    for (case, files) in parity::cases(&dir) {
        let mut translator = Translator::new(MeshConfig::default());
        translator.apply_all(
            world::kubernetes_service()
                .into_iter()
                .chain(world::changes(&files)),
        );
        for name in ["client", "server", "ingress"] {
            let mut proxy = parity::proxy(&nodes, name);
            proxy.features = Features { vhds: true };
            let resources = translator.resources_for(&proxy);
            let mut store = Store::new(1);
            for resource_type in ResourceType::ALL {
                let batch: Vec<_> = resources
                    .iter()
                    .filter(|resource| resource.resource_type == resource_type)
                    .map(|resource| Update {
                        name: &resource.name,
                        body: &resource.body,
                    })
                    .collect();
                taken += batch.len();
                for (resource, refusal) in store.apply(resource_type, &batch, &[]) {
                    let text = format!("{case} {name} {resource_type:?} {resource}: {refusal}");
                    if !REFUSED.iter().any(|(part, _)| text.contains(part)) {
                        refused.push(text);
                    }
                }
                store.take_listener_changes();
            }
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
    assert!(taken > 1_000, "{taken} resources");
}
