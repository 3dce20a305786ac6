//! The runtime: layers of values by key, the last layer that has a key deciding, and the shares of requests that follow them.
//!
//! A share that names a key ([`RuntimeFraction`]) holds a cell that is written when a layer changes, so that a request pays
//! one relaxed load. Layers are static, set over the admin port, or delivered by RTDS; what a proxy does from its start on
//! should follow them, so listeners and everything else that comes from a control plane wait for the first values (Envoy).
//!
//! Keys have the meaning that the configuration gives them by naming them. Envoy's own switches (`envoy.…`, `re2.…`) have
//! none here and are passed over; its own settings of traffic are refused, lest somebody think that they hold.

mod layer;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde_json::{Value, json};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::google::protobuf as google;

pub use self::layer::{Layer, Source};

use super::convert::Fraction;
use crate::error::{Refusal, Within};

/// No value.
const UNSET: u32 = u32::MAX;

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
        layer.modify(changes)?;
        self.publish();
        Ok(true)
    }

    fn keys(&self) -> BTreeSet<&str> {
        self.layers
            .iter()
            .flat_map(|layer| layer.values.keys())
            .map(|key| &**key)
            .collect()
    }

    /// How many keys and layers there are.
    pub fn size(&self) -> (usize, usize) {
        (self.keys().len(), self.layers.len())
    }

    /// `/runtime` in Envoy's shape.
    pub fn json(&self) -> Value {
        let entries: serde_json::Map<String, Value> = self
            .keys()
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
mod tests;
