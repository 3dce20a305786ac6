//! Who asks: bearer tokens on TLS, trusted callers in the process and on the Unix socket.

use std::collections::HashMap;
use std::sync::Arc;

use http::{HeaderMap, header};

use crate::error::{ApiError, ApiResult};

/// An authenticated caller. Every user may do everything; RBAC is not evaluated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// As in `kubectl auth whoami`.
    pub name: String,
    /// Group names, for admission and audit.
    pub groups: Vec<String>,
}

impl User {
    /// A user of `system:masters`.
    pub fn admin(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            groups: vec!["system:masters".to_owned(), "system:authenticated".to_owned()],
        }
    }

    pub(crate) fn is_anonymous(&self) -> bool {
        self.name == "system:anonymous"
    }
}

/// Tokens and the users they stand for.
#[derive(Debug, Clone, Default)]
pub struct Tokens(HashMap<String, User>);

impl Tokens {
    /// No token at all: nobody gets in.
    pub fn new() -> Self {
        Self::default()
    }

    /// One token of an administrator.
    pub fn admin(token: impl Into<String>) -> Self {
        let mut tokens = Self::default();
        tokens.insert(token, User::admin("admin"));
        tokens
    }

    /// Add a token.
    pub fn insert(&mut self, token: impl Into<String>, user: User) {
        self.0.insert(token.into(), user);
    }
}

/// How a front end knows its callers.
#[derive(Debug, Clone)]
pub(crate) enum Trust {
    /// Whoever can reach this front end is this user.
    Caller(Arc<User>),
    Tokens(Arc<Tokens>),
}

impl Trust {
    pub(crate) fn identify(&self, headers: &HeaderMap) -> ApiResult<User> {
        let tokens = match self {
            Trust::Caller(user) => return Ok((**user).clone()),
            Trust::Tokens(tokens) => tokens,
        };
        let text = headers
            .get(header::AUTHORIZATION)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        let Some(token) = text.strip_prefix("Bearer ") else {
            return Ok(User {
                name: "system:anonymous".to_owned(),
                groups: vec!["system:unauthenticated".to_owned()],
            });
        };
        match tokens.0.get(token.trim()) {
            Some(user) => Ok(user.clone()),
            None => Err(ApiError::new(401, "Unauthorized", "Unauthorized")),
        }
    }
}
