//! placeholder
pub mod bootstrap;
mod clock;
pub mod config;
pub mod control;
pub mod error;
mod hygiene;
pub mod metrics;
mod random;
mod sys;
pub mod upstream;
pub mod worker;
