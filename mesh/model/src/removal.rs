//! What a change would take away from rules that are in effect.
//!
//! A subset, a host or a port that rules still send requests to should go after those rules, whatever the order in which a person
//! deletes things. Whoever feeds the model asks [`Model::bereaves`] before such a change and may keep it back for a while; of a
//! DestinationRule that drops subsets everything else can be taken in meanwhile ([`Model::with_dropped_subsets`]).

use std::collections::BTreeSet;
use std::sync::Arc;

use serin_crds::istio::DestinationRule;

use crate::object::{Change, Kind, Object, ObjectKey};
use crate::route::RuleSet;
use crate::service::Service;
use crate::{Client, Model, host};

/// A destination that a rule in effect would lose.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Loss {
    /// The VirtualService that names it.
    pub rules: ObjectKey,
    /// The destination, in words.
    pub destination: String,
}

impl Model {
    /// What rules in effect would lose by a change, in order and each once. The model is the same afterwards.
    ///
    /// Costs what the rules that name the hosts of the object have destinations.
    pub fn bereaves(&mut self, change: &Change) -> Vec<Loss> {
        let (key, object) = match change {
            Change::Apply(object) => (object.key(), Some(object)),
            Change::Delete(key) => (key.clone(), None),
        };
        let losses: BTreeSet<Loss> = match (key.kind, object) {
            (Kind::DestinationRule, Some(Object::DestinationRule(new))) => {
                self.lost_subsets(&key, Some(new.clone()))
            }
            (Kind::DestinationRule, _) => self.lost_subsets(&key, None),
            (Kind::Service, Some(Object::Service(new))) => {
                let new = Service::from_kubernetes(new, &self.config.domain);
                self.lost_services(&key, new.as_slice())
            }
            (Kind::ServiceEntry, Some(Object::ServiceEntry(new))) => {
                self.lost_services(&key, &Service::from_entry(new))
            }
            (Kind::Service | Kind::ServiceEntry, _) => self.lost_services(&key, &[]),
            _ => BTreeSet::new(),
        };
        losses.into_iter().collect()
    }

    /// A new version of a DestinationRule together with the subsets of the version in effect that it drops; none if it drops none, or is
    /// for another host.
    pub fn with_dropped_subsets(&self, new: &Arc<DestinationRule>) -> Option<Arc<DestinationRule>> {
        let key = Object::DestinationRule(new.clone()).key();
        let (for_host, old) = self.policies.get(&key)?;
        if *for_host != host::resolve(&new.spec.host, &key.namespace, &self.config.domain) {
            return None;
        }
        let kept = |name: &str| new.spec.subsets.iter().any(|subset| subset.name == name);
        let dropped: Vec<_> = old
            .spec
            .subsets
            .iter()
            .filter(|subset| !kept(&subset.name))
            .cloned()
            .collect();
        if dropped.is_empty() {
            return None;
        }
        let mut whole = (**new).clone();
        whole.spec.subsets.extend(dropped);
        Some(Arc::new(whole))
    }

    fn lost_subsets(&mut self, key: &ObjectKey, new: Option<Arc<DestinationRule>>) -> BTreeSet<Loss> {
        let Some((for_host, old)) = self.policies.get(key) else {
            return BTreeSet::new();
        };
        if old.spec.subsets.is_empty() {
            return BTreeSet::new();
        }
        let (for_host, old) = (for_host.clone(), old.clone());
        let naming = self.rules.naming(&for_host);
        let before = self.subsets_of(&naming);
        if before.is_empty() {
            return BTreeSet::new();
        }
        let domain = self.config.domain.clone();
        self.policies.set(key, new, &domain);
        let after = self.subsets_of(&naming);
        self.policies.set(key, Some(old), &domain);
        before.difference(&after).cloned().collect()
    }

    /// The subsets that rules name and that are there.
    fn subsets_of(&self, rules: &[(ObjectKey, Arc<RuleSet>)]) -> BTreeSet<Loss> {
        let mut found = BTreeSet::new();
        for (key, rules) in rules {
            let client = Client {
                namespace: key.namespace.clone(),
                labels: std::collections::BTreeMap::new(),
                scope: None,
            };
            for backend in rules.destinations() {
                let (Some(subset), Some(service)) = (&backend.subset, self.service(&backend.host)) else {
                    continue;
                };
                let policy = self.policy(&backend.host, &service.namespace, &client);
                if policy.is_some_and(|policy| policy.subsets.iter().any(|known| known.name == **subset)) {
                    found.insert(Loss {
                        rules: key.clone(),
                        destination: format!("subset {subset} of host {}", backend.host),
                    });
                }
            }
        }
        found
    }

