//! Custom resources: structural schemas ([`rules`]), checking ([`validate`]), pruning and defaulting ([`prune`]),
//! and turning a CustomResourceDefinition into a served kind with its conditions ([`definition`]).

pub(crate) mod cel;
mod cel_check;
mod cel_kubernetes;
pub(crate) mod definition;
pub(crate) mod prune;
pub(crate) mod rules;
mod structural;
pub(crate) mod validate;
