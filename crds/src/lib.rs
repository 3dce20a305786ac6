//! serin-crds
