//! Reads the caches into [`Observed`]. No request is made here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use kube::{Resource, ResourceExt};
use serde_json::Value;
use serin_crds::flagger::Canary;
use serin_crds::istio::VirtualService;
use sha2::{Digest, Sha256};

use super::interests::{Interest, Kind};
use super::{Key, Shared};
use crate::decide::Action;
use crate::objects::configs::{self, Reference, Tracked};
use crate::objects::{Blueprint, Ownership, covers, former, split_of};
use crate::observed::{Observed, RouteState, Workload};
use crate::plan::Plan;
use crate::traffic::Split;

/// Flagger's finalizer.
pub(crate) const FINALIZER: &str = "finalizer.flagger.app";

/// What was read, and the objects it was read from.
pub(crate) struct Seen {
    pub(crate) canary: Arc<Canary>,
    pub(crate) plan: Plan,
    pub(crate) observed: Observed,
    pub(crate) target: Option<Arc<Deployment>>,
    pub(crate) tracked: BTreeMap<Reference, Tracked>,
    pub(crate) route: Option<Arc<VirtualService>>,
}

/// What was written last, by object, so that a field which the API server does not keep is not written for ever.
#[derive(Default)]
pub(crate) struct Written {
    by_object: BTreeMap<String, (Value, Option<String>)>,
}

impl Written {
    pub(crate) fn remember(&mut self, wanted: Value, resource_version: Option<String>) {
        self.by_object
            .insert(object_key(&wanted), (wanted, resource_version));
    }

    /// Whether the live object is as wanted, or as the API server made it of exactly this wish.
    fn in_place<K>(&self, live: Option<&Arc<K>>, wanted: &Value) -> bool
    where
        K: Resource + serde::Serialize,
    {
        let Some(live) = live else { return false };
        let written = self.by_object.get(&object_key(wanted));
        if written.is_some_and(|(wish, version)| wish == wanted && *version == live.resource_version()) {
            return true;
        }
        serde_json::to_value(&**live).is_ok_and(|live| covers(&live, wanted))
    }
}

fn object_key(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!("{}/{}", text(&object["kind"]), text(&object["metadata"]["name"]))
}

/// Reads everything that a Canary is about. `None` when it is gone.
pub(crate) fn observe(shared: &Shared, key: &Key, written: &Written) -> Option<Seen> {
    let caches = &shared.caches;
    let namespace = Some(key.namespace.as_str());
    let canary = caches.canaries.get(namespace, &key.name)?;
    let plan = Plan::new(&canary.spec);
    let target = caches.deployments.get(namespace, &plan.target);
    let primary = caches.deployments.get(namespace, &plan.primary());
    let route = caches.routes.get(namespace, &plan.apex);

    let mut observed = Observed {
        name: key.name.clone(),
        namespace: key.namespace.clone(),
        generation: canary.metadata.generation.unwrap_or(0),
        deleting: canary.metadata.deletion_timestamp.is_some(),
        has_finalizer: canary.finalizers().iter().any(|finalizer| finalizer == FINALIZER),
        target: target.as_deref().map(workload),
        primary: primary.as_deref().map(workload),
        canary_endpoints: Some(
            shared
                .endpoints
                .ready(&key.namespace, &format!("{}-canary", plan.apex)),
        ),
        rival: rival(shared, key, &canary, &plan),
        former: caches
            .secrets
            .get(namespace, &former::name(&plan.primary()))
            .and_then(|kept| former::read(&kept)),
        ..Observed::default()
    };
    let mut interests: BTreeSet<Interest> = [
        (Kind::Target, plan.target.clone()),
        (Kind::Deployment, plan.target.clone()),
        (Kind::Deployment, plan.primary()),
        (Kind::Service, plan.apex.clone()),
        (Kind::Service, format!("{}-primary", plan.apex)),
        (Kind::Service, format!("{}-canary", plan.apex)),
        (Kind::Rule, format!("{}-primary", plan.apex)),
        (Kind::Rule, format!("{}-canary", plan.apex)),
        (Kind::Route, plan.apex.clone()),
        (Kind::Endpoints, format!("{}-canary", plan.apex)),
        (Kind::Secret, former::name(&plan.primary())),
    ]
    .into();

    let mut tracked = BTreeMap::new();
    if let Some(target) = &target {
        if let Some(spec) = target
            .spec
            .as_ref()
            .filter(|_| shared.context.options.config_tracking)
        {
            for reference in configs::references(&spec.template).into_keys() {
                let kind = match reference.kind {
                    configs::Kind::ConfigMap => Kind::ConfigMap,
                    configs::Kind::Secret => Kind::Secret,
                };
                interests.insert((kind, reference.name));
            }
            let found = configs::tracked(
                &spec.template,
                |name| caches.config_maps.get(namespace, name),
                |name| caches.secrets.get(namespace, name),
            );
            match found {
                Ok(found) => tracked = found,
                Err(reason) => {
                    observed.blocked = Some(format!("Deployment {}.{}: {reason}", plan.target, key.namespace))
                }
            }
        }
        observed.configs = tracked
            .iter()
            .map(|(reference, object)| (reference.key(), object.checksum()))
            .collect();
        match Blueprint::new(&canary, target, &shared.context.options) {
            Ok(blueprint) => in_place(shared, key, &blueprint, route.as_ref(), written, &mut observed),
            Err(reason) => {
                observed.blocked = Some(reason);
                observed.route = route.as_deref().map(|route| bare_route(route, &plan.apex));
            }
        }
    } else {
        observed.route = route.as_deref().map(|route| bare_route(route, &plan.apex));
    }
    shared.interests.set(key, interests);
    Some(Seen {
        canary,
        plan,
        observed,
        target,
        tracked,
        route,
    })
}

