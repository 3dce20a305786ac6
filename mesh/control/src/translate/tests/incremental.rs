//! Following changes gives the same as translating anew, and costs what changed.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use serin_model::{Change as ModelChange, Kind, MeshConfig, ObjectKey};
use serin_xds::resource::{Change, ResourceType};

use super::super::{Translator, Work};
use super::world::objects;
use crate::proxy_identity::{Features, Locality, Proxy, ProxyKind};

pub(super) fn proxy(kind: ProxyKind, namespace: &str, app: &str, vhds: bool) -> Proxy {
    Proxy {
        id: format!(
            "{}~10.0.0.9~{app}-0.{namespace}~{namespace}.svc.cluster.local",
            kind.as_str()
        ),
        kind,
        name: format!("{app}-0"),
        namespace: namespace.into(),
        labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
        ips: vec!["10.0.0.9".parse().unwrap()],
        service_account: "default".into(),
        workload: app.into(),
        locality: Locality {
            region: "r1".into(),
            zone: "z1".into(),
            sub_zone: String::new(),
        },
        dns_domain: format!("{namespace}.svc.cluster.local"),
        features: Features { vhds },
    }
}

pub(super) fn apply(text: &str) -> Vec<ModelChange> {
    objects(text).into_iter().map(ModelChange::Apply).collect()
}

type Held = BTreeMap<(ResourceType, Arc<str>), (Arc<str>, Vec<String>)>;

/// What a proxy would hold that followed every change.
fn follow(held: &mut Held, changes: Vec<Change>) {
    for change in changes {
        match change {
            Change::Upsert(resource) => {
                let origins = resource
                    .origins
                    .iter()
                    .map(|origin| format!("{origin:?}"))
                    .collect();
                held.insert(
                    (resource.resource_type, resource.name.clone()),
                    (resource.version.clone(), origins),
                );
            }
            Change::Remove(resource_type, name) => {
                assert!(
                    held.remove(&(resource_type, name.clone())).is_some(),
                    "{name} was not held"
                );
            }
        }
    }
}

fn all(translator: &mut Translator, proxy: &Proxy) -> Held {
    let mut held = Held::new();
    follow(
        &mut held,
        translator
            .resources_for(proxy)
            .into_iter()
            .map(Change::Upsert)
            .collect(),
    );
    held
}

