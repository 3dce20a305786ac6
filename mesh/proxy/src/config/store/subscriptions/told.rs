//! Subscriptions as they are told: families with Envoy's names.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Routes, Subscription, Subscriptions, Values};
use crate::config::extension::Kind;
use crate::metrics::collect::{Family, Labels, Value};

const HELP: [&str; 8] = [
    "Times that updates were asked for.",
    "Updates that were taken.",
    "Streams that failed while this was asked for.",
    "Updates of which something was refused.",
    "When something was taken last, in milliseconds since 1970.",
    "The hash of what the control plane calls its state.",
    "Milliseconds that it took to take updates.",
    "Times that the first has not come in time.",
];

macro_rules! names {
    ($area:literal $(, $more:literal)?) => {
        &[
            concat!($area, "update_attempt"),
            concat!($area, "update_success"),
            concat!($area, "update_failure"),
            concat!($area, "update_rejected"),
            concat!($area, "update_time"),
            concat!($area, "version"),
            concat!($area, "update_duration"),
            $(concat!($area, $more),)?
        ]
    };
}

impl Subscriptions {
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
        self.add_hosts(&mut out);
        self.add_extensions(&mut out);
        self.secrets.retain(|name, _| secrets.contains(name));
        let waiting = Subscription::begun(0);
        let each = secrets.iter().map(|name| {
            let own = self.secrets.get(name).unwrap_or(&waiting);
            let labels = vec![("envoy_xds_resource_name", name.to_string())];
            (labels, own.values(0))
        });
        add(
            &mut out,
            names!("envoy_sds_", "init_fetch_timeout"),
            each.collect(),
        );
        out.retain(|family| !family.metrics.is_empty());
        out
    }

    fn add_hosts(&self, out: &mut Vec<Family>) {
        let (mut each, mut reloads) = (Vec::new(), Vec::new());
        for (name, routes) in &self.routes {
            if let Some((subscription, count)) = &routes.hosts {
                let labels = vec![
                    ("route_config", name.to_string()),
                    ("envoy_http_conn_manager_prefix", routes.prefix.to_string()),
                ];
                each.push((labels.clone(), subscription.values(self.lost)));
                reloads.push((labels, Value::Counter(*count as f64)));
            }
        }
        add(out, names!("envoy_http_vhds_"), each);
        out.push(Family {
            name: "envoy_http_vhds_config_reload",
            help: "Deliveries of virtual hosts that were taken.",
            metrics: reloads,
        });
    }

    fn add_extensions(&self, out: &mut Vec<Family>) {
        let kinds: [(Kind, &[&str], [&str; 2]); 3] = [
            (
                Kind::Http,
                names!(
                    "envoy_extension_config_discovery_http_filter_",
                    "init_fetch_timeout"
                ),
                RELOADS_OF_HTTP,
            ),
            (
                Kind::Network,
                names!(
                    "envoy_extension_config_discovery_network_filter_",
                    "init_fetch_timeout"
                ),
                RELOADS_OF_NETWORK,
            ),
            (
                Kind::Listener,
                names!(
                    "envoy_extension_config_discovery_tcp_listener_filter_",
                    "init_fetch_timeout"
                ),
                RELOADS_OF_LISTENERS,
            ),
        ];
        for (kind, names, [reload, fail]) in kinds {
            let (mut each, mut reloads, mut fails) = (Vec::new(), Vec::new(), Vec::new());
            for ((_, name), extension) in self.extensions.iter().filter(|((own, _), _)| *own == kind) {
                let labels = vec![("extension", name.to_string())];
                let subscription = &extension.subscription;
                each.push((labels.clone(), subscription.values(self.lost)));
                reloads.push((labels.clone(), Value::Counter(subscription.taken as f64)));
                fails.push((labels, Value::Counter(extension.refused as f64)));
            }
            add(out, names, each);
            out.push(Family {
                name: reload,
                help: "Configurations of a filter that were taken.",
                metrics: reloads,
            });
            out.push(Family {
                name: fail,
                help: "Configurations of a filter that were refused.",
                metrics: fails,
            });
        }
    }
}

const RELOADS_OF_HTTP: [&str; 2] = [
    "envoy_extension_config_discovery_http_filter_config_reload",
    "envoy_extension_config_discovery_http_filter_config_fail",
];
const RELOADS_OF_NETWORK: [&str; 2] = [
    "envoy_extension_config_discovery_network_filter_config_reload",
    "envoy_extension_config_discovery_network_filter_config_fail",
];
const RELOADS_OF_LISTENERS: [&str; 2] = [
    "envoy_extension_config_discovery_tcp_listener_filter_config_reload",
    "envoy_extension_config_discovery_tcp_listener_filter_config_fail",
];

fn route_labels(name: &str, routes: &Routes) -> Labels {
    vec![
        ("envoy_rds_route_config", name.to_owned()),
        ("envoy_http_conn_manager_prefix", routes.prefix.to_string()),
    ]
}

fn add(out: &mut Vec<Family>, names: &[&'static str], each: Vec<(Labels, Values)>) {
    for (index, (name, help)) in names.iter().copied().zip(HELP).enumerate() {
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
