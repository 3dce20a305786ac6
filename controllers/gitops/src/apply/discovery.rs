//! Which path of the API a kind is served at, and whether its objects live in namespaces. Asked once per group version.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kube::core::{ApiResource, DynamicObject};
use kube::{Api, Client};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::error::{Error, server_words};
use crate::key::{ObjectId, group_version};

/// A kind that was not there is looked for again after this long; a CustomResourceDefinition may just have come.
const ABSENT_FOR: Duration = Duration::from_millis(500);

/// A served kind.
#[derive(Debug, Clone)]
pub(crate) struct Served {
    pub(crate) resource: ApiResource,
    pub(crate) namespaced: bool,
}

struct Version {
    kinds: HashMap<String, Served>,
    fetched: Instant,
}

/// The cache. Cloning shares it.
#[derive(Clone)]
pub(crate) struct Discovery {
    client: Client,
    versions: Arc<Mutex<HashMap<String, Arc<Version>>>>,
}

impl Discovery {
    pub(crate) fn new(client: Client) -> Self {
        Self {
            client,
            versions: Arc::default(),
        }
    }

    /// How a kind is served. A kind that is unknown is asked for again, at most every half second.
    pub(crate) async fn served(&self, id: &ObjectId, api_version: &str) -> Result<Served, Error> {
        let known = self.versions.lock().get(api_version).cloned();
        if let Some(version) = known {
            if let Some(served) = version.kinds.get(&id.kind) {
                return Ok(served.clone());
            }
            if version.fetched.elapsed() < ABSENT_FOR {
                return Err(no_kind(id, api_version));
            }
        }
        let version = self.fetch(api_version).await?;
        version
            .kinds
            .get(&id.kind)
            .cloned()
            .ok_or_else(|| no_kind(id, api_version))
    }

    /// Forgets a group version, after a definition came or went or a path turned out to be gone.
    pub(crate) fn forget(&self, api_version: &str) {
        self.versions.lock().remove(api_version);
    }

    /// Forgets every version of a group.
    pub(crate) fn forget_group(&self, group: &str) {
        self.versions
            .lock()
            .retain(|version, _| group_version(version).0 != group);
    }

    async fn fetch(&self, api_version: &str) -> Result<Arc<Version>, Error> {
        let (group, version) = group_version(api_version);
        let list = if group.is_empty() {
            self.client.list_core_api_resources(version).await
        } else {
            self.client.list_api_group_resources(api_version).await
        };
        let resources = match list {
            Ok(list) => list.resources,
            Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
            Err(e) => {
                return Err(Error::Api {
                    action: format!("discover {api_version} ({})", server_words(&e)),
                    source: Box::new(e),
                });
            }
        };
        let kinds = resources
            .into_iter()
            .filter(|r| !r.name.contains('/'))
            .map(|r| {
                let resource = ApiResource {
                    group: group.to_string(),
                    version: version.to_string(),
                    api_version: api_version.to_string(),
                    kind: r.kind.clone(),
                    plural: r.name,
                };
                (
                    r.kind,
                    Served {
                        resource,
                        namespaced: r.namespaced,
                    },
                )
            })
            .collect();
        let fetched = Arc::new(Version {
            kinds,
            fetched: Instant::now(),
        });
        self.versions
            .lock()
            .insert(api_version.to_string(), fetched.clone());
        Ok(fetched)
    }

    /// A client for the objects of a served kind, in a namespace where they have one.
    pub(crate) fn api(&self, served: &Served, namespace: &str) -> Api<DynamicObject> {
        if served.namespaced {
            Api::namespaced_with(self.client.clone(), namespace, &served.resource)
        } else {
            Api::all_with(self.client.clone(), &served.resource)
        }
    }

    /// A client for all objects of a served kind.
    pub(crate) fn api_all(&self, served: &Served) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &served.resource)
    }
}

fn no_kind(id: &ObjectId, api_version: &str) -> Error {
    Error::NoKind {
        object: id.to_string(),
        kind: id.kind.clone(),
        version: api_version.to_string(),
    }
}
