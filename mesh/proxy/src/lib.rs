//! placeholder
pub mod bootstrap;
pub mod config;
pub mod control;
pub mod error;
pub mod metrics;
mod clock;
mod hygiene;
mod random;
mod sys;
pub mod upstream;
pub mod worker;