fn in_place(
    shared: &Shared,
    key: &Key,
    blueprint: &Blueprint<'_>,
    route: Option<&Arc<VirtualService>>,
    written: &Written,
    observed: &mut Observed,
) {
    let caches = &shared.caches;
    let namespace = Some(key.namespace.as_str());
    let name_of = |object: &Value| object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    observed.services_in_place = blueprint.services().iter().all(|wanted| {
        let live = caches.services.get(namespace, &name_of(wanted));
        written.in_place(live.as_ref(), wanted)
    });
    let apex = caches.services.get(namespace, blueprint.apex_name());
    observed.apex_in_place = match blueprint.ownership(apex.as_deref().map(|apex| &apex.metadata)) {
        Ownership::Ours => written.in_place(apex.as_ref(), &blueprint.apex()),
        Ownership::Taken => apex.as_ref().is_some_and(|apex| {
            let wanted = blueprint.apex_takeover(apex);
            serde_json::to_value(&**apex).is_ok_and(|live| covers(&live, &wanted))
        }),
    };
    observed.rules_in_place = blueprint.rules().iter().all(|wanted| {
        let live = caches.rules.get(namespace, &name_of(wanted));
        written.in_place(live.as_ref(), wanted)
    });
    observed.route = route.map(|live| {
        let bare = bare_route(live, blueprint.apex_name());
        let wanted = blueprint.route(bare.split.unwrap_or(Split::PRIMARY), Some(live));
        RouteState {
            in_place: bare.split.is_some() && written.in_place(Some(live), &wanted),
            ..bare
        }
    });
}

/// A route whose content cannot be compared with anything.
fn bare_route(live: &VirtualService, apex: &str) -> RouteState {
    RouteState {
        generation: live.metadata.generation.unwrap_or(0),
        split: serde_json::to_value(&live.spec)
            .ok()
            .and_then(|spec| split_of(&spec, apex)),
        in_place: false,
    }
}

/// The Canary that rolls out the same target and is older (or, at the same second, comes first by name).
fn rival(shared: &Shared, key: &Key, canary: &Canary, plan: &Plan) -> Option<String> {
    let age = |canary: &Canary| canary.metadata.creation_timestamp.as_ref().map(|at| at.0);
    let own = (age(canary), key.clone());
    shared
        .interests
        .concerned(Kind::Target, &key.namespace, &plan.target)
        .into_iter()
        .filter(|other| other != key)
        .filter_map(|other| {
            let rival = shared.caches.canaries.get(Some(&other.namespace), &other.name)?;
            // Its own spec counts, not what it was interested in a moment ago.
            let same = rival.spec.target_ref.name == plan.target
                && rival.spec.target_ref.kind == canary.spec.target_ref.kind;
            same.then(|| (age(&rival), other))
        })
        .filter(|other| *other < own)
        .min()
        .map(|(_, other)| other.to_string())
}

fn workload(deployment: &Deployment) -> Workload {
    let spec = deployment.spec.as_ref();
    let status = deployment.status.as_ref();
    let template = spec.map(|spec| &spec.template);
    let count = |value: Option<i32>| value.unwrap_or(0);
    Workload {
        name: format!(
            "{}.{}",
            deployment.name_any(),
            deployment.namespace().unwrap_or_default()
        ),
        generation: deployment.metadata.generation.unwrap_or(0),
        observed_generation: status.and_then(|status| status.observed_generation).unwrap_or(0),
        replicas: spec.and_then(|spec| spec.replicas).unwrap_or(1),
        total: count(status.and_then(|status| status.replicas)),
        updated: count(status.and_then(|status| status.updated_replicas)),
        available: count(status.and_then(|status| status.available_replicas)),
        deadline_exceeded: status
            .and_then(|status| status.conditions.as_ref())
            .into_iter()
            .flatten()
            .any(|condition| {
                condition.type_ == "Progressing"
                    && condition.reason.as_deref() == Some("ProgressDeadlineExceeded")
            }),
        template_hash: template.map(template_hash).unwrap_or_default(),
        promoted_id: template
            .and_then(|template| template.metadata.as_ref())
            .and_then(|metadata| metadata.annotations.as_ref())
            .and_then(|annotations| annotations.get("flagger-id"))
            .cloned(),
    }
}

/// Names a revision: ten hex digits of the SHA-256 of the pod template's JSON, whose maps are sorted.
fn template_hash(template: &k8s_openapi::api::core::v1::PodTemplateSpec) -> String {
    let json = serde_json::to_vec(template).unwrap_or_default();
    crate::hex(&Sha256::digest(&json)[..5])
}

/// Whether an action needs the target to generate objects from.
pub(crate) fn needs_target(action: &Action) -> bool {
    match action {
        Action::AddFinalizer
        | Action::RemoveFinalizer
        | Action::ScaleTarget(_)
        | Action::RestorePrimary { .. }
        | Action::RevertRoute => false,
        Action::SetWeight(_)
        | Action::KeepFormer { .. }
        | Action::CreatePrimary { .. }
        | Action::PromotePrimary { .. }
        | Action::ApplyServices
        | Action::ApplyApex
        | Action::ApplyRules
        | Action::RevertApex => true,
    }
}
