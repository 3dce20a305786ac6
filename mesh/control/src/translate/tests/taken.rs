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

#[test]
fn traffic_that_prefers_to_stay_close_goes_by_priority_from_zone_to_region() {
    let mut translator = Translator::new(MeshConfig::default());
    let mut text = String::new();
    for (node, region, zone) in [("near", "r1", "z1"), ("same", "r1", "z2"), ("far", "r2", "z1")] {
        text += &format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: {node}, labels: {{topology.kubernetes.io/region: {region}, \
             topology.kubernetes.io/zone: {zone}}}}}}}\n---\n"
        );
    }
    for (name, distribution) in [("close", ", trafficDistribution: PreferClose"), ("spread", "")] {
        text += &format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: a}}, \
             spec: {{clusterIP: 10.0.0.1, ports: [{{name: http, port: 80}}]{distribution}}}}}\n---\n\
             {{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: {name}, namespace: a, \
             labels: {{kubernetes.io/service-name: {name}}}}}, addressType: IPv4, ports: [{{name: http, port: 8080}}], endpoints: \
             [{{addresses: [10.2.0.1], conditions: {{ready: true}}, nodeName: far}}, \
             {{addresses: [10.2.0.2], conditions: {{ready: true}}, nodeName: same}}, \
             {{addresses: [10.2.0.3], conditions: {{ready: true}}, nodeName: near}}]}}\n---\n"
        );
    }
    translator.apply_all(apply(&text));
    let mut found = Vec::new();
    for resource in translator.resources_for(&proxy(ProxyKind::Sidecar, "a", "x", true)) {
        if resource.resource_type != ResourceType::Endpoints {
            continue;
        }
        let message =
            <serin_xds::pb::envoy::config::endpoint::v3::ClusterLoadAssignment as prost::Message>::decode(
                &*resource.body,
            )
            .unwrap();
        let Some(name) = message.cluster_name.strip_prefix("outbound|80||") else {
            continue;
        };
        let mut groups: Vec<(u32, String)> = message
            .endpoints
            .iter()
            .map(|group| {
                let locality = group.locality.clone().unwrap_or_default();
                (group.priority, format!("{}/{}", locality.region, locality.zone))
            })
            .collect();
        groups.sort();
        found.push((name.split('.').next().unwrap().to_owned(), groups));
    }
    found.sort();
    let groups = |priorities: [u32; 3]| {
        let places = ["r1/z1", "r1/z2", "r2/z1"].map(str::to_owned);
        priorities.into_iter().zip(places).collect::<Vec<_>>()
    };
    assert_eq!(
        found,
        [
            ("close".to_owned(), groups([0, 1, 2])),
            ("spread".to_owned(), groups([0, 0, 0]))
        ]
    );
}
