//! Subsets of a cluster: which keys of the endpoints' `envoy.lb` metadata make groups, and what routes ask for.
//!
//! A group is found by one look-up: keys and values are written as bytes, sorted by key, and that is the name of the
//! group. Routes have theirs written when they are compiled.

use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::google::protobuf as google;

use crate::config::convert::each;
use crate::error::Refusal;

/// Metadata that subsets go by, of endpoints and of routes.
pub const METADATA: &str = "envoy.lb";
/// Key of a route's criteria that holds alternatives (`FALLBACK_LIST`).
const FALLBACK_LIST: &str = "fallback_list";

type Config = cluster::cluster::LbSubsetConfig;

/// What a request asks of its endpoint: values by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Criteria {
    pairs: Box<[(Box<str>, Box<[u8]>)]>,
    name: Box<[u8]>,
    /// Alternatives in the order in which they are tried.
    pub alternatives: Box<[Criteria]>,
}

/// Writes a value so that equal values, and no others, give equal bytes.
fn write_value(from: &google::Value, out: &mut Vec<u8>) {
    use google::value::Kind;
    let sized = |out: &mut Vec<u8>, tag: u8, bytes: &[u8]| {
        out.push(tag);
        out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
        out.extend_from_slice(bytes);
    };
    match &from.kind {
        None | Some(Kind::NullValue(_)) => out.push(b'0'),
        Some(Kind::BoolValue(value)) => out.extend_from_slice(&[b'b', u8::from(*value)]),
        Some(Kind::NumberValue(value)) => {
            out.push(b'n');
            // Minus zero is zero.
            out.extend_from_slice(&(value + 0.0).to_bits().to_be_bytes());
        }
        Some(Kind::StringValue(text)) => sized(out, b's', text.as_bytes()),
        Some(Kind::StructValue(fields)) => {
            let mut names: Vec<_> = fields.fields.iter().collect();
            names.sort_by_key(|(name, _)| *name);
            let mut inner = Vec::new();
            for (name, value) in names {
                sized(&mut inner, b'k', name.as_bytes());
                write_value(value, &mut inner);
            }
            sized(out, b'{', &inner);
        }
        Some(Kind::ListValue(list)) => {
            let mut inner = Vec::new();
            list.values
                .iter()
                .for_each(|value| write_value(value, &mut inner));
            sized(out, b'[', &inner);
        }
    }
}

/// The bytes of a value.
pub fn value_bytes(from: &google::Value) -> Box<[u8]> {
    let mut out = Vec::new();
    write_value(from, &mut out);
    out.into()
}

/// The name of a group: its keys, sorted, with their values.
pub fn group_name<'a>(pairs: impl Iterator<Item = (&'a str, &'a [u8])>) -> Box<[u8]> {
    let mut out = Vec::new();
    for (key, value) in pairs {
        out.extend_from_slice(&(key.len() as u32).to_be_bytes());
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(value);
    }
    out.into()
}

impl Criteria {
    fn of_pairs(mut pairs: Vec<(Box<str>, Box<[u8]>)>) -> Self {
        pairs.sort();
        let name = group_name(pairs.iter().map(|(key, value)| (&**key, &**value)));
        Self {
            pairs: pairs.into(),
            name,
            alternatives: Box::default(),
        }
    }

    /// From a struct.
    pub fn of_struct(from: &google::Struct) -> Self {
        let mut out = Self::of_pairs(
            from.fields
                .iter()
                .map(|(key, value)| (key.as_str().into(), value_bytes(value)))
                .collect(),
        );
        let Some(google::value::Kind::ListValue(list)) = from
            .fields
            .get(FALLBACK_LIST)
            .and_then(|value| value.kind.as_ref())
        else {
            return out;
        };
        out.alternatives = list
            .values
            .iter()
            .filter_map(|value| match &value.kind {
                Some(google::value::Kind::StructValue(more)) => Some(more),
                _ => None,
            })
            .map(|more| {
                let mut merged = from.clone();
                merged.fields.remove(FALLBACK_LIST);
                merged.fields.extend(more.fields.clone());
                merged.fields.remove(FALLBACK_LIST);
                Self::of_struct(&merged)
            })
            .collect();
        out
    }