/// Kinds of objects that a step can write, in every variant that changes how others are translated.
fn object_text(kind: u8, name: u8, variant: u8) -> (Kind, &'static str, String, String) {
    let namespace = if name.is_multiple_of(2) { "a" } else { "b" };
    let meta = |name: &str| {
        format!(
            "metadata: {{name: {name}, namespace: {namespace}, generation: {}}}",
            variant + 1
        )
    };
    match kind {
        0 => {
            let service = format!("s{name}");
            let spec = match variant % 6 {
                0 => format!("{{clusterIP: 10.1.0.{name}, selector: {{app: s{name}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}"),
                1 => format!("{{clusterIP: 10.1.0.{name}, selector: {{app: s{name}}}, ports: [{{name: http, port: 80, targetPort: 8080}}, {{name: tcp, port: 9000}}]}}"),
                2 => format!("{{clusterIP: 10.1.0.{name}, selector: {{app: s{name}}}, ports: [{{name: auto, port: 80}}]}}"),
                3 => format!("{{clusterIP: None, selector: {{app: s{name}}}, ports: [{{name: tcp, port: 9000}}, {{name: http, port: 81}}]}}"),
                4 => "{type: ExternalName, externalName: s0.a.svc.cluster.local, ports: [{name: http, port: 80}]}".to_owned(),
                _ => format!("{{clusterIP: 10.1.0.{name}, selector: {{app: s0}}, ports: [{{name: http, port: 80, targetPort: web}}]}}"),
            };
            let annotations = if variant % 7 == 6 {
                ", annotations: {networking.istio.io/exportTo: '.'}"
            } else {
                ""
            };
            let meta = format!("metadata: {{name: {service}, namespace: {namespace}{annotations}}}");
            (
                Kind::Service,
                namespace,
                service,
                format!("apiVersion: v1\nkind: Service\n{meta}\nspec: {spec}\n"),
            )
        }
        1 => {
            let slice = format!("s{name}-x");
            let addresses: Vec<String> = (0..=variant % 3).map(|index| format!(
                "{{addresses: [10.2.{name}.{index}], conditions: {{ready: {}}}, targetRef: {{kind: Pod, name: p{index}, namespace: {namespace}}}, nodeName: n{}}}",
                variant % 5 != 4, index % 2)).collect();
            (
                Kind::EndpointSlice,
                namespace,
                slice.clone(),
                format!(
                    "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {slice}, namespace: {namespace}, labels: {{kubernetes.io/service-name: s{name}}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}, {{name: tcp, port: 9000}}, {{name: auto, port: 80}}]\nendpoints: [{}]\n",
                    addresses.join(", ")
                ),
            )
        }
        2 => {
            let pod = format!("p{}", name % 3);
            (
                Kind::Pod,
                namespace,
                pod.clone(),
                format!(
                    "apiVersion: v1\nkind: Pod\nmetadata: {{name: {pod}, namespace: {namespace}, labels: {{app: s{name}, version: v{}}}}}\nspec: {{containers: [{{name: c, image: i, ports: [{{name: web, containerPort: 80{}}}]}}], nodeName: n0}}\nstatus: {{podIP: 10.2.{name}.0}}\n",
                    variant % 3,
                    variant % 2
                ),
            )
        }
        3 => {
            let rules = format!("v{}", name % 3);
            let hosts = [
                "[s0]",
                "[s1]",
                "['*']",
                "[s0.a]",
                "[out.example.com, s1]",
                "[s0.a.svc.cluster.local]",
            ][variant as usize % 6];
            let gateways = [
                "",
                "gateways: [gw]\n  ",
                "gateways: [mesh, gw]\n  ",
                "gateways: [mesh, b/gw]\n  ",
            ][name as usize % 4];
            let http = match variant % 7 {
                0 => {
                    "[{route: [{destination: {host: s0, subset: v1}, weight: 10}, {destination: {host: s1}, weight: 90}]}]"
                }
                1 => {
                    "[{match: [{uri: {prefix: /x}}], route: [{destination: {host: s2, port: {number: 80}}}]}, {redirect: {uri: /y}}]"
                }
                2 => "[{match: [{sourceLabels: {app: s0}}], route: [{destination: {host: s1}}]}]",
                3 => "[{directResponse: {status: 418}}]",
                4 => "[{match: [{port: 80}], route: [{destination: {host: s3}}], mirror: {host: s0}}]",
                5 => "[{delegate: {name: d0, namespace: a}}]",
                _ => {
                    "[{route: [{destination: {host: s0}}], fault: {abort: {httpStatus: 500, percentage: {value: 3}}}}]"
                }
            };
            let export = if variant % 5 == 3 {
                "exportTo: ['.']\n  "
            } else {
                ""
            };
            let tcp = if variant % 4 == 1 {
                "tcp: [{match: [{port: 9000}], route: [{destination: {host: s0}}]}]\n  "
            } else {
                ""
            };
            (
                Kind::VirtualService,
                namespace,
                rules.clone(),
                format!(
                    "apiVersion: networking.istio.io/v1\nkind: VirtualService\n{}\nspec:\n  hosts: {hosts}\n  {gateways}{export}{tcp}http: {http}\n",
                    meta(&rules)
                ),
            )
        }
        4 => {
            let rule = format!("r{}", name % 2);
            let host =
                ["s0", "s1", "'*.a.svc.cluster.local'", "s0.a.svc.cluster.local"][variant as usize % 4];
            let policy = [
                "",
                ", trafficPolicy: {loadBalancer: {consistentHash: {httpHeaderName: x}}}",
                ", trafficPolicy: {outlierDetection: {consecutive5xxErrors: 3}}",
                ", trafficPolicy: {connectionPool: {tcp: {idleTimeout: 9s}}}, workloadSelector: {matchLabels: {app: s0}}",
            ][variant as usize % 4];
            (
                Kind::DestinationRule,
                namespace,
                rule.clone(),
                format!(
                    "apiVersion: networking.istio.io/v1\nkind: DestinationRule\n{}\nspec: {{host: {host}, subsets: [{{name: v1, labels: {{version: v{}}}}}]{policy}}}\n",
                    meta(&rule),
                    variant % 3
                ),
            )
        }
        5 => {
            let servers = [
                "[{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]",
                "[{port: {number: 80, name: http, protocol: HTTP}, hosts: [s0.a.svc.cluster.local, out.example.com]}]",
                "[{port: {number: 9000, name: tcp, protocol: TCP}, hosts: ['*']}]",
                "[{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*'], tls: {httpsRedirect: true}}]",
            ][variant as usize % 4];
            (
                Kind::Gateway,
                namespace,
                "gw".to_owned(),
                format!(
                    "apiVersion: networking.istio.io/v1\nkind: Gateway\n{}\nspec: {{selector: {{app: gate}}, servers: {servers}}}\n",
                    meta("gw")
                ),
            )
        }
        6 => {
            let spec = [
                "{egress: [{hosts: ['./*']}]}",
                "{egress: [{hosts: ['b/*', '*/s0.a.svc.cluster.local']}]}",
                "{workloadSelector: {labels: {app: s0}}, egress: [{hosts: ['a/*']}]}",
                "{outboundTrafficPolicy: {mode: REGISTRY_ONLY}}",
            ][variant as usize % 4];
            (
                Kind::Sidecar,
                namespace,
                "sc".to_owned(),
                format!(
                    "apiVersion: networking.istio.io/v1\nkind: Sidecar\n{}\nspec: {spec}\n",
                    meta("sc")
                ),
            )
        }
        7 => (
            Kind::VirtualService,
            "a",
            "d0".to_owned(),
            format!(
                "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: d0, namespace: a, generation: {}}}\nspec:\n  http: [{{match: [{{uri: {{prefix: /d{}}}}}], route: [{{destination: {{host: s{}}}}}]}}]\n",
                variant + 1,
                variant % 3,
                variant % 4
            ),
        ),
        _ => (
            Kind::ServiceEntry,
            namespace,
            "e".to_owned(),
            format!(
                "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n{}\nspec: {{hosts: [out.example.com], ports: [{{number: 80, name: http, protocol: HTTP}}], resolution: {}}}\n",
                meta("e"),
                ["DNS", "NONE", "STATIC"][variant as usize % 3]
            ),
        ),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn following_every_change_ends_where_translating_anew_begins(
        steps in prop::collection::vec((0u8..9, 0u8..4, 0u8..24, prop::bool::weighted(0.25)), 1..28)
    ) {
        let proxies = [
            proxy(ProxyKind::Sidecar, "a", "s0", true),
            proxy(ProxyKind::Sidecar, "b", "s1", false),
            proxy(ProxyKind::Router, "a", "gate", true),
            proxy(ProxyKind::Router, "b", "gate", false),
        ];
        let mut translator = Translator::new(MeshConfig::default());
        let mut held: Vec<Held> = proxies.iter().map(|proxy| all(&mut translator, proxy)).collect();
        let mut world: BTreeMap<ObjectKey, String> = BTreeMap::new();
        for (kind, name, variant, delete) in steps {
            let (kind, namespace, name, text) = object_text(kind, name, variant);
            let key = ObjectKey::new(kind, namespace, &name);
            let changes = if delete {
                world.remove(&key);
                vec![ModelChange::Delete(key)]
            } else {
                world.insert(key, text.clone());
                apply(&text)
            };
            let touched = translator.apply_all(changes);
            for (proxy, held) in proxies.iter().zip(&mut held) {
                follow(held, translator.changes_for(proxy, &touched));
            }
        }
        let mut anew = Translator::new(MeshConfig::default());
        // In the other order, for good measure: order of arrival must not matter.
        anew.apply_all(world.values().rev().flat_map(|text| apply(text)));
        for (proxy, held) in proxies.iter().zip(&held) {
            let expected = all(&mut anew, proxy);
            let missing: Vec<_> = expected.iter().filter(|(name, value)| held.get(*name) != Some(value)).collect();
            let extra: Vec<_> = held.keys().filter(|name| !expected.contains_key(*name)).collect();
            prop_assert!(missing.is_empty() && extra.is_empty(), "{}: missing or stale {missing:#?}, left over {extra:#?}", proxy.id);
        }
    }
}

fn mesh(services: usize) -> Translator {
    let mut translator = Translator::new(MeshConfig::default());
    let mut text = String::new();
    for index in 0..services {
        text.push_str(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s{index}, namespace: a}}\nspec: {{clusterIP: 10.1.{}.{}, selector: {{app: s{index}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: s{index}, namespace: a, generation: 1}}\nspec: {{hosts: [s{index}], http: [{{route: [{{destination: {{host: s{index}, subset: v1}}, weight: 100}}, {{destination: {{host: s{index}, subset: v2}}, weight: 0}}]}}]}}\n---\n",
            index / 250, index % 250
        ));
    }
    translator.apply_all(apply(&text));
    translator
}

