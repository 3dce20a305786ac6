//! What was received, as it was received: for those who want to see all of it (`/config_dump`).
//!
//! Encoded, in boxes of exactly their size: some hundred bytes for a cluster or a virtual host, where the decoded message
//! would be many times as large. Endpoints are not here, because the store keeps their messages anyway; secrets are not,
//! because nobody should see them. What was refused last is kept beside what is in use, within limits.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use serin_xds::ResourceType;

use crate::error::Refusal;

/// Refused resources that are remembered.
const MAX_FAILURES: usize = 1_000;
/// Largest refused message that is kept.
const MAX_FAILED_BYTES: usize = 64 * 1024;

/// Milliseconds since 1970, for what people read.
pub(super) fn wall_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// A message that is in use.
#[derive(Debug)]
pub struct Kept {
    /// Encoded.
    pub body: Box<[u8]>,
    /// The control plane's version of it, where it came from one.
    pub version: Option<Arc<str>>,
    /// When it came, in milliseconds since 1970.
    pub updated: u64,
    /// Whether it is of the bootstrap.
    pub is_static: bool,
}

impl Kept {
    pub(crate) fn now(body: &[u8]) -> Self {
        Self {
            body: body.into(),
            version: None,
            updated: wall_ms(),
            is_static: false,
        }
    }
}

/// A message that was refused, since when nothing of its name was taken.
#[derive(Debug)]
pub struct Failure {
    /// Encoded; empty if it was too large to be kept.
    pub body: Box<[u8]>,
    /// The control plane's version of it.
    pub version: Option<Arc<str>>,
    /// When it came, in milliseconds since 1970.
    pub at: u64,
    /// Why it was refused.
    pub details: Box<str>,
}

type Messages = BTreeMap<Box<str>, Kept>;

/// Encoded messages by type and name.
#[derive(Debug, Default)]
pub struct Received {
    clusters: Messages,
    listeners: Messages,
    routes: Messages,
    virtual_hosts: Messages,
    failures: BTreeMap<(ResourceType, Box<str>), Failure>,
}

impl Received {
    fn of(&mut self, resource_type: ResourceType) -> Option<&mut Messages> {
        match resource_type {
            ResourceType::Cluster => Some(&mut self.clusters),
            ResourceType::Listener => Some(&mut self.listeners),
            ResourceType::Route => Some(&mut self.routes),
            ResourceType::VirtualHost => Some(&mut self.virtual_hosts),
            _ => None,
        }
    }

    /// Keeps a message that was taken.
    pub(super) fn keep(&mut self, resource_type: ResourceType, name: &str, body: &[u8]) {
        self.recover(resource_type, name);
        if let Some(kept) = self.of(resource_type) {
            match kept.get_mut(name) {
                Some(own) => *own = Kept::now(body),
                None => {
                    kept.insert(name.into(), Kept::now(body));
                }
            }
        }
    }

    /// Keeps a message that was refused.
    pub(super) fn fail(
        &mut self,
        resource_type: ResourceType,
        name: &str,
        body: Option<&[u8]>,
        refusal: &Refusal,
    ) {
        // Nobody should see what was to be a secret.
        if resource_type == ResourceType::Secret || self.failures.len() >= MAX_FAILURES {
            return;
        }
        let failure = Failure {
            body: body
                .filter(|body| body.len() <= MAX_FAILED_BYTES)
                .unwrap_or_default()
                .into(),
            version: None,
            at: wall_ms(),
            details: refusal.to_string().into(),
        };
        self.failures.insert((resource_type, name.into()), failure);
    }

    fn recover(&mut self, resource_type: ResourceType, name: &str) {
        if !self.failures.is_empty() {
            self.failures.remove(&(resource_type, Box::from(name)));
        }
    }

    /// The control plane's version of what was taken or refused just now.
    pub(super) fn note_version(&mut self, resource_type: ResourceType, name: &str, version: &Arc<str>) {
        if !self.failures.is_empty()
            && let Some(failure) = self.failures.get_mut(&(resource_type, Box::from(name)))
        {
            failure.version = Some(version.clone());
        } else if let Some(kept) = self.of(resource_type).and_then(|kept| kept.get_mut(name)) {
            kept.version = Some(version.clone());
        }
    }

    /// Whether a cluster is of the bootstrap.
    pub fn is_static_cluster(&self, name: &str) -> bool {
        self.clusters.get(name).is_some_and(|kept| kept.is_static)
    }

