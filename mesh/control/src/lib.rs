//! serin-control
