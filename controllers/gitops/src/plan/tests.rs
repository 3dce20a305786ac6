use super::*;

fn owner() -> Key {
    Key::new("flux-system", "apps")
}

fn desired(annotations: &Value) -> Arc<Desired> {
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "prod", "annotations": annotations}, "data": {"k": "v"}});
    Desired::new(object, &owner(), &[], &[], None).unwrap()
}

/// The live object that applying `d` leaves.
fn live_of(d: &Desired) -> Value {
    let mut live = d.value.clone();
    live["metadata"]["resourceVersion"] = json!("7");
    let labels: Map<String, Value> = d.value["metadata"]["labels"]
        .as_object()
        .unwrap()
        .keys()
        .map(|k| (format!("f:{k}"), json!({})))
        .collect();
    let annotations: Map<String, Value> = d.value["metadata"]["annotations"]
        .as_object()
        .unwrap()
        .keys()
        .map(|k| (format!("f:{k}"), json!({})))
        .collect();
    live["metadata"]["managedFields"] = json!([{"manager": FIELD_MANAGER, "operation": "Apply",
        "fieldsV1": {"f:metadata": {"f:labels": labels, "f:annotations": annotations}, "f:data": {"f:k": {}}}}]);
    live
}

#[test]
fn an_object_is_created_configured_or_left_alone() {
    let d = desired(&json!({}));
    assert_eq!(decide(&d, None, None), Action::Create);
    assert_eq!(
        decide(&d, Some(&LiveObject::new(live_of(&d))), None),
        Action::Unchanged
    );
    let mut drifted = live_of(&d);
    drifted["data"]["k"] = json!("edited");
    let drifted = LiveObject::new(drifted);
    assert_eq!(decide(&d, Some(&drifted), None), Action::Configure);
    let answer = Accepted {
        desired: d.digest,
        projection: fields::projection(&drifted.value, drifted.owned.as_ref().unwrap()),
    };
    assert_eq!(
        decide(&d, Some(&drifted), Some(&answer)),
        Action::Unchanged,
        "the server said that this changes nothing"
    );
    let mut never_ours = live_of(&d);
    never_ours["metadata"]["managedFields"] = json!([]);
    assert_eq!(
        decide(&d, Some(&LiveObject::new(never_ours)), None),
        Action::Configure
    );
}

#[test]
fn fields_that_kubectl_holds_are_taken_over_unless_the_object_merges() {
    let mut live = live_of(&desired(&json!({})));
    live["metadata"]["managedFields"]
        .as_array_mut()
        .unwrap()
        .push(json!({"manager": "kubectl-client-side-apply", "operation": "Update"}));
    assert_eq!(
        decide(&desired(&json!({})), Some(&LiveObject::new(live)), None),
        Action::Configure
    );
    let merging = desired(&json!({"kustomize.toolkit.fluxcd.io/ssa": "Merge"}));
    let mut live = live_of(&merging);
    live["metadata"]["managedFields"]
        .as_array_mut()
        .unwrap()
        .push(json!({"manager": "kubectl-edit", "operation": "Update"}));
    assert_eq!(
        decide(&merging, Some(&LiveObject::new(live)), None),
        Action::Unchanged
    );
}

#[test]
fn annotations_in_git_or_on_the_live_object_keep_our_hands_off() {
    for (name, value) in [
        ("reconcile", "disabled"),
        ("ssa", "Ignore"),
        ("ssa", "IfNotPresent"),
    ] {
        let annotations = json!({(format!("kustomize.toolkit.fluxcd.io/{name}")): value});
        let plain = desired(&json!({}));
        let mut live = live_of(&plain);
        live["data"]["k"] = json!("edited");
        assert!(
            matches!(
                decide(&desired(&annotations), Some(&LiveObject::new(live.clone())), None),
                Action::Skip(_)
            ),
            "{name} in git"
        );
        live["metadata"]["annotations"] = annotations;
        assert!(
            matches!(
                decide(&plain, Some(&LiveObject::new(live)), None),
                Action::Skip(_)
            ),
            "{name} on the object"
        );
    }
    let present = desired(&json!({"kustomize.toolkit.fluxcd.io/ssa": "IfNotPresent"}));
    assert_eq!(decide(&present, None, None), Action::Create);
}

#[test]
fn only_what_is_ours_and_not_protected_is_pruned() {
    let base = live_of(&desired(&json!({})));
    assert_eq!(
        prune(Some(&LiveObject::new(base.clone())), &owner()),
        Prune::Delete
    );
    assert_eq!(prune(None, &owner()), Prune::Gone);
    assert!(matches!(
        prune(
            Some(&LiveObject::new(base.clone())),
            &Key::new("flux-system", "other")
        ),
        Prune::Keep(_)
    ));
    for (name, value) in [
        ("prune", "disabled"),
        ("reconcile", "disabled"),
        ("ssa", "Ignore"),
    ] {
        let mut live = base.clone();
        live["metadata"]["annotations"] = json!({(format!("kustomize.toolkit.fluxcd.io/{name}")): value});
        assert!(
            matches!(prune(Some(&LiveObject::new(live)), &owner()), Prune::Keep(_)),
            "{name}"
        );
    }
    let mut once = base;
    once["metadata"]["annotations"] = json!({"kustomize.toolkit.fluxcd.io/ssa": "IfNotPresent"});
    assert_eq!(
        prune(Some(&LiveObject::new(once)), &owner()),
        Prune::Delete,
        "created once, still pruned"
    );
}

