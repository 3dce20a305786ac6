//! The model as its users see it: objects in, lookups out.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;

use super::*;
use crate::route::Action;

fn read(text: &str) -> Vec<Change> {
    serde_yaml::Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|value| !value.is_null())
        .map(|value| {
            macro_rules! object {
                ($($kind:ident),*) => {
                    match value["kind"].as_str().unwrap() {
                        $( stringify!($kind) => Object::$kind(Arc::new(serde_json::from_value(value).unwrap())), )*
                        other => panic!("{other}"),
                    }
                };
            }
            Change::Apply(object!(
                Service, EndpointSlice, Pod, Node, VirtualService, DestinationRule, Gateway, ServiceEntry, Sidecar
            ))
        })
        .collect()
}

fn model(text: &str) -> Model {
    let mut model = Model::new(MeshConfig::default());
    for change in read(text) {
        model.apply(change);
    }
    model
}

fn client(namespace: &str) -> Client {
    Client {
        namespace: namespace.into(),
        labels: BTreeMap::new(),
        scope: None,
    }
}

fn rules(name: &str, namespace: &str, created: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {name}, namespace: {namespace}, generation: 4, creationTimestamp: '2026-01-01T00:00:{created}Z'}}\nspec: {spec}\n---\n"
    )
}

fn destination_rule(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n---\n"
    )
}

const TO_S: &str = "http: [{route: [{destination: {host: s}}]}]";

#[test]
fn of_two_objects_for_one_mesh_host_the_older_is_used_alone() {
    let model = model(
        &(rules("a", "n", "02", &format!("{{hosts: [s], {TO_S}}}"))
            + &rules("z", "n", "01", &format!("{{hosts: [s], {TO_S}}}"))),
    );
    let used = model.rules("s.n.svc.cluster.local", &client("n")).unwrap();
    assert_eq!(&*used.provenance.object.name, "z");
}

#[test]
fn the_most_specific_host_wins_however_old_the_wildcard() {
    let text = rules(
        "wild",
        "n",
        "01",
        &format!("{{hosts: ['*.n.svc.cluster.local'], {TO_S}}}"),
    ) + &rules("star", "n", "00", &format!("{{hosts: ['*'], {TO_S}}}"))
        + &rules("exact", "n", "05", &format!("{{hosts: [s], {TO_S}}}"));
    let model = model(&text);
    for (host, name) in [
        ("s.n.svc.cluster.local", "exact"),
        ("t.n.svc.cluster.local", "wild"),
        ("t.m.svc.cluster.local", "star"),
    ] {
        assert_eq!(
            &*model.rules(host, &client("n")).unwrap().provenance.object.name,
            name
        );
    }
}

#[test]
fn rules_that_are_not_exported_are_not_seen_elsewhere() {
    let model = model(&rules(
        "r",
        "n",
        "01",
        &format!("{{hosts: [s], exportTo: ['.'], {TO_S}}}"),
    ));
    assert!(model.rules("s.n.svc.cluster.local", &client("n")).is_some());
    assert!(model.rules("s.n.svc.cluster.local", &client("m")).is_none());
}

#[test]
fn every_route_knows_the_object_generation_and_rule_that_it_came_from() {
    let model = model(&rules(
        "r",
        "n",
        "01",
        "{hosts: [s], http: [{match: [{uri: {exact: /a}}, {uri: {exact: /b}}], route: [{destination: {host: s}}]}, {route: [{destination: {host: s}}]}]}",
    ));
    let rules = model.rules("s.n.svc.cluster.local", &client("n")).unwrap();
    let origins: Vec<_> = rules
        .http
        .iter()
        .map(|route| {
            (
                route.provenance.object.to_string(),
                route.provenance.generation,
                route.provenance.rule,
            )
        })
        .collect();
    let origin = |rule| ("VirtualService/n/r".to_owned(), 4, Some(rule));
    assert_eq!(origins, [origin(0), origin(0), origin(1)]);
}

