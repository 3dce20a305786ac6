//! The list of resources of a build, in order, with indexes instead of searches.

use std::collections::HashMap;

use crate::error::{Cause, Error, Result};
use crate::id::{ResId, effective_namespace};
use crate::resource::Resource;
use crate::schema::Schemas;
use crate::selector::Matcher;

/// Group, version, kind, name, effective namespace, separated by a character that none of them holds.
type Key = String;

fn key(group_version: &str, kind: &str, name: &str, namespace: &str) -> Key {
    let mut key = String::with_capacity(group_version.len() + kind.len() + name.len() + namespace.len() + 3);
    for part in [group_version, kind, name] {
        key.push_str(part);
        key.push('\0');
    }
    key.push_str(namespace);
    key
}

fn key_of_id(id: &ResId) -> Key {
    let api_version = if id.gvk.group.is_empty() {
        id.gvk.version.clone()
    } else {
        format!("{}/{}", id.gvk.group, id.gvk.version)
    };
    key(&api_version, &id.gvk.kind, &id.name, id.effective_namespace())
}

/// Resources in order. Whoever changes identities through [`ResMap::resources_mut`] need not care about the indexes: they
/// are built again when they are next needed.
#[derive(Clone, Debug, Default)]
pub(crate) struct ResMap {
    resources: Vec<Resource>,
    /// Current identities; complete unless `stale`.
    current: HashMap<Key, u32>,
    /// All identities, present and past.
    any: Option<HashMap<Key, Vec<u32>>>,
    stale: bool,
}

impl ResMap {
    /// Number of resources.
    pub(crate) fn len(&self) -> usize {
        self.resources.len()
    }

    /// The resources.
    pub(crate) fn resources(&self) -> &[Resource] {
        &self.resources
    }

    /// The resources, to change in any way but their number.
    pub(crate) fn resources_mut(&mut self) -> &mut [Resource] {
        self.stale = true;
        self.any = None;
        &mut self.resources
    }

    /// The resources, to change without touching apiVersion, kind, name or namespace.
    pub(crate) fn contents_mut(&mut self) -> &mut [Resource] {
        &mut self.resources
    }

    /// All resources out of the map.
    pub(crate) fn into_resources(self) -> Vec<Resource> {
        self.resources
    }

    fn current_key(resource: &Resource, schemas: &Schemas) -> Key {
        key(
            resource.api_version(),
            resource.kind(),
            resource.name(),
            resource.effective_namespace(schemas),
        )
    }

    fn refresh(&mut self, schemas: &Schemas) {
        if self.stale {
            self.current.clear();
            for (i, r) in self.resources.iter().enumerate() {
                self.current.insert(Self::current_key(r, schemas), i as u32);
            }
            self.stale = false;
        }
    }

    /// Adds a resource. Its identity must be new.
    pub(crate) fn append(&mut self, resource: Resource, schemas: &Schemas) -> Result<()> {
        self.refresh(schemas);
        let key = Self::current_key(&resource, schemas);
        if let Some(&existing) = self.current.get(&key) {
            return Err(duplicate(&self.resources[existing as usize], &resource, schemas));
        }
        self.current.insert(key, self.resources.len() as u32);
        self.any = None;
        self.resources.push(resource);
        Ok(())
    }

    /// Adds all resources of another map.
    pub(crate) fn append_all(&mut self, other: ResMap, schemas: &Schemas) -> Result<()> {
        if self.resources.is_empty() {
            *self = other;
            return Ok(());
        }
        self.resources.reserve(other.resources.len());
        for resource in other.resources {
            self.append(resource, schemas)?;
        }
        Ok(())
    }

    /// The resources that have or had an identity.
    pub(crate) fn by_any_id(&mut self, id: &ResId, schemas: &Schemas) -> Vec<usize> {
        let resources = &self.resources;
        let index = self.any.get_or_insert_with(|| {
            let mut index: HashMap<Key, Vec<u32>> = HashMap::with_capacity(resources.len() * 2);
            for (i, r) in resources.iter().enumerate() {
                if r.is_empty() {
                    continue;
                }
                let mut add = |key: Key| {
                    let list = index.entry(key).or_default();
                    if list.last() != Some(&(i as u32)) {
                        list.push(i as u32);
                    }
                };
                add(Self::current_key(r, schemas));
                for p in &r.previous {
                    add(key(
                        r.api_version(),
                        &p.kind,
                        &p.name,
                        effective_namespace(&p.namespace, false),
                    ));
                }
            }
            index
        });
        index
            .get(&key_of_id(id))
            .map_or_else(Vec::new, |list| list.iter().map(|&i| i as usize).collect())
    }

    /// The resources that a selector of a patch means: by the original or the present name and namespace.
    pub(crate) fn select(&self, matcher: &Matcher, schemas: &Schemas) -> Vec<usize> {
        let selected = self.resources.iter().enumerate().filter(|(_, r)| {
            let (group, version) = serin_manifests::split_api_version(r.api_version());
            matcher.gvk(group, version, r.kind())
                && (matcher.name(r.original_name()) || matcher.name(r.name()))
                && (matcher.namespace(r.original_namespace(schemas))
                    || matcher.namespace(r.effective_namespace(schemas)))
                && matcher.metadata(&r.root)
        });
        selected.map(|(i, _)| i).collect()
    }

    /// Puts a resource in the place of another.
    pub(crate) fn replace(&mut self, index: usize, resource: Resource) {
        self.resources[index] = resource;
        self.stale = true;
        self.any = None;
    }

    /// Takes out the resources that patches have emptied.
    pub(crate) fn drop_empty(&mut self) {
        if self.resources.iter().any(Resource::is_empty) {
            self.resources.retain(|r| !r.is_empty());
            self.stale = true;
            self.any = None;
        }
    }

    /// Keeps the resources for which the test holds.
    pub(crate) fn retain(&mut self, test: impl FnMut(&Resource) -> bool) {
        self.resources.retain(test);
        self.stale = true;
        self.any = None;
    }

    /// Fails when two resources have one identity.
    pub(crate) fn check_unique(&self, schemas: &Schemas) -> Result<()> {
        let mut seen: HashMap<Key, usize> = HashMap::with_capacity(self.resources.len());
        for (i, r) in self.resources.iter().enumerate() {
            if let Some(first) = seen.insert(Self::current_key(r, schemas), i) {
                return Err(duplicate(&self.resources[first], r, schemas));
            }
        }
        Ok(())
    }
}

fn duplicate(first: &Resource, second: &Resource, schemas: &Schemas) -> Error {
    let error = Error::new(Cause::DuplicateId {
        id: second.id(schemas).to_string(),
    });
    let place = |r: &Resource| match &r.source {
        Some(source) => format!("{}:{}", source.file, source.line),
        None => "a generator".to_owned(),
    };
    error.help(format!(
        "it is defined in {} and again in {}; remove one, or change one of them with a patch",
        place(first),
        place(second)
    ))
}
