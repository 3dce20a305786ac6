//! serin-kit
