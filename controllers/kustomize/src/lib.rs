//! serin-kustomize
