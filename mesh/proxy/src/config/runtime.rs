//! The runtime: layers of values by key, the last layer that has a key deciding, and the shares of requests that follow them.
//!
//! A share that names a key ([`RuntimeFraction`]) holds a cell that is written when a layer changes, so that a request pays
//! one relaxed load. Layers are static, set over the admin port, or delivered by RTDS; what a proxy does from its start on
//! should follow them, so listeners and everything else that comes from a control plane wait for the first values (Envoy).
//!
//! Keys have the meaning that the configuration gives them by naming them. Envoy's own switches (`envoy.…`, `re2.…`) have
//! none here and are passed over; its own settings of traffic are refused, lest somebody think that they hold.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde_json::{Value, json};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::google::protobuf as google;

use super::convert::Fraction;
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
/// No value.
const UNSET: u32 = u32::MAX;

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
    settled: bool,
    values: BTreeMap<Box<str>, Setting>,
}

/// A value as it is written, and as a share.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    text: Box<str>,
    share: Option<Fraction>,
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
            Some(Kind::StringValue(text)) => setting_of_text(text),
            Some(Kind::NullValue(_) | Kind::ListValue(_)) | None => {
                return Err(Refusal::new(name, "is neither a value nor an object"));
            }
        };
        check_key(&name)?;
        out.insert(name.into(), setting);
        if out.len() > MAX_KEYS {
            return Err(Refusal::new(
                "",
                format!("more than {MAX_KEYS} keys in one layer"),
            ));
        }
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

