//! Rate limit descriptors: what the `rate_limits` of routes and virtual hosts make of a request.
//!
//! Each entry is a list of actions, each action gives a key and a value, or says that the entry does not apply.

mod action;

use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::google::protobuf::value::Kind;

use self::action::{Action, Outcome};
use super::facts::Facts;
use super::metadata::{Key, Metadata};
use crate::config::convert::each;
use crate::error::{Refusal, Within};
use crate::observe::format::Template;
use crate::observe::record::{Record, Wants};

/// A limit that a request brings with it for the rate limit service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitOverride {
    /// Requests.
    pub requests_per_unit: u32,
    /// Per this (`RateLimitUnit`).
    pub unit: i32,
}

/// Keys and values that name a limit, the most general one first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Keys and values.
    pub entries: Vec<(Box<str>, Box<str>)>,
    /// Its own limit.
    pub limit: Option<LimitOverride>,
    /// How many hits the request counts for.
    pub hits: Option<u64>,
    /// Whether `x-ratelimit-*` is sent for it, where it says so itself.
    pub headers: Option<bool>,
}

/// What actions may look at, beside the facts.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// What is noted of its route.
    pub route: Option<&'a Metadata>,
    /// Who, what, from where.
    pub facts: &'a Facts<'a>,
    /// Name of the cluster that the request goes to.
    pub destination_cluster: &'a str,
    /// Name of the cluster that this proxy belongs to (`node.cluster`).
    pub source_cluster: &'a str,
    /// What is known of the request, where formats want it.
    pub record: Option<&'a Record<'a>>,
}

/// A compiled `RateLimit` of a route.
#[derive(Debug)]
pub struct RateLimitEntry {
    /// Filters of this stage use it.
    pub stage: u32,
    /// It is asked about when the request has ended, and nobody waits for the answer.
    pub at_end: bool,
    actions: Box<[Action]>,
    limit: Option<Limit>,
    hits: Option<Hits>,
    headers: Option<bool>,
    /// Fields that its formats name.
    wants: Option<Box<Wants>>,
}

#[derive(Debug)]
enum Hits {
    Fixed(u64),
    Format(Template),
}

/// Envoy's limit of what a format may say.
const MAX_HITS: f64 = 1e9;

#[derive(Debug)]
enum Limit {
    Fixed(LimitOverride),
    Metadata(Key),
}

/// `vh_rate_limits`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtualHostLimits {
    /// Used where the route has none.
    Override,
    /// Used as well.
    Include,
    /// Not used.
    Ignore,
}

impl VirtualHostLimits {
    pub(crate) fn compile(from: i32) -> Result<Self, Refusal> {
        match from {
            0 => Ok(Self::Override),
            1 => Ok(Self::Include),
            2 => Ok(Self::Ignore),
            other => Err(Refusal::new("vh_rate_limits", format!("{other} is unknown"))),
        }
    }
}

/// Compiles a list of entries.
pub(crate) fn compile_all(from: &[route::RateLimit]) -> Result<Box<[RateLimitEntry]>, Refusal> {
    each(from, "rate_limits", RateLimitEntry::compile)
}

