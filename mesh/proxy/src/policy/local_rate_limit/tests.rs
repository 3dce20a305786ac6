use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::r#type::v3::{FractionalPercent, TokenBucket};
use serin_xds::pb::google::protobuf::{BoolValue, Duration, UInt32Value};

use super::*;

fn bucket(max: u32) -> Option<TokenBucket> {
    Some(TokenBucket {
        max_tokens: max,
        tokens_per_fill: Some(UInt32Value { value: max }),
        fill_interval: Some(Duration {
            seconds: 60,
            nanos: 0,
        }),
    })
}

fn all() -> Option<core::RuntimeFractionalPercent> {
    Some(core::RuntimeFractionalPercent {
        default_value: Some(FractionalPercent {
            numerator: 100,
            denominator: 0,
        }),
        ..Default::default()
    })
}

fn descriptor(key: &str, value: &str, max: u32) -> common::LocalRateLimitDescriptor {
    common::LocalRateLimitDescriptor {
        entries: vec![common::rate_limit_descriptor::Entry {
            key: key.into(),
            value: value.into(),
        }],
        token_bucket: bucket(max),
        shadow_mode: false,
    }
}

fn compile(message: local::LocalRateLimit) -> LocalRateLimit {
    LocalRateLimit::compile(
        &message,
        1,
        &mut Registry::default(),
        &mut Runtime::default(),
        None,
        0,
    )
    .unwrap()
}

fn asked(key: &str, value: &str) -> Vec<Descriptor> {
    vec![Descriptor {
        entries: vec![(key.into(), value.into())],
        ..Default::default()
    }]
}

fn message() -> local::LocalRateLimit {
    local::LocalRateLimit {
        stat_prefix: "l".into(),
        token_bucket: bucket(3),
        filter_enabled: all(),
        filter_enforced: all(),
        ..Default::default()
    }
}

#[test]
fn a_descriptor_has_its_own_bucket_and_the_default_one_is_used_as_well_unless_told_otherwise() {
    let mut from = message();
    from.descriptors = vec![descriptor("user", "bob", 1)];
    let limit = compile(from.clone());
    let take = |limit: &LocalRateLimit, who: &str| !limit.judge(&asked("user", who), None, 0, 0).limited;
    assert!(take(&limit, "bob"));
    assert!(!take(&limit, "bob"), "bob's bucket is empty");
    assert!(take(&limit, "eve") && take(&limit, "eve"));
    assert!(
        !take(&limit, "eve"),
        "bob took one of the three of the default bucket"
    );
    from.always_consume_default_token_bucket = Some(BoolValue { value: false });
    let limit = compile(from);
    assert!(take(&limit, "bob") && take(&limit, "eve") && take(&limit, "eve") && take(&limit, "eve"));
    assert!(!take(&limit, "eve"));
}

#[test]
fn a_descriptor_without_a_value_gives_each_value_a_bucket_and_forgets_the_oldest() {
    let mut from = message();
    from.token_bucket = bucket(1000);
    from.descriptors = vec![descriptor("user", "", 1)];
    from.max_dynamic_descriptors = Some(UInt32Value { value: 2 });
    let limit = compile(from);
    let take = |who: &str, now| !limit.judge(&asked("user", who), None, now, 0).limited;
    assert!(take("a", 1) && !take("a", 2) && take("b", 3));
    assert!(take("c", 4), "a is forgotten");
    assert!(take("a", 5), "and starts anew");
}

#[test]
fn what_remains_is_that_of_the_decisive_bucket() {
    let limit = compile(message());
    let verdict = limit.judge(&[], None, 1500, 0);
    assert_eq!((verdict.limit, verdict.remaining, verdict.reset_s), (3, 2, 59));
}
