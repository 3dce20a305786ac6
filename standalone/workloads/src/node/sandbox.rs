//! What a pod has before its first container: an address, a network namespace, its files, its shim.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use kube::ResourceExt;
use tokio::sync::mpsc;

use super::env::{self, PodFacts};
use super::shim_client::{ShimClient, ShimEvent, shim_process};
use super::start;
use super::volumes;
use super::worker::Worker;
use crate::shim::protocol::{ShimConfig, files};
use crate::sys::netns;

/// Creates the sandbox; errors as text for the pod's event.
pub(crate) async fn create(worker: &mut Worker) -> Result<mpsc::Receiver<ShimEvent>, String> {
    let context = worker.context.clone();
    let object = worker.object.clone();
    worker.listeners = context.listeners_for(&object).await?;
    let address = match worker.address {
        Some(address) => address,
        None => context
            .addresses
            .take()
            .ok_or("no address is left in the pods' network")?,
    };
    worker.address = Some(address);
    let directory = worker.directory.clone();
    prepare_directory(&directory).map_err(|error| format!("create {}: {error}", directory.display()))?;
    worker
        .write_record(address)
        .map_err(|error| format!("write {}: {error}", files::POD))?;
    let domain = &context.config.cluster_domain;
    let etc = directory.join("etc");
    let host_resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    for (name, text) in [
        (
            "resolv.conf",
            start::resolv_conf(&object, context.config.dns_address, domain, &host_resolver),
        ),
        ("hosts", start::hosts(&object, address, domain)),
        ("hostname", format!("{}\n", env::hostname(&object))),
    ] {
        fs::write(etc.join(name), text).map_err(|error| format!("write {name}: {error}"))?;
    }
    let facts = PodFacts {
        pod_ip: address.to_string(),
        host_ip: context.config.gateway().to_string(),
        node_name: context.config.node_name.clone(),
    };
    // A missing ConfigMap is no reason not to have a network; containers that mount it wait for it.
    let memory_volumes = volumes::plan(&object, &directory, &facts, &context.references(&object))
        .unwrap_or_default()
        .into_iter()
        .filter_map(|volume| Some((volume.path, volume.memory?)))
        .collect();
    let gateway = context.config.gateway();
    let interface = interface_name(&worker.uid);
    let network = tokio::task::spawn_blocking(move || netns::create_pod(&interface, address, gateway))
        .await
        .map_err(|error| error.to_string())?
        .map_err(|error| format!("create the pod's network: {error}"))?;
    let config = ShimConfig {
        directory: directory.clone(),
        hostname: env::hostname(&object),
        network: -1,
        control: -1,
        memory_volumes,
    };
    let (client, events, child) = ShimClient::spawn(
        &context.config.shim_command,
        config,
        &network,
        &directory.join("shim.log"),
    )
    .map_err(|error| format!("start the pod's shim: {error}"))?;
    worker.shim = Some(Arc::new(client));
    worker.shim_process = Some(child);
    tracing::debug!(pod = %object.name_any(), %address, "sandbox created");
    Ok(events)
}

fn prepare_directory(directory: &Path) -> std::io::Result<()> {
    for sub in ["etc", "volumes"] {
        fs::create_dir_all(directory.join(sub))?;
    }
    // Programs of any user must reach the files that are bound; only what lies in here is theirs to read.
    fs::set_permissions(directory, fs::Permissions::from_mode(0o711))
}

/// At most 15 characters, unique as far as a uid's last twelve digits are.
fn interface_name(uid: &str) -> String {
    let digits: String = uid.chars().filter(char::is_ascii_alphanumeric).collect();
    let start = digits.len().saturating_sub(12);
    format!("ve{}", &digits[start..])
}

/// Ends what may still run of a pod and removes its directory.
pub(crate) fn clear(directory: &Path) {
    crate::teardown::end_pod(directory, std::time::Duration::ZERO);
    if shim_process(directory).is_none()
        && let Err(error) = fs::remove_dir_all(directory)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(directory = %directory.display(), %error, "remove a pod's directory");
    }
}