#[test]
fn a_delegate_narrows_its_root_and_follows_changes_of_either() {
    let root = rules(
        "root",
        "n",
        "01",
        "{hosts: [s], http: [{name: team, match: [{uri: {prefix: /team}}], timeout: 3s, delegate: {name: child, namespace: m}}]}",
    );
    let child = |path: &str| {
        rules(
            "child",
            "m",
            "01",
            &format!(
                "{{http: [{{name: r, match: [{{uri: {{prefix: {path}}}}}], route: [{{destination: {{host: t}}}}]}}]}}"
            ),
        )
    };
    let mut model = model(&root);
    let routes = |model: &Model| {
        model
            .rules("s.n.svc.cluster.local", &client("n"))
            .unwrap()
            .http
            .clone()
    };
    assert!(routes(&model).is_empty(), "a missing delegate drops the rule");
    let touched: Vec<Touched> = read(&child("/team/x"))
        .into_iter()
        .map(|change| model.apply(change))
        .collect();
    assert!(
        touched[0].rules.contains("s.n.svc.cluster.local"),
        "the root's host is touched: {touched:?}"
    );
    let found = routes(&model);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name, "team-r");
    assert_eq!(
        found[0].hosts().next().map(|backend| &*backend.host),
        Some("t.m.svc.cluster.local")
    );
    let Action::Forward(forward) = &found[0].action else {
        panic!("{:?}", found[0].action)
    };
    assert_eq!(forward.timeout, Some(std::time::Duration::from_secs(3)));
    assert_eq!(found[0].also[0].object.to_string(), "VirtualService/n/root");
    for change in read(&child("/elsewhere")) {
        model.apply(change);
    }
    assert!(routes(&model).is_empty(), "a path outside the root's is left out");
}

#[test]
fn one_policy_applies_that_of_the_client_then_the_service_then_the_root() {
    let rule = |namespace: &str| {
        destination_rule(
            "d",
            namespace,
            &format!("{{host: s.b.svc.cluster.local, subsets: [{{name: {namespace}, labels: {{v: x}}}}]}}"),
        )
    };
    let chosen = |model: &Model| {
        model
            .policy("s.b.svc.cluster.local", "b", &client("a"))
            .map(|policy| policy.subsets[0].name.clone())
    };
    let mut model = model(&(rule("a") + &rule("b") + &rule("istio-system") + &rule("third")));
    for expected in ["a", "b", "istio-system"] {
        assert_eq!(chosen(&model).as_deref(), Some(expected));
        model.apply(Change::Delete(ObjectKey::new(
            Kind::DestinationRule,
            expected,
            "d",
        )));
    }
    assert_eq!(chosen(&model), None, "a rule of a third namespace has no effect");
}

#[test]
fn rules_of_one_namespace_for_one_host_are_merged() {
    let text = destination_rule("one", "n", "{host: s, subsets: [{name: v1, labels: {v: '1'}}]}")
        + &destination_rule(
            "two",
            "n",
            "{host: s, trafficPolicy: {loadBalancer: {simple: RANDOM}}, subsets: [{name: v1, labels: {v: other}}, {name: v2, labels: {v: '2'}}]}",
        );
    let policy = model(&text)
        .policy("s.n.svc.cluster.local", "n", &client("n"))
        .unwrap();
    let subsets: Vec<_> = policy
        .subsets
        .iter()
        .map(|subset| (subset.name.as_str(), subset.labels["v"].as_str()))
        .collect();
    assert_eq!(subsets, [("v1", "1"), ("v2", "2")]);
    assert!(policy.policy.is_some());
    assert_eq!(policy.provenance.len(), 2);
}

#[test]
fn a_port_entry_hides_the_policy_of_the_host_even_when_empty() {
    let text = destination_rule(
        "d",
        "n",
        "{host: s, trafficPolicy: {connectionPool: {tcp: {maxConnections: 5}}, portLevelSettings: [{port: {number: 80}}]}}",
    );
    let policy = model(&text)
        .policy("s.n.svc.cluster.local", "n", &client("n"))
        .unwrap();
    assert!(policy.for_port(None, 80).connection_pool.is_none());
    assert!(policy.for_port(None, 81).connection_pool.is_some());
}

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: s, namespace: n}
spec: {clusterIP: 10.0.0.1, selector: {app: s}, ports: [{name: http, port: 80, targetPort: web}]}
---
";

