//! What the process is told at its start: a bootstrap file in Envoy's shape ([`mod@file`]), or the environment of a pod as
//! Istio's agent reads it ([`agent`]); and listening sockets that the parent hands over ([`inherited`]).

#![allow(deprecated)] // files still hold fields that Envoy calls deprecated

pub mod agent;
mod fields;
pub mod file;
pub mod inherited;
mod messages;
mod routes;
