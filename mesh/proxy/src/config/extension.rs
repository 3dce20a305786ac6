//! Filters whose configuration is a resource of its own (ECDS): the places where one is used, and what is known of it.
//!
//! A place compiles what comes for its name by itself, because counters and defaults differ from listener to listener. An
//! update is taken only if every place can use it, so that no two listeners differ in what a name means; otherwise all keep
//! what they had.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::google::protobuf::Any;

use super::route::Context;
use crate::error::{Refusal, Within};
use crate::policy::chain::{self, Kind};
use crate::policy::on_demand::aggregated;

/// A filter of a chain whose configuration comes by ECDS.
#[derive(Debug)]
pub struct Place {
    /// The resource's name, which is the filter's.
    pub name: Box<str>,
    types: Box<[Box<str>]>,
    stat_prefix: Box<str>,
    default: Option<Arc<Kind>>,
    current: ArcSwapOption<Kind>,
    /// Whether the listener need not wait any more.
    settled: AtomicBool,
}

impl Place {
    /// What the filter does now; `None` where nothing has come and there is no default.
    pub fn load(&self) -> Option<Arc<Kind>> {
        self.current.load_full()
    }

    /// Whether its listener can be used as far as this filter is concerned.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    /// Nothing has come in time, or what there was is gone: the default, if there is one.
    pub fn fall_back(&self) {
        self.set(self.default.clone());
    }

    fn set(&self, kind: Option<Arc<Kind>>) {
        self.current.store(kind);
        self.settled.store(true, Ordering::Release);
    }

    fn compile(&self, any: &Any, context: &mut Context<'_>) -> Result<Arc<Kind>, Refusal> {
        compile(&self.name, &self.types, any, &self.stat_prefix, context)
    }
}

fn compile(
    name: &str,
    types: &[Box<str>],
    any: &Any,
    stat_prefix: &str,
    context: &mut Context<'_>,
) -> Result<Arc<Kind>, Refusal> {
    if !types.iter().any(|url| type_name(url) == type_name(&any.type_url)) {
        return Err(Refusal::new(
            "typed_config",
            format!(
                "{} is not among the type_urls of the filter {name:?}: {}",
                any.type_url,
                types.join(", ")
            ),
        ));
    }
    match chain::compile(name, Some(any), stat_prefix, context)? {
        Some(Kind::OnDemand(_)) | None => Err(Refusal::new(
            "typed_config",
            format!("{} cannot be configured by extension discovery", any.type_url),
        )),
        Some(kind) => Ok(Arc::new(kind)),
    }
}

fn type_name(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or_default()
}

/// Every place, and what is held for their names.
#[derive(Debug, Default)]
pub struct Extensions {
    places: HashMap<Box<str>, Vec<Weak<Place>>>,
    values: HashMap<Box<str>, Any>,
}

impl Extensions {
    /// A place for the filter of that name.
    pub(crate) fn place(
        name: &str,
        from: &core::ExtensionConfigSource,
        stat_prefix: &str,
        context: &mut Context<'_>,
    ) -> Result<Arc<Place>, Refusal> {
        if name.is_empty() {
            return Err(Refusal::new("name", "is missing"));
        }
        aggregated(from.config_source.as_ref()).within("config_discovery.config_source")?;
        let types: Box<[Box<str>]> = from.type_urls.iter().map(|url| url.as_str().into()).collect();
        if types.is_empty() {
            return Err(Refusal::new("config_discovery.type_urls", "is missing"));
        }
        let default = from
            .default_config
            .as_ref()
            .map(|any| compile(name, &types, any, stat_prefix, context))
            .transpose()
            .within("config_discovery.default_config")?;
        let place = Place {
            name: name.into(),
            types,
            stat_prefix: stat_prefix.into(),
            default,
            current: ArcSwapOption::empty(),
            settled: AtomicBool::new(false),
        };
        let held = context.slots.extensions.values.get(name).cloned();
        match held {
            Some(any) => {
                let kind = place
                    .compile(&any, context)
                    .within("config_discovery: the extension as it is")?;
                place.set(Some(kind));
            }
            None if from.apply_default_config_without_warming && place.default.is_some() => place.fall_back(),
            None => {}
        }
        let place = Arc::new(place);
        let extensions = &mut context.slots.extensions;
        extensions
            .places
            .entry(name.into())
            .or_default()
            .push(Arc::downgrade(&place));
        Ok(place)
    }

    /// Takes a `TypedExtensionConfig`.
    pub(crate) fn put(
        name: &str,
        from: &core::TypedExtensionConfig,
        context: &mut Context<'_>,
    ) -> Result<(), Refusal> {
        let any = from
            .typed_config
            .as_ref()
            .ok_or_else(|| Refusal::new("typed_config", "is missing"))?;
        let places = context.slots.extensions.live(name);
        let kinds = places
            .iter()
            .map(|place| place.compile(any, context))
            .collect::<Result<Vec<_>, _>>()?;
        for (place, kind) in places.iter().zip(kinds) {
            place.set(Some(kind));
        }
        context.slots.extensions.values.insert(name.into(), any.clone());
        Ok(())
    }

    /// There is none of that name, or no more.
    pub(crate) fn remove(&mut self, name: &str) {
        self.values.remove(name);
        for place in self.live(name) {
            place.fall_back();
        }
    }

    fn live(&self, name: &str) -> Vec<Arc<Place>> {
        let places = self.places.get(name).into_iter().flatten();
        places.filter_map(Weak::upgrade).collect()
    }

    /// The names to ask for. What is held for others is forgotten: it will be told anew when it is asked for again.
    pub fn names(&mut self) -> BTreeSet<Arc<str>> {
        self.places.retain(|_, places| {
            places.retain(|place| place.strong_count() > 0);
            !places.is_empty()
        });
        let places = &self.places;
        self.values.retain(|name, _| places.contains_key(name));
        self.places.keys().map(|name| Arc::from(&**name)).collect()
    }

    /// Names of the places that wait.
    pub fn unsettled(&self) -> impl Iterator<Item = &str> {
        self.places
            .iter()
            .filter(|(_, places)| {
                places
                    .iter()
                    .filter_map(Weak::upgrade)
                    .any(|place| !place.is_settled())
            })
            .map(|(name, _)| &**name)
    }
}
