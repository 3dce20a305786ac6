use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::config::cluster::{LbPolicy, SlowStart};
use crate::config::convert::Address;
use crate::config::endpoint::Endpoint;
use crate::config::slot::ClusterSlot;

fn cluster(lb: i32) -> Cluster {
    let message = serin_xds::pb::envoy::config::cluster::v3::Cluster {
        name: "c".into(),
        lb_policy: lb,
        ..Default::default()
    };
    Cluster::compile(&message, &mut Default::default(), None).unwrap()
}

struct Fixture {
    cluster: Cluster,
    set: EndpointSet,
    hosts: Vec<Rc<Host>>,
    balancer: Balancer,
}

/// Hosts as (priority, weight, healthy).
fn fixture(lb: i32, hosts: &[(usize, u32, bool)]) -> Fixture {
    let cluster = cluster(lb);
    let mut all = Vec::new();
    let mut priorities = Vec::new();
    for priority in 0..=hosts.iter().map(|host| host.0).max().unwrap_or(0) {
        let start = all.len();
        for (index, (_, weight, healthy)) in hosts.iter().enumerate().filter(|(_, host)| host.0 == priority) {
            all.push(Arc::new(Endpoint {
                text: index.to_string().into(),
                weight: *weight,
                healthy: *healthy,
                ..Endpoint::at(Address::Tcp(([10, 0, 0, 1], index as u16).into()))
            }));
        }
        let locality = crate::config::endpoint::Locality {
            weight: 1,
            zone: Box::default(),
            members: start..all.len(),
        };
        priorities.push(vec![locality].into());
    }
    let set = EndpointSet {
        all: all.into(),
        priorities: priorities.into(),
        overprovisioning: 140,
        drop: None,
    };
    let hosts: Vec<_> = set
        .all
        .iter()
        .map(|endpoint| Rc::new(Host::new(endpoint.clone())))
        .collect();
    let balancer = Balancer::new(&cluster, &set, &hosts);
    Fixture {
        cluster,
        set,
        hosts,
        balancer,
    }
}

impl Fixture {
    fn counts(&self, draws: usize, wish: &Wish<'_>) -> Vec<usize> {
        let mut counts = vec![0; self.set.all.len()];
        for _ in 0..draws {
            if let Some(host) = self.balancer.pick(&self.cluster, wish) {
                counts[host.endpoint.text.parse::<usize>().unwrap()] += 1;
            }
        }
        counts
    }
}

const ROUND_ROBIN: i32 = 0;
const LEAST_REQUEST: i32 = 1;
const RANDOM: i32 = 3;

#[test]
fn round_robin_gives_each_host_exactly_its_weight() {
    let fixture = fixture(ROUND_ROBIN, &[(0, 1, true), (0, 3, true), (0, 2, true)]);
    assert_eq!(fixture.counts(600, &Wish::default()), [100, 300, 200]);
}

#[test]
fn random_follows_the_weights_roughly() {
    let fixture = fixture(RANDOM, &[(0, 1, true), (0, 3, true)]);
    let counts = fixture.counts(4000, &Wish::default());
    assert!((800..1200).contains(&counts[0]), "{counts:?}");
}

#[test]
fn least_request_avoids_the_busy_host() {
    let fixture = fixture(LEAST_REQUEST, &[(0, 1, true), (0, 1, true)]);
    fixture.hosts[0].active.set(10);
    let counts = fixture.counts(1000, &Wish::default());
    // The busy host is chosen only when both draws hit it.
    assert!((150..350).contains(&counts[0]), "{counts:?}");
}