#[test]
fn a_desired_object_carries_owner_and_common_metadata_and_nothing_of_the_server() {
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "creationTimestamp": null, "uid": "u", "labels": null},
        "stringData": {"a": "b"}, "data": {"c": "ZA=="}, "status": {}});
    let d = Desired::new(
        secret,
        &owner(),
        &[("team".into(), "x".into())],
        &[("note".into(), "y".into())],
        None,
    )
    .unwrap();
    assert_eq!(
        d.value,
        json!({"apiVersion": "v1", "kind": "Secret", "data": {"a": "Yg==", "c": "ZA=="},
            "metadata": {"name": "s", "annotations": {"note": "y"},
                "labels": {"team": "x", "kustomize.toolkit.fluxcd.io/name": "apps", "kustomize.toolkit.fluxcd.io/namespace": "flux-system"}}})
    );
    assert!(Desired::new(json!({"kind": "Secret"}), &owner(), &[], &[], None).is_err());
}

#[test]
fn definitions_come_before_classes_before_the_rest_and_webhooks_last() {
    let id = |kind: &str| ObjectId {
        group: String::new(),
        kind: kind.into(),
        namespace: String::new(),
        name: "x".into(),
    };
    assert_eq!(stage(&id("Namespace")), Stage::Definitions);
    assert_eq!(stage(&id("StorageClass")), Stage::Classes);
    assert_eq!(stage(&id("Deployment")), Stage::Rest);
    let mut kinds = vec![
        "ValidatingWebhookConfiguration",
        "VirtualService",
        "Deployment",
        "ServiceAccount",
        "ConfigMap",
    ];
    kinds.sort_by_key(|k| rank(&id(k)));
    assert_eq!(
        kinds,
        [
            "ServiceAccount",
            "ConfigMap",
            "Deployment",
            "VirtualService",
            "ValidatingWebhookConfiguration"
        ]
    );
}

#[test]
fn a_prune_budget_refuses_more_deletions_than_it_allows() {
    assert_eq!(over_budget(None, 1000), None);
    assert_eq!(over_budget(Some("2"), 2), None);
    assert!(
        over_budget(Some("2"), 3)
            .unwrap()
            .contains("would delete 3 objects")
    );
    assert!(over_budget(Some("many"), 0).is_some());
}

#[test]
fn taking_over_merges_what_kubectl_holds_into_our_field_set_and_leaves_others_alone() {
    let object = json!({"metadata": {"managedFields": [
        {"manager": "kubectl-client-side-apply", "operation": "Update", "apiVersion": "v1", "fieldsV1": {"f:data": {"f:a": {}, "f:b": {}}}},
        {"manager": "kube-controller-manager", "operation": "Update", "subresource": "status", "fieldsV1": {"f:status": {}}},
        {"manager": FIELD_MANAGER, "operation": "Apply", "apiVersion": "v1", "fieldsV1": {"f:data": {"f:c": {}}}},
        {"manager": "autoscaler", "operation": "Update", "fieldsV1": {"f:spec": {}}}]}});
    let after = taken_over(&object);
    assert_eq!(after.len(), 3);
    assert_eq!(
        after[2]["fieldsV1"],
        json!({"f:data": {"f:a": {}, "f:b": {}, "f:c": {}}})
    );
    assert_eq!(
        (after[2]["manager"].as_str(), after[2]["operation"].as_str()),
        (Some(FIELD_MANAGER), Some("Apply"))
    );
    assert!(!after.iter().any(is_foreign));
    let only_kubectl = json!({"metadata": {"managedFields": [{"manager": "kubectl", "operation": "Apply", "apiVersion": "v1", "fieldsV1": {"f:x": {}}}]}});
    assert_eq!(taken_over(&only_kubectl)[0]["manager"], FIELD_MANAGER);
}

#[test]
fn the_number_of_replicas_is_left_to_a_controller_that_decides_it_and_not_to_a_person() {
    let object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "prod"}, "spec": {"replicas": 2, "paused": false}});
    let desired = Desired::new(object, &owner(), &[], &[], None).unwrap();
    let live = |manager: &str, subresource: &str| {
        let mut live = desired.value.clone();
        live["spec"]["replicas"] = json!(0);
        live["metadata"]["managedFields"] = json!([
            {"manager": FIELD_MANAGER, "operation": "Apply", "fieldsV1": {"f:spec": {"f:paused": {}}, "f:metadata": {"f:labels":
                {"f:kustomize.toolkit.fluxcd.io/name": {}, "f:kustomize.toolkit.fluxcd.io/namespace": {}}}}},
            {"manager": manager, "operation": "Update", "subresource": subresource, "fieldsV1": {"f:spec": {"f:replicas": {}}}}]);
        LiveObject::new(live)
    };
    assert_eq!(
        decide(&desired, Some(&live("flagger", "")), None),
        Action::Unchanged
    );
    assert_eq!(
        decide(&desired, Some(&live("kube-controller-manager", "scale")), None),
        Action::Unchanged
    );
    assert_eq!(
        decide(&desired, Some(&live("kubectl", "scale")), None),
        Action::Configure
    );
    assert_eq!(
        effective(&desired.value, Some(&live("flagger", ""))).pointer("/spec/replicas"),
        None
    );
    assert_eq!(
        effective(&desired.value, None).pointer("/spec/replicas"),
        Some(&json!(2))
    );
}
