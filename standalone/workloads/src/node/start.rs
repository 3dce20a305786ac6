//! From a container of a manifest to what the shim executes.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};
use kube::ResourceExt;
use serin_kit::unhonoured::{self, Field};

use super::context::Context;
use super::env::{self, ConfigError, PodFacts, expand};
use super::probes::{self, Target};
use super::volumes;
use crate::image;
use crate::shim::container::DEFAULT_PATH;
use crate::shim::protocol::ContainerSpec;
use crate::sys::mounts::Bind;

/// Why a container cannot be started now, in kubelet's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NotPrepared {
    /// Waiting reason at the first failure.
    pub(crate) reason: &'static str,
    /// Waiting reason when it fails again for the same reason.
    pub(crate) repeated_reason: &'static str,
    pub(crate) message: String,
}

impl NotPrepared {
    pub(crate) fn config(message: String) -> Self {
        Self {
            reason: "CreateContainerConfigError",
            repeated_reason: "CreateContainerConfigError",
            message,
        }
    }

    fn image(message: String) -> Self {
        Self {
            reason: "ErrImagePull",
            repeated_reason: "ImagePullBackOff",
            message,
        }
    }
}

pub(crate) struct Prepared {
    pub(crate) spec: ContainerSpec,
}

/// A name that sorts by time and does not repeat within this process.
pub(crate) fn stamp() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S.%6f").to_string() + &format!(".{number}")
}

/// The environment of a container, its image's included.
pub(crate) fn environment(
    context: &Context,
    pod: &Pod,
    container: &Container,
    facts: &PodFacts,
) -> Result<Vec<(String, String)>, ConfigError> {
    let reference = container.image.as_deref().unwrap_or_default();
    let mut from_image = vec![("PATH".to_owned(), DEFAULT_PATH.to_owned())];
    if let Some(image) = context.catalogue.borrow().find(reference) {
        from_image.extend(image.env);
    }
    // Programs of the catalogue stand for many images; this tells them which (its tag is often a version).
    from_image.push(("SERIN_IMAGE".to_owned(), reference.to_owned()));
    env::resolve(pod, container, &from_image, facts, &context.references(pod))
}

/// Everything that a container needs to start; writes its volumes.
pub(crate) fn prepare(
    context: &Context,
    pod: &Pod,
    container: &Container,
    facts: &PodFacts,
    directory: &Path,
    attempt: u32,
    listeners: &[(u16, OwnedFd)],
) -> Result<Prepared, NotPrepared> {
    let config = |error: ConfigError| NotPrepared::config(error.0);
    let reference = container.image.as_deref().unwrap_or_default();
    let image = context
        .catalogue
        .borrow()
        .find(reference)
        .ok_or_else(|| NotPrepared::image(image::unknown_image(reference)))?;
    if let Some(reason) = refused(pod, container) {
        return Err(NotPrepared::config(reason));
    }
    let env = environment(context, pod, container, facts).map_err(config)?;
    let known: BTreeMap<String, String> = env.iter().cloned().collect();
    let planned = volumes::plan(pod, directory, facts, &context.references(pod)).map_err(config)?;
    for volume in &planned {
        // Of medium Memory: mounted by the shim, in its own mount namespace.
        if volume.memory.is_none() {
            volumes::write(volume, &stamp())
                .map_err(|error| NotPrepared::config(format!("write volume {}: {error}", volume.name)))?;
        }
    }
    let mut binds = volumes::binds(container, &planned, &known).map_err(config)?;
    binds.extend(own_files(directory, &binds));
    let expanded = |words: &Option<Vec<String>>| -> Vec<String> {
        words.iter().flatten().map(|word| expand(word, &known)).collect()
    };
    let path = known.get("PATH").cloned().unwrap_or_default();
    let invocation = image.invocation(
        &expanded(&container.command),
        &expanded(&container.args),
        |word| exists(word, &path),
    );
    let identity = identity(pod, container)?;
    let read_only_root = container
        .security_context
        .as_ref()
        .and_then(|context| context.read_only_root_filesystem)
        .unwrap_or(false);
    // The first container that declares a handed-over port gets the sockets: the gateway's proxy.
    let wants = listeners.iter().any(|(port, _)| {
        container
            .ports
            .iter()
            .flatten()
            .any(|declared| declared.container_port == i32::from(*port))
    }) || pod
        .spec
        .as_ref()
        .is_some_and(|spec| spec.containers.len() == 1 && spec.containers[0].name == container.name);
    let ports = if wants {
        listeners.iter().map(|(port, _)| *port).collect()
    } else {
        Vec::new()
    };
    let logs = context.paths.pod_logs(
        &pod.namespace().unwrap_or_default(),
        &pod.name_any(),
        &pod.uid().unwrap_or_default(),
    );
    let keep_identity = context.config.unprivileged;
    Ok(Prepared {
        spec: ContainerSpec {
            name: container.name.clone(),
            attempt,
            program: invocation.program,
            argv: invocation.argv,
            env,
            working_dir: container.working_dir.clone().map(PathBuf::from),
            // In a user namespace with one mapped id nobody else exists to become.
            uid: identity.uid.filter(|_| !keep_identity),
            gid: identity.gid.filter(|_| !keep_identity),
            groups: if keep_identity {
                Vec::new()
            } else {
                identity.groups
            },
            binds,
            read_only_root,
            log: logs.join(&container.name).join(format!("{attempt}.log")),
            listeners: ports,
        },
    })
}

