//! The translator as the pump's world, with what a person should be told about each object.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Resource;
use serin_crds::istio::IstioStatus;
use serin_kit::unhonoured::Field;
use serin_model::{Change, Kind, MeshConfig, Object, ObjectKey, Severity, unhonoured};
use serin_xds::resource as xds;

use crate::ads::{Applied, Input, Note, Verdict, World};
use crate::index::Event;
use crate::lingering::Lingering;
use crate::proxy_identity::Proxy;
use crate::translate::{Touched, Translator};
use crate::warming::Warming;

impl From<Event> for Input<Change> {
    fn from(event: Event) -> Self {
        match event {
            Event::Changed(changes) => Self::Changes(changes),
            Event::Synced => Self::Synced,
        }
    }
}

/// The world of the mesh.
#[derive(Debug)]
pub struct MeshWorld {
    translator: Translator,
    warming: Warming,
    lingering: Lingering,
    objects: HashMap<Arc<str>, Seen>,
}

/// A user object as it was read last.
#[derive(Debug)]
struct Seen {
    key: ObjectKey,
    uid: Option<String>,
    generation: i64,
    conditions: Vec<Condition>,
    unhonoured: Vec<Field>,
}

impl MeshWorld {
    /// An empty world.
    pub fn new(config: MeshConfig) -> Self {
        Self {
            translator: Translator::new(config),
            warming: Warming::default(),
            lingering: Lingering::default(),
            objects: HashMap::new(),
        }
    }

    /// Remembers the object; returns whether its specification may have changed. A write of the status alone, such as our
    /// own, changes neither generation nor uid.
    fn see(&mut self, seen: Seen) -> bool {
        let name: Arc<str> = seen.key.to_string().into();
        let new = self.objects.get(&name).is_none_or(|known| {
            known.generation != seen.generation || known.uid != seen.uid || seen.generation == 0
        });
        self.objects.insert(name, seen);
        new
    }
}

/// The user objects whose liveness and status are reported.
fn seen(object: &Object) -> Option<Seen> {
    macro_rules! seen {
        ($object:expr, $conditions:expr) => {
            Some(Seen {
                key: object.key(),
                uid: $object.meta().uid.clone(),
                generation: $object.meta().generation.unwrap_or(0),
                conditions: $conditions,
                unhonoured: unhonoured(object)
                    .into_iter()
                    .map(|field| match field.refused {
                        true => Field::refused(field.path, field.reason),
                        false => Field::ignored(field.path, field.reason),
                    })
                    .collect(),
            })
        };
    }
    let of =
        |status: Option<&IstioStatus>| status.map(|status| status.conditions.clone()).unwrap_or_default();
    match object {
        Object::VirtualService(object) => seen!(object, of(object.status.as_ref())),
        Object::DestinationRule(object) => seen!(object, of(object.status.as_ref())),
        Object::Gateway(object) => seen!(object, of(object.status.as_ref())),
        Object::Sidecar(object) => seen!(object, of(object.status.as_ref())),
        Object::ServiceEntry(object) => {
            seen!(
                object,
                object
                    .status
                    .as_ref()
                    .map(|status| status.conditions.clone())
                    .unwrap_or_default()
            )
        }
        Object::Service(_) | Object::EndpointSlice(_) | Object::Pod(_) | Object::Node(_) => None,
    }
}

impl World for MeshWorld {
    type Change = Change;
    type Touched = Touched;

