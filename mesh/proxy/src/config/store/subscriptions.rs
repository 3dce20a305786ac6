//! What is counted of what the control plane is asked for (`cds.*`, `lds.*`, `rds.*`, `sds.*`), as Envoy counts it: being
//! asked for is an attempt, each answer is one (it asks for the next), one that is refused is two, and each stream that ends
//! or cannot be opened is one that failed. Endpoints are counted by their clusters ([`crate::config::slot::Updates`]), with the same meaning.
//!
//! Streams that failed are counted once for all; what a subscription has had of them is the difference to when it began.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::received::wall_ms;
use crate::config::hash::xxh64;
use crate::metrics::collect::{Family, Labels, Value};

/// One thing that is asked for.
#[derive(Clone, Debug)]
pub struct Subscription {
    attempts: u64,
    taken: u64,
    refused: u64,
    /// Streams that had failed when it began.
    lost_before: u64,
    /// When something of it was taken last, in milliseconds since 1970.
    updated: u64,
    /// The hash of the state's name that this was of.
    version: u64,
}

impl Subscription {
    fn begun(lost: u64) -> Self {
        Self {
            attempts: 1,
            taken: 0,
            refused: 0,
            lost_before: lost,
            updated: 0,
            version: 0,
        }
    }

    fn delivered(&mut self, taken: bool, version: u64) {
        // Each answer asks for the next.
        self.attempts += 1;
        if taken {
            self.taken += 1;
            self.updated = wall_ms();
            self.version = version;
        } else {
            // And saying that it is refused is one (Envoy).
            self.attempts += 1;
            self.refused += 1;
        }
    }

    /// Values in the order of [`HELP`].
    fn values(&self, lost: u64) -> [Value; 6] {
        let failed = lost.saturating_sub(self.lost_before);
        [
            Value::Counter((self.attempts + failed) as f64),
            Value::Counter(self.taken as f64),
            Value::Counter(failed as f64),
            Value::Counter(self.refused as f64),
            Value::Whole(self.updated),
            Value::Whole(self.version),
        ]
    }
}

/// A state's name as a number, as Envoy makes it one.
pub fn version_hash(version: &str) -> u64 {
    xxh64(version.as_bytes(), 0)
}

/// A route configuration that is asked for.
#[derive(Debug)]
struct Routes {
    /// Of the first connection manager that asked.
    prefix: Box<str>,
    subscription: Subscription,
    /// Answers that differed from what was there.
    reloads: u64,
    /// When that was last, in milliseconds since 1970.
    reloaded: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Subscriptions {
    /// Streams to the control plane that ended, or could not be opened.
    lost: u64,
    clusters: Option<Subscription>,
    /// Deliveries that changed clusters, and when that was last, in milliseconds since 1970.
    reloads: (u64, u64),
    listeners: Option<Subscription>,
    routes: BTreeMap<Arc<str>, Routes>,
    /// Those that something has come of.
    secrets: BTreeMap<Arc<str>, Subscription>,
}

const HELP: [&str; 6] = [
    "Times that updates were asked for.",
    "Updates that were taken.",
    "Streams that failed while this was asked for.",
    "Updates of which something was refused.",
    "When something was taken last, in milliseconds since 1970.",
    "The hash of what the control plane calls its state.",
];

macro_rules! names {
    ($area:literal) => {
        [
            concat!($area, "update_attempt"),
            concat!($area, "update_success"),
            concat!($area, "update_failure"),
            concat!($area, "update_rejected"),
            concat!($area, "update_time"),
            concat!($area, "version"),
        ]
    };
}

impl Subscriptions {
    /// Clusters and listeners are asked for from now on.
    pub fn begin(&mut self) {
        let lost = self.lost;
        for own in [&mut self.clusters, &mut self.listeners] {
            own.get_or_insert_with(|| Subscription::begun(lost));
        }
    }

    /// A stream to the control plane has ended, or could not be opened.
    pub fn lose(&mut self) {
        self.lost += 1;
    }

