use prost::Message;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::load_balancing_policies as policies;
use serin_xds::pb::google::protobuf as google;

use super::policies::PeakEwma;
use super::*;

fn policy(name: &str, message: &impl Message) -> cluster::load_balancing_policy::Policy {
    cluster::load_balancing_policy::Policy {
        typed_extension_config: Some(core::TypedExtensionConfig {
            name: name.into(),
            typed_config: Some(google::Any {
                type_url: format!("type.googleapis.com/envoy.extensions.load_balancing_policies.{name}"),
                value: message.encode_to_vec(),
            }),
        }),
    }
}

fn list(policies: Vec<cluster::load_balancing_policy::Policy>) -> cluster::Cluster {
    cluster::Cluster {
        name: "c".into(),
        load_balancing_policy: Some(cluster::LoadBalancingPolicy { policies }),
        ..Default::default()
    }
}

#[test]
fn the_first_policy_that_is_known_counts_and_a_list_without_one_is_refused() {
    let unknown = || policy("pick_first.v3.PickFirst", &google::Empty {});
    let ewma = PeakEwma {
        decay_time: Some(google::Duration { seconds: 3, nanos: 0 }),
        default_rtt: None,
    };
    let message = list(vec![
        unknown(),
        policy("peak_ewma.v3alpha.PeakEwma", &ewma),
        policy("random.v3.Random", &policies::random::v3::Random::default()),
    ]);
    assert_eq!(
        Balancing::compile(&message).unwrap().lb,
        LbPolicy::PeakEwma {
            decay: Duration::from_secs(3),
            default_rtt: Duration::from_millis(10)
        }
    );
    let refusal = Balancing::compile(&list(vec![unknown()])).unwrap_err();
    assert_eq!(refusal.path, "load_balancing_policy.policies");
    assert!(refusal.to_string().contains("PickFirst"), "{refusal}");
}

#[test]
fn policies_within_policies_bring_localities_and_subsets() {
    let inner = |policy| {
        Some(cluster::LoadBalancingPolicy {
            policies: vec![policy],
        })
    };
    let scan = policies::least_request::v3::LeastRequest {
        selection_method: 1,
        ..Default::default()
    };
    let wrr = policies::wrr_locality::v3::WrrLocality {
        endpoint_picking_policy: inner(policy("least_request.v3.LeastRequest", &scan)),
    };
    let subset = policies::subset::v3::Subset {
        fallback_policy: 1,
        subset_selectors: vec![policies::subset::v3::subset::LbSubsetSelector {
            keys: vec!["version".into()],
            ..Default::default()
        }],
        subset_lb_policy: inner(policy("wrr_locality.v3.WrrLocality", &wrr)),
        ..Default::default()
    };
    let out = Balancing::compile(&list(vec![policy("subset.v3.Subset", &subset)])).unwrap();
    assert_eq!(
        out.lb,
        LbPolicy::LeastRequest {
            choices: 0,
            bias: 1000
        }
    );
    assert!(out.locality_weighted);
    assert_eq!(out.subsets.unwrap().selectors.len(), 1);
}

#[test]
fn the_older_fields_are_refused_beside_a_list_and_half_known_options_by_name() {
    let random = || policy("random.v3.Random", &policies::random::v3::Random::default());
    let mut message = list(vec![random()]);
    message.lb_subset_config = Some(Default::default());
    assert_eq!(Balancing::compile(&message).unwrap_err().path, "lb_subset_config");
    let mut message = list(vec![random()]);
    message.common_lb_config = Some(cluster::cluster::CommonLbConfig {
        close_connections_on_host_set_change: true,
        ..Default::default()
    });
    assert_eq!(
        Balancing::compile(&message).unwrap_err().path,
        "common_lb_config.close_connections_on_host_set_change"
    );
    let biased = cluster::Cluster {
        lb_policy: cluster::cluster::LbPolicy::LeastRequest as i32,
        lb_config: Some(cluster::cluster::LbConfig::LeastRequestLbConfig(
            cluster::cluster::LeastRequestLbConfig {
                active_request_bias: Some(core::RuntimeDouble {
                    default_value: -1.0,
                    runtime_key: String::new(),
                }),
                ..Default::default()
            },
        )),
        ..Default::default()
    };
    assert_eq!(
        Balancing::compile(&biased).unwrap_err().path,
        "least_request_lb_config.active_request_bias"
    );
}
