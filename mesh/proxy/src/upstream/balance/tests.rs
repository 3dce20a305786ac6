use std::sync::Arc;

use super::*;
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
        .map(|endpoint| {
            Rc::new(Host {
                endpoint: endpoint.clone(),
                pool: Rc::default(),
                active: Rc::default(),
            })
        })
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
    let slot = Arc::new(ClusterSlot::new(0, "c".into()));
    slot.set_config(Some(Arc::new(fixture.cluster)));
    slot.set_endpoints(Some(Arc::new(fixture.set)));
    let first = WorkerCluster::new(&slot, None).unwrap();
    let before: Vec<_> = (0..2)
        .map(|_| first.pick(&Wish::default(), None).unwrap().pool.clone())
        .collect();
    slot.set_endpoints(first.slot.endpoints());
    let second = WorkerCluster::new(&slot, Some(&first)).unwrap();
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