fn weight(service: usize, canary: u32, generation: u32) -> Vec<ModelChange> {
    apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: s{service}, namespace: a, generation: {generation}}}\nspec: {{hosts: [s{service}], http: [{{route: [{{destination: {{host: s{service}, subset: v1}}, weight: {}}}, {{destination: {{host: s{service}, subset: v2}}, weight: {canary}}}]}}]}}\n",
        100 - canary
    ))
}

#[test]
fn a_weight_change_translates_one_virtual_host_whatever_the_size_of_the_mesh() {
    let mut translator = mesh(120);
    let proxies: Vec<Proxy> = (0..20)
        .map(|index| proxy(ProxyKind::Sidecar, "a", &format!("c{index}"), true))
        .collect();
    for proxy in &proxies {
        translator.resources_for(proxy);
    }
    let before = translator.work();
    let touched = translator.apply_all(weight(7, 5, 2));
    let after = translator.work();
    assert_eq!(
        after,
        Work {
            virtual_hosts: before.virtual_hosts + 1,
            ..before
        }
    );
    let mut bodies = Vec::new();
    for proxy in &proxies {
        let changes = translator.changes_for(proxy, &touched);
        let [Change::Upsert(resource)] = changes.as_slice() else {
            panic!("{changes:?}")
        };
        assert_eq!(resource.resource_type, ResourceType::VirtualHost);
        assert_eq!(&*resource.name, "80/s7.a.svc.cluster.local:80");
        assert_eq!(resource.origins.len(), 1);
        assert_eq!(&*resource.origins[0].object, "VirtualService/a/s7");
        assert_eq!(resource.origins[0].generation, 2);
        assert!(resource.body.len() < 1024, "{} bytes", resource.body.len());
        bodies.push(resource.clone());
    }
    assert!(
        bodies.windows(2).all(|pair| Arc::ptr_eq(&pair[0], &pair[1])),
        "one encoding for all"
    );
}

