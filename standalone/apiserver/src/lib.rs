//! serin-apiserver
