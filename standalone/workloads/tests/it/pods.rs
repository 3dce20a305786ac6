//! Containers of one pod.

use std::path::{Path, PathBuf};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::json;

use crate::cluster::{Cluster, NAMESPACE, condition, create, phase};

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_becomes_ready_pods_and_its_deletion_leaves_none() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let deployments: Api<Deployment> = cluster.api();
    let deployment = json!({"metadata": {"name": "web"}, "spec": {"replicas": 2,
        "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"terminationGracePeriodSeconds": 1, "containers": [{
            "name": "c", "image": "test/serve:1", "args": ["8080"],
            "readinessProbe": {"httpGet": {"path": "/", "port": 8080}}}]}}}});
    create(&deployments, deployment).await;
    let available = |deployment: Option<&Deployment>| {
        deployment
            .and_then(|deployment| deployment.status.as_ref()?.available_replicas)
            .is_some_and(|available| available == 2)
    };
    cluster.until(&deployments, "web", available).await;
    let pods: Api<Pod> = cluster.api();
    let names: Vec<String> = pods
        .list(&Default::default())
        .await
        .unwrap()
        .items
        .iter()
        .map(kube::ResourceExt::name_any)
        .collect();
    assert_eq!(names.len(), 2);
    deployments
        .delete("web", &DeleteParams::background())
        .await
        .unwrap();
    for name in names {
        cluster.gone(&pods, &name).await;
    }
    let left: Vec<(PathBuf, Vec<PathBuf>)> = entries(&cluster.state.join("node/pods"))
        .into_iter()
        .map(|directory| (directory.clone(), entries(&directory)))
        .collect();
    assert_eq!(left, [], "a pod left its directory");
}

