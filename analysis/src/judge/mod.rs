//! The judges: pure, each with a state of a few hundred bytes that may be stored and continued at any time.

pub mod distribution;
pub mod errors;
pub mod flagger;
pub mod group_sequential;
pub mod guard;
pub mod hysteresis;
pub mod mann_whitney;
pub mod quantile;
pub mod ratio;
pub mod running;
pub mod split;
pub mod threshold;
pub mod values;
pub mod warmth;
pub mod watch;