/// resolv.conf, hosts and hostname, unless the manifest mounts its own.
fn own_files(directory: &Path, binds: &[Bind]) -> Vec<Bind> {
    ["resolv.conf", "hosts", "hostname"]
        .into_iter()
        .map(|name| Bind {
            source: directory.join("etc").join(name),
            target: Path::new("/etc").join(name),
            read_only: false,
        })
        .filter(|own| binds.iter().all(|bind| bind.target != own.target))
        .filter(|own| own.source.exists())
        .collect()
}

/// Whether a command word is a program of this machine: an absolute path, or a name in PATH.
pub(crate) fn exists(word: &str, path: &str) -> bool {
    let executable = |file: &Path| {
        fs::metadata(file).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    if word.contains('/') {
        return word.starts_with('/') && executable(Path::new(word));
    }
    path.split(':')
        .any(|directory| executable(&Path::new(directory).join(word)))
}

/// How exec probes and hooks of a container turn into programs.
pub(crate) fn command_of(
    context: &Context,
    container: &Container,
) -> Arc<dyn Fn(&[String]) -> Vec<String> + Send + Sync> {
    let image = context
        .catalogue
        .borrow()
        .find(container.image.as_deref().unwrap_or_default());
    Arc::new(move |command| match &image {
        Some(image) => image.command(command, |word| exists(word, DEFAULT_PATH)).argv,
        None => command.to_vec(),
    })
}

struct Identity {
    uid: Option<u32>,
    gid: Option<u32>,
    groups: Vec<u32>,
}

fn identity(pod: &Pod, container: &Container) -> Result<Identity, NotPrepared> {
    let of_pod = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
    let own = container.security_context.as_ref();
    let number = |value: Option<i64>| value.and_then(|value| u32::try_from(value).ok());
    let uid = number(
        own.and_then(|own| own.run_as_user)
            .or_else(|| of_pod.and_then(|pod| pod.run_as_user)),
    );
    let gid = number(
        own.and_then(|own| own.run_as_group)
            .or_else(|| of_pod.and_then(|pod| pod.run_as_group)),
    );
    let non_root = own
        .and_then(|own| own.run_as_non_root)
        .or_else(|| of_pod.and_then(|pod| pod.run_as_non_root))
        .unwrap_or(false);
    if non_root && uid == Some(0) {
        return Err(NotPrepared::config(format!(
            "container's runAsUser breaks non-root policy (pod: \"{}_{}({})\", container: {})",
            pod.name_any(),
            pod.namespace().unwrap_or_default(),
            pod.uid().unwrap_or_default(),
            container.name
        )));
    }
    let mut groups: Vec<u32> = of_pod
        .iter()
        .flat_map(|pod| pod.supplemental_groups.iter().flatten())
        .filter_map(|group| u32::try_from(*group).ok())
        .collect();
    groups.extend(number(of_pod.and_then(|pod| pod.fs_group)));
    Ok(Identity {
        // A catalogue program has no USER of its own; "not root" without a number means anybody but root.
        uid: uid.or(non_root.then_some(65_534)),
        gid: gid.or((non_root && uid.is_none()).then_some(65_534)),
        groups,
    })
}

/// What must not run at all, because running it differently would be wrong.
fn refused(pod: &Pod, container: &Container) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    if spec.host_network == Some(true) {
        return Some("hostNetwork is not supported: pods have a network of their own; use a Service of type LoadBalancer".into());
    }
    if spec.host_pid == Some(true) || spec.share_process_namespace == Some(true) {
        return Some("hostPID and shareProcessNamespace are not supported".into());
    }
    if container
        .volume_devices
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        return Some("volumeDevices are not supported".into());
    }
    None
}

