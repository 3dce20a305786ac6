//! Outlier detection: hosts that fail several times in a row, or more often than their siblings, are left out for a
//! while.
//!
//! Time is an argument. Counters are shared by all workers ([`HostState`]). When the time of an ejection is over the
//! host is on probation: one request at a time is let through ([`admit`]), and the first good answer brings it back,
//! while the next failure ends the trial at once and makes the next ejection longer. (Envoy puts all of the load back
//! and waits for a whole row of failures again.)

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::config::cluster::Outlier;
use crate::config::endpoint::{Endpoint, HostState};
use crate::metrics::events::{ClusterEvent, Events};

/// What a host did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Answered with this status.
    Status(u16),
    /// Could not be reached, or broke off before an answer.
    LocalFailure,
}

/// How long one request on probation may take before the next one is tried, in milliseconds.
const PROBE_MS: u64 = 1000;

/// Whether a host that was chosen may be used: always, unless it is on probation and another request tries it already.
/// Where it returns true for a host on probation, `ejected_until` has moved on.
pub fn admit(state: &HostState, now_ms: impl FnOnce() -> u64) -> bool {
    let until = state.ejected_until.load(Ordering::Relaxed);
    if until == 0 {
        return true;
    }
    let now = now_ms();
    let admitted = now >= until
        && state
            .ejected_until
            .compare_exchange(until, now + PROBE_MS, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok();
    if admitted {
        state.probing.store(true, Ordering::Relaxed);
    }
    admitted
}

/// Whether the host's next result decides about it. Results of requests that were on their way when it was ejected do
/// not.
fn on_probation(state: &HostState, now_ms: impl FnOnce() -> u64) -> bool {
    match state.ejected_until.load(Ordering::Relaxed) {
        0 => false,
        until => state.probing.load(Ordering::Relaxed) || now_ms() >= until,
    }
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
    counted: &Events<ClusterEvent>,
) -> bool {
    if rules.compares() {
        match event {
            Event::Status(status) => {
                state.answers.add(status < 500);
                state.local.add(true);
            }
            Event::LocalFailure if rules.split_local => state.local.add(false),
            Event::LocalFailure => state.answers.add(false),
        }
    }
    let on_probation = on_probation(state, &now_ms);
    let status = match event {
        Event::Status(status) => status,
        Event::LocalFailure if on_probation => 503,
        // In split mode local failures have a counter of their own; otherwise they count as 503.
        Event::LocalFailure if rules.split_local => {
            let count = state.consecutive_local.fetch_add(1, Ordering::Relaxed) + 1;
            if rules.consecutive_local.is_none_or(|limit| count < limit) {
                return false;
            }
            counted.note(ClusterEvent::OutlierDetectedLocal);
            return enforce(
                rules,
                state,
                hosts,
                now_ms(),
                counted,
                ClusterEvent::OutlierEnforcedLocal,
            );
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
        if on_probation {
            state.uneject();
        }
        return false;
    }
    if on_probation {
        return enforce(
            rules,
            state,
            hosts,
            now_ms(),
            counted,
            ClusterEvent::OutlierEnforcedServer,
        );
    }
    let server = state.consecutive_5xx.fetch_add(1, Ordering::Relaxed) + 1;
    let gateway = if (502..=504).contains(&status) {
        state.consecutive_gateway.fetch_add(1, Ordering::Relaxed) + 1
    } else {
        state.consecutive_gateway.store(0, Ordering::Relaxed);
        0
    };
    let by_gateway = rules.consecutive_gateway.is_some_and(|limit| gateway >= limit);
    let by_server = rules.consecutive_5xx.is_some_and(|limit| server >= limit);
    if by_gateway {
        counted.note(ClusterEvent::OutlierDetectedGateway);
    }
    if by_server {
        counted.note(ClusterEvent::OutlierDetectedServer);
    }
    // Looked at first, as in Envoy.
    let event = if by_gateway {
        ClusterEvent::OutlierEnforcedGateway
    } else {
        ClusterEvent::OutlierEnforcedServer
    };
    (by_gateway || by_server) && enforce(rules, state, hosts, now_ms(), counted, event)
}

/// Ejects a host if it may be, and counts what has come of it.
fn enforce(
    rules: &Outlier,
    state: &HostState,
    hosts: &[Arc<Endpoint>],
    now: u64,
    counted: &Events<ClusterEvent>,
    event: ClusterEvent,
) -> bool {
    if is_ejected(state, || now) && !on_probation(state, || now) {
        return false;
    }
    let ejected = eject(rules, state, hosts, now);
    if ejected {
        counted.note(ClusterEvent::OutlierEnforced);
        counted.note(event);
    } else {
        counted.note(ClusterEvent::OutlierOverflow);
    }
    ejected
}

/// Ejects hosts that stand out among their siblings by the last interval's answers, and begins a new interval.
pub fn compare<'h>(
    rules: &Outlier,
    hosts: &'h [Arc<Endpoint>],
    now: u64,
    counted: &Events<ClusterEvent>,
) -> Vec<&'h Arc<Endpoint>> {
    let answers: Vec<_> = hosts.iter().map(|host| host.state.answers.take()).collect();
    let local: Vec<_> = hosts.iter().map(|host| host.state.local.take()).collect();
    let mut out: Vec<(usize, ClusterEvent)> = Vec::new();
    for (counts, which) in [(&answers, 0), (&local, 1)] {
        let enforced = |pair: (bool, bool)| if which == 0 { pair.0 } else { pair.1 };
        // Of each host with enough requests: its index and its success rate in percent.
        let rates = |volume: u32| -> Vec<(usize, f64)> {
            counts
                .iter()
                .enumerate()
                .filter(|(_, (all, _))| *all > 0 && *all >= volume)
                .map(|(index, (all, good))| (index, f64::from(*good) * 100.0 / f64::from(*all)))
                .collect()
        };
        if let Some(rule) = rules.success_rate.filter(|rule| enforced(rule.enforced)) {
            let rates = rates(rule.request_volume);
            if rates.len() >= rule.minimum_hosts as usize && !rates.is_empty() {
                let count = rates.len() as f64;
                let mean = rates.iter().map(|(_, rate)| rate).sum::<f64>() / count;
                let variance = rates.iter().map(|(_, rate)| (rate - mean).powi(2)).sum::<f64>() / count;
                let floor = mean - variance.sqrt() * f64::from(rule.stdev_factor) / 1000.0;
                let [detected, enforced] = if which == 0 {
                    [
                        ClusterEvent::OutlierDetectedRate,
                        ClusterEvent::OutlierEnforcedRate,
                    ]
                } else {
                    [
                        ClusterEvent::OutlierDetectedLocalRate,
                        ClusterEvent::OutlierEnforcedLocalRate,
                    ]
                };
                for (index, _) in rates.iter().filter(|(_, rate)| *rate < floor) {
                    counted.note(detected);
                    out.push((*index, enforced));
                }
            }
        }
        if let Some(rule) = rules.failure_percentage.filter(|rule| enforced(rule.enforced)) {
            let rates = rates(rule.request_volume);
            if rates.len() >= rule.minimum_hosts as usize {
                let ceiling = f64::from(rule.threshold);
                let [detected, enforced] = if which == 0 {
                    [
                        ClusterEvent::OutlierDetectedPercentage,
                        ClusterEvent::OutlierEnforcedPercentage,
                    ]
                } else {
                    [
                        ClusterEvent::OutlierDetectedLocalPercentage,
                        ClusterEvent::OutlierEnforcedLocalPercentage,
                    ]
                };
                for (index, _) in rates.iter().filter(|(_, rate)| 100.0 - rate >= ceiling) {
                    counted.note(detected);
                    out.push((*index, enforced));
                }
            }
        }
    }
    out.sort_by_key(|(index, _)| *index);
    out.dedup_by_key(|(index, _)| *index);
    out.into_iter()
        .map(|(index, event)| (&hosts[index], event))
        .filter(|(host, _)| host.state.ejected_until.load(Ordering::Relaxed) == 0)
        .filter(|(host, event)| enforce(rules, &host.state, hosts, now, counted, *event))
        .map(|(host, _)| host)
        .collect()
}

