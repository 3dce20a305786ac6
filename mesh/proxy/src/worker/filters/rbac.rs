//! Role-based access control.

use http::StatusCode;
use http::request::Parts;

use super::facts::facts;
use super::{Passed, Verdict, state};
use crate::metrics::flags::Flags;
use crate::policy::per_route::Override;
use crate::policy::rbac::{NAMESPACE, Rules};
use crate::worker::exchange::Exchange;
use crate::worker::local::LocalReply;

/// Refuses what the route's rules, or else the chain's, do not allow.
pub(super) fn authorize(
    exchange: &mut Exchange,
    chain: Option<&Rules>,
    own: Option<&Override>,
    parts: &Parts,
) -> Verdict {
    let rules = match own {
        Some(Override::Rbac(own)) => own.as_deref(),
        _ => chain,
    };
    let Some(rules) = rules else {
        return Ok(Passed::On);
    };
    let conn = &exchange.conn;
    let (denied, notes) = rules.judge(&facts(exchange, parts), conn.worker.id);
    if !notes.is_empty() {
        notes.write(NAMESPACE, &mut state(exchange).metadata);
    }
    match denied {
        None => Ok(Passed::On),
        Some(details) => Err(LocalReply::new(
            StatusCode::FORBIDDEN,
            Flags::default(),
            details,
            "RBAC: access denied",
        )),
    }
}