/// Fields of a pod that are read but make no difference here, as one sentence (condition `FullyHonoured`).
pub(crate) fn not_honoured(pod: &Pod) -> String {
    let mut fields = Vec::new();
    let Some(spec) = pod.spec.as_ref() else {
        return String::new();
    };
    if spec.affinity.is_some()
        || spec
            .topology_spread_constraints
            .as_ref()
            .is_some_and(|all| !all.is_empty())
    {
        fields.push(Field::ignored("spec.affinity", "there is one node"));
    }
    if spec.runtime_class_name.is_some() {
        fields.push(Field::ignored(
            "spec.runtimeClassName",
            "containers are processes of this machine",
        ));
    }
    if spec.active_deadline_seconds.is_some() {
        fields.push(Field::ignored(
            "spec.activeDeadlineSeconds",
            "pods are not ended after a time; delete the pod instead",
        ));
    }
    if spec.containers.iter().any(|container| {
        container
            .resources
            .as_ref()
            .is_some_and(|resources| resources.limits.as_ref().is_some_and(|all| !all.is_empty()))
    }) {
        fields.push(Field::ignored(
            "spec.containers.resources.limits",
            "limits are not enforced",
        ));
    }
    if fields.is_empty() {
        String::new()
    } else {
        unhonoured::message(&fields)
    }
}

/// Writes a container's specification for the shim, which removes it once read: it holds secrets.
pub(crate) fn write_spec(directory: &Path, spec: &ContainerSpec) -> io::Result<PathBuf> {
    use std::io::Write;
    let path = directory.join(format!("start-{}.json", spec.name));
    let mut file = fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)?;
    file.write_all(&serde_json::to_vec(spec)?)?;
    Ok(path)
}

/// Runs a lifecycle hook.
pub(crate) async fn run_hook(
    hook: &LifecycleHandler,
    target: &Target,
    limit: Duration,
) -> Result<(), String> {
    if let Some(exec) = &hook.exec {
        let argv = (target.command)(exec.command.as_deref().unwrap_or_default());
        let env = target.env.as_ref().clone();
        return match target.shim.exec(&target.container.name, argv, env, limit).await? {
            (Some(0), _) => Ok(()),
            (Some(code), output) => Err(format!("exited with {code}: {}", output.trim_end())),
            (None, _) => Err(format!("timed out after {} s", limit.as_secs())),
        };
    }
    if let Some(sleep) = &hook.sleep {
        let wanted = Duration::from_secs(sleep.seconds.max(0).unsigned_abs());
        tokio::time::sleep(wanted.min(limit)).await;
        return Ok(());
    }
    if let Some(get) = &hook.http_get {
        let port = probes::port(&get.port, &target.container)?;
        let host = get.host.clone().unwrap_or_else(|| target.address.clone());
        let path = get.path.clone().unwrap_or_else(|| "/".to_owned());
        return tokio::time::timeout(limit, probes::http_get(&host, port, &path, get))
            .await
            .unwrap_or_else(|_| Err("timed out".to_owned()));
    }
    Ok(())
}

