//! Does what was decided. Every action is idempotent and has a deadline.

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, Patch, PatchParams};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use serin_crds::flagger::Canary;
use serin_crds::istio::{DestinationRule, VirtualService};
use tracing::warn;

use super::observe::{FINALIZER, Seen, Written, needs_target};
use super::{Key, Shared};
use crate::decide::Action;
use crate::objects::configs::{self, Kind};
use crate::objects::{Blueprint, ORIGINAL, Ownership, former, is_owned, without_takeover};
use crate::observed::Former;
use crate::traffic::{Route, Split};
use crate::{Error, FIELD_MANAGER};

/// How long one write may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct Acting<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) key: &'a Key,
    pub(crate) seen: &'a Seen,
    pub(crate) written: &'a mut Written,
}

impl Acting<'_> {
    pub(crate) async fn act(&mut self, action: &Action) -> Result<(), Error> {
        if needs_target(action) && self.seen.target.is_none() {
            // Without a target only the weights matter, and only on a route that is there.
            return match action {
                Action::SetWeight(split) => self.bare_weight(*split).await,
                _ => Ok(()),
            };
        }
        match action {
            Action::SetWeight(split) => match self.blueprint() {
                Ok(blueprint) => {
                    let object = blueprint.route(*split, self.seen.route.as_deref());
                    self.set_route(object).await
                }
                // A weight is withdrawn even where no objects can be generated.
                Err(_) => self.bare_weight(*split).await,
            },
            Action::ScaleTarget(replicas) => {
                let patch = json!({"spec": {"replicas": replicas}});
                self.merge::<Deployment>(&self.seen.plan.target, &patch).await
            }
            Action::CreatePrimary { id, replicas } => self.primary(id, *replicas, true).await,
            Action::PromotePrimary { id, replicas } => self.primary(id, *replicas, false).await,
            Action::KeepFormer { former, replaced_by } => {
                Box::pin(self.keep_former(former, replaced_by)).await
            }
            Action::RestorePrimary { id } => Box::pin(self.restore_primary(id)).await,
            Action::ApplyServices => {
                for service in self.blueprint()?.services() {
                    self.apply::<Service>(service).await?;
                }
                Ok(())
            }
            Action::ApplyApex => self.apex().await,
            Action::ApplyRules => {
                for rule in self.blueprint()?.rules() {
                    self.apply::<DestinationRule>(rule).await?;
                }
                Ok(())
            }
            Action::AddFinalizer => self.finalizers(|list| list.push(FINALIZER.to_owned())).await,
            Action::RemoveFinalizer => self.finalizers(|list| list.retain(|one| one != FINALIZER)).await,
            Action::RevertApex => self.revert_apex().await,
            Action::RevertRoute => self.revert_route().await,
        }
    }

    fn blueprint(&self) -> Result<Blueprint<'_>, Error> {
        let target = self
            .seen
            .target
            .as_deref()
            .ok_or_else(|| self.blocked("the target is gone".to_owned()))?;
        Blueprint::new(&self.seen.canary, target, &self.shared.context.options)
            .map_err(|reason| self.blocked(reason))
    }

    fn blocked(&self, reason: String) -> Error {
        Error::Blueprint {
            canary: self.key.to_string(),
            reason,
        }
    }

    async fn set_route(&self, object: Value) -> Result<(), Error> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let route = Route {
            namespace: self.key.namespace.clone(),
            name: name.clone(),
            object,
        };
        let described = format!("VirtualService {}/{name}", self.key.namespace);
        within(&described, "apply", self.shared.context.traffic.apply(&route)).await?;
        Ok(())
    }

    /// Changes nothing but the weights of an existing route.
    async fn bare_weight(&self, split: Split) -> Result<(), Error> {
        let Some(live) = self.seen.route.as_deref() else {
            return Ok(());
        };
        let apex = &self.seen.plan.apex;
        let mut spec = serde_json::to_value(&live.spec).unwrap_or_default();
        let destinations = spec.pointer_mut("/http/0/route").and_then(Value::as_array_mut);
        for destination in destinations.into_iter().flatten() {
            let host = destination["destination"]["host"].as_str().unwrap_or_default();
            if host == format!("{apex}-primary") {
                destination["weight"] = json!(split.primary());
            } else if host == format!("{apex}-canary") {
                destination["weight"] = json!(split.canary());
            }
        }
        let patch = json!({"spec": {"http": spec["http"]}});
        self.merge::<VirtualService>(&live.name_any(), &patch).await
    }

    async fn primary(&mut self, id: &str, replicas: i32, creating: bool) -> Result<(), Error> {
        let (copies, deployment) = {
            let blueprint = self.blueprint()?;
            (
                blueprint.config_copies(&self.seen.tracked),
                blueprint.primary(&self.seen.tracked, id, replicas, creating),
            )
        };
        // Before the pods roll: they read them when they start.
        for (kind, copy) in copies {
            match kind {
                Kind::ConfigMap => self.apply::<ConfigMap>(copy).await?,
                Kind::Secret => self.apply::<Secret>(copy).await?,
            }
        }
        self.apply::<Deployment>(deployment).await
    }

    /// Keeps the primary, unless it is another one already: then it was kept before.
    async fn keep_former(&mut self, former: &str, replaced_by: &str) -> Result<(), Error> {
        let caches = &self.shared.caches;
        let namespace = Some(self.key.namespace.as_str());
        let primary = caches.deployments.get(namespace, &self.seen.plan.primary());
        let Some(primary) = primary.filter(|primary| promoted_id(primary) == Some(former)) else {
            return Ok(());
        };
        let uid = self.seen.canary.uid();
        let ours = |metadata: &ObjectMeta| is_owned(metadata, uid.as_deref());
        let (mut config_maps, mut secrets) = (Vec::new(), Vec::new());
        for reference in primary
            .spec
            .iter()
            .flat_map(|spec| configs::references(&spec.template))
        {
            let name = &reference.0.name;
            match reference.0.kind {
                Kind::ConfigMap => config_maps.extend(
                    caches
                        .config_maps
                        .get(namespace, name)
                        .filter(|map| ours(&map.metadata))
                        .map(|map| (*map).clone()),
                ),
                Kind::Secret => secrets.extend(
                    caches
                        .secrets
                        .get(namespace, name)
                        .filter(|secret| ours(&secret.metadata))
                        .map(|secret| (*secret).clone()),
                ),
            }
        }
        let kept = Former {
            id: former.to_owned(),
            replaced_by: replaced_by.to_owned(),
        };
        let wanted = self.blueprint()?.former(&primary, &config_maps, &secrets, &kept);
        match wanted {
            Ok(secret) => self.apply::<Secret>(secret).await,
            // The promotion goes on; an alarm will say that there is nothing to go back to.
            Err(reason) => {
                warn!(%reason, "the primary cannot be kept");
                Ok(())
            }
        }
    }

    async fn restore_primary(&mut self, id: &str) -> Result<(), Error> {
        let caches = &self.shared.caches;
        let namespace = Some(self.key.namespace.as_str());
        let name = self.seen.plan.primary();
        let live = caches.deployments.get(namespace, &name);
        let kept = caches.secrets.get(namespace, &former::name(&name));
        let kept = kept.filter(|kept| former::read(kept).is_some_and(|former| former.id == id));
        let objects = match kept {
            None => Err("it is not there any more".to_owned()),
            Some(kept) => former::objects(&kept),
        };
        let objects =
            objects.map_err(|reason| self.blocked(format!("Secret {}: {reason}", former::name(&name))))?;
        for mut object in objects {
            match object["kind"].as_str() {
                Some("ConfigMap") => self.apply::<ConfigMap>(object).await?,
                Some("Secret") => self.apply::<Secret>(object).await?,
                _ => {
                    // As many pods as it has now.
                    if let Some(replicas) = live.as_ref().and_then(|live| live.spec.as_ref()?.replicas) {
                        object["spec"]["replicas"] = json!(replicas);
                    }
                    self.apply::<Deployment>(object).await?;
                }
            }
        }
        Ok(())
    }

    async fn apex(&mut self) -> Result<(), Error> {
        let name = self.seen.plan.apex.clone();
        let live = self.shared.caches.services.get(Some(&self.key.namespace), &name);
        let blueprint = self.blueprint()?;
        let ownership = blueprint.ownership(live.as_deref().map(|live| &live.metadata));
        match (ownership, live) {
            (Ownership::Taken, Some(live)) => {
                let patch = blueprint.apex_takeover(&live);
                self.merge::<Service>(&name, &patch).await
            }
            (Ownership::Ours | Ownership::Taken, _) => {
                let apex = blueprint.apex();
                self.apply::<Service>(apex).await
            }
        }
    }

    async fn revert_apex(&self) -> Result<(), Error> {
        let name = &self.seen.plan.apex;
        let Some(live) = self.shared.caches.services.get(Some(&self.key.namespace), name) else {
            return Ok(());
        };
        let blueprint = self.blueprint()?;
        if blueprint.ownership(Some(&live.metadata)) == Ownership::Ours {
            // Garbage collection takes it with the Canary.
            return Ok(());
        }
        self.merge::<Service>(name, &blueprint.apex_revert(&live)).await
    }

    async fn revert_route(&self) -> Result<(), Error> {
        let Some(live) = self.seen.route.as_deref() else {
            return Ok(());
        };
        let annotations = live.metadata.annotations.as_ref();
        let Some(original) = annotations.and_then(|annotations| annotations.get(ORIGINAL)) else {
            return Ok(());
        };
        let Ok(original) = serde_json::from_str::<Value>(original) else {
            return Ok(());
        };
        let mut annotations = json!(annotations);
        if let (Some(annotations), Some(gone)) = (annotations.as_object_mut(), without_takeover().as_object())
        {
            annotations.retain(|key, _| !gone.contains_key(key));
        }
        // The whole spec: a merge would leave ours in.
        let operations: json_patch_operations::Operations = vec![
            json!({"op": "replace", "path": "/spec", "value": original}),
            json!({"op": "replace", "path": "/metadata/annotations", "value": annotations}),
        ];
        self.json_patch::<VirtualService>(&live.name_any(), operations)
            .await
    }

    async fn finalizers(&self, change: impl FnOnce(&mut Vec<String>)) -> Result<(), Error> {
        let canary = &self.seen.canary;
        let mut finalizers = canary.finalizers().to_vec();
        change(&mut finalizers);
        // With the version that was read: a list is replaced as a whole, and others may be changing it.
        let patch =
            json!({"metadata": {"finalizers": finalizers, "resourceVersion": canary.resource_version()}});
        self.merge::<Canary>(&self.key.name, &patch).await
    }

    async fn apply<K>(&mut self, object: Value) -> Result<(), Error>
    where
        K: Namespaced,
    {
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let stored = {
            let api: Api<K> = Api::namespaced(self.shared.context.client.clone(), &self.key.namespace);
            let parameters = PatchParams::apply(FIELD_MANAGER).force();
            let patch = Patch::Apply(&object);
            self.write::<K, K>(&name, "apply", api.patch(&name, &parameters, &patch))
                .await?
        };
        self.written.remember(object, stored.resource_version());
        Ok(())
    }

    async fn merge<K: Namespaced>(&self, name: &str, patch: &Value) -> Result<(), Error> {
        let api: Api<K> = Api::namespaced(self.shared.context.client.clone(), &self.key.namespace);
        let parameters = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let patch = Patch::Merge(patch);
        self.write::<K, K>(name, "patch", api.patch(name, &parameters, &patch))
            .await?;
        Ok(())
    }

    async fn json_patch<K: Namespaced>(
        &self,
        name: &str,
        operations: json_patch_operations::Operations,
    ) -> Result<(), Error> {
        let api: Api<K> = Api::namespaced(self.shared.context.client.clone(), &self.key.namespace);
        let parameters = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let patch = json_patch_operations::patch(operations)
            .map_err(|reason| self.blocked(format!("the original route cannot be restored: {reason}")))?;
        self.write::<K, K>(name, "patch", api.patch(name, &parameters, &patch))
            .await?;
        Ok(())
    }

    async fn write<K: Namespaced, T>(
        &self,
        name: &str,
        action: &'static str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, Error> {
        let object = format!("{} {}/{name}", K::kind(&()), self.key.namespace);
        within(&object, action, async {
            request.await.map_err(|source| Error::Write {
                action,
                object: object.clone(),
                source: Box::new(source),
            })
        })
        .await
    }
}

fn promoted_id(deployment: &Deployment) -> Option<&str> {
    let template = &deployment.spec.as_ref()?.template;
    let annotations = template.metadata.as_ref()?.annotations.as_ref()?;
    annotations.get("flagger-id").map(String::as_str)
}

/// The kinds that are written here.
pub(crate) trait Namespaced:
    Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + Clone + Debug + DeserializeOwned
{
}

impl<K> Namespaced for K where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
{
}

/// RFC 6902 operations, built from JSON.
mod json_patch_operations {
    use serde_json::Value;

    pub(super) type Operations = Vec<Value>;

    pub(super) fn patch(operations: Operations) -> Result<kube::api::Patch<()>, serde_json::Error> {
        serde_json::from_value(Value::Array(operations)).map(kube::api::Patch::Json)
    }
}

/// Gives a write its deadline.
pub(crate) async fn within<T>(
    object: &str,
    action: &'static str,
    write: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(WRITE_TIMEOUT, write).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::Timeout {
            action,
            object: object.to_owned(),
            seconds: WRITE_TIMEOUT.as_secs(),
        }),
    }
}