fn slice(ready: bool) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s-1, namespace: n, labels: {{kubernetes.io/service-name: s}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{{addresses: [10.1.0.1], conditions: {{ready: {ready}}}, targetRef: {{kind: Pod, name: s-x, namespace: n}}, nodeName: node}}]\n---\n"
    )
}

fn pod(version: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: s-x, namespace: n, labels: {{app: s, version: {version}, pod-template-hash: abc}}, ownerReferences: [{{apiVersion: apps/v1, kind: ReplicaSet, name: s-abc, uid: u, controller: true}}]}}\nspec: {{nodeName: node, containers: [{{name: c, image: i, ports: [{{name: web, containerPort: 8080}}]}}]}}\n---\n"
    )
}

#[test]
fn endpoints_are_joined_from_slices_pods_and_nodes_in_any_order() {
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: node, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z}}\n---\n";
    let parts = [SERVICE.to_owned(), slice(true), pod("v1"), node.to_owned()];
    let expected = model(&parts.concat()).endpoints("s.n.svc.cluster.local");
    assert_eq!(
        expected[0].locality,
        Locality {
            region: "r".into(),
            zone: "z".into(),
            sub_zone: "".into()
        }
    );
    assert_eq!(
        expected[0].workload.as_ref().unwrap().telemetry("c"),
        "s;n;s;v1;c"
    );
    assert!(expected[0].has_labels(&BTreeMap::from([("version".to_owned(), "v1".to_owned())])));
    for rotation in 1..parts.len() {
        let mut turned = parts.to_vec();
        turned.rotate_left(rotation);
        assert_eq!(
            model(&turned.concat()).endpoints("s.n.svc.cluster.local"),
            expected
        );
    }
}

#[test]
fn endpoints_that_are_not_ready_are_left_out_and_their_change_is_named() {
    let mut model = model(&(SERVICE.to_owned() + &slice(false)));
    assert!(model.endpoints("s.n.svc.cluster.local").is_empty());
    let touched: Vec<Touched> = read(&slice(true))
        .into_iter()
        .map(|change| model.apply(change))
        .collect();
    assert_eq!(
        touched[0]
            .endpoints
            .iter()
            .map(|host| &**host)
            .collect::<Vec<_>>(),
        ["s.n.svc.cluster.local"]
    );
    assert!(touched[0].services.is_empty());
    let again: Vec<Touched> = read(&slice(true))
        .into_iter()
        .map(|change| model.apply(change))
        .collect();
    assert!(again[0].is_empty(), "the same slice again touches nothing");
}

#[test]
fn references_to_nothing_are_named_as_things_stand() {
    let text = rules(
        "r",
        "n",
        "01",
        "{hosts: [s], gateways: [mesh, gw], http: [{route: [{destination: {host: s, subset: v9}, weight: 1}, {destination: {host: gone}, weight: 1}, {destination: {host: s, port: {number: 81}}, weight: 1}]}]}",
    );
    let key = ObjectKey::new(Kind::VirtualService, "n", "r");
    let mut model = model(&(SERVICE.to_owned() + &text));
    let problems = |model: &Model| {
        model
            .problems(&key)
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        problems(&model),
        [
            "spec.gateways: referenced gateway n/gw does not exist",
            "spec.http[0]: referenced host gone.n.svc.cluster.local does not exist",
            "spec.http[0]: referenced host s.n.svc.cluster.local has no port 81",
            "spec.http[0]: referenced subset v9 of host s.n.svc.cluster.local is not defined by a DestinationRule",
        ]
    );
    assert!(
        model
            .problems(&key)
            .iter()
            .all(|problem| problem.severity == Severity::Unresolved)
    );
    for change in read(&destination_rule(
        "d",
        "n",
        "{host: s, subsets: [{name: v9, labels: {version: v9}}]}",
    )) {
        model.apply(change);
    }
    assert_eq!(problems(&model).len(), 3);
}

