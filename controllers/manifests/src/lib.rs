//! serin-manifests
