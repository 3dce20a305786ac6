//! The server seen from outside: through kube-rs, through kubectl, and against recorded transcripts of a real kube-apiserver.

mod client;
mod definitions;
mod durable;
mod history;
mod kubectl;
mod kubectl_recorded;
mod likeness;
mod recording;
mod transcripts;
mod type_table;