    /// From a route's `metadata_match`, over what the level above asks for; `None` when nothing is asked.
    pub fn compile(from: Option<&core::Metadata>, above: Option<&core::Metadata>) -> Option<Box<Self>> {
        let of = |metadata: Option<&core::Metadata>| {
            metadata.and_then(|metadata| metadata.filter_metadata.get(METADATA).cloned())
        };
        let merged = match (of(above), of(from)) {
            (None, None) => return None,
            (Some(one), None) | (None, Some(one)) => one,
            (Some(mut above), Some(own)) => {
                above.fields.extend(own.fields);
                above
            }
        };
        Some(Box::new(Self::of_struct(&merged)))
    }

    /// What a route asks for, or nothing.
    pub fn default_of(from: Option<&Self>) -> Self {
        from.cloned().unwrap_or_default()
    }

    /// The same and, over it, what is noted.
    pub fn with(&self, noted: &google::Struct) -> Self {
        let mut pairs: std::collections::BTreeMap<_, _> = self.pairs.iter().cloned().collect();
        for (key, value) in &noted.fields {
            pairs.insert(key.as_str().into(), value_bytes(value));
        }
        Self {
            alternatives: self.alternatives.clone(),
            ..Self::of_pairs(pairs.into_iter().collect())
        }
    }

    /// The name of the group that has exactly these keys and values.
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// Whether it asks for nothing.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Whether it asks for exactly these keys, which are sorted.
    pub fn has_exactly(&self, keys: &[Box<str>]) -> bool {
        self.pairs.len() == keys.len() && self.pairs.iter().zip(keys).all(|((have, _), key)| have == key)
    }

    /// What it asks of these keys only; `None` if it lacks one.
    pub fn narrowed(&self, keys: &[Box<str>]) -> Option<Self> {
        let pairs = keys
            .iter()
            .map(|key| self.pairs.iter().find(|(have, _)| have == key).cloned())
            .collect::<Option<Vec<_>>>()?;
        Some(Self::of_pairs(pairs))
    }

    /// The same without alternatives.
    pub fn without_alternatives(&self) -> Self {
        Self::of_pairs(
            self.pairs
                .iter()
                .filter(|(key, _)| &**key != FALLBACK_LIST)
                .cloned()
                .collect(),
        )
    }

    /// Whether an endpoint with this metadata fits.
    pub fn fits(&self, metadata: Option<&google::Struct>, list_as_any: bool) -> bool {
        self.pairs.iter().all(|(key, wanted)| {
            let Some(value) = metadata.and_then(|metadata| metadata.fields.get(&**key)) else {
                return false;
            };
            values_of(value, list_as_any).any(|have| have == *wanted)
        })
    }
}

/// The values that an endpoint's value stands for: itself, or each element of a list.
pub fn values_of(value: &google::Value, list_as_any: bool) -> impl Iterator<Item = Box<[u8]>> + '_ {
    let elements = match &value.kind {
        Some(google::value::Kind::ListValue(list)) if list_as_any => &list.values[..],
        _ => std::slice::from_ref(value),
    };
    elements.iter().map(value_bytes)
}

/// What happens to a request whose group does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// It fails.
    Nobody,
    /// Any endpoint.
    Anybody,
    /// An endpoint of the default subset.
    Default,
    /// A group of these keys only.
    Keys(Box<[Box<str>]>),
}

/// A selector: the keys of groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    /// Sorted.
    pub keys: Box<[Box<str>]>,
    /// Groups hold their first host only.
    pub single_host: bool,
    /// What happens where its group does not exist; `None` for what the cluster says.
    pub fallback: Option<Fallback>,
}

/// `lb_subset_config`, compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subsets {
    /// For requests whose group does not exist.
    pub fallback: Fallback,
    /// Of [`Fallback::Default`].
    pub default_subset: Criteria,
    /// By number of keys, most first.
    pub selectors: Box<[Selector]>,
    /// Locality weights count within groups.
    pub locality_weight_aware: bool,
    /// By the part of the locality that is in the group.
    pub scale_locality_weight: bool,
    /// Any endpoint when the fallback finds none.
    pub panic_mode_any: bool,
    /// A list stands for each of its elements.
    pub list_as_any: bool,
    /// Routes may hold alternatives.
    pub fallback_list: bool,
    /// Keys of a route that no selector has are passed over.
    pub allow_redundant_keys: bool,
}

