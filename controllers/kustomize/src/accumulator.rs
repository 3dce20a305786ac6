//! What a kustomization has gathered so far.

use std::rc::Rc;

use crate::config::TransformerConfig;
use crate::error::{Cause, Result};
use crate::kustomization::Var;
use crate::resmap::ResMap;
use crate::schema::Schemas;
use crate::vars;

/// Resources with the configuration that will find references among them, and the variables defined so far.
#[derive(Default)]
pub(crate) struct Accumulator {
    pub(crate) map: ResMap,
    /// `None`: nothing yet. Whatever is merged first decides which of two overlapping specifications stays.
    pub(crate) config: Option<Rc<TransformerConfig>>,
    pub(crate) vars: Vec<Var>,
}

impl Accumulator {
    pub(crate) fn config(&self) -> &TransformerConfig {
        self.config
            .as_deref()
            .unwrap_or_else(|| TransformerConfig::defaults())
    }

    pub(crate) fn merge_config(
        &mut self,
        other: Rc<TransformerConfig>,
        defaults: &Rc<TransformerConfig>,
    ) -> Result<()> {
        let merged = match &self.config {
            // The common case: no configuration but the defaults, anywhere.
            None if Rc::ptr_eq(&other, defaults) => other,
            Some(mine) if Rc::ptr_eq(mine, &other) => return Ok(()),
            mine => {
                let mut merged = mine.as_deref().cloned().unwrap_or_default();
                merged.merge((*other).clone()).map_err(Cause::Transformer)?;
                Rc::new(merged)
            }
        };
        self.config = Some(merged);
        Ok(())
    }

    pub(crate) fn merge(
        &mut self,
        other: Accumulator,
        schemas: &Schemas,
        defaults: &Rc<TransformerConfig>,
    ) -> Result<()> {
        self.map.append_all(other.map, schemas)?;
        if let Some(config) = other.config {
            self.merge_config(config, defaults)?;
        }
        vars::add_all(&mut self.vars, &other.vars)
    }
}
