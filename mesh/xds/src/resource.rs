//! One xDS resource as both ends of the transport see it: encoded once, versioned by content, and knowing which
//! user objects it came from.

use std::sync::Arc;

use bytes::Bytes;

/// The resource types that travel on the aggregated stream.
///
/// The order is the make-before-break order of the xDS protocol: additions are sent in this order and removals in the
/// reverse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceType {
    /// `envoy.config.cluster.v3.Cluster` (CDS).
    Cluster,
    /// `envoy.config.endpoint.v3.ClusterLoadAssignment` (EDS).
    Endpoints,
    /// `envoy.config.listener.v3.Listener` (LDS).
    Listener,
    /// `envoy.config.route.v3.RouteConfiguration` (RDS).
    Route,
    /// `envoy.config.route.v3.VirtualHost` (VHDS), named `<route configuration>/<virtual host>`.
    VirtualHost,
}

impl ResourceType {
    /// Every type, in make-before-break order.
    pub const ALL: [ResourceType; 5] =
        [Self::Cluster, Self::Endpoints, Self::Listener, Self::Route, Self::VirtualHost];

    /// The `type.googleapis.com/…` URL that names this type on the wire.
    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::VirtualHost => "type.googleapis.com/envoy.config.route.v3.VirtualHost",
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
