//! What was received and is in use, as it was received: for those who want to see all of it (`/config_dump`).
//!
//! Encoded, in boxes of exactly their size: some hundred bytes for a cluster or a virtual host, where the decoded message
//! would be many times as large. Endpoints are not here, because the store keeps their messages anyway; secrets are not,
//! because nobody should see them.

use std::collections::BTreeMap;
use std::ops::Bound;

use serin_xds::ResourceType;

/// Encoded messages by type and name.
#[derive(Debug, Default)]
pub struct Received {
    clusters: BTreeMap<Box<str>, Box<[u8]>>,
    listeners: BTreeMap<Box<str>, Box<[u8]>>,
    routes: BTreeMap<Box<str>, Box<[u8]>>,
    virtual_hosts: BTreeMap<Box<str>, Box<[u8]>>,
}

impl Received {
    fn of(&mut self, resource_type: ResourceType) -> Option<&mut BTreeMap<Box<str>, Box<[u8]>>> {
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
        if let Some(kept) = self.of(resource_type) {
            match kept.get_mut(name) {
                Some(own) => *own = body.into(),
                None => {
                    kept.insert(name.into(), body.into());
                }
            }
        }
    }

    /// Forgets a resource that was removed.
    pub(super) fn forget(&mut self, resource_type: ResourceType, name: &str) {
        if let Some(kept) = self.of(resource_type) {
            kept.remove(name);
        }
    }

    /// The message of a route configuration.
    pub(super) fn route(&self, name: &str) -> Option<&[u8]> {
        self.routes.get(name).map(|body| &**body)
    }

    /// Messages of clusters.
    pub fn clusters(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.clusters.iter().map(|(name, body)| (&**name, &**body))
    }

    /// Messages of listeners.
    pub fn listeners(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.listeners.iter().map(|(name, body)| (&**name, &**body))
    }

    /// Messages of route configurations.
    pub fn routes(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.routes.iter().map(|(name, body)| (&**name, &**body))
    }

    /// Messages of virtual hosts that came by themselves, of one route configuration.
    pub fn virtual_hosts<'a>(&'a self, route: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.virtual_hosts
            .range::<str, _>((Bound::Included(route), Bound::Unbounded))
            .take_while(move |(name, _)| name.starts_with(route))
            .filter(move |(name, _)| name[route.len()..].starts_with('/'))
            .map(|(_, body)| &**body)
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
        assert_eq!(received.clusters().count() + received.listeners().count(), 0);
    }
}