/// `/etc/resolv.conf` of a pod.
pub(crate) fn resolv_conf(pod: &Pod, dns: Ipv4Addr, domain: &str, host: &str) -> String {
    let spec = pod.spec.as_ref();
    let policy = spec
        .and_then(|spec| spec.dns_policy.as_deref())
        .unwrap_or("ClusterFirst");
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let (mut servers, mut searches, mut options): (Vec<String>, Vec<String>, Vec<String>) = match policy {
        "Default" => parse_resolv_conf(host),
        "None" => (Vec::new(), Vec::new(), Vec::new()),
        _ => (
            vec![dns.to_string()],
            vec![
                format!("{namespace}.svc.{domain}"),
                format!("svc.{domain}"),
                domain.to_owned(),
            ],
            vec!["ndots:5".to_owned()],
        ),
    };
    if let Some(config) = spec.and_then(|spec| spec.dns_config.as_ref()) {
        servers.extend(config.nameservers.iter().flatten().cloned());
        searches.extend(config.searches.iter().flatten().cloned());
        for option in config.options.iter().flatten() {
            let name = option.name.clone().unwrap_or_default();
            options.retain(|known| known.split(':').next() != Some(name.as_str()));
            options.push(match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name,
            });
        }
    }
    let mut text = String::new();
    if !searches.is_empty() {
        text.push_str(&format!("search {}\n", searches.join(" ")));
    }
    for server in servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    text
}

fn parse_resolv_conf(text: &str) -> (Vec<String>, Vec<String>, Vec<String>) {
    let (mut servers, mut searches, mut options) = (Vec::new(), Vec::new(), Vec::new());
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => servers.extend(words.next().map(str::to_owned)),
            Some("search") => searches = words.map(str::to_owned).collect(),
            Some("options") => options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    (servers, searches, options)
}

/// `/etc/hosts` of a pod.
pub(crate) fn hosts(pod: &Pod, address: Ipv4Addr, domain: &str) -> String {
    let name = env::hostname(pod);
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let subdomain = pod.spec.as_ref().and_then(|spec| spec.subdomain.as_deref());
    let full = subdomain.map(|subdomain| format!("{name}.{subdomain}.{namespace}.svc.{domain}\t"));
    let mut text = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{address}\t{}{name}\n",
        full.unwrap_or_default()
    );
    for alias in pod
        .spec
        .iter()
        .flat_map(|spec| spec.host_aliases.iter().flatten())
    {
        text.push_str(&format!(
            "{}\t{}\n",
            alias.ip,
            alias
                .hostnames
                .iter()
                .flatten()
                .cloned()
                .collect::<Vec<_>>()
                .join("\t")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec}))
            .unwrap()
    }

    #[test]
    fn resolv_conf_searches_the_pods_namespace_first_with_ndots_5() {
        let dns = Ipv4Addr::new(10, 96, 0, 10);
        assert_eq!(
            resolv_conf(&pod(json!({"containers": []})), dns, "cluster.local", ""),
            "search n.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
        );
        let own = pod(
            json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.1.1.1"],
            "searches": ["x.y"], "options": [{"name": "ndots", "value": "2"}]}}),
        );
        assert_eq!(
            resolv_conf(&own, dns, "cluster.local", ""),
            "search x.y\nnameserver 1.1.1.1\noptions ndots:2\n"
        );
        let hosts = pod(json!({"containers": [], "dnsPolicy": "Default"}));
        assert_eq!(
            resolv_conf(&hosts, dns, "cluster.local", "nameserver 9.9.9.9\n"),
            "nameserver 9.9.9.9\n"
        );
    }

    #[test]
    fn the_identity_comes_from_the_container_then_the_pod_and_root_is_refused_where_it_must_not_be() {
        let pod = pod(
            json!({"containers": [], "securityContext": {"runAsUser": 1000, "runAsGroup": 3000, "fsGroup": 2000}}),
        );
        let container = |context: serde_json::Value| -> Container {
            serde_json::from_value(json!({"name": "c", "securityContext": context})).unwrap()
        };
        let found = identity(&pod, &container(json!({"runAsUser": 1337})))
            .ok()
            .unwrap();
        assert_eq!(
            (found.uid, found.gid, found.groups),
            (Some(1337), Some(3000), vec![2000])
        );
        let error = identity(&pod, &container(json!({"runAsUser": 0, "runAsNonRoot": true})))
            .err()
            .unwrap();
        assert_eq!(error.reason, "CreateContainerConfigError");
    }

    #[test]
    fn a_field_without_effect_is_named() {
        let named = not_honoured(&pod(
            json!({"containers": [{"name": "c", "resources": {"limits": {"cpu": "1"}}}]}),
        ));
        assert!(named.contains("resources.limits"), "{named}");
        assert_eq!(not_honoured(&pod(json!({"containers": [{"name": "c"}]}))), "");
    }
}
