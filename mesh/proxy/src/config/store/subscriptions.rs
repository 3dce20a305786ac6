//! What is counted of what the control plane is asked for (`cds.*`, `lds.*`, `rds.*`, `vhds.*`, `sds.*`,
//! `extension_config_discovery.*`), as Envoy counts it: being asked for is an attempt, each answer is one (it asks for the
//! next), one that is refused is two, and each stream that ends or cannot be opened is one that failed. Endpoints are counted
//! by their clusters ([`crate::config::slot::Updates`]), with the same meaning.
//!
//! Streams that failed are counted once for all; what a subscription has had of them is the difference to when it began.

mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::received::wall_ms;
use crate::config::extension::Kind;
use crate::config::hash::xxh64;
use crate::metrics::collect::Value;
use crate::metrics::histogram::{Histogram, HistogramValue};

/// One thing that is asked for.
#[derive(Debug)]
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
    /// How long it took to take updates; made with the first.
    took: Option<Box<Histogram>>,
    /// Times that something has waited for the first in vain.
    waited: u64,
}

/// What a delivery of the control plane was.
#[derive(Clone, Copy, Debug)]
pub struct Came {
    /// Whether it was taken.
    pub taken: bool,
    /// The hash of its state's name.
    pub version: u64,
    /// How long it took to take it, with all that came together.
    pub took: Duration,
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
            took: None,
            waited: 0,
        }
    }

    fn delivered(&mut self, came: Came) {
        // Each answer asks for the next.
        self.attempts += 1;
        if came.taken {
            self.taken += 1;
            self.updated = wall_ms();
            self.version = came.version;
            let took = self.took.get_or_insert_default();
            took.observe_thousandths(came.took.as_micros() as u64);
        } else {
            // And saying that it is refused is one (Envoy).
            self.attempts += 1;
            self.refused += 1;
        }
    }

    /// Values in the order in which they are told.
    fn values(&self, lost: u64) -> Values {
        let mut took = HistogramValue::default();
        if let Some(own) = &self.took {
            own.read(&mut took);
        }
        let failed = lost.saturating_sub(self.lost_before);
        [
            Value::Counter((self.attempts + failed) as f64),
            Value::Counter(self.taken as f64),
            Value::Counter(failed as f64),
            Value::Counter(self.refused as f64),
            Value::Whole(self.updated),
            Value::Whole(self.version),
            Value::Histogram(Box::new(took)),
            Value::Counter(self.waited as f64),
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
    /// Its virtual hosts, where they come as resources of their own, and how many deliveries of them were taken.
    hosts: Option<(Subscription, u64)>,
}

/// A filter that is asked for.
#[derive(Debug)]
struct Extension {
    subscription: Subscription,
    /// Times that it was refused.
    refused: u64,
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
    /// Filters by ECDS.
    extensions: BTreeMap<(Kind, Box<str>), Extension>,
}

/// In the order in which they are told. The last is told of what something waits for.
type Values = [Value; 8];

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
    pub fn clusters_came(&mut self, came: Came, changed: bool) {
        if let Some(own) = &mut self.clusters {
            own.delivered(came);
            if changed {
                self.reloads = (self.reloads.0 + 1, wall_ms());
            }
        }
    }

    /// Something has come of all listeners.
    pub fn listeners_came(&mut self, came: Came) {
        if let Some(own) = &mut self.listeners {
            own.delivered(came);
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
            hosts: None,
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
    pub fn routes_came(&mut self, name: &str, came: Came) {
        if let Some(routes) = self.routes.get_mut(name) {
            routes.subscription.delivered(came);
        }
    }

    /// Virtual hosts of a route configuration are asked for, or not any more.
    pub fn ask_hosts(&mut self, name: &str, asked: bool) {
        let lost = self.lost;
        if let Some(routes) = self.routes.get_mut(name) {
            let before = routes.hosts.take();
            routes.hosts = asked.then(|| before.unwrap_or((Subscription::begun(lost), 0)));
        }
    }

    /// The control plane has said something of virtual hosts of a route configuration.
    pub fn hosts_came(&mut self, name: &str, came: Came) {
        let hosts = self.routes.get_mut(name).and_then(|routes| routes.hosts.as_mut());
        if let Some((subscription, reloads)) = hosts {
            subscription.delivered(came);
            *reloads += u64::from(came.taken);
        }
    }

    /// These filters are asked for, and no others.
    pub fn ask_extensions(&mut self, asked: &BTreeSet<(Kind, Box<str>)>) {
        let lost = self.lost;
        self.extensions.retain(|subject, _| asked.contains(subject));
        for subject in asked {
            if !self.extensions.contains_key(subject) {
                let extension = Extension {
                    subscription: Subscription::begun(lost),
                    refused: 0,
                };
                self.extensions.insert(subject.clone(), extension);
            }
        }
    }

    /// The control plane has said something of the filters of a name.
    pub fn extension_came(&mut self, name: &str, came: Came) {
        for (_, extension) in self.extensions.iter_mut().filter(|((_, own), _)| **own == *name) {
            extension.subscription.delivered(came);
            extension.refused += u64::from(!came.taken);
        }
    }

    /// A listener has waited for a filter in vain.
    pub fn extension_late(&mut self, kind: Kind, name: &str) {
        if let Some(extension) = self.extensions.get_mut(&(kind, name.into())) {
            extension.subscription.waited += 1;
        }
    }

    /// Something has waited for a secret in vain.
    pub fn secret_late(&mut self, name: &str) {
        let secret = self.secrets.entry(name.into());
        secret.or_insert_with(|| Subscription::begun(0)).waited += 1;
    }

    /// Somebody who is asked for it has said something of a secret.
    pub fn secret_came(&mut self, name: &str, came: Came) {
        if !self.secrets.contains_key(name) {
            // Those that are there were asked for when they came.
            self.secrets.insert(name.into(), Subscription::begun(0));
        }
        if let Some(secret) = self.secrets.get_mut(name) {
            secret.delivered(came);
        }
    }
}

#[cfg(test)]
mod tests;
