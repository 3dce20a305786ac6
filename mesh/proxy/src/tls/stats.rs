//! Envoy's `ssl.*` counters of one listener or cluster. They outlive its configurations.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::table::Side;
use crate::metrics::collect::{Family, Labels, Value};

macro_rules! counters {
    ($($name:ident: $text:literal, $doc:literal;)*) => {
        /// See the module.
        #[derive(Debug, Default)]
        pub struct TlsStats {
            $(#[doc = $doc] pub $name: AtomicU64,)*
            versions: [AtomicU64; VERSIONS.len()],
            ciphers: [AtomicU64; CIPHERS.len()],
            groups: [AtomicU64; GROUPS.len()],
        }

        impl TlsStats {
            /// Names of the counters at listeners and clusters, for Prometheus, with their values.
            pub fn counters(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((
                    concat!("envoy_listener_ssl_", $text),
                    concat!("envoy_cluster_ssl_", $text),
                    self.$name.load(Ordering::Relaxed),
                )),*]
            }

            /// What was negotiated, for Prometheus: names at listeners and clusters, label, its value, how often.
            pub fn agreed(&self) -> Vec<(&'static str, &'static str, &'static str, &'static str, u64)> {
                let mut out = Vec::new();
                for (listener, cluster, label, names, values) in [
                    ("envoy_listener_ssl_versions", "envoy_cluster_ssl_versions", "envoy_ssl_version", VERSIONS, &self.versions[..]),
                    ("envoy_listener_ssl_ciphers", "envoy_cluster_ssl_ciphers", "envoy_ssl_cipher", CIPHERS, &self.ciphers[..]),
                    ("envoy_listener_ssl_curves", "envoy_cluster_ssl_curves", "envoy_ssl_curve", GROUPS, &self.groups[..]),
                ] {
                    for (name, value) in names.iter().zip(values) {
                        let value = value.load(Ordering::Relaxed);
                        if value > 0 {
                            out.push((listener, cluster, label, *name, value));
                        }
                    }
                }
                out
            }

            /// Names as Envoy writes them, with their values; of versions, ciphers and curves those that occurred.
            pub fn read(&self) -> Vec<(String, u64)> {
                let mut out = vec![$(($text.to_owned(), self.$name.load(Ordering::Relaxed))),*];
                out.extend(present("versions", VERSIONS, &self.versions));
                out.extend(present("ciphers", CIPHERS, &self.ciphers));
                out.extend(present("curves", GROUPS, &self.groups));
                out
            }
        }
    };
}

counters! {
    handshake: "handshake", "Handshakes that succeeded.";
    connection_error: "connection_error", "Handshakes and connections that failed for other reasons than verification.";
    session_reused: "session_reused", "Handshakes that resumed a session.";
    no_certificate: "no_certificate", "Handshakes in which the client gave no certificate.";
    fail_verify_no_cert: "fail_verify_no_cert", "Handshakes that failed because the peer gave no certificate.";
    fail_verify_error: "fail_verify_error", "Handshakes that failed because the chain did not verify.";
    fail_verify_san: "fail_verify_san", "Handshakes that failed because no subject alternative name matched.";
    fail_verify_cert_hash: "fail_verify_cert_hash", "Handshakes that failed because neither hash nor key matched.";
    context_updated: "context_config_update_by_sds", "Configurations rebuilt because a secret changed.";
    secrets_not_ready: "context_secrets_not_ready", "Connections refused because a secret had not arrived.";
}

const VERSIONS: &[&str] = &["TLSv1.2", "TLSv1.3"];
const CIPHERS: &[&str] = &[
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-RSA-CHACHA20-POLY1305",
];
const GROUPS: &[&str] = &["X25519MLKEM768", "X25519", "P-256", "P-384"];

fn present<'a>(
    kind: &'a str,
    names: &'a [&'a str],
    values: &'a [AtomicU64],
) -> impl Iterator<Item = (String, u64)> + 'a {
    names.iter().zip(values).filter_map(move |(name, value)| {
        let value = value.load(Ordering::Relaxed);
        (value > 0).then(|| (format!("{kind}.{name}"), value))
    })
}

/// Adds one. Handshakes are rare enough for a shared counter.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl TlsStats {
    /// Counts what a handshake agreed on.
    pub(crate) fn negotiated(&self, version: &str, cipher: &str, group: &str) {
        for (names, values, name) in [
            (VERSIONS, &self.versions[..], version),
            (CIPHERS, &self.ciphers[..], cipher),
            (GROUPS, &self.groups[..], group),
        ] {
            if let Some(index) = names.iter().position(|known| *known == name) {
                count(&values[index]);
            }
        }
    }
}

/// The counters of every listener and cluster as metric families.
pub fn families<'a>(all: impl Iterator<Item = (Side, &'a str, &'a Arc<TlsStats>)>) -> Vec<Family> {
    let mut families: BTreeMap<&'static str, Vec<(Labels, Value)>> = BTreeMap::new();
    for (side, name, stats) in all {
        let owner = || match side {
            Side::Listener => ("envoy_listener_address", name.to_owned()),
            Side::Cluster => ("envoy_cluster_name", name.to_owned()),
        };
        let of_side = |listener, cluster| match side {
            Side::Listener => listener,
            Side::Cluster => cluster,
        };
        for (listener, cluster, value) in stats.counters() {
            families
                .entry(of_side(listener, cluster))
                .or_default()
                .push((vec![owner()], Value::Counter(value as f64)));
        }
        for (listener, cluster, label, agreed, value) in stats.agreed() {
            families.entry(of_side(listener, cluster)).or_default().push((
                vec![owner(), (label, agreed.to_owned())],
                Value::Counter(value as f64),
            ));
        }
    }
    families
        .into_iter()
        .map(|(name, mut metrics)| {
            metrics.sort_by(|(a, _), (b, _)| a.cmp(b));
            Family {
                name,
                help: "TLS handshakes, as Envoy counts them.",
                metrics,
            }
        })
        .collect()
}