#[test]
fn ejected_hosts_are_left_out_until_panic() {
    let fixture = fixture(LEAST_REQUEST, &[(0, 1, true), (0, 1, true), (0, 1, true)]);
    let wish = Wish {
        some_ejected: true,
        ..Default::default()
    };
    let out = u64::MAX;
    fixture.hosts[0]
        .endpoint
        .state
        .ejected_until
        .store(out, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(fixture.counts(300, &wish)[0], 0);
    // One of three left is below the threshold of 50 %: everybody is used again.
    fixture.hosts[1]
        .endpoint
        .state
        .ejected_until
        .store(out, std::sync::atomic::Ordering::Relaxed);
    let counts = fixture.counts(300, &wish);
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}

#[test]
fn unhealthy_hosts_get_nothing_and_when_all_are_the_request_fails_without_panic() {
    let mut some = fixture(ROUND_ROBIN, &[(0, 1, true), (0, 1, false), (0, 1, true)]);
    some.cluster.panic_threshold = 0.0;
    assert_eq!(some.counts(100, &Wish::default())[1], 0);
    let mut none = fixture(ROUND_ROBIN, &[(0, 1, false)]);
    none.cluster.panic_threshold = 0.0;
    assert!(none.balancer.pick(&none.cluster, &Wish::default()).is_none());
}

#[test]
fn a_lower_priority_takes_over_what_the_higher_cannot_carry() {
    let healthy = fixture(ROUND_ROBIN, &[(0, 1, true), (0, 1, true), (1, 1, true)]);
    assert_eq!(healthy.counts(200, &Wish::default())[2], 0);
    // Half of the first level is usable: it carries 70 %, the second 30 %.
    let half = fixture(ROUND_ROBIN, &[(0, 1, true), (0, 1, false), (1, 1, true)]);
    let counts = half.counts(2000, &Wish::default());
    assert_eq!(counts[1], 0);
    assert!((450..750).contains(&counts[2]), "{counts:?}");
}

#[test]
fn a_retry_goes_to_a_host_that_was_not_tried() {
    let fixture = fixture(LEAST_REQUEST, &[(0, 1, true), (0, 1, true)]);
    let tried = [fixture.hosts[0].clone()];
    let wish = Wish {
        tried: &tried,
        attempts: 3,
        ..Default::default()
    };
    assert_eq!(fixture.counts(200, &wish), [0, 200]);
    let all = [fixture.hosts[0].clone(), fixture.hosts[1].clone()];
    let wish = Wish {
        tried: &all,
        attempts: 3,
        ..Default::default()
    };
    assert_eq!(
        fixture.counts(50, &wish).iter().sum::<usize>(),
        50,
        "when all were tried any will do"
    );
}

#[test]
fn the_same_hash_finds_the_same_host() {
    for lb in [2, 5] {
        let fixture = fixture(lb, &[(0, 1, true), (0, 1, true), (0, 1, true)]);
        let wish = Wish {
            hash: Some(42),
            ..Default::default()
        };
        let counts = fixture.counts(100, &wish);
        assert_eq!(counts.iter().filter(|count| **count > 0).count(), 1, "{counts:?}");
    }
}

#[test]
fn an_endpoint_update_keeps_the_connections_of_hosts_that_stay() {
    use crate::upstream::cluster::WorkerCluster;
    let fixture = fixture(ROUND_ROBIN, &[(0, 1, true), (0, 1, true)]);
    let slot = Arc::new(ClusterSlot::new(0, "c".into(), Arc::default()));
    slot.set_config(Some(Arc::new(fixture.cluster)));
    slot.set_endpoints(Some(Arc::new(fixture.set)));
    let first = WorkerCluster::new(&slot, None, None).unwrap();
    let before: Vec<_> = (0..2)
        .map(|_| first.pick(&Wish::default(), None).unwrap().pool.clone())
        .collect();
    slot.set_endpoints(first.slot.endpoints());
    let second = WorkerCluster::new(&slot, Some(&first), None).unwrap();
    assert_ne!(first.version, second.version);
    for _ in 0..2 {
        let pool = second.pick(&Wish::default(), None).unwrap().pool.clone();
        assert!(before.iter().any(|old| Rc::ptr_eq(old, &pool)));
    }
}

#[test]
fn a_new_host_gets_a_tenth_of_its_share_at_first_under_every_policy_with_slow_start() {
    for lb in [ROUND_ROBIN, LEAST_REQUEST] {
        let mut fixture = fixture(lb, &[(0, 1, true), (0, 1, true)]);
        fixture.cluster.slow_start = Some(SlowStart {
            window: Duration::from_secs(100_000),
            aggression: 1.0,
            least: 0.1,
        });
        fixture.hosts[0].endpoint.state.since.store(0, Ordering::Relaxed);
        fixture.balancer = Balancer::new(&fixture.cluster, &fixture.set, &fixture.hosts);
        let counts = fixture.counts(22_000, &Wish::default());
        assert!((1_500..2_600).contains(&counts[1]), "{lb}: {counts:?}");
    }
}

#[test]
fn the_slow_start_curve_rises_with_age_to_one_and_aggression_bends_it() {
    let slow = |aggression| SlowStart {
        window: Duration::from_secs(100),
        aggression,
        least: 0.1,
    };
    let at = |aggression, seconds| slow(aggression).factor(Duration::from_secs(seconds));
    assert_eq!(
        (at(1.0, 0), at(1.0, 50), at(1.0, 100), at(1.0, 900)),
        (0.1, 0.5, 1.0, 1.0)
    );
    assert!((at(2.0, 25) - 0.5).abs() < 1e-12);
}

#[test]
fn a_host_that_has_not_passed_its_active_checks_gets_nothing() {
    let mut fixture = fixture(ROUND_ROBIN, &[(0, 1, true), (0, 1, true), (0, 1, true)]);
    let message = serin_xds::pb::envoy::config::cluster::v3::Cluster {
        name: "c".into(),
        health_checks: vec![serin_xds::pb::envoy::config::core::v3::HealthCheck {
            timeout: Some(serin_xds::pb::google::protobuf::Duration { seconds: 1, nanos: 0 }),
            interval: Some(serin_xds::pb::google::protobuf::Duration { seconds: 1, nanos: 0 }),
            unhealthy_threshold: Some(serin_xds::pb::google::protobuf::UInt32Value { value: 1 }),
            healthy_threshold: Some(serin_xds::pb::google::protobuf::UInt32Value { value: 1 }),
            health_checker: Some(
                serin_xds::pb::envoy::config::core::v3::health_check::HealthChecker::TcpHealthCheck(
                    Default::default(),
                ),
            ),
            ..Default::default()
        }],
        ..Default::default()
    };
    fixture.cluster = Cluster::compile(&message, &mut Default::default(), None).unwrap();
    for passed in [0, 2] {
        fixture.hosts[passed]
            .endpoint
            .state
            .failed_checks
            .store(!1, Ordering::Relaxed);
    }
    fixture.balancer = Balancer::new(&fixture.cluster, &fixture.set, &fixture.hosts);
    assert_eq!(fixture.counts(300, &Wish::default()), [150, 0, 150]);
}

#[test]
fn a_level_that_others_can_stand_in_for_does_not_panic() {
    // One of four usable: 35 % stays, the second level takes the rest, and the three others get nothing.
    let fixture = fixture(
        ROUND_ROBIN,
        &[
            (0, 1, true),
            (0, 1, false),
            (0, 1, false),
            (0, 1, false),
            (1, 1, true),
        ],
    );
    let counts = fixture.counts(2000, &Wish::default());
    assert_eq!(counts[1..4], [0, 0, 0]);
    assert!((550..850).contains(&counts[0]), "{counts:?}");
    // Both levels are down to a quarter: now everybody is used.
    let down: Vec<_> = (0..8).map(|host| (host / 4, 1, host % 4 == 0)).collect();
    let fixture = super::tests::fixture(ROUND_ROBIN, &down);
    assert!(
        fixture
            .counts(2000, &Wish::default())
            .iter()
            .all(|count| *count > 0)
    );
}

#[test]
fn degraded_hosts_wait_until_the_healthy_cannot_carry_the_load() {
    let with = |healthy: &[bool]| {
        let hosts: Vec<_> = healthy.iter().map(|healthy| (0, 1, *healthy)).collect();
        let mut fixture = fixture(ROUND_ROBIN, &hosts);
        let mut all: Vec<Arc<Endpoint>> = Vec::new();
        for (index, endpoint) in fixture.set.all.iter().enumerate() {
            all.push(Arc::new(Endpoint {
                text: endpoint.text.clone(),
                degraded: index == 0,
                healthy: endpoint.healthy,
                ..Endpoint::at(endpoint.address.clone())
            }));
        }
        fixture.set.all = all.into();
        fixture.hosts = fixture
            .set
            .all
            .iter()
            .map(|endpoint| Rc::new(Host::new(endpoint.clone())))
            .collect();
        fixture.balancer = Balancer::new(&fixture.cluster, &fixture.set, &fixture.hosts);
        fixture.counts(1000, &Wish::default())
    };
    assert_eq!(with(&[true, true, true, true])[0], 0);
    // Half is healthy (70 %), a quarter degraded (30 %).
    let counts = with(&[true, true, true, false]);
    assert!((220..380).contains(&counts[0]), "{counts:?}");
}

#[test]
fn a_retry_leaves_the_priorities_that_were_tried() {
    let fixture = fixture(ROUND_ROBIN, &[(0, 1, true), (1, 1, true), (2, 1, true)]);
    let counts = |tried_priorities| {
        fixture.counts(
            50,
            &Wish {
                tried_priorities,
                ..Default::default()
            },
        )
    };
    assert_eq!(counts(0b001), [0, 50, 0]);
    assert_eq!(counts(0b011), [0, 0, 50]);
    assert_eq!(counts(0b111), [50, 0, 0], "when all were tried it starts over");
}

#[test]
fn peak_ewma_prefers_the_faster_host_until_it_is_busy() {
    use crate::upstream::ewma::Ewma;
    let mut fixture = fixture(RANDOM, &[(0, 1, true), (0, 1, true)]);
    let (decay, default_rtt) = (Duration::from_secs(10), Duration::from_millis(10));
    fixture.cluster.lb = LbPolicy::PeakEwma { decay, default_rtt };
    let hosts = fixture.set.all.iter().zip([5, 50]).map(|(endpoint, latency)| {
        let ewma = Ewma::default();
        ewma.observe(Duration::from_millis(latency), 0, decay);
        Rc::new(Host {
            ewma: Some(Rc::new(ewma)),
            ..Host::new(endpoint.clone())
        })
    });
    fixture.hosts = hosts.collect();
    fixture.balancer = Balancer::new(&fixture.cluster, &fixture.set, &fixture.hosts);
    let counts = fixture.counts(400, &Wish::default());
    // Four draws miss the other of two hosts once in sixteen times.
    assert!(counts[0] > 350, "{counts:?}");
    fixture.hosts[0].active.set(20);
    let counts = fixture.counts(400, &Wish::default());
    assert!(counts[1] > 350, "{counts:?}");
}

#[test]
fn a_full_scan_finds_the_least_busy_of_all() {
    let mut fixture = fixture(LEAST_REQUEST, &[(0, 1, true), (0, 4, true), (0, 1, true)]);
    fixture.cluster.lb = LbPolicy::LeastRequest {
        choices: 0,
        bias: 1000,
    };
    for (host, active) in fixture.hosts.iter().zip([2, 6, 3]) {
        host.active.set(active);
    }
    assert_eq!(fixture.counts(50, &Wish::default()), [0, 50, 0]);
    fixture.hosts[1].active.set(8);
    let counts = fixture.counts(400, &Wish::default());
    assert!(counts[0] > 100 && counts[1] > 100 && counts[2] == 0, "{counts:?}");
}

#[test]
fn the_bias_weighs_requests_on_their_way_against_the_weight() {
    let mut fixture = fixture(LEAST_REQUEST, &[(0, 1, true), (0, 4, true)]);
    for (host, active) in fixture.hosts.iter().zip([0, 3]) {
        host.active.set(active);
    }
    let mut first = |bias| {
        fixture.cluster.lb = LbPolicy::LeastRequest { choices: 0, bias };
        fixture.counts(50, &Wish::default())
    };
    // 1^2/1 against 4^2/4; 1/1 against 2/4; without a bias the weight alone.
    assert_eq!(first(2000), [50, 0]);
    assert_eq!(first(500), [0, 50]);
    assert_eq!(first(0), [0, 50]);
}

#[test]
fn with_bounded_loads_a_hash_moves_on_from_a_host_that_has_its_part() {
    let mut fixture = fixture(5, &[(0, 1, true), (0, 1, true), (0, 1, true)]);
    let wish = Wish {
        hash: Some(42),
        ..Default::default()
    };
    let first = fixture
        .counts(10, &wish)
        .iter()
        .position(|count| *count > 0)
        .unwrap();
    fixture.cluster.hashing.balance_factor = Some(150);
    let all = Rc::new(Cell::new(9));
    fixture.hosts = fixture
        .set
        .all
        .iter()
        .map(|endpoint| {
            Rc::new(Host {
                siblings: Some(all.clone()),
                ..Host::new(endpoint.clone())
            })
        })
        .collect();
    fixture.balancer = Balancer::new(&fixture.cluster, &fixture.set, &fixture.hosts);
    // Ten requests, three hosts, half more than the average: five each, and one more goes where there are five (Envoy).
    fixture.hosts[first].active.set(5);
    assert_eq!(fixture.counts(10, &wish)[first], 10);
    fixture.hosts[first].active.set(6);
    assert_eq!(fixture.counts(10, &wish)[first], 0);
}

#[test]
fn requests_keep_to_the_zone_that_was_decided_on_and_leave_it_when_it_is_out() {
    let mut fixture = fixture(ROUND_ROBIN, &[(0, 1, true), (0, 1, true), (0, 1, true)]);
    fixture.cluster.zone_aware = Some(crate::config::balancing::ZoneAware {
        enabled: crate::config::convert::Fraction::ALL,
        min_cluster_size: 1,
        fail_on_panic: true,
        force_local: None,
        by_weight: false,
    });
    let locality = |zone: &str, members| crate::config::endpoint::Locality {
        weight: 0,
        zone: zone.into(),
        members,
    };
    fixture.set.priorities = vec![vec![locality("a", 0..1), locality("b", 1..3)].into()].into();
    fixture.balancer = Balancer::new(&fixture.cluster, &fixture.set, &fixture.hosts);
    assert_eq!(fixture.balancer.zones().collect::<Vec<_>>(), [(1, 1), (2, 2)]);
    let direct = ZoneRouting::Direct(1);
    let wish = Wish {
        zones: Some(&direct),
        ..Default::default()
    };
    assert_eq!(fixture.counts(100, &wish), [0, 50, 50]);
    for host in &fixture.hosts[1..] {
        host.endpoint
            .state
            .ejected_until
            .store(u64::MAX, Ordering::Relaxed);
    }
    let wish = Wish {
        some_ejected: true,
        ..wish
    };
    // A third is left, which is panic, and the rules say that then requests fail.
    assert_eq!(fixture.counts(10, &wish), [0, 0, 0]);
}
