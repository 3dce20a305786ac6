//! Outlier detection: hosts that fail several times in a row are left out for a while.
//!
//! Time is an argument. Counters are shared by all workers ([`HostState`]); an ejection ends by itself when its time is
//! over, and each further one lasts longer.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::config::cluster::Outlier;
use crate::config::endpoint::{Endpoint, HostState};

/// What a host did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Answered with this status.
    Status(u16),
    /// Could not be reached, or broke off before an answer.
    LocalFailure,
}

/// Whether a host is out at `now_ms`.
pub fn is_ejected(state: &HostState, now_ms: impl FnOnce() -> u64) -> bool {
    // The usual value is 0 and costs no look at the clock.
    match state.ejected_until.load(Ordering::Relaxed) {
        0 => false,
        until => now_ms() < until,
    }
}

/// Records an event; returns whether the host was ejected by it. `hosts` are all hosts of the cluster.
pub fn record(
    rules: &Outlier,
    state: &HostState,
    hosts: &[Arc<Endpoint>],
    event: Event,
    now_ms: impl Fn() -> u64,
) -> bool {
    let status = match event {
        Event::Status(status) => status,
        // In split mode local failures have a counter of their own; otherwise they count as 503.
        Event::LocalFailure if rules.split_local => {
            let count = state.consecutive_local.fetch_add(1, Ordering::Relaxed) + 1;
            return rules.consecutive_local.is_some_and(|limit| count >= limit)
                && eject(rules, state, hosts, now_ms());
        }
        Event::LocalFailure => 503,
    };
    if status < 500 {
        // Written only when there is something to reset, so that a healthy host's line is not bounced between cores.
        for counter in [
            &state.consecutive_5xx,
            &state.consecutive_gateway,
            &state.consecutive_local,
        ] {
            if counter.load(Ordering::Relaxed) != 0 {
                counter.store(0, Ordering::Relaxed);
            }
        }
        return false;
    }
    let server = state.consecutive_5xx.fetch_add(1, Ordering::Relaxed) + 1;
    let gateway = if (502..=504).contains(&status) {
        state.consecutive_gateway.fetch_add(1, Ordering::Relaxed) + 1
    } else {
        state.consecutive_gateway.store(0, Ordering::Relaxed);
        0
    };
    let over = rules.consecutive_5xx.is_some_and(|limit| server >= limit)
        || rules.consecutive_gateway.is_some_and(|limit| gateway >= limit);
    over && eject(rules, state, hosts, now_ms())
}

