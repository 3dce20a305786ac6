//! The one trait between a rollout and any mesh: *make this split so*, and *tell me how live it is*.
//!
//! [`KubeTraffic`] writes the VirtualService and asks a [`LivenessSource`] about it. The embedded mesh implements the
//! source with its ack ledger; for a foreign mesh it is whatever tells how far a route object got.

use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use kube::api::{Api, Patch, PatchParams};
use serde_json::Value;
use serin_crds::istio::VirtualService;

use crate::{Error, FIELD_MANAGER};

/// A split of traffic between canary and primary. The shares add up to 100 by construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Split {
    canary_percent: u8,
}

impl Split {
    /// Everything to the primary.
    pub const PRIMARY: Self = Self { canary_percent: 0 };
    /// Everything to the canary.
    pub const CANARY: Self = Self { canary_percent: 100 };

    /// A share of the canary in percent; values outside 0 to 100 are brought to the nearest bound.
    pub fn of_canary(percent: i32) -> Self {
        Self {
            canary_percent: u8::try_from(percent.clamp(0, 100)).unwrap_or(0),
        }
    }

    /// The canary's share in percent.
    pub fn canary(self) -> i32 {
        i32::from(self.canary_percent)
    }

    /// The primary's share in percent.
    pub fn primary(self) -> i32 {
        100 - self.canary()
    }
}

/// How far a generation of a route object is live in the proxies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Liveness {
    /// The generation spoken of.
    pub generation: i64,
    /// Whether the mesh has taken this generation in. Before that nothing else here counts.
    pub known: bool,
    /// Proxies that need it.
    pub needed: u32,
    /// Proxies that it was sent to.
    pub sent: u32,
    /// Proxies that have it.
    pub acked: u32,
    /// Proxies that refused it.
    pub refused: u32,
    /// The first refusal in the proxy's words.
    pub reason: Option<String>,
}

impl Liveness {
    /// Whether every proxy that needs it has it. A route that no proxy needs is live.
    pub fn is_live(&self) -> bool {
        self.known && self.refused == 0 && self.acked >= self.needed
    }
}

/// A route object and what it must look like.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Namespace of the object.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
    /// The whole object, with the split in it.
    pub object: Value,
}

/// A mesh, as seen by a rollout.
#[async_trait]
pub trait Traffic: Send + Sync {
    /// Makes a route so. Idempotent. Returns the generation of the object that now carries it.
    async fn apply(&self, route: &Route) -> Result<i64, Error>;

    /// How live a generation is, from now on: the current state at once, then every change. Ends when the mesh does.
    fn liveness(&self, namespace: &str, name: &str, generation: i64) -> BoxStream<'static, Liveness>;
}

/// Who knows how far a route object got.
pub trait LivenessSource: Send + Sync {
    /// The state of `object` (`VirtualService/<namespace>/<name>`) at a generation: at once, then at every change.
    fn watch(&self, object: &str, generation: i64) -> BoxStream<'static, Liveness>;
}

/// Writes VirtualServices by server-side apply.
pub struct KubeTraffic {
    client: kube::Client,
    liveness: Arc<dyn LivenessSource>,
}

impl KubeTraffic {
    /// Writes with `client`; `liveness` knows how far what was written got.
    pub fn new(client: kube::Client, liveness: Arc<dyn LivenessSource>) -> Self {
        Self { client, liveness }
    }
}

#[async_trait]
impl Traffic for KubeTraffic {
    async fn apply(&self, route: &Route) -> Result<i64, Error> {
        let api: Api<VirtualService> = Api::namespaced(self.client.clone(), &route.namespace);
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let stored = api
            .patch(&route.name, &parameters, &Patch::Apply(&route.object))
            .await
            .map_err(|source| Error::Write {
                action: "apply",
                object: format!("VirtualService {}/{}", route.namespace, route.name),
                source: Box::new(source),
            })?;
        Ok(stored.metadata.generation.unwrap_or(0))
    }

    fn liveness(&self, namespace: &str, name: &str, generation: i64) -> BoxStream<'static, Liveness> {
        self.liveness
            .watch(&format!("VirtualService/{namespace}/{name}"), generation)
    }
}
