//! placeholder
pub mod bootstrap;
mod clock;
pub mod config;
pub mod control;
pub mod error;
pub mod hygiene;
pub mod intercept;
pub mod metrics;
mod random;
mod sys;
pub mod upstream;
pub mod worker;
