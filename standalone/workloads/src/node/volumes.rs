//! A pod's volumes as directories of the node, and what of them each container sees.
//!
//! configMap, secret, downwardAPI and projected volumes are written the way kubelet writes them: the files are links
//! into `..data`, which is itself a link to a directory with the time in its name; an update writes a new directory
//! and moves the link, so that a reader sees all of the old or all of the new content.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, DownwardAPIVolumeFile, KeyToPath, Pod, Volume};

use super::env::{ConfigError, PodFacts, References, expand, field_value, parse_quantity, resource_value};
use crate::sys::mounts::Bind;

/// Relative path, content and mode of a file in a volume.
type Content = BTreeMap<PathBuf, (Vec<u8>, u32)>;

/// Mode of files where a manifest gives none; Kubernetes' default.
const DEFAULT_MODE: u32 = 0o644;

/// A volume of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) name: String,
    /// What is bound into containers.
    pub(crate) path: PathBuf,
    /// Present if its content is written by us (and rewritten when its sources change).
    pub(crate) content: Option<Content>,
    /// emptyDir of medium Memory: size in bytes, 0 for the kernel's default.
    pub(crate) memory: Option<u64>,
    /// Content that nothing can change.
    pub(crate) read_only: bool,
}

/// Where every volume of a pod is and what it holds. Pure but for hostPath checks.
pub(crate) fn plan(
    pod: &Pod,
    directory: &Path,
    facts: &PodFacts,
    references: &impl References,
) -> Result<Vec<Planned>, ConfigError> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes
        .map(|volume| plan_one(pod, volume, directory, facts, references))
        .collect()
}

fn plan_one(
    pod: &Pod,
    volume: &Volume,
    directory: &Path,
    facts: &PodFacts,
    references: &impl References,
) -> Result<Planned, ConfigError> {
    let mut planned = Planned {
        name: volume.name.clone(),
        path: directory.join("volumes").join(&volume.name),
        content: None,
        memory: None,
        read_only: false,
    };
    let mut content = Content::new();
    if let Some(empty) = &volume.empty_dir {
        if empty.medium.as_deref() == Some("Memory") {
            let size = empty
                .size_limit
                .as_ref()
                .and_then(|limit| parse_quantity(&limit.0))
                .unwrap_or(0.0);
            planned.memory = Some(size as u64);
        }
        return Ok(planned);
    }
    if let Some(host) = &volume.host_path {
        planned.path = PathBuf::from(&host.path);
        check_host_path(&planned.path, host.type_.as_deref().unwrap_or_default())
            .map_err(|reason| ConfigError(format!("hostPath type check failed: {reason}")))?;
        return Ok(planned);
    }
    if let Some(map) = &volume.config_map {
        config_map(
            &mut content,
            &map.name,
            map.items.as_deref(),
            map.default_mode,
            map.optional,
            references,
        )?;
    } else if let Some(secret) = &volume.secret {
        let name = secret.secret_name.as_deref().unwrap_or_default();
        secret_files(
            &mut content,
            name,
            secret.items.as_deref(),
            secret.default_mode,
            secret.optional,
            references,
        )?;
    } else if let Some(downward) = &volume.downward_api {
        downward_files(
            &mut content,
            pod,
            downward.items.as_deref(),
            downward.default_mode,
            facts,
        )?;
    } else if let Some(projected) = &volume.projected {
        for source in projected.sources.iter().flatten() {
            if let Some(map) = &source.config_map {
                config_map(
                    &mut content,
                    &map.name,
                    map.items.as_deref(),
                    projected.default_mode,
                    map.optional,
                    references,
                )?;
            }
            if let Some(secret) = &source.secret {
                secret_files(
                    &mut content,
                    &secret.name,
                    secret.items.as_deref(),
                    projected.default_mode,
                    secret.optional,
                    references,
                )?;
            }
            if let Some(downward) = &source.downward_api {
                downward_files(
                    &mut content,
                    pod,
                    downward.items.as_deref(),
                    projected.default_mode,
                    facts,
                )?;
            }
            if source.service_account_token.is_some() {
                return Err(ConfigError(format!(
                    "volume {}: service account tokens are not issued here yet",
                    volume.name
                )));
            }
            if source.cluster_trust_bundle.is_some() {
                return Err(ConfigError(format!(
                    "volume {}: clusterTrustBundle is not supported",
                    volume.name
                )));
            }
        }
    } else {
        return Err(ConfigError(format!(
            "volume {}: only emptyDir, configMap, secret, downwardAPI, projected and hostPath volumes are supported",
            volume.name
        )));
    }
    planned.content = Some(content);
    planned.read_only = true;
    Ok(planned)
}

