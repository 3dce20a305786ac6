//! Rules that came before what they refer to.
//!
//! Kinds are watched apart, so a VirtualService may be seen milliseconds before the DestinationRule or the Service that was
//! written ahead of it. Taken in at once, its requests would be answered with 503 until the other one is seen. So it waits:
//! what was in effect stays in effect, the object is not live, and its status names what is missing. As soon as nothing is missing,
//! or after [`WARMING`], it is taken in. After that it means what it means in Istio: 503 for what is not there.
//!
//! Nothing waits before the world is complete: a rule that has always pointed at nothing is no news after a restart.
//!
//! What is *removed* in the wrong order is the subject of [`crate::lingering`]. Pure: times are since any fixed moment.

use std::collections::BTreeMap;
use std::time::Duration;

use serin_model::{Model, Object, ObjectKey, Problem};

/// How long a rule waits for what it refers to. Two writes of one apply are seen within milliseconds of each other; istiod
/// debounces all changes for 100 ms, which hides most of this.
pub const WARMING: Duration = Duration::from_secs(1);

/// The rules that wait.
#[derive(Debug, Default)]
pub(crate) struct Warming {
    held: BTreeMap<ObjectKey, Held>,
    complete: bool,
}

#[derive(Debug)]
struct Held {
    object: Object,
    until: Duration,
    missing: Vec<Problem>,
}

impl Warming {
    /// Everything that exists has been said. What waits goes with the next changes.
    pub(crate) fn complete(&mut self) {
        self.complete = true;
    }

    /// Whether everything that exists has been said.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    /// The rules that wait, to be tried again.
    pub(crate) fn take(&mut self) -> BTreeMap<ObjectKey, (Object, Duration)> {
        std::mem::take(&mut self.held)
            .into_iter()
            .map(|(key, held)| (key, (held.object, held.until)))
            .collect()
    }

    /// Whether a rule goes ahead; if not it is kept until `until` (from now on, if it is new here).
    pub(crate) fn admits(
        &mut self,
        model: &Model,
        object: &Object,
        until: Option<Duration>,
        now: Duration,
    ) -> bool {
        if !self.complete {
            return true;
        }
        let key = object.key();
        // A newer version waits no longer than the one before it.
        let before = self.held.get(&key).map(|held| held.until);
        let until = until.or(before).unwrap_or(now + WARMING);
        let missing = if until <= now {
            Vec::new()
        } else {
            model.dangling(object)
        };
        if missing.is_empty() {
            // An older version of it may have been kept a moment ago.
            self.held.remove(&key);
            return true;
        }
        let held = Held {
            object: object.clone(),
            until,
            missing,
        };
        self.held.insert(key, held);
        false
    }

    /// Forgets a rule that was deleted.
    pub(crate) fn forget(&mut self, key: &ObjectKey) {
        self.held.remove(key);
    }

    /// What a rule waits for.
    pub(crate) fn missing(&self, key: &ObjectKey) -> Option<&[Problem]> {
        self.held.get(key).map(|held| held.missing.as_slice())
    }

    /// When the first one has waited long enough.
    pub(crate) fn wake_at(&self) -> Option<Duration> {
        self.held.values().map(|held| held.until).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::Service;
    use serde_json::json;
    use serin_crds::istio::{DestinationRule, VirtualService};
    use serin_model::{Change, MeshConfig};

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn service() -> Object {
        let service: Service = serde_json::from_value(json!({
            "metadata": {"name": "reviews", "namespace": "prod"},
            "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 80}]}}))
        .unwrap();
        Object::Service(Arc::new(service))
    }

    fn subsets() -> Object {
        let rule: DestinationRule = serde_json::from_value(json!({
            "metadata": {"name": "reviews", "namespace": "prod"},
            "spec": {"host": "reviews", "subsets": [{"name": "v2", "labels": {"version": "v2"}}]}}))
        .unwrap();
        Object::DestinationRule(Arc::new(rule))
    }

    fn rules(generation: i64) -> Object {
        let rules: VirtualService = serde_json::from_value(json!({
            "metadata": {"name": "reviews", "namespace": "prod", "generation": generation},
            "spec": {"hosts": ["reviews"], "http": [{"route": [{"destination": {"host": "reviews", "subset": "v2"}}]}]}}))
        .unwrap();
        Object::VirtualService(Arc::new(rules))
    }

    fn model(objects: impl IntoIterator<Item = Object>) -> Model {
        let mut model = Model::new(MeshConfig::default());
        for object in objects {
            model.apply(Change::Apply(object));
        }
        model
    }

    #[test]
    fn a_rule_waits_for_its_subset_and_goes_when_it_is_there() {
        let mut warming = Warming::default();
        warming.complete();
        assert!(!warming.admits(&model([service()]), &rules(1), None, ms(0)));
        let missing = warming.missing(&rules(1).key()).unwrap();
        assert!(missing[0].to_string().contains("subset v2"), "{missing:?}");
        assert_eq!(warming.wake_at(), Some(WARMING));
        let waiting = warming.take();
        let (object, until) = &waiting[&rules(1).key()];
        assert!(warming.admits(&model([service(), subsets()]), object, Some(*until), ms(3)));
        assert_eq!(warming.wake_at(), None);
    }

    #[test]
    fn a_rule_does_not_wait_for_ever_and_a_newer_version_not_longer() {
        let mut warming = Warming::default();
        warming.complete();
        let model = model([service()]);
        assert!(!warming.admits(&model, &rules(1), None, ms(0)));
        assert!(!warming.admits(&model, &rules(2), None, ms(900)));
        assert_eq!(warming.wake_at(), Some(WARMING));
        let waiting = warming.take();
        let (object, until) = &waiting[&rules(2).key()];
        assert!(!warming.admits(&model, object, Some(*until), ms(999)));
        assert!(warming.admits(&model, object, Some(*until), ms(1000)));
        assert_eq!(warming.wake_at(), None);
    }

    #[test]
    fn nothing_waits_before_the_world_is_complete_and_a_deleted_rule_is_forgotten() {
        let mut warming = Warming::default();
        let model = model([]);
        assert!(warming.admits(&model, &rules(1), None, ms(0)));
        warming.complete();
        assert!(
            !warming.admits(&model, &rules(1), None, ms(0)),
            "its host is not there"
        );
        warming.forget(&rules(1).key());
        assert_eq!(warming.wake_at(), None);
    }
}
