//! serin-canary
