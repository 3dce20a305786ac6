//! The node's own objects: a Node and the Lease that says it is alive.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;
use tracing::{debug, warn};

use super::context::Context;

/// Kubelet renews a quarter of the lease's duration; both are its defaults.
const LEASE_SECONDS: i32 = 40;
const RENEW_EVERY: Duration = Duration::from_secs(10);
/// Wait between tries to register.
const RETRY: Duration = Duration::from_millis(500);
/// Namespace of the leases.
const LEASES: &str = "kube-node-lease";
const MANAGER: &str = "serin-node";

/// Registers the node and renews its lease until cancelled.
pub(crate) async fn keep(context: Arc<Context>) {
    let mut warned = false;
    loop {
        match register(&context).await {
            Ok(()) => break,
            Err(error) => {
                if !warned {
                    warn!(%error, "register the node; will be tried again");
                }
                warned = true;
            }
        }
        tokio::select! {
            () = context.cancel.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
    loop {
        if let Err(error) = renew(&context).await {
            debug!(%error, "renew the node's lease");
        }
        tokio::select! {
            () = context.cancel.cancelled() => return,
            () = tokio::time::sleep(RENEW_EVERY) => {}
        }
    }
}

async fn register(context: &Context) -> Result<(), kube::Error> {
    let name = &context.config.node_name;
    let api: Api<Node> = Api::all(context.client.clone());
    let parameters = PatchParams::apply(MANAGER).force();
    let labels = BTreeMap::from([
        ("kubernetes.io/hostname", name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture()),
    ]);
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDR": format!("{}/{}", context.config.pod_network, context.config.pod_prefix),
                 "providerID": format!("serin://{name}")},
    });
    api.patch(name, &parameters, &Patch::Apply(&node)).await?;
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let condition = |type_: &str, status: &str, reason: &str, message: &str| {
        json!({"type": type_, "status": status, "reason": reason, "message": message,
               "lastHeartbeatTime": now, "lastTransitionTime": now})
    };
    let capacity = json!({
        "cpu": std::thread::available_parallelism().map_or(1, usize::from).to_string(),
        "memory": format!("{}Ki", memory_kibibytes()),
        "pods": "500",
    });
    let status = json!({"status": {
        "addresses": [
            {"type": "InternalIP", "address": context.config.gateway().to_string()},
            {"type": "Hostname", "address": name},
        ],
        "capacity": capacity,
        "allocatable": capacity,
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
            condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        ],
        "nodeInfo": {
            "architecture": architecture(),
            "bootID": crate::sys::process::boot_id(),
            "containerRuntimeVersion": format!("serin://{}", env!("CARGO_PKG_VERSION")),
            "kernelVersion": nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            "kubeProxyVersion": "",
            "kubeletVersion": format!("v1.35.4+serin-{}", env!("CARGO_PKG_VERSION")),
            "machineID": "",
            "operatingSystem": "linux",
            "osImage": "Linux",
            "systemUUID": "",
        },
    }});
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
        .await?;
    let namespaces: Api<Namespace> = Api::all(context.client.clone());
    let namespace: Namespace =
        serde_json::from_value(json!({"metadata": {"name": LEASES}})).unwrap_or_default();
    match namespaces.create(&PostParams::default(), &namespace).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => return Err(error),
    }
    renew(context).await
}

async fn renew(context: &Context) -> Result<(), kube::Error> {
    let name = &context.config.node_name;
    let api: Api<k8s_openapi::api::coordination::v1::Lease> = Api::namespaced(context.client.clone(), LEASES);
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": LEASES},
        "spec": {
            "holderIdentity": name,
            "leaseDurationSeconds": LEASE_SECONDS,
            "renewTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string(),
        },
    });
    api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&lease))
        .await?;
    Ok(())
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn memory_kibibytes() -> u64 {
    std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
            line.split_whitespace().nth(1)?.parse().ok()
        })
        .unwrap_or(0)
}