#[tokio::test(flavor = "multi_thread")]
async fn init_containers_sidecars_environment_volumes_and_logs_work_together() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let maps: Api<ConfigMap> = cluster.api();
    create(
        &maps,
        json!({"metadata": {"name": "cm"}, "data": {"greeting": "hello", "conf": "a=1"}}),
    )
    .await;
    let pod = cluster
        .pod(
            "p",
            json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
                "volumes": [{"name": "shared", "emptyDir": {}}, {"name": "conf", "configMap": {"name": "cm"}}],
                "initContainers": [
                    {"name": "prepare", "image": "test/sh:1", "args": ["echo prepared > /opt/not/there/file"],
                     "volumeMounts": [{"name": "shared", "mountPath": "/opt/not/there"}]},
                    {"name": "side", "image": "test/serve:1", "args": ["9090"], "restartPolicy": "Always",
                     "startupProbe": {"tcpSocket": {"port": 9090}}},
                ],
                "containers": [{"name": "main", "image": "test/sh:1", "workingDir": "/data/shared",
                    "args": ["echo $(GREETING) from $POD_NAME as $SERIN_IMAGE; cat file; cat /etc/conf/conf; hostname; echo; echo err >&2; exit 3"],
                    "env": [{"name": "GREETING", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "greeting"}}},
                            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
                    "volumeMounts": [{"name": "shared", "mountPath": "/data/shared"},
                                     {"name": "conf", "mountPath": "/etc/conf"}]}]}),
            phase("Failed"),
        )
        .await;
    assert_eq!(
        cluster.log(&pod, "main").await,
        "hello from p as test/sh:1\nprepared\na=1p\n\nerr\n"
    );
    let status = pod.status.clone().unwrap();
    let main = status.container_statuses.unwrap()[0].clone();
    let ended = main.state.unwrap().terminated.unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_deref()), (3, Some("Error")));
    let init = status.init_container_statuses.unwrap();
    assert_eq!(
        init[0]
            .state
            .as_ref()
            .unwrap()
            .terminated
            .as_ref()
            .unwrap()
            .reason
            .as_deref(),
        Some("Completed")
    );
    assert!(!std::path::Path::new("/opt/not").exists() && !std::path::Path::new("/data/shared").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashing_container_is_restarted_and_then_backs_off() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let backing_off = |pod: Option<&Pod>| {
        pod.and_then(|pod| pod.status.as_ref()?.container_statuses.as_ref()?.first().cloned())
            .is_some_and(|status| {
                let waiting = status.state.and_then(|state| state.waiting?.reason);
                status.restart_count >= 1 && waiting.as_deref() == Some("CrashLoopBackOff")
            })
    };
    let spec = json!({"terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": "test/sh:1", "args": ["exit 7"]}]});
    let pod = cluster.pod("crash", spec, backing_off).await;
    let status = pod.status.unwrap().container_statuses.unwrap()[0].clone();
    assert_eq!(status.last_state.unwrap().terminated.unwrap().exit_code, 7);
    assert!(
        status
            .state
            .unwrap()
            .waiting
            .unwrap()
            .message
            .unwrap()
            .starts_with("back-off 10s restarting failed container=c")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_image_and_a_missing_config_map_say_what_to_do_and_start_when_it_is_there() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let waiting = |wanted: &'static str| {
        move |pod: Option<&Pod>| {
            let status =
                pod.and_then(|pod| pod.status.as_ref()?.container_statuses.as_ref()?.first().cloned());
            let waiting = status.and_then(|status| status.state?.waiting);
            waiting
                .and_then(|waiting| waiting.reason)
                .is_some_and(|reason| reason == wanted)
        }
    };
    let spec = |image: &str, env: serde_json::Value| {
        json!({"terminationGracePeriodSeconds": 1,
               "containers": [{"name": "c", "image": image, "args": ["sleep 600"], "envFrom": env}]})
    };
    let pod = cluster
        .pod(
            "unknown",
            spec("example.org/what:1", json!([])),
            waiting("ErrImagePull"),
        )
        .await;
    let message = pod.status.unwrap().container_statuses.unwrap()[0]
        .clone()
        .state
        .unwrap()
        .waiting
        .unwrap()
        .message
        .unwrap();
    assert!(
        message.contains("serin image add example.org/what:1"),
        "{message}"
    );
    let missing = json!([{"configMapRef": {"name": "late"}}]);
    cluster
        .pod(
            "waits",
            spec("test/sh:1", missing),
            waiting("CreateContainerConfigError"),
        )
        .await;
    let maps: Api<ConfigMap> = cluster.api();
    create(&maps, json!({"metadata": {"name": "late"}, "data": {}})).await;
    let pods: Api<Pod> = cluster.api();
    cluster.until(&pods, "waits", condition("Ready")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_decide_on_readiness_and_restart_what_is_not_alive() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let spec = json!({"terminationGracePeriodSeconds": 1, "containers": [
        {"name": "c", "image": "test/sh:1",
         "args": ["trap 'exit 0' TERM; touch /tmp/serin-test-$HOSTNAME; while :; do sleep 1; done"],
         "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
         "readinessProbe": {"exec": {"command": ["/bin/sh", "-c", "test -e /tmp/serin-test-probed"]}, "periodSeconds": 1},
         "livenessProbe": {"exec": {"command": ["/bin/sh", "-c", "test ! -e /tmp/dead"]}, "periodSeconds": 1, "failureThreshold": 1}}],
        "volumes": [{"name": "tmp", "emptyDir": {}}]});
    let pod = cluster.pod("probed", spec, condition("Ready")).await;
    let uid = pod.metadata.uid.unwrap();
    let volume = cluster.state.join("node/pods").join(uid).join("volumes/tmp");
    std::fs::write(volume.join("dead"), "").unwrap();
    let restarted = |pod: Option<&Pod>| {
        pod.and_then(|pod| {
            pod.status
                .as_ref()?
                .container_statuses
                .as_ref()?
                .first()
                .map(|status| status.restart_count)
        })
        .is_some_and(|count| count >= 1)
    };
    let pods: Api<Pod> = cluster.api();
    cluster.until(&pods, "probed", restarted).await;
    assert!(
        cluster
            .events()
            .await
            .contains("Container c failed liveness probe, will be restarted")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_run_when_a_container_has_started_and_before_it_is_stopped_and_its_root_may_be_read_only() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    // Not alive from the first hook to the second: the container is stopped for that, and started again.
    let script = "if [ -e /s/stopping ]; then cat /s/started /s/stopping; (echo > /written) 2>/dev/null || echo kept; \
                  exit 0; fi; sleep 1000";
    let spec = json!({"restartPolicy": "OnFailure", "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "s", "emptyDir": {}}],
        "containers": [{"name": "c", "image": "test/sh:1", "args": [script],
            "securityContext": {"readOnlyRootFilesystem": true},
            "lifecycle": {
                "postStart": {"exec": {"command": ["/bin/sh", "-c", "echo started > /s/started"]}},
                "preStop": {"exec": {"command": ["/bin/sh", "-c", "echo stopping > /s/stopping"]}}},
            "livenessProbe": {"periodSeconds": 1, "failureThreshold": 1,
                "exec": {"command": ["/bin/sh", "-c", "test ! -e /s/started"]}},
            "volumeMounts": [{"name": "s", "mountPath": "/s"}]}]});
    let pod = cluster.pod("hooks", spec, phase("Succeeded")).await;
    assert_eq!(cluster.log(&pod, "c").await, "started\nstopping\nkept\n");
    let status = pod.status.unwrap().container_statuses.unwrap()[0].clone();
    assert_eq!(status.restart_count, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_map_volume_follows_its_object() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let maps: Api<ConfigMap> = cluster.api();
    create(&maps, json!({"metadata": {"name": "cm"}, "data": {"key": "old"}})).await;
    let spec = json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "v", "configMap": {"name": "cm"}}],
        "containers": [{"name": "c", "image": "test/sh:1",
            "args": ["until grep -q new /config/key; do sleep 0.05; done; cat /config/key"],
            "volumeMounts": [{"name": "v", "mountPath": "/config"}]}]});
    cluster.pod("reader", spec, phase("Running")).await;
    let patch = json!({"data": {"key": "new"}});
    maps.patch("cm", &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .unwrap();
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let pod = cluster.until(&pods, "reader", phase("Succeeded")).await;
    assert_eq!(cluster.log(&pod, "c").await, "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_added_to_the_catalogue_starts_the_pod_that_waits_for_it() {
    use kube::CustomResourceExt;
    use serin_workloads::image;
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let client = cluster.client.clone();
    let definitions: Api<
        k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    > = Api::all(client.clone());
    create(
        &definitions,
        serde_json::to_value(serin_crds::serin_dev::Image::crd()).unwrap(),
    )
    .await;
    let spec = json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": "example.org/greeter:2.1", "args": ["hello"]}]});
    let waiting = |pod: Option<&Pod>| {
        let status = pod.and_then(|pod| pod.status.as_ref()?.container_statuses.as_ref()?.first().cloned());
        status
            .and_then(|status| status.state?.waiting?.reason)
            .is_some_and(|reason| reason == "ErrImagePull")
    };
    cluster.pod("greeter", spec, waiting).await;
    let entry = image::ImageSpec {
        reference: "example.org/greeter:*".to_owned(),
        program: "/bin/echo".to_owned(),
        args: vec!["{name}-{tag}".to_owned()],
        ..image::ImageSpec::default()
    };
    image::add(client.clone(), &entry).await.unwrap();
    let pods: Api<Pod> = cluster.api();
    let pod = cluster.until(&pods, "greeter", phase("Succeeded")).await;
    assert_eq!(cluster.log(&pod, "c").await, "greeter-2.1 hello\n");
    assert_eq!(image::list(client.clone()).await.unwrap(), [entry]);
    assert!(
        image::remove(client.clone(), "example.org/greeter:*")
            .await
            .unwrap()
    );
    assert!(
        !image::remove(client.clone(), "example.org/greeter:*")
            .await
            .unwrap()
    );
    assert!(image::list(client).await.unwrap().is_empty());
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}