impl RateLimitEntry {
    fn compile(from: &route::RateLimit) -> Result<Self, Refusal> {
        use route::rate_limit::XRateLimitOption;
        let headers = match XRateLimitOption::try_from(from.x_ratelimit_option) {
            Ok(XRateLimitOption::Unspecified) => None,
            Ok(XRateLimitOption::Off) => Some(false),
            Ok(XRateLimitOption::DraftVersion03) => Some(true),
            Err(_) => return Err(Refusal::new("x_ratelimit_option", "is unknown")),
        };
        let mut wants = Wants::default();
        if from.actions.is_empty() {
            return Err(Refusal::new("actions", "an entry needs an action"));
        }
        let stage = from.stage.as_ref().map_or(0, |value| value.value);
        if stage > 10 {
            return Err(Refusal::new("stage", format!("{stage} is above 10")));
        }
        use route::rate_limit::r#override::OverrideSpecifier;
        let limit = match from
            .limit
            .as_ref()
            .and_then(|limit| limit.override_specifier.as_ref())
        {
            None => None,
            Some(OverrideSpecifier::RateLimit(limit)) => Some(Limit::Fixed(LimitOverride {
                requests_per_unit: limit.requests_per_unit,
                unit: limit.unit,
            })),
            Some(OverrideSpecifier::DynamicMetadata(metadata)) => Some(Limit::Metadata(
                Key::compile(metadata.metadata_key.as_ref()).within("limit.dynamic_metadata")?,
            )),
        };
        let hits = match &from.hits_addend {
            None => None,
            Some(addend) if addend.is_negative_hits => {
                return Err(Refusal::new("hits_addend.is_negative_hits", "not supported"));
            }
            Some(addend) if addend.number.is_some() && !addend.format.is_empty() => {
                return Err(Refusal::new(
                    "hits_addend",
                    "number and format exclude each other",
                ));
            }
            Some(addend) if !addend.format.is_empty() => {
                let template = Template::parse(&addend.format, true, &mut wants);
                Some(Hits::Format(template.within("hits_addend.format")?))
            }
            Some(addend) => addend.number.as_ref().map(|number| Hits::Fixed(number.value)),
        };
        let actions: Box<[Action]> = each(&from.actions, "actions", |action| {
            Action::compile(action, &mut wants)
        })?;
        if wants.looks_at_responses() {
            return Err(Refusal::new(
                "",
                "formats of descriptors may not name fields of responses",
            ));
        }
        let formats = matches!(hits, Some(Hits::Format(_))) || actions.iter().any(Action::has_format);
        Ok(Self {
            at_end: from.apply_on_stream_done,
            headers,
            wants: formats.then(|| Box::new(wants)),
            stage,
            actions,
            limit,
            hits,
        })
    }

    /// Whether an action needs the name of the destination cluster.
    pub fn needs_cluster(&self) -> bool {
        self.actions
            .iter()
            .any(|action| matches!(action, Action::DestinationCluster))
    }

    /// Fields that its formats name, if it has any.
    pub fn wants(&self) -> Option<&Wants> {
        self.wants.as_deref()
    }

    /// The descriptor of a request; `None` if an action says that the entry does not apply. It has no entries where all
    /// actions are skipped, as in Envoy.
    pub fn describe(&self, scene: &Scene<'_>) -> Option<Descriptor> {
        let mut entries = Vec::with_capacity(self.actions.len());
        for action in &self.actions {
            match action.apply(scene) {
                Outcome::Entry(key, value) => entries.push((key, value)),
                Outcome::Skip => {}
                Outcome::Stop => return None,
            }
        }
        let hits = match &self.hits {
            None => None,
            Some(Hits::Fixed(hits)) => Some(*hits),
            // A number that is none makes the entry one that does not apply, as in Envoy.
            Some(Hits::Format(template)) => {
                let mut text = String::new();
                template.write(scene.record?, &mut text);
                let hits: f64 = text.parse().ok()?;
                Some((0.0..=MAX_HITS).contains(&hits).then_some(hits as u64)?)
            }
        };
        Some(Descriptor {
            entries,
            limit: self.limit.as_ref().and_then(|limit| limit.resolve(scene)),
            hits,
            headers: self.headers,
        })
    }
}

impl Limit {
    fn resolve(&self, scene: &Scene<'_>) -> Option<LimitOverride> {
        match self {
            Self::Fixed(limit) => Some(*limit),
            Self::Metadata(key) => {
                let Some(Kind::StructValue(fields)) = &key.find(scene.facts.metadata)?.kind else {
                    return None;
                };
                let Some(Kind::NumberValue(requests)) = &fields.fields.get("requests_per_unit")?.kind else {
                    return None;
                };
                let Some(Kind::StringValue(unit)) = &fields.fields.get("unit")?.kind else {
                    return None;
                };
                let unit = serin_xds::pb::envoy::r#type::v3::RateLimitUnit::from_str_name(unit)?;
                Some(LimitOverride {
                    requests_per_unit: *requests as u32,
                    unit: unit as i32,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests;