    fn lost_services(&self, key: &ObjectKey, new: &[Service]) -> BTreeSet<Loss> {
        let mut found = BTreeSet::new();
        for (old, another) in self.registry.made_by(key) {
            let new = new.iter().find(|service| service.host == old.host);
            if new.is_none() && another {
                continue;
            }
            for (rules, set) in self.rules.naming(&old.host) {
                for backend in set.destinations().filter(|backend| backend.host == old.host) {
                    let destination = match (new, backend.port) {
                        (None, _) => format!("host {}", old.host),
                        (Some(new), Some(port)) if old.port(port).is_some() && new.port(port).is_none() => {
                            format!("port {port} of host {}", old.host)
                        }
                        (Some(_), _) => continue,
                    };
                    found.insert(Loss {
                        rules: rules.clone(),
                        destination,
                    });
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MeshConfig;
    use serde_json::{Value, json};

    fn object(kind: &str, name: &str, spec: &Value) -> Change {
        let value = json!({"metadata": {"name": name, "namespace": "prod"}, "spec": spec});
        fn read<K: serde::de::DeserializeOwned>(value: Value) -> Arc<K> {
            Arc::new(serde_json::from_value(value).unwrap())
        }
        Change::Apply(match kind {
            "Service" => Object::Service(read(value)),
            "ServiceEntry" => Object::ServiceEntry(read(value)),
            "DestinationRule" => Object::DestinationRule(read(value)),
            "VirtualService" => Object::VirtualService(read(value)),
            other => panic!("{other}"),
        })
    }

    fn service(ports: &[u16]) -> Change {
        let ports: Vec<Value> = ports
            .iter()
            .map(|port| json!({"name": format!("http-{port}"), "port": port}))
            .collect();
        object(
            "Service",
            "reviews",
            &json!({"clusterIP": "10.96.0.9", "ports": ports}),
        )
    }

    fn subsets(name: &str, names: &[&str]) -> Change {
        let subsets: Vec<Value> = names
            .iter()
            .map(|name| json!({"name": name, "labels": {"version": name}}))
            .collect();
        object(
            "DestinationRule",
            name,
            &json!({"host": "reviews", "subsets": subsets}),
        )
    }

    fn model() -> Model {
        let mut model = Model::new(MeshConfig::default());
        let to = |destination: Value| json!({"route": [{"destination": destination}]});
        for change in [
            service(&[80, 81]),
            subsets("reviews", &["v1", "v2"]),
            object(
                "VirtualService",
                "a",
                &json!({"hosts": ["reviews"], "http": [to(json!({"host": "reviews", "subset": "v1"}))]}),
            ),
            object(
                "VirtualService",
                "b",
                &json!({"hosts": ["b"], "tcp": [to(json!({"host": "reviews", "port": {"number": 81}}))]}),
            ),
        ] {
            model.apply(change);
        }
        model
    }

    fn key(kind: Kind, name: &str) -> ObjectKey {
        ObjectKey::new(kind, "prod", name)
    }

    fn lost(model: &mut Model, change: &Change) -> Vec<String> {
        let losses = model.bereaves(change).into_iter();
        losses
            .map(|loss| format!("{}: {}", loss.rules.name, loss.destination))
            .collect()
    }

    #[test]
    fn a_change_is_told_what_rules_would_lose_by_it_and_asking_changes_nothing() {
        let mut model = model();
        let host = "reviews.prod.svc.cluster.local";
        let v1 = format!("a: subset v1 of host {host}");
        let rule = Change::Delete(key(Kind::DestinationRule, "reviews"));
        let whole = Change::Delete(key(Kind::Service, "reviews"));
        for _ in 0..2 {
            assert_eq!(lost(&mut model, &subsets("reviews", &["v2"])), [v1.as_str()]);
            assert_eq!(lost(&mut model, &rule), [v1.as_str()]);
            assert!(lost(&mut model, &subsets("reviews", &["v1"])).is_empty());
            assert_eq!(
                lost(&mut model, &whole),
                [format!("a: host {host}"), format!("b: host {host}")]
            );
            assert_eq!(
                lost(&mut model, &service(&[80])),
                [format!("b: port 81 of host {host}")]
            );
            assert!(lost(&mut model, &service(&[81])).is_empty());
        }
        // Another object that says the same takes its place.
        model.apply(subsets("more", &["v1"]));
        assert!(lost(&mut model, &rule).is_empty());
        let entry = json!({"hosts": [host], "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}], "resolution": "STATIC"});
        model.apply(object("ServiceEntry", "same", &entry));
        assert!(lost(&mut model, &whole).is_empty());
        // And nothing is lost by rules that are gone.
        model.apply(Change::Delete(key(Kind::DestinationRule, "more")));
        assert_eq!(lost(&mut model, &rule).len(), 1);
        model.apply(Change::Delete(key(Kind::VirtualService, "a")));
        assert!(lost(&mut model, &rule).is_empty());
    }

    #[test]
    fn a_rule_that_drops_subsets_can_be_taken_in_with_them() {
        let model = model();
        let new = |names: &[&str]| match subsets("reviews", names) {
            Change::Apply(Object::DestinationRule(rule)) => rule,
            other => panic!("{other:?}"),
        };
        let whole = model.with_dropped_subsets(&new(&["v3"])).unwrap();
        let names: Vec<&str> = whole.spec.subsets.iter().map(|subset| &*subset.name).collect();
        assert_eq!(names, ["v3", "v1", "v2"]);
        assert!(model.with_dropped_subsets(&new(&["v1", "v2", "v3"])).is_none());
    }
}