    /// What was taken just now is of the bootstrap.
    pub(super) fn note_static(&mut self, resource_type: ResourceType, name: &str) {
        if let Some(kept) = self.of(resource_type).and_then(|kept| kept.get_mut(name)) {
            kept.is_static = true;
        }
    }

    /// Forgets a resource that was removed.
    pub(super) fn forget(&mut self, resource_type: ResourceType, name: &str) {
        self.recover(resource_type, name);
        if let Some(kept) = self.of(resource_type) {
            kept.remove(name);
        }
    }

    /// What was refused of a type, by name.
    pub fn failures(&self, resource_type: ResourceType) -> impl Iterator<Item = (&str, &Failure)> {
        self.failures
            .iter()
            .filter(move |((own, _), _)| *own == resource_type)
            .map(|((_, name), failure)| (&**name, failure))
    }

    /// What was refused of a resource since it was taken last.
    pub fn failure(&self, resource_type: ResourceType, name: &str) -> Option<&Failure> {
        if self.failures.is_empty() {
            return None;
        }
        self.failures.get(&(resource_type, Box::from(name)))
    }

    /// The message of a route configuration.
    pub(super) fn route(&self, name: &str) -> Option<&[u8]> {
        self.routes.get(name).map(|kept| &*kept.body)
    }

    /// Messages of clusters.
    pub fn clusters(&self) -> impl Iterator<Item = (&str, &Kept)> {
        self.clusters.iter().map(|(name, kept)| (&**name, kept))
    }

    /// Messages of listeners.
    pub fn listeners(&self) -> impl Iterator<Item = (&str, &Kept)> {
        self.listeners.iter().map(|(name, kept)| (&**name, kept))
    }

    /// Messages of route configurations.
    pub fn routes(&self) -> impl Iterator<Item = (&str, &Kept)> {
        self.routes.iter().map(|(name, kept)| (&**name, kept))
    }

    /// Messages of virtual hosts that came by themselves, of one route configuration.
    pub fn virtual_hosts<'a>(&'a self, route: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.virtual_hosts
            .range::<str, _>((Bound::Included(route), Bound::Unbounded))
            .take_while(move |(name, _)| name.starts_with(route))
            .filter(move |(name, _)| name[route.len()..].starts_with('/'))
            .map(|(_, kept)| &*kept.body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_hosts_are_found_by_the_route_configuration_that_they_belong_to() {
        let mut received = Received::default();
        for name in ["80/a", "80/b", "8080/c", "9/d"] {
            received.keep(ResourceType::VirtualHost, name, name.as_bytes());
        }
        received.forget(ResourceType::VirtualHost, "80/a");
        let found: Vec<_> = received.virtual_hosts("80").collect();
        assert_eq!(found, [b"80/b"]);
        received.keep(ResourceType::Secret, "s", b"secret");
        received.fail(
            ResourceType::Secret,
            "s",
            Some(b"secret"),
            &Refusal::new("", "bad"),
        );
        assert!(received.failure(ResourceType::Secret, "s").is_none());
        assert_eq!(received.clusters().count() + received.listeners().count(), 0);
    }

    #[test]
    fn what_was_refused_stays_beside_what_is_in_use_until_something_of_its_name_is_taken() {
        let mut received = Received::default();
        let (name, of) = ("c", ResourceType::Cluster);
        received.keep(of, name, b"good");
        received.note_version(of, name, &"1".into());
        received.fail(of, name, Some(b"bad"), &Refusal::new("lb_policy", "unknown"));
        received.note_version(of, name, &"2".into());
        let (_, kept) = received.clusters().next().unwrap();
        assert_eq!((&*kept.body, kept.version.as_deref()), (&b"good"[..], Some("1")));
        let failure = received.failure(of, name).unwrap();
        assert_eq!(
            (&*failure.body, failure.version.as_deref()),
            (&b"bad"[..], Some("2"))
        );
        assert!(failure.details.contains("lb_policy"), "{failure:?}");
        received.keep(of, name, b"better");
        assert!(received.failure(of, name).is_none());
        for index in 0..2 * MAX_FAILURES {
            let large = vec![0; MAX_FAILED_BYTES + 1];
            received.fail(of, &index.to_string(), Some(&large), &Refusal::new("", "large"));
        }
        assert_eq!(received.failures(of).count(), MAX_FAILURES);
        assert!(received.failures(of).all(|(_, failure)| failure.body.is_empty()));
    }
}