#[test]
fn workloads_of_other_namespaces_share_encodings_that_are_equal() {
    let mut translator = mesh(3);
    let clusters = |translator: &mut Translator, namespace: &str| {
        let found = translator.resources_for(&proxy(ProxyKind::Sidecar, namespace, "c", true));
        found
            .into_iter()
            .find(|resource| &*resource.name == "outbound|80||s1.a.svc.cluster.local")
            .unwrap()
    };
    let (one, other) = (clusters(&mut translator, "b"), clusters(&mut translator, "c"));
    assert!(Arc::ptr_eq(&one, &other));
}

#[test]
fn a_change_without_effect_is_not_told() {
    let mut translator = mesh(3);
    let proxy = proxy(ProxyKind::Sidecar, "a", "c", true);
    translator.resources_for(&proxy);
    let touched = translator.apply_all(weight(1, 0, 1));
    assert!(translator.changes_for(&proxy, &touched).is_empty());
    // A new generation with the same content is told: somebody waits to hear that it is live.
    let touched = translator.apply_all(weight(1, 0, 2));
    assert_eq!(translator.changes_for(&proxy, &touched).len(), 1);
}

#[test]
fn a_proxy_without_the_feature_gets_the_whole_table_and_only_that() {
    let mut translator = mesh(10);
    let proxy = proxy(ProxyKind::Sidecar, "a", "c", false);
    translator.resources_for(&proxy);
    let before = translator.work();
    let touched = translator.apply_all(weight(7, 5, 2));
    let after = translator.work();
    assert_eq!(
        after,
        Work {
            virtual_hosts: before.virtual_hosts + 1,
            routes: before.routes + 1,
            ..before
        }
    );
    let changes = translator.changes_for(&proxy, &touched);
    let [Change::Upsert(resource)] = changes.as_slice() else {
        panic!("{changes:?}")
    };
    assert_eq!(
        (resource.resource_type, &*resource.name),
        (ResourceType::Route, "80")
    );
}