    fn apply(&mut self, changes: Vec<Change>, now: Duration) -> Applied<Touched> {
        let mut first = Vec::with_capacity(changes.len());
        let mut rules = Vec::new();
        let waiting = self.warming.take();
        let mut changed: Vec<(ObjectKey, Option<i64>)> = Vec::new();
        let mut notes_changed = false;
        for change in changes {
            let key = match &change {
                Change::Apply(object) => {
                    if let Some(seen) = seen(object) {
                        let (key, generation) = (seen.key.clone(), seen.generation);
                        if !self.see(seen) {
                            continue;
                        }
                        changed.push((key, Some(generation)));
                    }
                    object.key()
                }
                Change::Delete(key) => {
                    if self.objects.remove(key.to_string().as_str()).is_some() {
                        changed.push((key.clone(), None));
                    }
                    key.clone()
                }
            };
            // References are to services and user objects, not to what comes and goes with pods.
            notes_changed |= !matches!(key.kind, Kind::EndpointSlice | Kind::Pod | Kind::Node);
            // Rules come after what they may refer to, and among themselves in order.
            match key.kind {
                Kind::VirtualService => rules.push((change, None)),
                _ => first.push(change),
            }
        }
        let mut retried = Vec::with_capacity(waiting.len());
        let mut told = Vec::with_capacity(waiting.len());
        for (key, (object, until)) in &waiting {
            // One that is overtaken before it was ever in effect is not told of.
            let overtaken = changed.iter().any(|(changed, _)| changed == key);
            if !overtaken {
                told.push((key.clone(), seen(object).map(|seen| seen.generation)));
            }
            retried.push((Change::Apply(object.clone()), Some(*until)));
        }
        told.append(&mut changed);
        let (warming, lingering) = (&mut self.warming, &mut self.lingering);
        let mut settled = Vec::new();
        let touched = self.translator.apply_with(|intake| {
            for change in first {
                let change = if warming.is_complete() {
                    lingering.at_once(intake, change, now)
                } else {
                    Some(change)
                };
                if let Some(change) = change {
                    intake.take(change);
                }
            }
            for (change, until) in retried.into_iter().chain(rules) {
                let admitted = match &change {
                    Change::Apply(rules) => warming.admits(intake.model(), rules, until, now),
                    Change::Delete(key) => {
                        warming.forget(key);
                        true
                    }
                };
                if admitted {
                    intake.take(change);
                }
            }
            settled = lingering.settle(intake, now);
        });
        for key in settled {
            // Told already if it settled with the change itself.
            if told.iter().all(|(told, _)| *told != key) {
                let generation = self
                    .objects
                    .get(key.to_string().as_str())
                    .map(|seen| seen.generation);
                if matches!(key.kind, Kind::DestinationRule | Kind::ServiceEntry) {
                    told.push((key, generation));
                }
            }
        }
        notes_changed |= waiting.keys().any(|key| self.warming.missing(key).is_none());
        // Of what waits there is no verdict yet.
        told.retain(|(key, _)| self.warming.missing(key).is_none() && !self.lingering.holds(key));
        let verdicts = told
            .into_iter()
            .map(|(key, generation)| {
                let object: Arc<str> = key.to_string().into();
                match generation {
                    None => Verdict::Deleted { object },
                    Some(generation) if self.translator.model().is_refused(&key) => {
                        let reason = self.problems(&key, Severity::Refused).join("; ");
                        Verdict::Refused {
                            object,
                            generation,
                            reason,
                        }
                    }
                    Some(generation) => Verdict::Taken { object, generation },
                }
            })
            .collect();
        Applied {
            touched,
            verdicts,
            notes_changed,
        }
    }

    fn resources_for(&mut self, proxy: &Proxy) -> Vec<Arc<xds::Resource>> {
        self.translator.resources_for(proxy)
    }

    fn changes_for(&self, proxy: &Proxy, touched: &Touched) -> Vec<xds::Change> {
        self.translator.changes_for(proxy, touched)
    }

    fn complete(&mut self) {
        self.warming.complete();
    }

    fn wake_at(&self) -> Option<Duration> {
        let times = [self.warming.wake_at(), self.lingering.wake_at()];
        times.into_iter().flatten().min()
    }

    fn forget(&mut self, proxy: &str) {
        self.translator.forget(proxy);
    }

    fn note(&self, object: &str) -> Option<Note> {
        let seen = self.objects.get(object)?;
        Some(Note {
            kind: seen.key.kind.as_str(),
            namespace: seen.key.namespace.clone(),
            name: seen.key.name.clone(),
            generation: seen.generation,
            refused: self.problems(&seen.key, Severity::Refused),
            unresolved: match self.warming.missing(&seen.key) {
                Some(missing) => missing.iter().map(ToString::to_string).collect(),
                None => self.problems(&seen.key, Severity::Unresolved),
            },
            unhonoured: seen.unhonoured.clone(),
            conditions: seen.conditions.clone(),
        })
    }

    fn noted(&self) -> Vec<Arc<str>> {
        self.objects.keys().cloned().collect()
    }
}

impl MeshWorld {
    fn problems(&self, key: &ObjectKey, severity: Severity) -> Vec<String> {
        let problems = self.translator.model().problems(key).into_iter();
        problems
            .filter(|problem| problem.severity == severity)
            .map(|problem| problem.to_string())
            .collect()
    }
}
