//! The arithmetic of a rollout: surge and unavailability, and how many replicas each ReplicaSet should have. Pure.

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

/// Annotations of ReplicaSets and Deployments, Kubernetes' own.
pub(crate) const REVISION: &str = "deployment.kubernetes.io/revision";
pub(crate) const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub(crate) const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
pub(crate) const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";

pub(crate) fn wanted(deployment: &Deployment) -> i32 {
    deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1)
        .max(0)
}

pub(crate) fn is_recreate(deployment: &Deployment) -> bool {
    let strategy = deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref());
    strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate")
}

/// A number, or a percentage of `total`.
fn resolve(value: Option<&IntOrString>, total: i32, round_up: bool) -> i32 {
    match value {
        None => 0,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(text)) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let product = percent * i64::from(total);
            let rounded = if round_up {
                (product + 99).div_euclid(100)
            } else {
                product.div_euclid(100)
            };
            i32::try_from(rounded).unwrap_or(i32::MAX)
        }
    }
}

/// maxSurge (rounded up) and maxUnavailable (rounded down). Both zero would never move: then one may be unavailable.
pub(crate) fn fences(deployment: &Deployment) -> (i32, i32) {
    if is_recreate(deployment) {
        return (0, 0);
    }
    let rolling = deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.strategy.as_ref())
        .and_then(|strategy| strategy.rolling_update.as_ref());
    let quarter = IntOrString::String("25%".to_owned());
    let replicas = wanted(deployment);
    let surge = resolve(
        rolling.map_or(Some(&quarter), |r| r.max_surge.as_ref().or(Some(&quarter))),
        replicas,
        true,
    );
    let unavailable = resolve(
        rolling.map_or(Some(&quarter), |r| r.max_unavailable.as_ref().or(Some(&quarter))),
        replicas,
        false,
    );
    if surge == 0 && unavailable == 0 {
        (0, 1)
    } else {
        (surge, unavailable.min(replicas))
    }
}

pub(crate) fn spec_replicas(set: &ReplicaSet) -> i32 {
    set.spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1)
        .max(0)
}

pub(crate) fn available(set: &ReplicaSet) -> i32 {
    set.status
        .as_ref()
        .and_then(|status| status.available_replicas)
        .unwrap_or(0)
}

pub(crate) fn actual(set: &ReplicaSet) -> i32 {
    set.status.as_ref().map_or(0, |status| status.replicas)
}

pub(crate) fn number(set: &ReplicaSet, annotation: &str) -> Option<i32> {
    set.annotations().get(annotation)?.parse().ok()
}

/// A ReplicaSet by its position among those given, and its new size.
pub(crate) type Scale = (usize, i32);

/// The size that the new ReplicaSet may grow to now.
pub(crate) fn grow_new(deployment: &Deployment, new: &ReplicaSet, all: &[&ReplicaSet]) -> i32 {
    let replicas = wanted(deployment);
    let current = spec_replicas(new);
    if is_recreate(deployment) || current > replicas {
        return replicas;
    }
    let (surge, _) = fences(deployment);
    let total: i32 = all.iter().map(|set| spec_replicas(set)).sum();
    let room = (replicas + surge - total).max(0);
    current + room.min(replicas - current)
}

/// How far the old ReplicaSets (oldest first) may shrink now: first what is not available anyway, then as much as
/// keeps `minAvailable`. Sizes are of the sets that change.
pub(crate) fn shrink_old(deployment: &Deployment, old: &[&ReplicaSet], new: &ReplicaSet) -> Vec<Scale> {
    let (_, max_unavailable) = fences(deployment);
    let mut sizes: Vec<i32> = old.iter().map(|set| spec_replicas(set)).collect();
    let old_total: i32 = sizes.iter().sum();
    if old_total == 0 {
        return Vec::new();
    }
    let min_available = wanted(deployment) - max_unavailable;
    let new_unavailable = spec_replicas(new) - available(new);
    let max_scaled_down = old_total + spec_replicas(new) - min_available - new_unavailable;
    if max_scaled_down <= 0 {
        return Vec::new();
    }
    let mut cleaned = 0;
    for (position, set) in old.iter().enumerate() {
        let unhealthy = sizes[position] - available(set);
        let count = unhealthy.max(0).min(max_scaled_down - cleaned);
        sizes[position] -= count;
        cleaned += count;
    }
    let total_available: i32 = old.iter().map(|set| available(set)).sum::<i32>() + available(new);
    let mut surplus = total_available - min_available;
    for size in &mut sizes {
        if surplus <= 0 {
            break;
        }
        let count = (*size).min(surplus);
        *size -= count;
        surplus -= count;
    }
    old.iter()
        .enumerate()
        .filter(|(position, set)| sizes[*position] != spec_replicas(set))
        .map(|(position, _)| (position, sizes[position]))
        .collect()
}

