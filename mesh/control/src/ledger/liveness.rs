//! What the ledger says.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A refusal, for the person who wrote the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Node id of the proxy.
    pub proxy: Arc<str>,
    /// `type name` of the resource, for example `VHDS 80/reviews.default.svc.cluster.local:9080`.
    pub resource: Arc<str>,
    /// The proxy's words.
    pub reason: Arc<str>,
}

/// How live a generation of an object is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Liveness {
    /// `Kind/namespace/name`.
    pub object: Arc<str>,
    /// The generation that was asked for.
    pub generation: i64,
    /// The generation has been translated and handed to the proxies that need it. Until then the counts say nothing.
    pub observed: bool,
    /// Connected proxies that need the object.
    pub needed: usize,
    /// Of these, those that have been sent everything.
    pub sent: usize,
    /// Of these, those that run with this generation or a newer one.
    pub acked: usize,
    /// Of these, those that refused something made from the object.
    pub refused: usize,
    /// Some of the refusals.
    pub refusals: Vec<Refused>,
    /// The control plane's own refusal of this generation.
    pub rejected: Option<Arc<str>>,
    /// Node id of the proxy that keeps it from being live, or that was the last to acknowledge it.
    pub slowest: Option<Arc<str>>,
    /// Time from translation until the last proxy had acknowledged; for the newest generation only.
    pub live_after: Option<Duration>,
}

impl Liveness {
    /// Whether every proxy that needs the generation runs with it.
    pub fn is_live(&self) -> bool {
        self.observed && self.rejected.is_none() && self.acked >= self.needed
    }

    /// Whether somebody refused it: it will not become live without a change.
    pub fn is_refused(&self) -> bool {
        self.rejected.is_some() || self.refused > 0
    }
}

impl fmt::Display for Liveness {
    /// `38/40 proxies`, with what matters most behind it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reason) = &self.rejected {
            return write!(f, "not sent to any proxy: {reason}");
        }
        if !self.observed {
            return f.write_str("not translated yet");
        }
        if self.needed == 0 {
            return f.write_str("no connected proxy needs it");
        }
        write!(f, "{}/{} proxies", self.acked, self.needed)?;
        if let Some(first) = self.refusals.first() {
            write!(
                f,
                "; refused by {}, first by {}: {}: {}",
                self.refused, first.proxy, first.resource, first.reason
            )?;
        } else if !self.is_live()
            && let Some(slowest) = &self.slowest
        {
            write!(f, "; waiting for {slowest}")?;
        }
        Ok(())
    }
}

/// Where one proxy stands with one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProxyStand {
    /// It needs the object and has not been sent all of it.
    Needed,
    /// It has been sent all of it.
    Sent,
    /// It runs with it.
    Acked,
    /// It refused something.
    Refused(Refused),
}

/// How each proxy that needs an object stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectReport {
    /// The summary for the newest generation.
    pub liveness: Liveness,
    /// Node id, newest generation acked (0: none yet) and stand, by node id.
    pub proxies: Vec<(Arc<str>, i64, ProxyStand)>,
}

/// One connected proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyReport {
    /// Node id.
    pub proxy: Arc<str>,
    /// Resources with origins that it has yet to acknowledge.
    pub pending: usize,
    /// Resources with origins that it refused.
    pub refused: Vec<Refused>,
}