fn check_host_path(path: &Path, kind: &str) -> Result<(), String> {
    let shown = path.display();
    match kind {
        "" => Ok(()),
        "Directory" if path.is_dir() => Ok(()),
        "Directory" => Err(format!("{shown} is not a directory")),
        "File" if path.is_file() => Ok(()),
        "File" => Err(format!("{shown} is not a file")),
        "DirectoryOrCreate" => fs::create_dir_all(path).map_err(|error| format!("create {shown}: {error}")),
        "FileOrCreate" => fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map(|_| ())
            .map_err(|error| format!("create {shown}: {error}")),
        "Socket" | "CharDevice" | "BlockDevice" if path.exists() => Ok(()),
        "Socket" | "CharDevice" | "BlockDevice" => Err(format!("{shown} does not exist")),
        other => Err(format!("unknown type {other}")),
    }
}

fn config_map(
    content: &mut Content,
    name: &str,
    items: Option<&[KeyToPath]>,
    mode: Option<i32>,
    optional: Option<bool>,
    references: &impl References,
) -> Result<(), ConfigError> {
    let Some(map) = references.config_map(name) else {
        return missing(optional, format!("configmap \"{name}\" not found"));
    };
    let mut all: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    all.extend(
        map.data
            .iter()
            .flatten()
            .map(|(key, value)| (key.clone(), value.clone().into_bytes())),
    );
    all.extend(
        map.binary_data
            .iter()
            .flatten()
            .map(|(key, value)| (key.clone(), value.0.clone())),
    );
    select(content, all, items, mode, optional, "configmap", name)
}

fn secret_files(
    content: &mut Content,
    name: &str,
    items: Option<&[KeyToPath]>,
    mode: Option<i32>,
    optional: Option<bool>,
    references: &impl References,
) -> Result<(), ConfigError> {
    let Some(secret) = references.secret(name) else {
        return missing(optional, format!("secret \"{name}\" not found"));
    };
    let all = secret
        .data
        .iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.0.clone()))
        .collect();
    select(content, all, items, mode, optional, "secret", name)
}

fn missing(optional: Option<bool>, reason: String) -> Result<(), ConfigError> {
    if optional == Some(true) {
        Ok(())
    } else {
        Err(ConfigError(reason))
    }
}

fn select(
    content: &mut Content,
    mut all: BTreeMap<String, Vec<u8>>,
    items: Option<&[KeyToPath]>,
    mode: Option<i32>,
    optional: Option<bool>,
    kind: &str,
    name: &str,
) -> Result<(), ConfigError> {
    let mode = mode.map_or(DEFAULT_MODE, |mode| mode as u32);
    match items {
        None | Some([]) => {
            for (key, value) in all {
                content.insert(safe(&key)?, (value, mode));
            }
        }
        Some(items) => {
            for item in items {
                match all.remove(&item.key) {
                    Some(value) => {
                        let mode = item.mode.map_or(mode, |mode| mode as u32);
                        content.insert(safe(&item.path)?, (value, mode));
                    }
                    None if optional == Some(true) => {}
                    None => {
                        return Err(ConfigError(format!(
                            "references non-existent {kind} key: {} (in {name})",
                            item.key
                        )));
                    }
                }
            }
        }
    }
    Ok(())
}

fn downward_files(
    content: &mut Content,
    pod: &Pod,
    items: Option<&[DownwardAPIVolumeFile]>,
    mode: Option<i32>,
    facts: &PodFacts,
) -> Result<(), ConfigError> {
    let mode = mode.map_or(DEFAULT_MODE, |mode| mode as u32);
    for item in items.into_iter().flatten() {
        let value = if let Some(field) = &item.field_ref {
            field_value(pod, field, facts)?
        } else if let Some(field) = &item.resource_field_ref {
            let none = Container::default();
            resource_value(pod, &none, field)?
        } else {
            continue;
        };
        let mode = item.mode.map_or(mode, |mode| mode as u32);
        content.insert(safe(&item.path)?, (value.into_bytes(), mode));
    }
    Ok(())
}

