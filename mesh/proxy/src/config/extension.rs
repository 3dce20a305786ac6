//! Filters whose configuration is a resource of its own (ECDS): the places where one is used, and what is known of it.
//!
//! There are places in chains of HTTP filters, in chains of network filters and among listener filters ([`Discoverable`]). A
//! place compiles what comes for its name by itself, because counters and defaults differ from listener to listener. An
//! update is taken only if every place can use it, so that no two listeners differ in what a name means; otherwise all keep
//! what they had.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::google::protobuf::Any;

use super::route::Context;
use crate::config::convert::required;
use crate::error::{Refusal, Within};
use crate::policy::on_demand::aggregated;

/// Kinds of filters, as statistics have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Of HTTP.
    Http,
    /// Of connections.
    Network,
    /// Of listeners.
    Listener,
}

/// A kind of filter whose configuration may come by ECDS.
pub trait Discoverable: std::fmt::Debug + Send + Sync + Sized + 'static {
    /// What statistics of its updates call it.
    const KIND: Kind;
    /// What it takes to compile one, beside its message.
    type Origin: std::fmt::Debug + Send + Sync;

    /// Compiles a message that came for the filter `name`. What cannot come this way is refused.
    fn discovered(
        name: &str,
        any: &Any,
        origin: &Self::Origin,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal>;
}

/// A filter whose configuration comes by ECDS.
#[derive(Debug)]
pub struct Place<K: Discoverable> {
    /// The resource's name, which is the filter's.
    pub name: Box<str>,
    types: Box<[Box<str>]>,
    origin: K::Origin,
    default: Option<Arc<K>>,
    current: ArcSwapOption<K>,
    /// Whether the listener need not wait any more.
    settled: AtomicBool,
}

/// Puts into use what was compiled.
type Commit = Box<dyn FnOnce()>;

/// A place, whatever kind of filter it is for.
pub trait AnyPlace: std::fmt::Debug + Send + Sync {
    /// What it is a place for: the kind of filter and its name.
    fn subject(&self) -> (Kind, &str);

    /// Whether its listener can be used as far as this filter is concerned.
    fn is_settled(&self) -> bool;

    /// Nothing has come in time, or what there was is gone: the default, if there is one.
    fn fall_back(&self);

    /// Compiles a message, which is used from the commit on.
    #[doc(hidden)]
    fn prepare(self: Arc<Self>, any: &Any, context: &mut Context<'_>) -> Result<Commit, Refusal>;
}

impl<K: Discoverable> Place<K> {
    /// What the filter does now; `None` where nothing has come and there is no default.
    pub fn load(&self) -> Option<Arc<K>> {
        self.current.load_full()
    }

    fn set(&self, kind: Option<Arc<K>>) {
        self.current.store(kind);
        self.settled.store(true, Ordering::Release);
    }

    fn compile(&self, any: &Any, context: &mut Context<'_>) -> Result<Arc<K>, Refusal> {
        compile(&self.name, &self.types, any, &self.origin, context)
    }
}

impl<K: Discoverable> AnyPlace for Place<K> {
    fn subject(&self) -> (Kind, &str) {
        (K::KIND, &self.name)
    }

    fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    fn fall_back(&self) {
        self.set(self.default.clone());
    }

    fn prepare(self: Arc<Self>, any: &Any, context: &mut Context<'_>) -> Result<Commit, Refusal> {
        let kind = self.compile(any, context)?;
        Ok(Box::new(move || self.set(Some(kind))))
    }
}

fn compile<K: Discoverable>(
    name: &str,
    types: &[Box<str>],
    any: &Any,
    origin: &K::Origin,
    context: &mut Context<'_>,
) -> Result<Arc<K>, Refusal> {
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
    K::discovered(name, any, origin, context).map(Arc::new)
}

fn type_name(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or_default()
}

/// The refusal of a message that a filter cannot be configured with by ECDS.
pub(crate) fn not_by_discovery(any: &Any) -> Refusal {
    Refusal::new(
        "typed_config",
        format!("{} cannot be configured by extension discovery", any.type_url),
    )
}

/// Every place, and what is held for their names.
#[derive(Debug, Default)]
pub struct Extensions {
    places: HashMap<Box<str>, Vec<Weak<dyn AnyPlace>>>,
    values: HashMap<Box<str>, Any>,
}

impl Extensions {
    /// A place for the filter of that name.
    pub(crate) fn place<K: Discoverable>(
        name: &str,
        from: &core::ExtensionConfigSource,
        origin: K::Origin,
        context: &mut Context<'_>,
    ) -> Result<Arc<Place<K>>, Refusal> {
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
            .map(|any| compile(name, &types, any, &origin, context))
            .transpose()
            .within("config_discovery.default_config")?;
        let place = Place {
            name: name.into(),
            types,
            origin,
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
        let erased: Arc<dyn AnyPlace> = place.clone();
        extensions
            .places
            .entry(name.into())
            .or_default()
            .push(Arc::downgrade(&erased));
        Ok(place)
    }

    /// Takes a `TypedExtensionConfig`.
    pub(crate) fn put(
        name: &str,
        from: &core::TypedExtensionConfig,
        context: &mut Context<'_>,
    ) -> Result<(), Refusal> {
        let any = required(from.typed_config.as_ref(), "typed_config")?;
        let places = context.slots.extensions.live(name);
        let commits = places
            .into_iter()
            .map(|place| place.prepare(any, context))
            .collect::<Result<Vec<_>, _>>()?;
        for commit in commits {
            commit();
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

    fn live(&self, name: &str) -> Vec<Arc<dyn AnyPlace>> {
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

    /// The kinds of filters that have such a name.
    pub fn kinds(&self, name: &str) -> BTreeSet<Kind> {
        self.live(name).iter().map(|place| place.subject().0).collect()
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
