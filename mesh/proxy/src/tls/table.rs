//! Every secret that the proxy knows or waits for. Owned by the configuration store.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Weak};

use prost::Message as _;
use rustls_pki_types::UnixTime;
use serin_xds::client::NameChanges;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;

use super::secret::{Kind, Secret, SecretSlot};
use super::stats::TlsStats;
use crate::error::{Refusal, Within};

/// Which side a counter belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// A listener's.
    Listener,
    /// A cluster's.
    Cluster,
}

/// A service that secrets are asked of (`api_config_source`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SdsService {
    /// The cluster that it is.
    pub cluster: Arc<str>,
    /// Whether it is asked incrementally (`DELTA_GRPC`).
    pub delta: bool,
}

impl SdsService {
    fn compile(from: &core::ApiConfigSource) -> Result<Self, Refusal> {
        use core::api_config_source::ApiType;
        use core::grpc_service::TargetSpecifier;
        let delta = match ApiType::try_from(from.api_type) {
            Ok(ApiType::Grpc) => false,
            Ok(ApiType::DeltaGrpc) => true,
            _ => return Err(Refusal::new("api_type", "only GRPC and DELTA_GRPC are supported")),
        };
        let target = from
            .grpc_services
            .first()
            .and_then(|service| service.target_specifier.as_ref());
        let Some(TargetSpecifier::EnvoyGrpc(target)) = target else {
            return Err(Refusal::new(
                "grpc_services",
                "envoy_grpc with the name of a cluster is missing",
            ));
        };
        if target.cluster_name.is_empty() {
            return Err(Refusal::new(
                "grpc_services[0].envoy_grpc.cluster_name",
                "is missing",
            ));
        }
        Ok(Self {
            cluster: target.cluster_name.as_str().into(),
            delta,
        })
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct SecretTable {
    slots: HashMap<Box<str>, Arc<SecretSlot>>,
    values: HashMap<Box<str>, Arc<Secret>>,
    inline: Vec<Weak<SecretSlot>>,
    /// Secrets of services, by service and name.
    remote: HashMap<(SdsService, Box<str>), Arc<SecretSlot>>,
    stats: HashMap<(Side, Box<str>), Arc<TlsStats>>,
    /// What has changed of the names to ask the control plane for.
    changes: NameChanges,
}

impl SecretTable {
    /// The slot of a secret that a context refers to by name.
    pub fn reference(&mut self, from: &tls::SdsSecretConfig, kind: Kind) -> Result<Arc<SecretSlot>, Refusal> {
        use core::config_source::ConfigSourceSpecifier;
        if from.name.is_empty() {
            return Err(Refusal::new("name", "is missing"));
        }
        let discovered = match from.sds_config.as_ref() {
            None => false,
            Some(config) => match &config.config_source_specifier {
                Some(ConfigSourceSpecifier::Ads(_)) => true,
                Some(ConfigSourceSpecifier::PathConfigSource(source)) => {
                    return self.in_file(&source.path, &from.name, kind);
                }
                Some(ConfigSourceSpecifier::Path(path)) => return self.in_file(path, &from.name, kind),
                Some(ConfigSourceSpecifier::ApiConfigSource(source)) => {
                    let service = SdsService::compile(source).within("sds_config.api_config_source")?;
                    return self.of_service(service, &from.name, kind);
                }
                _ => {
                    return Err(Refusal::new(
                        "sds_config",
                        "secrets come with the other resources, from a service or from a file: use ads, \
                         api_config_source or path_config_source",
                    ));
                }
            },
        };
        if let Some(slot) = self.slots.get(from.name.as_str()) {
            return if slot.kind == kind {
                Ok(slot.clone())
            } else {
                Err(Refusal::new(
                    "name",
                    format!(
                        "the secret {} is in use as a {} elsewhere",
                        from.name,
                        slot.kind.field()
                    ),
                ))
            };
        }
        let value = self.values.get(from.name.as_str()).cloned();
        if let Some(value) = &value
            && value.kind() != kind
        {
            return Err(Refusal::new(
                "name",
                format!(
                    "the secret {} is a {}, not a {}",
                    from.name,
                    value.kind().field(),
                    kind.field()
                ),
            ));
        }
        if value.is_none() && !discovered {
            return Err(Refusal::new(
                "name",
                format!(
                    "there is no static secret {}; without sds_config it must be one",
                    from.name
                ),
            ));
        }
        let slot = Arc::new(SecretSlot::named(&from.name, kind, discovered));
        if let Some(value) = value {
            slot.set(value);
        }
        self.slots.insert(slot.name.clone(), slot.clone());
        if discovered {
            self.changes.add(&*slot.name);
        }
        Ok(slot)
    }

    /// A slot for a secret that a service is asked for.
    fn of_service(
        &mut self,
        service: SdsService,
        name: &str,
        kind: Kind,
    ) -> Result<Arc<SecretSlot>, Refusal> {
        let key = (service, Box::from(name));
        if let Some(slot) = self.remote.get(&key) {
            return if slot.kind == kind {
                Ok(slot.clone())
            } else {
                Err(Refusal::new(
                    "name",
                    format!("the secret {name} is in use as a {} elsewhere", slot.kind.field()),
                ))
            };
        }
        let slot = Arc::new(SecretSlot::named(name, kind, false));
        self.remote.insert(key, slot.clone());
        Ok(slot)
    }

    /// Names to ask services for: those that somebody still refers to.
    pub fn services(&mut self) -> BTreeMap<SdsService, BTreeSet<Arc<str>>> {
        self.remote.retain(|_, slot| Arc::strong_count(slot) > 1);
        let mut out: BTreeMap<SdsService, BTreeSet<Arc<str>>> = BTreeMap::new();
        for (service, name) in self.remote.keys() {
            out.entry(service.clone()).or_default().insert(Arc::from(&**name));
        }
        out
    }

    /// Takes a secret from a service. One that cannot be used is refused and the last good one stays.
    pub fn put_of(&mut self, service: &SdsService, name: &str, body: &[u8]) -> Result<(), Refusal> {
        let Some(slot) = self.remote.get(&(service.clone(), Box::from(name))) else {
            // Nobody refers to it any more.
            return Ok(());
        };
        let message = tls::Secret::decode(body)
            .map_err(|error| Refusal::new("", format!("not a valid message: {error}")))?;
        let secret = Arc::new(Secret::compile(&message, UnixTime::now())?);
        if slot.kind != secret.kind() {
            return Err(Refusal::new(
                secret.kind().field(),
                format!("{name} is in use as a {}", slot.kind.field()),
            ));
        }
        slot.set(secret);
        Ok(())
    }

    /// A slot for a secret in a file of its own, which is read again when it changes.
    fn in_file(&mut self, path: &str, name: &str, kind: Kind) -> Result<Arc<SecretSlot>, Refusal> {
        let slot = Arc::new(SecretSlot::in_file(path, name, UnixTime::now()).within("sds_config")?);
        if slot.kind != kind {
            return Err(Refusal::new(
                "name",
                format!(
                    "the secret {name} is a {}, not a {}",
                    slot.kind.field(),
                    kind.field()
                ),
            ));
        }
        self.inline.retain(|slot| slot.strong_count() > 0);
        self.inline.push(Arc::downgrade(&slot));
        Ok(slot)
    }

    /// A slot for a secret that is part of a context.
    pub fn inline(&mut self, message: tls::secret::Type) -> Result<Arc<SecretSlot>, Refusal> {
        let secret = tls::Secret {
            name: String::new(),
            r#type: Some(message),
        };
        let slot = Arc::new(SecretSlot::inline(secret, UnixTime::now())?);
        self.inline.retain(|slot| slot.strong_count() > 0);
        self.inline.push(Arc::downgrade(&slot));
        Ok(slot)
    }

    /// Takes a secret from the control plane. One that cannot be used is refused and the last good one stays.
    pub fn put(&mut self, name: &str, body: &[u8]) -> Result<(), Refusal> {
        let message = tls::Secret::decode(body)
            .map_err(|error| Refusal::new("", format!("not a valid message: {error}")))?;
        let secret = Arc::new(Secret::compile(&message, UnixTime::now())?);
        if let Some(slot) = self.slots.get(name) {
            if slot.kind != secret.kind() {
                return Err(Refusal::new(
                    secret.kind().field(),
                    format!("{name} is in use as a {}", slot.kind.field()),
                ));
            }
            slot.set(secret.clone());
        }
        self.values.insert(name.into(), secret);
        Ok(())
    }

    /// A secret is gone: nothing new may use it, but whoever has it keeps it.
    pub fn remove(&mut self, name: &str) {
        self.values.remove(name);
    }

    /// Forgets slots that nobody refers to any more.
    pub fn sweep(&mut self) {
        let (values, changes) = (&mut self.values, &mut self.changes);
        self.slots.retain(|name, slot| {
            let keep = Arc::strong_count(slot) > 1;
            if !keep && slot.discovered {
                values.remove(name);
                changes.remove(&**name);
            }
            keep
        });
        self.inline.retain(|slot| slot.strong_count() > 0);
        self.remote.retain(|_, slot| Arc::strong_count(slot) > 1);
    }

    /// What has changed of [`Self::wanted`] since this was asked last.
    pub fn take_name_changes(&mut self) -> NameChanges {
        std::mem::take(&mut self.changes)
    }

    /// Names to ask the control plane for.
    pub fn wanted(&self) -> BTreeSet<Arc<str>> {
        self.slots
            .values()
            .filter(|slot| slot.discovered)
            .map(|slot| Arc::from(&*slot.name))
            .collect()
    }

    /// Names that the control plane or services are asked for.
    pub fn asked_for(&self) -> BTreeSet<Arc<str>> {
        let of_services = self.remote.iter().filter(|(_, slot)| Arc::strong_count(slot) > 1);
        let of_services = of_services.map(|((_, name), _)| Arc::from(&**name));
        self.wanted().into_iter().chain(of_services).collect()
    }

    /// Whether any secret comes from files.
    pub fn has_files(&self) -> bool {
        self.inline
            .iter()
            .any(|slot| slot.upgrade().is_some_and(|slot| slot.has_files()))
    }

    /// Reads changed files again; returns what could not be used.
    pub fn reload_files(&self) -> Vec<Refusal> {
        let now = UnixTime::now();
        self.inline
            .iter()
            .filter_map(Weak::upgrade)
            .filter_map(|slot| slot.reload(now).err())
            .collect()
    }

    /// The counters of that listener or cluster; the same for as long as the proxy runs.
    pub fn stats(&mut self, side: Side, name: &str) -> Arc<TlsStats> {
        self.stats.entry((side, name.into())).or_default().clone()
    }

    /// Every counter.
    pub fn all_stats(&self) -> impl Iterator<Item = (Side, &str, &Arc<TlsStats>)> {
        self.stats
            .iter()
            .map(|((side, name), stats)| (*side, &**name, stats))
    }

    /// Forgets the counters of what is gone.
    pub fn forget(&mut self, side: Side, name: &str) {
        self.stats.remove(&(side, Box::from(name)));
    }

    /// Everything that is in use, and whether it was discovered, for admin output.
    pub fn in_use_by_kind(&self) -> impl Iterator<Item = (Arc<SecretSlot>, bool)> + '_ {
        let named = self.slots.values().map(|slot| (slot.clone(), slot.discovered));
        let remote = self.remote.values().map(|slot| (slot.clone(), true));
        let inline = self.inline.iter().filter_map(Weak::upgrade);
        named.chain(remote).chain(inline.map(|slot| (slot, false)))
    }

    /// Everything that is in use, for admin output.
    pub fn in_use(&self) -> impl Iterator<Item = Arc<SecretSlot>> + '_ {
        self.slots
            .values()
            .cloned()
            .chain(self.remote.values().cloned())
            .chain(self.inline.iter().filter_map(Weak::upgrade))
    }
}