/// A relative path that stays inside its volume.
fn safe(path: &str) -> Result<PathBuf, ConfigError> {
    let path = PathBuf::from(path);
    let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
    if inside && path.components().next().is_some() {
        Ok(path)
    } else {
        Err(ConfigError(format!(
            "path {} must be relative and may not contain \"..\"",
            path.display()
        )))
    }
}

/// Writes a volume's content if it differs from what is there; whether it did.
pub(crate) fn write(volume: &Planned, stamp: &str) -> io::Result<bool> {
    let Some(content) = &volume.content else {
        if volume
            .path
            .parent()
            .is_some_and(|parent| parent.ends_with("volumes"))
        {
            fs::create_dir_all(&volume.path)?;
            fs::set_permissions(&volume.path, fs::Permissions::from_mode(0o777))?;
        }
        return Ok(false);
    };
    fs::create_dir_all(&volume.path)?;
    let data = volume.path.join("..data");
    let previous = fs::read_link(&data).ok();
    if previous.is_some() && same(&data, content) {
        return Ok(false);
    }
    let directory = format!("..{stamp}");
    let target = volume.path.join(&directory);
    for (path, (bytes, mode)) in content {
        let file = target.join(path);
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&file, bytes)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(*mode))?;
    }
    fs::create_dir_all(&target)?;
    let moving = volume.path.join("..data_tmp");
    let _ = fs::remove_file(&moving);
    symlink(&directory, &moving)?;
    fs::rename(&moving, &data)?;
    let wanted: std::collections::BTreeSet<&Path> = content
        .keys()
        .filter_map(|path| path.components().next().map(|first| Path::new(first.as_os_str())))
        .collect();
    for first in &wanted {
        let link = volume.path.join(first);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(first), &link)?;
        }
    }
    for entry in fs::read_dir(&volume.path)? {
        let name = entry?.file_name();
        let visible = !name.to_string_lossy().starts_with("..");
        if visible && !wanted.contains(Path::new(&name)) {
            fs::remove_file(volume.path.join(&name))?;
        }
    }
    if let Some(previous) = previous.filter(|previous| previous.as_os_str() != directory.as_str()) {
        let _ = fs::remove_dir_all(volume.path.join(previous));
    }
    Ok(true)
}

fn same(data: &Path, content: &Content) -> bool {
    let mut found = 0;
    let mut pending = vec![data.to_owned()];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = fs::read_dir(&directory) else {
            return false;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.is_dir() {
                pending.push(path);
                continue;
            }
            let Ok(relative) = path.strip_prefix(data) else {
                return false;
            };
            match content.get(relative) {
                Some((bytes, _)) if fs::read(&path).is_ok_and(|have| &have == bytes) => found += 1,
                _ => return false,
            }
        }
    }
    found == content.len()
}

