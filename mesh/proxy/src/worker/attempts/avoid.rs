//! Which hosts and priorities a retry avoids.

use std::rc::Rc;

use crate::config::retry::RetryPolicy;
use crate::upstream::balance::Wish;
use crate::upstream::cluster::Host;
use crate::worker::upstream::Plan;

/// What a retry avoids.
#[derive(Default)]
pub(in crate::worker) struct Avoid {
    tried: Vec<Rc<Host>>,
    priorities: u128,
    /// Of tries since priorities were last avoided.
    fresh: u128,
    tries: u32,
}

impl Avoid {
    /// What the next try asks of the balancer.
    pub(in crate::worker) fn wish<'a>(
        &'a self,
        plan: &Plan<'a>,
        policy: Option<&'a RetryPolicy>,
        was_unsent: bool,
    ) -> Wish<'a> {
        let avoids = policy.is_some_and(|policy| policy.previous_hosts) || was_unsent;
        Wish {
            hash: plan.hash,
            criteria: plan.criteria,
            tried: if avoids { &self.tried } else { &[] },
            attempts: policy.map_or(1, |policy| policy.host_selection_attempts),
            tried_priorities: self.priorities,
            // Not for the first try.
            rules: policy
                .filter(|_| self.tries > 0)
                .and_then(|policy| policy.hosts.as_ref()),
            ..Wish::default()
        }
    }

    /// Takes note of a try.
    pub(in crate::worker) fn add(&mut self, host: Rc<Host>, policy: Option<&RetryPolicy>) {
        self.tries += 1;
        if let Some(every) = policy.and_then(|policy| policy.priorities_every) {
            self.fresh |= 1u128.checked_shl(host.priority).unwrap_or(0);
            if self.tries.is_multiple_of(every) {
                self.priorities |= std::mem::take(&mut self.fresh);
            }
        }
        self.tried.push(host);
    }
}
