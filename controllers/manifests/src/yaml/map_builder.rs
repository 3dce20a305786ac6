//! Mappings while they are read: repeated keys are found without comparing all pairs, merge keys take effect at the end.

use std::collections::HashSet;

use super::parse::{Fault, fault};
use super::scan::Mark;
use crate::value::{Entry, Map, Pos, Scalar, Value};

/// A mapping under construction: finds repeated keys without comparing all pairs.
pub(super) struct MapBuilder {
    pub(super) map: Map,
    seen: HashSet<Box<str>>,
    merge: Option<Vec<Map>>,
}

/// Above this many keys a set is kept beside the list.
const INDEX_FROM: usize = 24;

impl MapBuilder {
    pub(super) fn new(pos: Pos) -> MapBuilder {
        MapBuilder {
            map: Map {
                entries: Vec::new(),
                pos,
            },
            seen: HashSet::new(),
            merge: None,
        }
    }

    pub(super) fn find(&self, key: &str) -> Option<usize> {
        if !self.seen.is_empty() && !self.seen.contains(key) {
            return None;
        }
        self.map.index_of(key)
    }

    pub(super) fn push(&mut self, key: Scalar, value: Value) {
        if self.map.entries.len() == INDEX_FROM {
            self.seen = self.map.entries.iter().map(|e| e.key.text.clone()).collect();
        }
        if !self.seen.is_empty() {
            self.seen.insert(key.text.clone());
        }
        self.map.entries.push(Entry { key, value });
    }

    pub(super) fn add_merge(&mut self, value: Value, mark: Mark) -> Result<(), Fault> {
        if self.merge.is_some() {
            return fault("duplicate merge key", mark);
        }
        let sources = match value {
            Value::Map(map) => vec![map],
            Value::Seq(seq) => seq
                .items
                .into_iter()
                .map(|item| match item {
                    Value::Map(map) => Ok(map),
                    _ => fault("map merge requires map or sequence of maps as the value", mark),
                })
                .collect::<Result<_, _>>()?,
            Value::Scalar(_) => {
                return fault("map merge requires map or sequence of maps as the value", mark);
            }
        };
        self.merge = Some(sources);
        Ok(())
    }

    /// Own keys win over merged ones, earlier merge sources over later ones.
    pub(super) fn finish(mut self) -> Result<Value, Fault> {
        if let Some(sources) = self.merge.take() {
            for entry in sources.into_iter().flat_map(|m| m.entries) {
                if self.find(&entry.key.text).is_none() {
                    self.push(entry.key, entry.value);
                }
            }
        }
        Ok(Value::Map(self.map))
    }
}