#[test]
fn an_expression_that_no_proxy_would_take_is_refused() {
    let mut model = model(&rules("r", "n", "01", &format!("{{hosts: [s], {TO_S}}}")));
    for change in read(&rules(
        "r",
        "n",
        "01",
        "{hosts: [s], http: [{match: [{uri: {regex: '(a'}}], route: [{destination: {host: s}}]}]}",
    )) {
        assert!(model.apply(change).is_empty());
    }
    let problems = model.problems(&ObjectKey::new(Kind::VirtualService, "n", "r"));
    assert!(
        problems
            .iter()
            .any(|problem| problem.field == "spec.http[0].match[0].uri.regex"
                && problem.severity == Severity::Refused),
        "{problems:?}"
    );
    // What was there before stays in effect.
    assert!(
        model.rules("s.n.svc.cluster.local", &client("n")).unwrap().http[0]
            .matches
            .unconditional
    );
}

#[test]
fn a_scope_hides_services_and_the_workloads_own_goes_first() {
    let sidecar = |name: &str, spec: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: {name}, namespace: n}}\nspec: {spec}\n---\n"
        )
    };
    let text = SERVICE.to_owned()
        + &SERVICE.replace("namespace: n", "namespace: m")
        + &sidecar("all", "{egress: [{hosts: ['./*']}]}")
        + &sidecar(
            "some",
            "{workloadSelector: {labels: {app: x}}, egress: [{hosts: ['m/*']}]}",
        );
    let model = model(&text);
    let seen = |labels: &[(&str, &str)]| {
        let labels: BTreeMap<String, String> = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let client = Client {
            namespace: "n".into(),
            scope: model.scope("n", &labels),
            labels,
        };
        model
            .visible_services(&client)
            .map(|service| service.namespace.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(seen(&[]), ["n"]);
    assert_eq!(seen(&[("app", "x")]), ["m"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn deleting_everything_leaves_nothing_behind(order in Just(()).prop_perturb(|(), mut rng| {
        let mut order: Vec<usize> = (0..6).collect();
        for index in (1..order.len()).rev() {
            order.swap(index, rng.random_range(0..=index));
        }
        order
    })) {
        let texts = [
            SERVICE.to_owned(), slice(true), pod("v1"),
            rules("r", "n", "01", "{hosts: [s], gateways: [mesh, gw], http: [{match: [{sourceLabels: {a: b}}], route: [{destination: {host: s}}]}]}"),
            destination_rule("d", "n", "{host: s, trafficPolicy: {outlierDetection: {}}, workloadSelector: {matchLabels: {a: b}}}"),
            "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: gw, namespace: n}\nspec: {selector: {a: b}, servers: [{port: {number: 80, name: h, protocol: HTTP}, hosts: ['*']}]}\n".to_owned(),
        ];
        let mut model = model(&texts.concat());
        prop_assert!(model.labels_matter() && model.locality_matters());
        let keys: Vec<ObjectKey> = read(&texts.concat())
            .into_iter()
            .map(|change| match change {
                Change::Apply(object) => object.key(),
                Change::Delete(key) => key,
            })
            .collect();
        for index in order {
            model.apply(Change::Delete(keys[index].clone()));
        }
        prop_assert!(!model.labels_matter() && !model.locality_matters());
        prop_assert!(model.service("s.n.svc.cluster.local").is_none());
        prop_assert!(model.endpoints("s.n.svc.cluster.local").is_empty());
        prop_assert!(model.rules("s.n.svc.cluster.local", &client("n")).is_none());
        prop_assert!(model.rule_hosts().next().is_none());
        prop_assert!(model.policy("s.n.svc.cluster.local", "n", &client("n")).is_none());
        prop_assert!(model.gateways(&BTreeMap::from([("a".to_owned(), "b".to_owned())])).is_empty());
    }
}