fn sorted(keys: &[String]) -> Box<[Box<str>]> {
    let mut keys: Vec<Box<str>> = keys.iter().map(|key| key.as_str().into()).collect();
    keys.sort();
    keys.dedup();
    keys.into()
}

impl Subsets {
    /// Compiles the message; `None` when it makes no groups (Envoy's rule).
    pub(crate) fn compile(from: &Config) -> Result<Option<Self>, Refusal> {
        use cluster::cluster::lb_subset_config as pb;
        if from.subset_selectors.is_empty() {
            return Ok(None);
        }
        let fallback = match pb::LbSubsetFallbackPolicy::try_from(from.fallback_policy) {
            Ok(pb::LbSubsetFallbackPolicy::NoFallback) => Fallback::Nobody,
            Ok(pb::LbSubsetFallbackPolicy::AnyEndpoint) => Fallback::Anybody,
            Ok(pb::LbSubsetFallbackPolicy::DefaultSubset) => Fallback::Default,
            Err(_) => {
                return Err(Refusal::new(
                    "fallback_policy",
                    format!("{} is unknown", from.fallback_policy),
                ));
            }
        };
        let mut selectors: Vec<_> = each(&from.subset_selectors, "subset_selectors", compile_selector)?;
        if from
            .subset_selectors
            .iter()
            .any(|selector| selector.single_host_per_subset)
            && (selectors.len() != 1 || selectors[0].keys.len() != 1)
        {
            return Err(Refusal::new(
                "subset_selectors",
                "single_host_per_subset takes one selector with one key",
            ));
        }
        selectors.sort_by_key(|selector| std::cmp::Reverse(selector.keys.len()));
        Ok(Some(Self {
            fallback,
            default_subset: from
                .default_subset
                .as_ref()
                .map(Criteria::of_struct)
                .unwrap_or_default(),
            selectors: selectors.into(),
            locality_weight_aware: from.locality_weight_aware,
            scale_locality_weight: from.scale_locality_weight,
            panic_mode_any: from.panic_mode_any,
            list_as_any: from.list_as_any,
            fallback_list: from.metadata_fallback_policy
                == pb::LbSubsetMetadataFallbackPolicy::FallbackList as i32,
            // A field of the newer message only.
            allow_redundant_keys: false,
        }))
    }
}

fn compile_selector(
    from: &cluster::cluster::lb_subset_config::LbSubsetSelector,
) -> Result<Selector, Refusal> {
    use cluster::cluster::lb_subset_config::lb_subset_selector::LbSubsetSelectorFallbackPolicy as Policy;
    let keys = sorted(&from.keys);
    if keys.is_empty() {
        return Err(Refusal::new("keys", "a selector needs a key"));
    }
    let fallback = match Policy::try_from(from.fallback_policy) {
        Ok(Policy::NotDefined) => None,
        Ok(Policy::NoFallback) => Some(Fallback::Nobody),
        Ok(Policy::AnyEndpoint) => Some(Fallback::Anybody),
        Ok(Policy::DefaultSubset) => Some(Fallback::Default),
        Ok(Policy::KeysSubset) => {
            let fewer = sorted(&from.fallback_keys_subset);
            if fewer.is_empty() || fewer.len() >= keys.len() || fewer.iter().any(|key| !keys.contains(key)) {
                return Err(Refusal::new(
                    "fallback_keys_subset",
                    "must hold some of the selector's keys, and not all",
                ));
            }
            Some(Fallback::Keys(fewer))
        }
        Err(_) => {
            return Err(Refusal::new(
                "fallback_policy",
                format!("{} is unknown", from.fallback_policy),
            ));
        }
    };
    Ok(Selector {
        keys,
        single_host: from.single_host_per_subset,
        fallback,
    })
}
