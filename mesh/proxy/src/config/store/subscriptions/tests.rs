//! What is counted, event by event.

use super::*;
use crate::metrics::collect::Family;

fn told(own: &mut Subscriptions, secrets: &[&str]) -> BTreeMap<&'static str, Vec<Value>> {
    let secrets = secrets.iter().map(|name| Arc::from(*name)).collect();
    let values = |family: Family| family.metrics.into_iter().map(|(_, value)| value).collect();
    let families = own.families(&secrets).into_iter();
    families.map(|family| (family.name, values(family))).collect()
}

fn came(taken: bool, version: u64) -> Came {
    Came {
        taken,
        version,
        took: Duration::from_millis(2),
    }
}

#[test]
fn what_is_asked_for_counts_answers_and_the_streams_that_failed_since() {
    let mut own = Subscriptions::default();
    assert!(told(&mut own, &[]).is_empty(), "nothing is asked for");
    own.lose();
    own.begin();
    own.clusters_came(came(true, version_hash("7")), true);
    own.clusters_came(came(false, version_hash("8")), false);
    own.lose();
    let all = told(&mut own, &[]);
    let of = |name: &str| all[name][0].clone();
    assert_eq!(
        of("envoy_cluster_manager_cds_update_attempt"),
        Value::Counter(5.0)
    );
    assert_eq!(
        of("envoy_cluster_manager_cds_update_success"),
        Value::Counter(1.0)
    );
    assert_eq!(
        of("envoy_cluster_manager_cds_update_rejected"),
        Value::Counter(1.0)
    );
    assert_eq!(
        of("envoy_cluster_manager_cds_update_failure"),
        Value::Counter(1.0),
        "not the one before it was asked for"
    );
    assert_eq!(
        of("envoy_cluster_manager_cds_version"),
        Value::Whole(version_hash("7")),
        "what was taken"
    );
    assert_eq!(
        of("envoy_listener_manager_lds_update_attempt"),
        Value::Counter(2.0)
    );
}

#[test]
fn routes_are_told_while_somebody_asks_for_them_and_secrets_while_they_are_wanted() {
    let mut own = Subscriptions::default();
    let name: Arc<str> = "r".into();
    own.routes_came("r", came(true, 1));
    own.ask_routes(&name, "in");
    own.ask_routes(&name, "other");
    own.routes_came("r", came(true, 5));
    own.routes_changed("r");
    own.secret_came("s", came(false, 0));
    let all = told(&mut own, &["s", "t"]);
    assert_eq!(all["envoy_http_rds_update_success"], [Value::Counter(1.0)]);
    assert_eq!(all["envoy_http_rds_version"], [Value::Whole(5)]);
    assert_eq!(all["envoy_http_rds_config_reload"], [Value::Counter(1.0)]);
    assert_eq!(
        all["envoy_sds_update_attempt"],
        [Value::Counter(3.0), Value::Counter(1.0)]
    );
    assert_eq!(
        all["envoy_sds_update_rejected"],
        [Value::Counter(1.0), Value::Counter(0.0)]
    );
    own.leave_routes("r");
    assert!(told(&mut own, &[]).is_empty());
    assert_eq!(
        told(&mut own, &["s"])["envoy_sds_update_attempt"],
        [Value::Counter(1.0)]
    );
}

#[test]
fn filters_and_virtual_hosts_are_told_while_they_are_asked_for_with_the_time_that_updates_took() {
    let mut own = Subscriptions::default();
    own.ask_routes(&"r".into(), "in");
    own.hosts_came("r", came(true, 1));
    own.ask_hosts("r", true);
    own.hosts_came("r", came(true, 2));
    own.ask_hosts("r", true);
    let http = (Kind::Http, Box::from("f"));
    let listener = (Kind::Listener, Box::from("f"));
    own.ask_extensions(&[http.clone(), listener].into());
    own.extension_late(Kind::Http, "f");
    own.extension_came("f", came(true, 3));
    own.extension_came("f", came(false, 4));
    let all = told(&mut own, &[]);
    assert_eq!(all["envoy_http_vhds_update_attempt"], [Value::Counter(2.0)]);
    assert_eq!(all["envoy_http_vhds_config_reload"], [Value::Counter(1.0)]);
    for (name, value) in [
        ("http_filter_config_reload", 1.0),
        ("http_filter_config_fail", 1.0),
        ("http_filter_update_attempt", 4.0),
        ("http_filter_init_fetch_timeout", 1.0),
        ("tcp_listener_filter_init_fetch_timeout", 0.0),
    ] {
        let name = format!("envoy_extension_config_discovery_{name}");
        assert_eq!(all[&*name], [Value::Counter(value)], "{name}");
    }
    let took = &all["envoy_extension_config_discovery_http_filter_update_duration"][0];
    let Value::Histogram(took) = took else {
        panic!("{took:?}");
    };
    assert_eq!((took.count(), took.sum), (1, 2.0));
    own.ask_hosts("r", false);
    own.ask_extensions(&[http].into());
    let all = told(&mut own, &[]);
    assert!(
        all.keys()
            .all(|name| !name.contains("vhds") && !name.contains("listener_filter"))
    );
}

#[test]
fn a_version_is_the_number_that_envoy_makes_of_it() {
    assert_eq!(version_hash("v8"), 15_701_665_227_093_768_493);
    assert_eq!(version_hash("v9"), 7_832_730_476_746_051_721);
}
