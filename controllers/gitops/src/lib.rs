//! serin-gitops
mod apply;
mod build;
mod error;
mod health;
mod key;
mod plan;
mod queue;
mod source;
mod status;
mod sys;
pub use error::Error;
