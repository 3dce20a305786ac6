//! One xDS resource as both ends of the transport see it: encoded once, versioned by content, and knowing which
//! user objects it came from.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use crate::digest;

/// The resource types that travel on the aggregated stream.
///
/// The order is the make-before-break order of the xDS protocol: additions are sent in this order and removals in the
/// reverse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceType {
    /// `envoy.extensions.transport_sockets.tls.v3.Secret` (SDS); clusters and listeners refer to them.
    Secret,
    /// `envoy.config.cluster.v3.Cluster` (CDS).
    Cluster,
    /// `envoy.config.endpoint.v3.ClusterLoadAssignment` (EDS).
    Endpoints,
    /// `envoy.config.core.v3.TypedExtensionConfig` (ECDS), named after the filter that it configures.
    Extension,
    /// `envoy.config.listener.v3.Listener` (LDS).
    Listener,
    /// `envoy.config.route.v3.RouteConfiguration` (RDS).
    Route,
    /// `envoy.config.route.v3.VirtualHost` (VHDS), named `<route configuration>/<virtual host>`.
    VirtualHost,
    /// `envoy.service.runtime.v3.Runtime` (RTDS), a layer of runtime values; nothing refers to it.
    Runtime,
}

impl ResourceType {
    /// How many types there are.
    pub(crate) const COUNT: usize = 8;

    /// Every type, in make-before-break order.
    pub const ALL: [ResourceType; Self::COUNT] = [
        Self::Secret,
        Self::Cluster,
        Self::Endpoints,
        Self::Extension,
        Self::Listener,
        Self::Route,
        Self::VirtualHost,
        Self::Runtime,
    ];

    /// The `type.googleapis.com/…` URL that names this type on the wire.
    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Extension => "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::VirtualHost => "type.googleapis.com/envoy.config.route.v3.VirtualHost",
            Self::Runtime => "type.googleapis.com/envoy.service.runtime.v3.Runtime",
        }
    }

    /// The abbreviation that people and logs use: SDS, CDS, EDS, ECDS, LDS, RDS, VHDS, RTDS.
    pub const fn abbreviation(self) -> &'static str {
        match self {
            Self::Secret => "SDS",
            Self::Cluster => "CDS",
            Self::Endpoints => "EDS",
            Self::Extension => "ECDS",
            Self::Listener => "LDS",
            Self::Route => "RDS",
            Self::VirtualHost => "VHDS",
            Self::Runtime => "RTDS",
        }
    }

    /// Position in [`Self::ALL`].
    pub(crate) const fn index(self) -> usize {
        match self {
            Self::Secret => 0,
            Self::Cluster => 1,
            Self::Endpoints => 2,
            Self::Extension => 3,
            Self::Listener => 4,
            Self::Route => 5,
            Self::VirtualHost => 6,
            Self::Runtime => 7,
        }
    }

    /// The type behind a wire URL, if we speak it.
    pub fn from_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.type_url() == url)
    }
}

/// A user object, at one generation, that an xDS resource was made from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// `Kind/namespace/name`, for example `VirtualService/prod/reviews`.
    pub object: Arc<str>,
    /// `metadata.generation` of the object when the resource was made.
    pub generation: i64,
}

/// An encoded resource. Cloning is cheap; one encoding is shared by every proxy that needs it.
#[derive(Clone, Debug)]
pub struct Resource {
    /// Its type.
    pub resource_type: ResourceType,
    /// Its name, unique within the type and the proxy's view.
    pub name: Arc<str>,
    /// Hash of the content: equal content has an equal version, so what did not change is not sent.
    pub version: Arc<str>,
    /// The encoded protobuf message (the `value` of the `Any`).
    pub body: Bytes,
    /// The objects that it was made from; empty for what comes from Services and mesh configuration alone.
    pub origins: Arc<[Origin]>,
}

impl Resource {
    /// Encodes `message` and versions it by its content.
    pub fn new(
        resource_type: ResourceType,
        name: impl Into<Arc<str>>,
        message: &impl Message,
        origins: impl Into<Arc<[Origin]>>,
    ) -> Self {
        Self::from_encoded(resource_type, name, message.encode_to_vec().into(), origins)
    }

    /// Wraps an encoded message and versions it by its content.
    pub fn from_encoded(
        resource_type: ResourceType,
        name: impl Into<Arc<str>>,
        body: Bytes,
        origins: impl Into<Arc<[Origin]>>,
    ) -> Self {
        let version = digest::content_version(&body).into();
        Self {
            resource_type,
            name: name.into(),
            version,
            body,
            origins: origins.into(),
        }
    }

    /// Whether both have the same type, name and content; their origins may differ.
    pub fn same_content(&self, other: &Self) -> bool {
        self.resource_type == other.resource_type && self.version == other.version && self.name == other.name
    }
}

/// One difference between two views.
#[derive(Clone, Debug)]
pub enum Change {
    /// The resource is new or has a new content (or the same content with newer origins).
    Upsert(Arc<Resource>),
    /// The view no longer has a resource of this type and name.
    Remove(ResourceType, Arc<str>),
}

impl Change {
    /// The type of the resource concerned.
    pub fn resource_type(&self) -> ResourceType {
        match self {
            Self::Upsert(resource) => resource.resource_type,
            Self::Remove(resource_type, _) => *resource_type,
        }
    }

    /// The name of the resource concerned.
    pub fn name(&self) -> &Arc<str> {
        match self {
            Self::Upsert(resource) => &resource.name,
            Self::Remove(_, name) => name,
        }
    }
}