/// Spreads a change of `spec.replicas` in the middle of a rollout over the active ReplicaSets by their size.
/// `active` are the positions' sets; `newest_first` orders ties.
pub(crate) fn proportional(deployment: &Deployment, active: &[&ReplicaSet]) -> Vec<Scale> {
    let replicas = wanted(deployment);
    let (surge, _) = fences(deployment);
    let total: i32 = active.iter().map(|set| spec_replicas(set)).sum();
    let allowed = if replicas > 0 { replicas + surge } else { 0 };
    let to_add = allowed - total;
    let mut order: Vec<usize> = (0..active.len()).collect();
    order.sort_by(|a, b| {
        let (a, b) = (active[*a], active[*b]);
        let by_age = a
            .creation_timestamp()
            .map(|t| t.0)
            .cmp(&b.creation_timestamp().map(|t| t.0))
            .then(a.name_any().cmp(&b.name_any()));
        // Largest first; of equal ones the newer grows first and the older shrinks first.
        spec_replicas(b)
            .cmp(&spec_replicas(a))
            .then(if to_add > 0 { by_age.reverse() } else { by_age })
    });
    let mut added = 0;
    let mut sizes: Vec<i32> = active.iter().map(|set| spec_replicas(set)).collect();
    for position in &order {
        let set = active[*position];
        if to_add == 0 || spec_replicas(set) == 0 || added == to_add {
            continue;
        }
        let share = share(deployment, set, replicas, surge);
        let left = to_add - added;
        let share = if to_add > 0 {
            share.min(left)
        } else {
            share.max(left)
        };
        sizes[*position] += share;
        added += share;
    }
    if let Some(first) = order.first() {
        sizes[*first] = (sizes[*first] + to_add - added).max(0);
    }
    sizes.into_iter().enumerate().collect()
}

fn share(deployment: &Deployment, set: &ReplicaSet, replicas: i32, surge: i32) -> i32 {
    let size = spec_replicas(set);
    if replicas == 0 {
        return -size;
    }
    let before = number(set, MAX_REPLICAS)
        .filter(|max| *max > 0)
        .unwrap_or_else(|| {
            deployment
                .status
                .as_ref()
                .and_then(|status| status.replicas)
                .filter(|count| *count > 0)
                .unwrap_or(1)
        });
    let new = (f64::from(size) * f64::from(replicas + surge) / f64::from(before)).round();
    new as i32 - size
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn deployment(replicas: i32, surge: serde_json::Value, unavailable: serde_json::Value) -> Deployment {
        serde_json::from_value(json!({"metadata": {"name": "d"}, "spec": {"replicas": replicas,
            "selector": {}, "template": {},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}}}))
        .unwrap()
    }

    fn set(name: &str, replicas: i32, available: i32) -> ReplicaSet {
        serde_json::from_value(
            json!({"metadata": {"name": name}, "spec": {"replicas": replicas, "selector": {}},
            "status": {"replicas": replicas, "availableReplicas": available}}),
        )
        .unwrap()
    }

    #[test]
    fn surge_is_rounded_up_and_unavailability_down() {
        for (replicas, surge, unavailable, expected) in [
            (4, json!("25%"), json!("25%"), (1, 1)),
            (3, json!("25%"), json!("25%"), (1, 0)),
            (10, json!("25%"), json!("25%"), (3, 2)),
            (1, json!(0), json!(0), (0, 1)),
            (5, json!(2), json!(1), (2, 1)),
            (2, json!("100%"), json!(0), (2, 0)),
        ] {
            assert_eq!(fences(&deployment(replicas, surge, unavailable)), expected);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// A rollout driven by these two functions, with pods becoming available in any order, never has more than
        /// replicas + surge, never fewer than replicas - unavailable available, and always ends.
        #[test]
        fn a_rollout_keeps_its_fences_and_ends(
            replicas in 1_i32..12, surge in 0_i32..5, unavailable in 0_i32..5, order in prop::collection::vec(0_u8..2, 400),
        ) {
            let deployment = deployment(replicas, json!(surge), json!(unavailable));
            let (surge, unavailable) = fences(&deployment);
            let mut old = set("old", replicas, replicas);
            let mut new = set("new", 0, 0);
            let mut ended = false;
            for step in order {
                if step == 0 {
                    let size = grow_new(&deployment, &new, &[&old, &new]);
                    let grown = size != spec_replicas(&new);
                    new.spec.as_mut().unwrap().replicas = Some(size);
                    if !grown {
                        for (_, size) in shrink_old(&deployment, &[&old], &new) {
                            old.spec.as_mut().unwrap().replicas = Some(size);
                            old.status.as_mut().unwrap().available_replicas = Some(size);
                        }
                    }
                } else if available(&new) < spec_replicas(&new) {
                    new.status.as_mut().unwrap().available_replicas = Some(available(&new) + 1);
                }
                prop_assert!(spec_replicas(&old) + spec_replicas(&new) <= replicas + surge);
                prop_assert!(available(&old) + available(&new) >= replicas - unavailable);
                ended = spec_replicas(&old) == 0 && available(&new) == replicas;
                if ended {
                    break;
                }
            }
            prop_assert!(ended);
        }

        #[test]
        fn proportional_scaling_reaches_the_allowed_total(
            replicas in 0_i32..30, a in 1_i32..10, b in 1_i32..10, max in 1_i32..25,
        ) {
            let deployment = deployment(replicas, json!(3), json!(0));
            let mut sets = [set("a", a, a), set("b", b, b)];
            for set in &mut sets {
                set.metadata.annotations = Some([(MAX_REPLICAS.to_owned(), max.to_string())].into());
            }
            let scaled = proportional(&deployment, &[&sets[0], &sets[1]]);
            let total: i32 = scaled.iter().map(|(_, size)| size).sum();
            prop_assert!(scaled.iter().all(|(_, size)| *size >= 0));
            let allowed = if replicas == 0 { 0 } else { replicas + 3 };
            prop_assert!(total >= allowed);
        }
    }
}