fn eject(rules: &Outlier, state: &HostState, hosts: &[Arc<Endpoint>], now: u64) -> bool {
    if is_ejected(state, || now) {
        return false;
    }
    let out = hosts
        .iter()
        .filter(|host| is_ejected(&host.state, || now))
        .count();
    // Envoy's rule: the share that is already out must be below the maximum.
    let share_allows = (out * 100) < rules.max_ejection_percent as usize * hosts.len();
    let allowed = share_allows
        && (out + 1) * 100 <= rules.max_ejection_percent.max(1) as usize * hosts.len().max(1)
        || (rules.always_one && out == 0);
    if !allowed {
        return false;
    }
    // A host that stayed in for as long as its last ejection lasted has earned a shorter one.
    let base = rules.base_ejection.as_millis() as u64;
    let last_end = state.ejected_until.load(Ordering::Relaxed);
    let mut times = state.ejections.load(Ordering::Relaxed);
    if last_end != 0 {
        let healthy = now.saturating_sub(last_end) / base.max(1);
        times = times.saturating_sub(healthy.min(u64::from(u32::MAX)) as u32);
    }
    times += 1;
    let length = base
        .saturating_mul(u64::from(times))
        .min(rules.max_ejection.as_millis() as u64);
    state.ejections.store(times, Ordering::Relaxed);
    state.ejected_until.store(now + length, Ordering::Relaxed);
    state.consecutive_5xx.store(0, Ordering::Relaxed);
    state.consecutive_gateway.store(0, Ordering::Relaxed);
    state.consecutive_local.store(0, Ordering::Relaxed);
    true
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::convert::Address;

    fn rules() -> Outlier {
        Outlier {
            consecutive_5xx: Some(5),
            consecutive_gateway: Some(3),
            consecutive_local: Some(2),
            split_local: false,
            base_ejection: Duration::from_secs(30),
            max_ejection: Duration::from_secs(100),
            max_ejection_percent: 50,
            always_one: false,
        }
    }

    fn hosts(count: u16) -> Vec<Arc<Endpoint>> {
        (0..count)
            .map(|port| {
                Arc::new(Endpoint {
                    address: Address::Tcp(([127, 0, 0, 1], port).into()),
                    text: "".into(),
                    hostname: "".into(),
                    weight: 1,
                    healthy: true,
                    degraded: false,
                    workload: None,
                    socket_metadata: None,
                    more_addresses: Box::default(),
                    state: Arc::default(),
                })
            })
            .collect()
    }

    fn fail(
        rules: &Outlier,
        hosts: &[Arc<Endpoint>],
        index: usize,
        status: u16,
        times: usize,
        now: u64,
    ) -> usize {
        (0..times)
            .filter(|_| record(rules, &hosts[index].state, hosts, Event::Status(status), || now))
            .count()
    }

    #[test]
    fn five_5xx_in_a_row_eject_and_a_success_between_starts_over() {
        let (rules, hosts) = (rules(), hosts(4));
        assert_eq!(fail(&rules, &hosts, 0, 500, 4, 1), 0);
        record(&rules, &hosts[0].state, &hosts, Event::Status(200), || 1);
        assert_eq!(fail(&rules, &hosts, 0, 500, 4, 1), 0);
        assert_eq!(fail(&rules, &hosts, 0, 500, 1, 1), 1);
        assert!(is_ejected(&hosts[0].state, || 30_000));
        assert!(!is_ejected(&hosts[0].state, || 30_001));
    }

    #[test]
    fn gateway_errors_have_a_threshold_of_their_own() {
        let (rules, hosts) = (rules(), hosts(4));
        assert_eq!(fail(&rules, &hosts, 0, 503, 2, 1), 0);
        assert_eq!(fail(&rules, &hosts, 0, 503, 1, 1), 1);
    }

    #[test]
    fn no_more_than_the_allowed_share_is_ejected() {
        let (rules, hosts) = (rules(), hosts(4));
        assert_eq!(fail(&rules, &hosts, 0, 503, 3, 1), 1);
        assert_eq!(fail(&rules, &hosts, 1, 503, 3, 1), 1);
        assert_eq!(fail(&rules, &hosts, 2, 503, 30, 1), 0);
        let one = self::hosts(1);
        assert_eq!(fail(&rules, &one, 0, 503, 30, 1), 0, "the only host stays");
    }

    #[test]
    fn each_ejection_in_a_row_lasts_longer_up_to_the_maximum() {
        let (rules, hosts) = (rules(), hosts(2));
        let mut now = 1;
        let mut lengths = Vec::new();
        for _ in 0..5 {
            assert_eq!(fail(&rules, &hosts, 0, 503, 3, now), 1);
            let until = hosts[0].state.ejected_until.load(Ordering::Relaxed);
            lengths.push((until - now) / 1000);
            now = until;
        }
        assert_eq!(lengths, [30, 60, 90, 100, 100]);
    }

    #[test]
    fn in_split_mode_local_failures_count_apart() {
        let mut rules = rules();
        rules.split_local = true;
        let hosts = hosts(4);
        assert!(!record(
            &rules,
            &hosts[0].state,
            &hosts,
            Event::LocalFailure,
            || 1
        ));
        assert!(record(&rules, &hosts[0].state, &hosts, Event::LocalFailure, || 1));
        assert_eq!(hosts[0].state.consecutive_5xx.load(Ordering::Relaxed), 0);
    }
}