    /// How many have.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Something has come of all clusters; `changed` says whether any of it is in use now.
    pub fn clusters_came(&mut self, taken: bool, changed: bool, version: u64) {
        if let Some(own) = &mut self.clusters {
            own.delivered(taken, version);
            if changed {
                self.reloads = (self.reloads.0 + 1, wall_ms());
            }
        }
    }

    /// Something has come of all listeners.
    pub fn listeners_came(&mut self, taken: bool, version: u64) {
        if let Some(own) = &mut self.listeners {
            own.delivered(taken, version);
        }
    }

    /// A connection manager with that prefix asks for a route configuration.
    pub fn ask_routes(&mut self, name: &Arc<str>, prefix: &str) {
        let lost = self.lost;
        self.routes.entry(name.clone()).or_insert_with(|| Routes {
            prefix: prefix.into(),
            subscription: Subscription::begun(lost),
            reloads: 0,
            reloaded: 0,
        });
    }

    /// Nobody asks for it any more.
    pub fn leave_routes(&mut self, name: &str) {
        self.routes.remove(name);
    }

    /// A route configuration has come that differs from the one before.
    pub fn routes_changed(&mut self, name: &str) {
        if let Some(routes) = self.routes.get_mut(name) {
            routes.reloads += 1;
            routes.reloaded = wall_ms();
        }
    }

    /// The control plane has said something of a route configuration.
    pub fn routes_came(&mut self, name: &str, taken: bool, version: u64) {
        if let Some(routes) = self.routes.get_mut(name) {
            routes.subscription.delivered(taken, version);
        }
    }

    /// Somebody who is asked for it has said something of a secret.
    pub fn secret_came(&mut self, name: &str, taken: bool, version: u64) {
        if !self.secrets.contains_key(name) {
            // Those that are there were asked for when they came.
            self.secrets.insert(name.into(), Subscription::begun(0));
        }
        if let Some(secret) = self.secrets.get_mut(name) {
            secret.delivered(taken, version);
        }
    }

