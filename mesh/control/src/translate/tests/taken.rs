//! What the translator makes, compiled by our own proxy: nothing that we send may be refused by whom we send it to.

use serin_model::MeshConfig;
use serin_proxy::config::store::{Store, Update};
use serin_xds::resource::ResourceType;

use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::cluster::v3::cluster::common_lb_config::LocalityConfigSpecifier;

use super::super::Translator;
use super::incremental::{apply, proxy};
use super::{parity, world};
use crate::proxy_identity::{Features, ProxyKind};

/// Part of the refusal, and why we send it all the same.
const REFUSED: [(&str, &str); 1] = [(
    "filename: /etc/certs/",
    "files of a DestinationRule are in the proxy's own file system, which a test does not have",
)];

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

#[test]
fn a_service_whose_topology_mode_is_auto_is_zone_aware_unless_its_rule_says_more() {
    let mut translator = Translator::new(MeshConfig::default());
    let service = |name: &str, mode: &str| {
        format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: a, \
             annotations: {{service.kubernetes.io/topology-mode: {mode}}}}}, \
             spec: {{clusterIP: 10.0.0.1, ports: [{{name: http, port: 80}}]}}}}\n---\n"
        )
    };
    let rule = "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: weighted, namespace: a}, \
                spec: {host: weighted, trafficPolicy: {outlierDetection: {}, \
                loadBalancer: {localityLbSetting: {enabled: true}}}}}";
    let text = service("auto", "Auto") + &service("plain", "Disabled") + &service("weighted", "auto") + rule;
    translator.apply_all(apply(&text));
    let mut found = Vec::new();
    for resource in translator.resources_for(&proxy(ProxyKind::Sidecar, "a", "x", true)) {
        if resource.resource_type != ResourceType::Cluster {
            continue;
        }
        let message = <cluster::Cluster as prost::Message>::decode(&*resource.body).unwrap();
        let kind = message
            .common_lb_config
            .and_then(|common| common.locality_config_specifier)
            .map(|specifier| match specifier {
                LocalityConfigSpecifier::ZoneAwareLbConfig(_) => "zone-aware",
                LocalityConfigSpecifier::LocalityWeightedLbConfig(_) => "weighted",
            });
        if let Some(name) = message.name.strip_prefix("outbound|80||") {
            found.push((name.split('.').next().unwrap().to_owned(), kind));
        }
    }
    found.sort();
    let expected = [
        ("auto", Some("zone-aware")),
        ("plain", None),
        ("weighted", Some("weighted")),
    ];
    assert_eq!(found, expected.map(|(name, kind)| (name.to_owned(), kind)));
}