/// Text is a number or a share where it reads like one.
fn setting_of_text(text: &str) -> Setting {
    let share = match text.trim().parse::<f64>() {
        Ok(number) => share_of_number(number),
        Err(_) => share_in_text(text),
    };
    Setting {
        text: text.into(),
        share,
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

/// The value of a key, in parts of a million.
#[derive(Debug)]
struct Cell(AtomicU32);

/// A `RuntimeFractionalPercent`: its default, unless the runtime has a value for its key.
#[derive(Clone, Debug)]
pub struct RuntimeFraction {
    default: Fraction,
    cell: Option<Arc<Cell>>,
}

impl From<Fraction> for RuntimeFraction {
    fn from(default: Fraction) -> Self {
        Self { default, cell: None }
    }
}

impl RuntimeFraction {
    /// What it is now.
    pub fn now(&self) -> Fraction {
        match &self.cell {
            None => self.default,
            Some(cell) => match cell.0.load(Ordering::Relaxed) {
                UNSET => self.default,
                parts => Fraction::of_millionths(parts),
            },
        }
    }

    /// Whether a uniform draw falls within the share.
    pub fn hit(&self, random: u64) -> bool {
        self.now().hit(random)
    }

    /// Whether nothing falls within it, whatever the runtime says.
    pub fn is_never(&self) -> bool {
        self.cell.is_none() && self.default.is_none()
    }

    /// Whether everything falls within it now.
    pub fn is_all(&self) -> bool {
        self.now() == Fraction::ALL
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Runtime {
    layers: Vec<Layer>,
    cells: HashMap<Box<str>, Weak<Cell>>,
    /// Times that values were taken, and that they could not be.
    loads: [u64; 2],
}

impl Runtime {
    /// Replaces the layers, lowest first.
    pub fn set_layers(&mut self, layers: Vec<Layer>) {
        self.layers = layers;
        self.publish();
    }

    /// The share that the message says; absent means `absent`.
    pub(crate) fn fraction(
        &mut self,
        from: Option<&core::RuntimeFractionalPercent>,
        absent: Fraction,
    ) -> Result<RuntimeFraction, Refusal> {
        let default = Fraction::compile(from.and_then(|value| value.default_value.as_ref()), absent)?;
        let key = from.map_or("", |value| value.runtime_key.as_str());
        if key.is_empty() {
            return Ok(default.into());
        }
        let cell = match self.cells.get(key).and_then(Weak::upgrade) {
            Some(cell) => cell,
            None => {
                self.cells.retain(|_, cell| cell.strong_count() > 0);
                let cell = Arc::new(Cell(AtomicU32::new(self.value(key))));
                self.cells.insert(key.into(), Arc::downgrade(&cell));
                cell
            }
        };
        Ok(RuntimeFraction {
            default,
            cell: Some(cell),
        })
    }

    fn value(&self, key: &str) -> u32 {
        self.layers
            .iter()
            .rev()
            .find_map(|layer| layer.values.get(key))
            .and_then(|setting| setting.share)
            .map_or(UNSET, Fraction::millionths)
    }

    /// Times that values were taken, and that they could not be.
    pub fn loads(&self) -> [u64; 2] {
        self.loads
    }

    /// Lets every share that names a key follow.
    fn publish(&mut self) {
        self.loads[0] += 1;
        self.cells.retain(|_, cell| cell.strong_count() > 0);
        for (key, cell) in &self.cells {
            if let Some(cell) = cell.upgrade() {
                cell.0.store(self.value(key), Ordering::Relaxed);
            }
        }
    }

    /// Resources to ask for by RTDS.
    pub fn names(&self) -> BTreeSet<Arc<str>> {
        self.layers
            .iter()
            .filter(|layer| layer.source == Source::Rtds)
            .map(|layer| layer.resource.clone())
            .collect()
    }

    /// Whether the start waits for layers.
    pub fn is_awaited(&self) -> bool {
        self.awaited().next().is_some()
    }

    /// The layers that the start waits for.
    pub fn awaited(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().filter(|layer| !layer.settled)
    }

    /// The control plane has said something about a layer, whether or not that can be used.
    pub fn answer(&mut self, resource: &str) {
        for layer in &mut self.layers {
            layer.settled |= *layer.resource == *resource;
        }
    }

    /// So much time has passed since layers were asked for first, or (`None`) nobody will send any: those that should have
    /// come by now are not waited for any more.
    pub fn expire(&mut self, waited: Option<Duration>) {
        for layer in self.layers.iter_mut().filter(|layer| !layer.settled) {
            layer.settled = match (waited, layer.patience) {
                (None, _) => true,
                (Some(waited), Some(patience)) => waited >= patience,
                (Some(_), None) => false,
            };
        }
    }

    /// When layers should be [given up](Self::expire) next, since they were asked for first.
    pub fn patience(&self) -> Option<Duration> {
        self.awaited().filter_map(|layer| layer.patience).min()
    }

    /// Takes a layer from RTDS. One that cannot be used is refused, and the last good one stays.
    pub fn put(&mut self, resource: &str, from: Option<&google::Struct>) -> Result<(), Refusal> {
        let nothing = google::Struct::default();
        for layer in &mut self.layers {
            if layer.source == Source::Rtds && *layer.resource == *resource {
                layer
                    .fill(from.unwrap_or(&nothing))
                    .within("layer")
                    .inspect_err(|_| self.loads[1] += 1)?;
            }
        }
        self.publish();
        Ok(())
    }

    /// A layer is gone.
    pub fn remove(&mut self, resource: &str) {
        // Nothing in it can be wrong.
        let _ = self.put(resource, None);
    }

    /// Changes values over the admin port; an empty one takes the key away. `false` without a layer for it.
    pub fn modify<'a>(
        &mut self,
        changes: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<bool, Refusal> {
        let Some(layer) = self
            .layers
            .iter_mut()
            .rfind(|layer| layer.source == Source::Admin)
        else {
            return Ok(false);
        };
        let mut values = layer.values.clone();
        for (key, text) in changes {
            check_key(key)?;
            if text.is_empty() {
                values.remove(key);
            } else {
                values.insert(key.into(), setting_of_text(text));
            }
        }
        if values.len() > MAX_KEYS {
            return Err(Refusal::new(
                "",
                format!("more than {MAX_KEYS} keys in one layer"),
            ));
        }
        layer.values = values;
        self.publish();
        Ok(true)
    }

    /// Keys and layers.
    pub fn size(&self) -> (usize, usize) {
        let keys: BTreeSet<&str> = self
            .layers
            .iter()
            .flat_map(|layer| layer.values.keys())
            .map(|key| &**key)
            .collect();
        (keys.len(), self.layers.len())
    }

    /// `/runtime` in Envoy's shape.
    pub fn json(&self) -> Value {
        let keys: BTreeSet<&str> = self
            .layers
            .iter()
            .flat_map(|layer| layer.values.keys())
            .map(|key| &**key)
            .collect();
        let entries: serde_json::Map<String, Value> = keys
            .into_iter()
            .map(|key| {
                let values: Vec<&str> = self
                    .layers
                    .iter()
                    .map(|layer| layer.values.get(key).map_or("", |setting| &*setting.text))
                    .collect();
                let last = values.iter().rev().find(|text| !text.is_empty());
                let entry = json!({ "final_value": last.unwrap_or(&""), "layer_values": values });
                (key.to_owned(), entry)
            })
            .collect();
        let layers: Vec<&str> = self.layers.iter().map(|layer| &*layer.name).collect();
        json!({ "layers": layers, "entries": entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_json(value: &Value) -> google::Struct {
        let kind = |value: &Value| match value {
            Value::Null => google::value::Kind::NullValue(0),
            Value::Bool(value) => google::value::Kind::BoolValue(*value),
            Value::Number(number) => google::value::Kind::NumberValue(number.as_f64().unwrap()),
            Value::String(text) => google::value::Kind::StringValue(text.clone()),
            Value::Array(_) => google::value::Kind::ListValue(google::ListValue::default()),
            Value::Object(_) => google::value::Kind::StructValue(of_json(value)),
        };
        let fields = value.as_object().unwrap().iter();
        google::Struct {
            fields: fields
                .map(|(key, value)| {
                    (
                        key.clone(),
                        google::Value {
                            kind: Some(kind(value)),
                        },
                    )
                })
                .collect(),
        }
    }

    fn share(runtime: &mut Runtime, key: &str) -> RuntimeFraction {
        let message = core::RuntimeFractionalPercent {
            default_value: None,
            runtime_key: key.into(),
        };
        runtime
            .fraction(Some(&message), Fraction::of_percent(10.0))
            .unwrap()
    }

    #[test]
    fn numbers_shares_and_texts_are_read_as_envoy_reads_them() {
        let mut runtime = Runtime::default();
        let mut layer = Layer::empty("s", Source::Static);
        let values = json!({
            "a": 25, "b": {"numerator": 5, "denominator": "TEN_THOUSAND"}, "c": 250, "d": "30", "e": true,
            "f": {"g": {"numerator": 1}}, "h": "{numerator: 2, denominator: MILLION}", "i": 1.5, "j": "text",
        });
        layer.fill(&of_json(&values)).unwrap();
        runtime.set_layers(vec![layer]);
        for (key, percent) in [
            ("a", 25.0),
            ("b", 0.05),
            ("c", 100.0),
            ("d", 30.0),
            ("f.g", 1.0),
            ("h", 0.0002),
            // What is no share leaves the default.
            ("e", 10.0),
            ("i", 10.0),
            ("j", 10.0),
            ("unknown", 10.0),
        ] {
            let now = share(&mut runtime, key).now();
            assert_eq!(now, Fraction::of_percent(percent), "{key}");
        }
    }

    #[test]
    fn the_last_layer_that_has_a_key_decides_and_shares_follow_changes() {
        let mut runtime = Runtime::default();
        let mut fixed = Layer::empty("fixed", Source::Static);
        fixed.fill(&of_json(&json!({ "k": 20 }))).unwrap();
        runtime.set_layers(vec![
            fixed,
            Layer::empty("rtds", Source::Rtds),
            Layer::empty("admin", Source::Admin),
        ]);
        let followed = share(&mut runtime, "k");
        assert_eq!(followed.now(), Fraction::of_percent(20.0));
        runtime.put("rtds", Some(&of_json(&json!({ "k": 30 })))).unwrap();
        assert_eq!(followed.now(), Fraction::of_percent(30.0));
        assert_eq!(runtime.modify([("k", "40")]), Ok(true));
        assert_eq!(followed.now(), Fraction::of_percent(40.0));
        assert_eq!(
            runtime.json(),
            json!({ "layers": ["fixed", "rtds", "admin"],
                    "entries": { "k": { "final_value": "40", "layer_values": ["20", "30", "40"] } } })
        );
        assert_eq!(runtime.modify([("k", "")]), Ok(true));
        runtime.remove("rtds");
        assert_eq!(followed.now(), Fraction::of_percent(20.0));
    }

    #[test]
    fn layers_are_waited_for_until_they_are_answered_for_or_each_ones_time_is_over() {
        let layer = |name: &str, patience| Layer {
            patience,
            ..Layer::empty(name, Source::Rtds)
        };
        let mut runtime = Runtime::default();
        runtime.set_layers(vec![Layer::empty("fixed", Source::Static)]);
        assert!(!runtime.is_awaited());
        let seconds = |count| Some(Duration::from_secs(count));
        runtime.set_layers(vec![
            layer("a", seconds(1)),
            layer("b", seconds(2)),
            layer("c", seconds(3)),
            layer("d", None),
        ]);
        assert_eq!(runtime.patience(), seconds(1));
        runtime.answer("a");
        assert_eq!(runtime.patience(), seconds(2));
        runtime.expire(seconds(2));
        assert_eq!(runtime.patience(), seconds(3));
        runtime.expire(seconds(100));
        let awaited: Vec<_> = runtime.awaited().map(|layer| &*layer.name).collect();
        assert_eq!(awaited, ["d"], "one without a limit is waited for");
        assert_eq!(runtime.patience(), None);
        runtime.expire(None);
        assert!(!runtime.is_awaited());
    }

    #[test]
    fn a_layer_that_cannot_be_used_is_refused_and_the_last_good_one_stays() {
        let mut runtime = Runtime::default();
        runtime.set_layers(vec![Layer::empty("rtds", Source::Rtds)]);
        let followed = share(&mut runtime, "k");
        runtime.put("rtds", Some(&of_json(&json!({ "k": 30 })))).unwrap();
        for (bad, path) in [
            (
                json!({ "k": 1, "upstream": { "healthy_panic_threshold": 3 } }),
                "layer.upstream.healthy_panic_threshold",
            ),
            (json!({ "k": [] }), "layer.k"),
            (json!({ "k": { "numerator": "many" } }), "layer.k.numerator"),
        ] {
            let refusal = runtime.put("rtds", Some(&of_json(&bad))).unwrap_err();
            assert_eq!(refusal.path, path);
            assert_eq!(followed.now(), Fraction::of_percent(30.0));
        }
        assert_eq!(runtime.modify([("k", "1")]), Ok(false), "there is no admin layer");
    }
}