    /// What is told, with the secrets that are asked for: others are forgotten.
    pub fn families(&mut self, secrets: &BTreeSet<Arc<str>>) -> Vec<Family> {
        let mut out = Vec::new();
        for (own, names) in [
            (&self.clusters, names!("envoy_cluster_manager_cds_")),
            (&self.listeners, names!("envoy_listener_manager_lds_")),
        ] {
            let each = own.iter().map(|own| (Labels::new(), own.values(self.lost)));
            add(&mut out, names, each.collect());
        }
        if self.clusters.is_some() {
            let (count, at) = self.reloads;
            out.push(Family {
                name: "envoy_cluster_manager_cds_config_reload",
                help: "Deliveries that changed clusters.",
                metrics: vec![(Labels::new(), Value::Counter(count as f64))],
            });
            out.push(Family {
                name: "envoy_cluster_manager_cds_config_reload_time_ms",
                help: "When a delivery changed clusters last, in milliseconds since 1970.",
                metrics: vec![(Labels::new(), Value::Whole(at))],
            });
        }
        let routes = self.routes.iter().map(|(name, routes)| {
            let labels = route_labels(name, routes);
            (labels, routes.subscription.values(self.lost))
        });
        add(&mut out, names!("envoy_http_rds_"), routes.collect());
        let (mut reloads, mut times) = (Vec::new(), Vec::new());
        for (name, routes) in &self.routes {
            let labels = route_labels(name, routes);
            reloads.push((labels.clone(), Value::Counter(routes.reloads as f64)));
            times.push((labels, Value::Whole(routes.reloaded)));
        }
        out.push(Family {
            name: "envoy_http_rds_config_reload",
            help: "Route configurations that differed from those before.",
            metrics: reloads,
        });
        out.push(Family {
            name: "envoy_http_rds_config_reload_time_ms",
            help: "When a route configuration differed last, in milliseconds since 1970.",
            metrics: times,
        });
        self.secrets.retain(|name, _| secrets.contains(name));
        let waiting = Subscription::begun(0);
        let each = secrets.iter().map(|name| {
            let own = self.secrets.get(name).unwrap_or(&waiting);
            let labels = vec![("envoy_xds_resource_name", name.to_string())];
            (labels, own.values(0))
        });
        add(&mut out, names!("envoy_sds_"), each.collect());
        out.retain(|family| !family.metrics.is_empty());
        out
    }
}

fn route_labels(name: &str, routes: &Routes) -> Labels {
    vec![
        ("envoy_rds_route_config", name.to_owned()),
        ("envoy_http_conn_manager_prefix", routes.prefix.to_string()),
    ]
}

fn add(out: &mut Vec<Family>, names: [&'static str; 6], each: Vec<(Labels, [Value; 6])>) {
    for (index, (name, help)) in names.into_iter().zip(HELP).enumerate() {
        let metrics = each
            .iter()
            .map(|(labels, values)| (labels.clone(), values[index].clone()));
        out.push(Family {
            name,
            help,
            metrics: metrics.collect(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(own: &mut Subscriptions, secrets: &[&str]) -> BTreeMap<&'static str, Vec<Value>> {
        let secrets = secrets.iter().map(|name| Arc::from(*name)).collect();
        let values = |family: Family| family.metrics.into_iter().map(|(_, value)| value).collect();
        let families = own.families(&secrets).into_iter();
        families.map(|family| (family.name, values(family))).collect()
    }

    #[test]
    fn what_is_asked_for_counts_answers_and_the_streams_that_failed_since() {
        let mut own = Subscriptions::default();
        assert!(told(&mut own, &[]).is_empty(), "nothing is asked for");
        own.lose();
        own.begin();
        own.clusters_came(true, true, version_hash("7"));
        own.clusters_came(false, false, version_hash("8"));
        own.lose();
        let all = told(&mut own, &[]);
        let of = |name: &str| all[name][0].clone();
        assert_eq!(
            of("envoy_cluster_manager_cds_update_attempt"),
            Value::Counter(5.0)
        );
        assert_eq!(
            of("envoy_cluster_manager_cds_update_success"),
            Value::Counter(1.0)
        );
        assert_eq!(
            of("envoy_cluster_manager_cds_update_rejected"),
            Value::Counter(1.0)
        );
        assert_eq!(
            of("envoy_cluster_manager_cds_update_failure"),
            Value::Counter(1.0),
            "not the one before it was asked for"
        );
        assert_eq!(
            of("envoy_cluster_manager_cds_version"),
            Value::Whole(version_hash("7")),
            "what was taken"
        );
        assert_eq!(
            of("envoy_listener_manager_lds_update_attempt"),
            Value::Counter(2.0)
        );
    }

    #[test]
    fn routes_are_told_while_somebody_asks_for_them_and_secrets_while_they_are_wanted() {
        let mut own = Subscriptions::default();
        let name: Arc<str> = "r".into();
        own.routes_came("r", true, 1);
        own.ask_routes(&name, "in");
        own.ask_routes(&name, "other");
        own.routes_came("r", true, 5);
        own.routes_changed("r");
        own.secret_came("s", false, 0);
        let all = told(&mut own, &["s", "t"]);
        assert_eq!(all["envoy_http_rds_update_success"], [Value::Counter(1.0)]);
        assert_eq!(all["envoy_http_rds_version"], [Value::Whole(5)]);
        assert_eq!(all["envoy_http_rds_config_reload"], [Value::Counter(1.0)]);
        assert_eq!(
            all["envoy_sds_update_attempt"],
            [Value::Counter(3.0), Value::Counter(1.0)]
        );
        assert_eq!(
            all["envoy_sds_update_rejected"],
            [Value::Counter(1.0), Value::Counter(0.0)]
        );
        own.leave_routes("r");
        assert!(told(&mut own, &[]).is_empty());
        assert_eq!(
            told(&mut own, &["s"])["envoy_sds_update_attempt"],
            [Value::Counter(1.0)]
        );
    }

    #[test]
    fn a_version_is_the_number_that_envoy_makes_of_it() {
        assert_eq!(version_hash("v8"), 15_701_665_227_093_768_493);
        assert_eq!(version_hash("v9"), 7_832_730_476_746_051_721);
    }
}