fn eject(rules: &Outlier, state: &HostState, hosts: &[Arc<Endpoint>], now: u64) -> bool {
    let on_probation = on_probation(state, || now);
    if !on_probation && is_ejected(state, || now) {
        return false;
    }
    let out = hosts
        .iter()
        .filter(|host| !std::ptr::eq(Arc::as_ptr(&host.state), state) && is_ejected(&host.state, || now))
        .count();
    // Envoy's rule: the share that is already out must be below the maximum.
    let share_allows = (out * 100) < rules.max_ejection_percent as usize * hosts.len();
    let allowed = share_allows
        && (out + 1) * 100 <= rules.max_ejection_percent.max(1) as usize * hosts.len().max(1)
        || (rules.always_one && out == 0);
    if !allowed {
        if on_probation {
            state.uneject();
        }
        return false;
    }
    // A host that stayed in for as long as its last ejection lasted has earned a shorter one.
    let base = rules.base_ejection.as_millis() as u64;
    let last_end = state.ejection_ended.load(Ordering::Relaxed);
    let mut times = state.ejections.load(Ordering::Relaxed);
    if last_end != 0 && !on_probation {
        let healthy = now.saturating_sub(last_end) / base.max(1);
        times = times.saturating_sub(healthy.min(u64::from(u32::MAX)) as u32);
    }
    times += 1;
    let length = base
        .saturating_mul(u64::from(times))
        .min(rules.max_ejection.as_millis() as u64);
    state.ejections.store(times, Ordering::Relaxed);
    state.probing.store(false, Ordering::Relaxed);
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

    fn record(
        rules: &Outlier,
        state: &HostState,
        hosts: &[Arc<Endpoint>],
        event: Event,
        now_ms: impl Fn() -> u64,
    ) -> bool {
        super::record(rules, state, hosts, event, now_ms, &Events::default())
    }

    fn compare<'h>(rules: &Outlier, hosts: &'h [Arc<Endpoint>], now: u64) -> Vec<&'h Arc<Endpoint>> {
        super::compare(rules, hosts, now, &Events::default())
    }

    #[test]
    fn what_is_detected_and_what_is_enforced_is_counted_and_what_too_many_prevent_as_well() {
        let (rules, hosts, counted) = (rules(), hosts(2), Events::default());
        for host in 0..2 {
            for _ in 0..3 {
                super::record(
                    &rules,
                    &hosts[host].state,
                    &hosts,
                    Event::Status(503),
                    || 1,
                    &counted,
                );
            }
        }
        for (event, times) in [
            (ClusterEvent::OutlierDetectedGateway, 2),
            (ClusterEvent::OutlierEnforcedGateway, 1),
            (ClusterEvent::OutlierEnforced, 1),
            (ClusterEvent::OutlierOverflow, 1),
            (ClusterEvent::OutlierDetectedServer, 0),
        ] {
            assert_eq!(counted.get(event), times, "{event:?}");
        }
    }

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
            interval: Duration::from_secs(10),
            success_rate: None,
            failure_percentage: None,
            uneject_on_check: true,
        }
    }

    fn hosts(count: u16) -> Vec<Arc<Endpoint>> {
        (0..count)
            .map(|port| Arc::new(Endpoint::at(Address::Tcp(([127, 0, 0, 1], port).into()))))
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

    #[test]
    fn after_its_time_a_host_is_tried_by_one_request_at_a_time_and_a_success_brings_it_back() {
        let (rules, hosts) = (rules(), hosts(4));
        let state = &hosts[0].state;
        fail(&rules, &hosts, 0, 503, 3, 1);
        let until = state.ejected_until.load(Ordering::Relaxed);
        assert!(!admit(state, || until - 1), "its time is not over");
        assert!(admit(state, || until));
        assert!(!admit(state, || until), "another request tries it already");
        assert!(admit(state, || until + PROBE_MS), "the first one hangs");
        assert!(!record(&rules, state, &hosts, Event::Status(200), || until + PROBE_MS));
        assert!(admit(state, || until + PROBE_MS) && admit(state, || until + PROBE_MS));
    }

    #[test]
    fn the_first_failure_on_probation_ejects_again_and_for_longer() {
        let (rules, hosts) = (rules(), hosts(4));
        let state = &hosts[0].state;
        fail(&rules, &hosts, 0, 503, 3, 1);
        let until = state.ejected_until.load(Ordering::Relaxed);
        assert!(admit(state, || until));
        assert_eq!(fail(&rules, &hosts, 0, 500, 1, until), 1);
        assert_eq!(state.ejected_until.load(Ordering::Relaxed), until + 60_000);
    }

    fn with_answers(hosts: &[Arc<Endpoint>], good_of: &[(u32, u32)]) {
        for (host, (good, all)) in hosts.iter().zip(good_of) {
            host.state.answers.good.store(*good, Ordering::Relaxed);
            host.state.answers.all.store(*all, Ordering::Relaxed);
        }
    }

    fn out(rules: &Outlier, hosts: &[Arc<Endpoint>]) -> Vec<u16> {
        let port = |host: &Arc<Endpoint>| match host.address {
            Address::Tcp(at) => at.port(),
            _ => 0,
        };
        compare(rules, hosts, 1).into_iter().map(port).collect()
    }

    #[test]
    fn a_success_rate_far_below_the_siblings_ejects_once_enough_hosts_have_enough_requests() {
        let mut rules = rules();
        rules.success_rate = Some(crate::config::cluster::SuccessRate {
            minimum_hosts: 5,
            request_volume: 100,
            stdev_factor: 1900,
            enforced: (true, false),
        });
        let six = hosts(6);
        with_answers(
            &six,
            &[
                (100, 100),
                (99, 100),
                (100, 100),
                (98, 100),
                (100, 100),
                (60, 100),
            ],
        );
        assert_eq!(out(&rules, &six), [5]);
        assert_eq!(out(&rules, &six), [0; 0], "an interval counts once");
        let few = hosts(6);
        with_answers(
            &few,
            &[(100, 100), (100, 100), (100, 100), (99, 99), (99, 99), (60, 100)],
        );
        assert_eq!(out(&rules, &few), [0; 0], "only four hosts have 100 requests");
    }

    #[test]
    fn a_failure_percentage_at_the_threshold_ejects() {
        let mut rules = rules();
        rules.failure_percentage = Some(crate::config::cluster::FailurePercentage {
            threshold: 85,
            minimum_hosts: 2,
            request_volume: 50,
            enforced: (true, false),
        });
        let hosts = hosts(4);
        with_answers(&hosts, &[(50, 50), (9, 60), (8, 50), (0, 49)]);
        assert_eq!(
            out(&rules, &hosts),
            [1],
            "85.0 % of 60; 84 % of 50 is below, 49 requests are too few"
        );
    }

    #[test]
    fn answers_are_counted_only_where_hosts_are_compared() {
        let (mut rules, hosts) = (rules(), hosts(2));
        record(&rules, &hosts[0].state, &hosts, Event::Status(200), || 1);
        assert_eq!(hosts[0].state.answers.take(), (0, 0));
        rules.failure_percentage = Some(crate::config::cluster::FailurePercentage {
            threshold: 85,
            minimum_hosts: 5,
            request_volume: 50,
            enforced: (true, false),
        });
        record(&rules, &hosts[0].state, &hosts, Event::Status(200), || 1);
        record(&rules, &hosts[0].state, &hosts, Event::Status(500), || 1);
        record(&rules, &hosts[0].state, &hosts, Event::LocalFailure, || 1);
        assert_eq!(hosts[0].state.answers.take(), (3, 1));
    }
}
