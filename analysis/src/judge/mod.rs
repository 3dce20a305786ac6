//! Judges: pure, restartable, O(1) per batch of observations.

pub mod comparison;
pub mod threshold;