#[test]
fn views_that_nobody_needs_any_more_are_dropped() {
    let mut translator = mesh(3);
    let (one, two) = (
        proxy(ProxyKind::Sidecar, "a", "c", true),
        proxy(ProxyKind::Sidecar, "b", "c", true),
    );
    translator.resources_for(&one);
    translator.resources_for(&two);
    // Both have nothing behind a service, so they share the inbound side.
    assert_eq!(translator.views(), 3);
    translator.forget(&two.id);
    assert_eq!(translator.views(), 2);
    translator.forget(&one.id);
    assert_eq!(translator.views(), 0);
}

#[test]
fn an_endpoint_change_translates_the_endpoints_of_that_service_alone() {
    let mut translator = mesh(50);
    let proxy = proxy(ProxyKind::Sidecar, "a", "c", true);
    translator.resources_for(&proxy);
    let before = translator.work();
    let touched = translator.apply_all(apply(
        "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s3-x, namespace: a, labels: {kubernetes.io/service-name: s3}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.2.0.1], conditions: {ready: true}}]
",
    ));
    assert_eq!(
        translator.work(),
        Work {
            endpoints: before.endpoints + 1,
            ..before
        }
    );
    let changes = translator.changes_for(&proxy, &touched);
    let [Change::Upsert(resource)] = changes.as_slice() else {
        panic!("{changes:?}")
    };
    assert_eq!(
        (resource.resource_type, &*resource.name),
        (ResourceType::Endpoints, "outbound|80||s3.a.svc.cluster.local")
    );
}

#[test]
fn a_refused_object_leaves_the_last_good_one_in_effect() {
    let mut translator = mesh(3);
    let proxy = proxy(ProxyKind::Sidecar, "a", "c", true);
    let before = all(&mut translator, &proxy);
    let touched = translator.apply_all(apply("apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: s1, namespace: a, generation: 2}
spec: {hosts: [s1], http: [{route: [{destination: {host: s1, subset: v1}, weight: 0}, {destination: {host: s1, subset: v2}, weight: 0}]}]}
"));
    assert!(touched.is_empty());
    assert_eq!(all(&mut translator, &proxy), before);
    let key = ObjectKey::new(Kind::VirtualService, "a", "s1");
    let problems: Vec<String> = translator
        .model()
        .problems(&key)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(
        problems.contains(&"spec.http[0].route: total destination weight = 0".to_owned()),
        "{problems:?}"
    );
}
