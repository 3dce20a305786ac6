//! serin-analysis
