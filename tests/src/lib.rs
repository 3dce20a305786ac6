//! serin-tests
