//! serin-model
