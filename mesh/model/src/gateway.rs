//! Front end: networking.istio.io Gateway → servers.

use std::collections::BTreeMap;
use std::sync::Arc;

use serin_crds::istio::{Gateway as Object, ServerTlsSettings};

use crate::host;
use crate::object::{Kind, ObjectKey, Provenance, Seniority};
use crate::protocol::Protocol;

/// A gateway's servers.
#[derive(Clone, Debug, PartialEq)]
pub struct Gateway {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// Labels of the proxies that serve it.
    pub selector: BTreeMap<String, String>,
    /// Servers in order.
    pub servers: Vec<Server>,
    /// The object.
    pub provenance: Provenance,
    /// Decides between gateways that claim one port.
    pub seniority: Seniority,
}

/// One port and its hosts.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Port as the Gateway names it (the Service's, not the Pod's).
    pub port: u16,
    /// Name of the port.
    pub port_name: Arc<str>,
    /// What is spoken.
    pub protocol: Protocol,
    /// Address to listen at, if not all.
    pub bind: Option<Arc<str>>,
    /// Hosts exposed.
    pub hosts: Vec<ServerHost>,
    /// TLS.
    pub tls: Option<ServerTlsSettings>,
}

/// A host that a server exposes, and the namespaces whose VirtualServices may claim it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerHost {
    /// Namespace of the VirtualServices; none means any.
    pub namespace: Option<Arc<str>>,
    /// Host or wildcard.
    pub host: Arc<str>,
}

impl Server {
    /// The part of a VirtualService's host that this server exposes, for a VirtualService of `namespace`.
    pub fn exposes<'a>(&'a self, wanted: &'a str, namespace: &'a str) -> impl Iterator<Item = &'a str> {
        self.hosts
            .iter()
            .filter(move |server| {
                server
                    .namespace
                    .as_deref()
                    .is_none_or(|allowed| allowed == namespace)
            })
            .filter_map(move |server| host::intersection(&server.host, wanted))
    }
}

impl Gateway {
    pub(crate) fn compile(object: &Object) -> Self {
        let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
        let name = object.metadata.name.as_deref().unwrap_or("");
        Self {
            name: format!("{namespace}/{name}").into(),
            selector: object.spec.selector.clone(),
            servers: object
                .spec
                .servers
                .iter()
                .filter_map(|server| {
                    let port = server.port.as_ref()?;
                    Some(Server {
                        port: u16::try_from(port.number?).ok()?,
                        port_name: port.name.as_deref().unwrap_or("").into(),
                        protocol: Protocol::parse(port.protocol.as_deref().unwrap_or(""))
                            .unwrap_or(Protocol::Tcp),
                        bind: server
                            .bind
                            .as_deref()
                            .filter(|bind| !bind.is_empty())
                            .map(Into::into),
                        hosts: server
                            .hosts
                            .iter()
                            .map(|text| match text.split_once('/') {
                                None => ServerHost {
                                    namespace: None,
                                    host: text.as_str().into(),
                                },
                                Some(("*", host)) => ServerHost {
                                    namespace: None,
                                    host: host.into(),
                                },
                                Some((".", host)) => ServerHost {
                                    namespace: Some(namespace.into()),
                                    host: host.into(),
                                },
                                Some((space, host)) => ServerHost {
                                    namespace: Some(space.into()),
                                    host: host.into(),
                                },
                            })
                            .collect(),
                        tls: server.tls.clone(),
                    })
                })
                .collect(),
            provenance: Provenance {
                object: ObjectKey::new(Kind::Gateway, namespace, name),
                generation: object.metadata.generation.unwrap_or(0),
                rule: None,
            },
            seniority: Seniority::of(&object.metadata, namespace),
        }
    }

    /// Whether a proxy with these labels serves it.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.selector
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
    }
}
