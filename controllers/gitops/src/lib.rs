//! serin-gitops
