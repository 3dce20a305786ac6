//! Server-side apply: who owns which field, and merging what appliers want (after Kubernetes' structured merge and diff).
//!
//! [`fieldset`] is a set of field paths (`fieldsV1`), [`typed`] relates sets to typed values, [`managers`] is `metadata.managedFields`.

pub(crate) mod fieldset;
pub(crate) mod managers;
pub(crate) mod typed;

#[cfg(test)]
mod properties;
