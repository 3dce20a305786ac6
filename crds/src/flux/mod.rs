//! Flux: sources, kustomizations, notifications.

pub mod kustomize;
pub mod notification;
pub mod source;
