use std::time::Duration;

use serde_json::json;

use super::*;

fn of_json(value: &Value) -> google::Struct {
    let kind = |value: &Value| match value {
        Value::Null => google::value::Kind::NullValue(0),
        Value::Bool(value) => google::value::Kind::BoolValue(*value),
        Value::Number(number) => google::value::Kind::NumberValue(number.as_f64().unwrap()),
        Value::String(text) => google::value::Kind::StringValue(text.clone()),
        Value::Array(_) => google::value::Kind::ListValue(google::ListValue::default()),
        Value::Object(_) => google::value::Kind::StructValue(of_json(value)),
    };
    let fields = value.as_object().unwrap().iter();
    google::Struct {
        fields: fields
            .map(|(key, value)| {
                (
                    key.clone(),
                    google::Value {
                        kind: Some(kind(value)),
                    },
                )
            })
            .collect(),
    }
}

fn share(runtime: &mut Runtime, key: &str) -> RuntimeFraction {
    let message = core::RuntimeFractionalPercent {
        default_value: None,
        runtime_key: key.into(),
    };
    runtime
        .fraction(Some(&message), Fraction::of_percent(10.0))
        .unwrap()
}

#[test]
fn numbers_shares_and_texts_are_read_as_envoy_reads_them() {
    let mut runtime = Runtime::default();
    let mut layer = Layer::empty("s", Source::Static);
    let values = json!({
        "a": 25, "b": {"numerator": 5, "denominator": "TEN_THOUSAND"}, "c": 250, "d": "30", "e": true,
        "f": {"g": {"numerator": 1}}, "h": "{numerator: 2, denominator: MILLION}", "i": 1.5, "j": "text",
    });
    layer.fill(&of_json(&values)).unwrap();
    runtime.set_layers(vec![layer]);
    for (key, percent) in [
        ("a", 25.0),
        ("b", 0.05),
        ("c", 100.0),
        ("d", 30.0),
        ("f.g", 1.0),
        ("h", 0.0002),
        // What is no share leaves the default.
        ("e", 10.0),
        ("i", 10.0),
        ("j", 10.0),
        ("unknown", 10.0),
    ] {
        let now = share(&mut runtime, key).now();
        assert_eq!(now, Fraction::of_percent(percent), "{key}");
    }
}

#[test]
fn the_last_layer_that_has_a_key_decides_and_shares_follow_changes() {
    let mut runtime = Runtime::default();
    let mut fixed = Layer::empty("fixed", Source::Static);
    fixed.fill(&of_json(&json!({ "k": 20 }))).unwrap();
    runtime.set_layers(vec![
        fixed,
        Layer::empty("rtds", Source::Rtds),
        Layer::empty("admin", Source::Admin),
    ]);
    let followed = share(&mut runtime, "k");
    assert_eq!(followed.now(), Fraction::of_percent(20.0));
    runtime.put("rtds", Some(&of_json(&json!({ "k": 30 })))).unwrap();
    assert_eq!(followed.now(), Fraction::of_percent(30.0));
    assert_eq!(runtime.modify([("k", "40")]), Ok(true));
    assert_eq!(followed.now(), Fraction::of_percent(40.0));
    assert_eq!(
        runtime.json(),
        json!({ "layers": ["fixed", "rtds", "admin"],
                "entries": { "k": { "final_value": "40", "layer_values": ["20", "30", "40"] } } })
    );
    assert_eq!(runtime.modify([("k", "")]), Ok(true));
    runtime.remove("rtds");
    assert_eq!(followed.now(), Fraction::of_percent(20.0));
}

#[test]
fn layers_are_waited_for_until_they_are_answered_for_or_each_ones_time_is_over() {
    let layer = |name: &str, patience| Layer {
        patience,
        ..Layer::empty(name, Source::Rtds)
    };
    let mut runtime = Runtime::default();
    runtime.set_layers(vec![Layer::empty("fixed", Source::Static)]);
    assert!(!runtime.is_awaited());
    let seconds = |count| Some(Duration::from_secs(count));
    runtime.set_layers(vec![
        layer("a", seconds(1)),
        layer("b", seconds(2)),
        layer("c", seconds(3)),
        layer("d", None),
    ]);
    assert_eq!(runtime.patience(), seconds(1));
    runtime.answer("a");
    assert_eq!(runtime.patience(), seconds(2));
    runtime.expire(seconds(2));
    assert_eq!(runtime.patience(), seconds(3));
    runtime.expire(seconds(100));
    let awaited: Vec<_> = runtime.awaited().map(|layer| &*layer.name).collect();
    assert_eq!(awaited, ["d"], "one without a limit is waited for");
    assert_eq!(runtime.patience(), None);
    runtime.expire(None);
    assert!(!runtime.is_awaited());
}

#[test]
fn a_layer_that_cannot_be_used_is_refused_and_the_last_good_one_stays() {
    let mut runtime = Runtime::default();
    runtime.set_layers(vec![Layer::empty("rtds", Source::Rtds)]);
    let followed = share(&mut runtime, "k");
    runtime.put("rtds", Some(&of_json(&json!({ "k": 30 })))).unwrap();
    for (bad, path) in [
        (
            json!({ "k": 1, "upstream": { "healthy_panic_threshold": 3 } }),
            "layer.upstream.healthy_panic_threshold",
        ),
        (json!({ "k": [] }), "layer.k"),
        (json!({ "k": { "numerator": "many" } }), "layer.k.numerator"),
    ] {
        let refusal = runtime.put("rtds", Some(&of_json(&bad))).unwrap_err();
        assert_eq!(refusal.path, path);
        assert_eq!(followed.now(), Fraction::of_percent(30.0));
    }
    assert_eq!(runtime.modify([("k", "1")]), Ok(false), "there is no admin layer");
}