/// What a container sees of the pod's volumes.
pub(crate) fn binds(
    container: &Container,
    volumes: &[Planned],
    env: &BTreeMap<String, String>,
) -> Result<Vec<Bind>, ConfigError> {
    let mut binds = Vec::new();
    for mount in container.volume_mounts.iter().flatten() {
        let volume = volumes
            .iter()
            .find(|volume| volume.name == mount.name)
            .ok_or_else(|| ConfigError(format!("volume \"{}\" is not defined", mount.name)))?;
        let sub_path = match (&mount.sub_path_expr, &mount.sub_path) {
            (Some(expression), _) => Some(expand(expression, env)),
            (None, Some(path)) if !path.is_empty() => Some(path.clone()),
            _ => None,
        };
        let source = match sub_path {
            None => volume.path.clone(),
            Some(path) => {
                let source = volume.path.join(safe(&path)?);
                if volume.content.is_none() && volume.memory.is_none() && !source.exists() {
                    fs::create_dir_all(&source).map_err(|error| {
                        ConfigError(format!("create subPath {path} of {}: {error}", mount.name))
                    })?;
                }
                source
            }
        };
        let target = PathBuf::from(&mount.mount_path);
        binds.push(Bind {
            source,
            target: if target.is_absolute() {
                target
            } else {
                Path::new("/").join(target)
            },
            read_only: volume.read_only || mount.read_only == Some(true),
        });
    }
    Ok(binds)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
    use parking_lot::Mutex;
    use serde_json::json;

    use super::*;

    struct Fixture(Mutex<String>);

    impl References for Fixture {
        fn config_map(&self, name: &str) -> Option<Arc<ConfigMap>> {
            (name == "cm").then(|| {
                Arc::new(
                    serde_json::from_value(json!({"data": {"a.txt": self.0.lock().clone(), "b.txt": "b"}}))
                        .unwrap(),
                )
            })
        }
        fn secret(&self, name: &str) -> Option<Arc<Secret>> {
            (name == "s").then(|| Arc::new(serde_json::from_value(json!({"data": {"key": "aGk="}})).unwrap()))
        }
        fn services(&self) -> Vec<Arc<Service>> {
            Vec::new()
        }
    }

    fn planned(
        volumes: serde_json::Value,
        directory: &Path,
        fixture: &Fixture,
    ) -> Result<Vec<Planned>, ConfigError> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "labels": {"app": "x"}},
            "spec": {"containers": [], "volumes": volumes},
        }))
        .unwrap();
        plan(&pod, directory, &PodFacts::default(), fixture)
    }

    #[test]
    fn an_update_moves_the_content_as_a_whole_and_removes_what_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let fixture = Fixture(Mutex::new("one".into()));
        let volumes = json!([{"name": "v", "configMap": {"name": "cm"}}]);
        let first = planned(volumes, directory.path(), &fixture).unwrap();
        assert!(write(&first[0], "1").unwrap());
        let path = &first[0].path;
        assert_eq!(fs::read_to_string(path.join("a.txt")).unwrap(), "one");
        assert!(
            !write(&first[0], "2").unwrap(),
            "unchanged content is not written again"
        );
        *fixture.0.lock() = "two".into();
        let only_a =
            json!([{"name": "v", "configMap": {"name": "cm", "items": [{"key": "a.txt", "path": "a.txt"}]}}]);
        let second = planned(only_a, directory.path(), &fixture).unwrap();
        assert!(write(&second[0], "3").unwrap());
        assert_eq!(fs::read_to_string(path.join("a.txt")).unwrap(), "two");
        assert!(!path.join("b.txt").exists());
        assert_eq!(fs::read_link(path.join("..data")).unwrap(), Path::new("..3"));
        assert!(!path.join("..1").exists());
    }

    #[test]
    fn projected_volumes_combine_their_sources_with_modes_and_paths() {
        let directory = tempfile::tempdir().unwrap();
        let fixture = Fixture(Mutex::new("one".into()));
        let volumes = json!([{"name": "v", "projected": {"defaultMode": 0o600, "sources": [
            {"secret": {"name": "s", "items": [{"key": "key", "path": "deep/er/key", "mode": 0o400}]}},
            {"configMap": {"name": "cm", "items": [{"key": "b.txt", "path": "b"}]}},
            {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        ]}}]);
        let plan = planned(volumes, directory.path(), &fixture).unwrap();
        write(&plan[0], "1").unwrap();
        let path = &plan[0].path;
        assert_eq!(fs::read_to_string(path.join("deep/er/key")).unwrap(), "hi");
        assert_eq!(
            fs::metadata(path.join("deep/er/key"))
                .unwrap()
                .permissions()
                .mode()
                & 0o777,
            0o400
        );
        assert_eq!(
            fs::metadata(path.join("b")).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_to_string(path.join("labels")).unwrap(), "app=\"x\"");
    }

    #[test]
    fn what_is_missing_or_unsupported_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let fixture = Fixture(Mutex::new(String::new()));
        for (volume, message) in [
            (
                json!({"name": "v", "configMap": {"name": "no"}}),
                "configmap \"no\" not found",
            ),
            (
                json!({"name": "v", "secret": {"secretName": "no"}}),
                "secret \"no\" not found",
            ),
            (
                json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "z", "path": "z"}]}}),
                "references non-existent configmap key: z (in cm)",
            ),
            (
                json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "a.txt", "path": "../a"}]}}),
                "path ../a must be relative and may not contain \"..\"",
            ),
            (
                json!({"name": "v", "persistentVolumeClaim": {"claimName": "x"}}),
                "volume v: only emptyDir, configMap, secret, downwardAPI, projected and hostPath volumes are supported",
            ),
        ] {
            assert_eq!(
                planned(json!([volume]), directory.path(), &fixture)
                    .unwrap_err()
                    .0,
                message
            );
        }
        let optional = json!([{"name": "v", "secret": {"secretName": "no", "optional": true}}]);
        assert_eq!(
            planned(optional, directory.path(), &fixture).unwrap()[0].content,
            Some(Content::new())
        );
    }
}
