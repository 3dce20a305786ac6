//! A layer of the runtime: its values by key, as they are written and as shares of requests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serin_xds::pb::google::protobuf as google;

use crate::config::convert::Fraction;
use crate::error::{Refusal, Within};

/// Prefixes of keys by which Envoy changes what it does to traffic without any configuration naming them.
const FOREIGN: [&str; 9] = [
    "upstream.",
    "health_check.",
    "outlier_detection.",
    "circuit_breakers.",
    "overload.",
    "load_balancer.",
    "http.",
    "tcp_proxy.",
    "listener.",
];
/// Envoy's `initial_fetch_timeout` when the layer does not say.
const INITIAL_FETCH: Duration = Duration::from_secs(15);
/// How deep values may be within values.
const MAX_DEPTH: usize = 16;
/// Keys of one layer.
const MAX_KEYS: usize = 4096;

/// Where the values of a layer come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The bootstrap file.
    Static,
    /// The admin port.
    Admin,
    /// RTDS.
    Rtds,
}

/// A layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its name in listings.
    pub name: Box<str>,
    /// Where its values come from.
    pub source: Source,
    /// The resource, where that is RTDS.
    pub resource: Arc<str>,
    /// How long the start waits for it (`initial_fetch_timeout`); for ever if `None`.
    pub patience: Option<Duration>,
    /// Whether nobody waits for it any more: something has come, or not in time.
    pub(super) settled: bool,
    pub(super) values: BTreeMap<Box<str>, Setting>,
}

/// A value as it is written, and as a share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) text: Box<str>,
    pub(super) share: Option<Fraction>,
}

impl Layer {
    /// A layer without values.
    pub fn empty(name: &str, source: Source) -> Self {
        Self {
            name: name.into(),
            source,
            resource: name.into(),
            patience: Some(INITIAL_FETCH),
            settled: source != Source::Rtds,
            values: BTreeMap::new(),
        }
    }

    /// Replaces its values.
    pub fn fill(&mut self, from: &google::Struct) -> Result<(), Refusal> {
        let mut values = BTreeMap::new();
        walk(from, "", 0, &mut values)?;
        self.values = values;
        Ok(())
    }

    /// Changes values; an empty one takes the key away. Nothing changes if one of them cannot be.
    pub(super) fn modify<'a>(
        &mut self,
        changes: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<(), Refusal> {
        let mut values = self.values.clone();
        for (key, text) in changes {
            check_key(key)?;
            if text.is_empty() {
                values.remove(key);
            } else {
                values.insert(key.into(), Setting::of_text(text));
            }
        }
        check_count(&values)?;
        self.values = values;
        Ok(())
    }
}

fn is_share(from: &google::Struct) -> bool {
    from.fields.contains_key("numerator") || from.fields.contains_key("denominator")
}

/// Values within values have the names of all that they are in, with dots between.
fn walk(
    from: &google::Struct,
    prefix: &str,
    depth: usize,
    out: &mut BTreeMap<Box<str>, Setting>,
) -> Result<(), Refusal> {
    use google::value::Kind;
    if depth > MAX_DEPTH {
        return Err(Refusal::new(prefix, "is nested too deeply"));
    }
    for (key, value) in &from.fields {
        let name = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        let setting = match &value.kind {
            Some(Kind::StructValue(inner)) if !is_share(inner) => {
                walk(inner, &name, depth + 1, out)?;
                continue;
            }
            Some(Kind::StructValue(inner)) => Setting {
                text: share_text(inner).into(),
                share: Some(share_of(inner).within(&name)?),
            },
            Some(Kind::NumberValue(number)) => Setting {
                text: number.to_string().into(),
                share: share_of_number(*number),
            },
            Some(Kind::BoolValue(value)) => Setting {
                text: value.to_string().into(),
                share: None,
            },
            Some(Kind::StringValue(text)) => Setting::of_text(text),
            Some(Kind::NullValue(_) | Kind::ListValue(_)) | None => {
                return Err(Refusal::new(name, "is neither a value nor an object"));
            }
        };
        check_key(&name)?;
        out.insert(name.into(), setting);
        check_count(out)?;
    }
    Ok(())
}

fn check_count(values: &BTreeMap<Box<str>, Setting>) -> Result<(), Refusal> {
    if values.len() > MAX_KEYS {
        return Err(Refusal::new(
            "",
            format!("more than {MAX_KEYS} keys in one layer"),
        ));
    }
    Ok(())
}

fn check_key(key: &str) -> Result<(), Refusal> {
    match FOREIGN.iter().find(|prefix| key.starts_with(*prefix)) {
        Some(prefix) => Err(Refusal::new(
            key,
            format!("settings of Envoy under {prefix} have no effect here; say it in the resource"),
        )),
        None => Ok(()),
    }
}

/// Envoy: a whole number is a percentage, and everything above 100 is all.
fn share_of_number(number: f64) -> Option<Fraction> {
    (number >= 0.0 && number.fract() == 0.0).then(|| Fraction::of_percent(number.min(100.0)))
}

fn share_of(from: &google::Struct) -> Result<Fraction, Refusal> {
    use google::value::Kind;
    let kind = |name: &str| from.fields.get(name).and_then(|value| value.kind.as_ref());
    let numerator = match kind("numerator") {
        None => 0.0,
        Some(Kind::NumberValue(number)) if *number >= 0.0 && number.fract() == 0.0 => *number,
        Some(_) => return Err(Refusal::new("numerator", "is not a number of requests")),
    };
    let denominator = match kind("denominator") {
        None => 100.0,
        Some(Kind::StringValue(name)) if name == "HUNDRED" => 100.0,
        Some(Kind::StringValue(name)) if name == "TEN_THOUSAND" => 10_000.0,
        Some(Kind::StringValue(name)) if name == "MILLION" => 1_000_000.0,
        Some(_) => {
            return Err(Refusal::new(
                "denominator",
                "is not HUNDRED, TEN_THOUSAND or MILLION",
            ));
        }
    };
    Ok(Fraction::of_percent(numerator / denominator * 100.0))
}

fn share_text(from: &google::Struct) -> String {
    use google::value::Kind;
    let shown = |name: &str| match from.fields.get(name).and_then(|value| value.kind.as_ref()) {
        Some(Kind::NumberValue(number)) => Some(format!("{name}: {number}")),
        Some(Kind::StringValue(text)) => Some(format!("{name}: {text}")),
        _ => None,
    };
    let parts: Vec<_> = ["numerator", "denominator"]
        .into_iter()
        .filter_map(shown)
        .collect();
    format!("{{{}}}", parts.join(", "))
}

impl Setting {
    /// Text is a number or a share where it reads like one.
    fn of_text(text: &str) -> Self {
        Self {
            text: text.into(),
            share: match text.trim().parse::<f64>() {
                Ok(number) => share_of_number(number),
                Err(_) => share_in_text(text),
            },
        }
    }
}

fn share_in_text(text: &str) -> Option<Fraction> {
    let inner = text.trim().strip_prefix('{')?.strip_suffix('}')?;
    let mut fields = google::Struct::default();
    for part in inner.split(',') {
        let (name, value) = part.split_once(':')?;
        let clean = |text: &str| text.trim().trim_matches(['"', '\'']).to_owned();
        let value = clean(value);
        let kind = match value.parse() {
            Ok(number) => google::value::Kind::NumberValue(number),
            Err(_) => google::value::Kind::StringValue(value),
        };
        fields
            .fields
            .insert(clean(name), google::Value { kind: Some(kind) });
    }
    is_share(&fields).then(|| share_of(&fields).ok())?
}
