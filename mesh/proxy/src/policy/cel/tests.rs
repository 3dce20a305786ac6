use http::{HeaderMap, HeaderValue};
use proptest::prelude::*;

use super::*;
use crate::config::matchers::RequestView;
use crate::policy::facts::{Facts, PeerIdentity};
use crate::policy::metadata::{Metadata, of_json, text};

fn with_facts<T>(run: impl FnOnce(&Facts<'_>) -> T) -> T {
    let mut headers = HeaderMap::new();
    headers.insert("x-tenant", HeaderValue::from_static("blue"));
    headers.append("x-many", HeaderValue::from_static("a"));
    headers.append("x-many", HeaderValue::from_static("b"));
    let mut metadata = Metadata::default();
    metadata.set("jwt", "sub", text("bob"));
    metadata.set("jwt", "groups", of_json(&serde_json::json!(["dev", "ops"])));
    metadata.set("jwt", "level", of_json(&serde_json::json!(3)));
    let uri_sans = [Box::from("spiffe://td/ns/a/sa/b")];
    let facts = Facts {
        direct_remote: "10.0.0.9:1000".parse().unwrap(),
        source: "10.0.0.9:1000".parse().unwrap(),
        local: "10.0.0.1:8080".parse().unwrap(),
        server_name: Some("shop.example"),
        peer: Some(PeerIdentity {
            uri_sans: &uri_sans,
            dns_sans: &[],
            subject: "CN=b",
        }),
        request: Some(RequestView {
            method: "GET",
            path: "/a/b",
            query: Some("q=1"),
            authority: Some("shop.example:80"),
            scheme: Some("https"),
            headers: &headers,
        }),
        remote: "10.0.0.9:1000".parse().unwrap(),
        metadata: &metadata,
    };
    run(&facts)
}

fn holds(expression: &str) -> bool {
    let compiled =
        Expression::parse(expression, None).unwrap_or_else(|refusal| panic!("{expression}: {refusal}"));
    with_facts(|facts| compiled.holds(facts))
}

#[test]
fn a_connection_that_named_no_server_has_an_empty_name() {
    let named = Expression::parse("connection.requested_server_name == ''", None).unwrap();
    with_facts(|facts| {
        assert!(!named.holds(facts));
        let unnamed = Facts {
            server_name: None,
            ..*facts
        };
        assert!(named.holds(&unnamed));
    });
}

#[test]
fn expressions_are_decided_as_the_language_says() {
    for expression in [
        "request.path == '/a/b?q=1' && request.url_path.startsWith('/a') && request.query == \"q=1\"",
        "request.method in ['GET', 'HEAD']",
        "request.headers['x-tenant'] == 'blue' && request.headers['X-Tenant'].size() == 4",
        "'x-tenant' in request.headers && !('x-none' in request.headers)",
        "request.headers['x-many'] == 'a,b'",
        "has(request.headers.host) && request.host.matches('^shop[.]')",
        "source.address == '10.0.0.9:1000' && source.port == 1000 && destination.port >= 8080u",
        "connection.mtls && connection.requested_server_name.endsWith('.example')",
        "connection.uri_san_peer_certificate.contains('/ns/a/')",
        "!has(connection.dns_san_peer_certificate)",
        "metadata.filter_metadata['jwt']['sub'] == 'bob'",
        "metadata['jwt'].level > 2 && metadata.filter_metadata.jwt.level == 3.0",
        "'ops' in metadata.filter_metadata['jwt']['groups']",
        "metadata.filter_metadata['jwt']['groups'][1] == 'ops'",
        "'jwt' in metadata.filter_metadata && !has(metadata.filter_metadata.none)",
        "1 + 2 * 3 == 7 && (1 + 2) * 3 == 9 && 7 % 4 == 3 && -7 / 2 == -3",
        "2 - 1 - 1 == 0 && 'a' + 'b' == 'ab' && 0x10 == 16 && 1.5e1 == 15.0",
        "true ? 1 == 1 : 1 / 0 == 1",
        "string(80) == '80' && int('80') == 80 && double('1.5') == 1.5",
        "duration('1h30m') == duration('90m') && duration('-1.5s') < duration('0')",
        r#"r'\d' == '\\d' && "\x41\u0042" == 'AB'"#,
        // Either side of && and || decides alone, whatever the other one is.
        "request.headers['x-none'] == 'a' || true",
        "!(request.headers['x-none'] == 'a' && false)",
        "1 == 1 // a comment\n",
        "[1, 2,] == [1, 2] && size([1, 2]) == 2 && null == null && 1 != 'a'",
    ] {
        assert!(holds(expression), "{expression}");
    }
}

#[test]
fn macros_ask_every_element_of_lists_and_maps() {
    for expression in [
        "[1, 2, 3].all(x, x > 0) && ![1, 2, 3].all(x, x > 1) && [].all(x, false)",
        "[1, 2, 3].exists(x, x == 2) && ![].exists(x, true)",
        "[1, 2, 3].exists_one(x, x > 2) && ![1, 2, 3].exists_one(x, x > 1)",
        "[1, 2, 3].filter(x, x != 2) == [1, 3] && [1, 2].map(x, x * x) == [1, 4]",
        "[1, 2, 3].map(x, x > 1, string(x)) == ['2', '3']",
        // What fails decides nothing where another element does.
        "[0, 1].exists(x, 1 / x == 1) && ![0, 1].all(x, 1 / x > 1)",
        // The inner variable hides the outer one, which is back afterwards.
        "[[1, 2], [3]].all(x, x.exists(y, y > 0) && x.map(x, x + 1).size() == x.size())",
        "{'a': 1, 'b': 2}.all(key, key in ['a', 'b']) && {'a': 1}['a'] == 1 && {'a': {'b': 2}}.a.b == 2",
        "{1: 'x', true: 'y'}[true] == 'y' && 1 in {1: 'x'} && size({'a': 1}) == 1 && {} == {}",
        "has({'a': 1}.a) && !has({'a': 1}.b) && {'a': 1, 'b': 2} == {'b': 2, 'a': 1}",
        "metadata.filter_metadata['jwt']['groups'].exists(group, group == 'ops')",
        "metadata.filter_metadata['jwt'].exists(field, field.startsWith('lev'))",
        "metadata.filter_metadata['jwt']['groups'].map(g, {'name': g}).filter(g, g.name == 'dev').size() == 1",
        "request.headers.exists(name, name.startsWith('x-ten') && request.headers[name] == 'blue')",
        "request.headers['x-' + 'tenant'] == 'blue' && !(('x-' + 'none') in request.headers)",
    ] {
        assert!(holds(expression), "{expression}");
    }
    for expression in [
        "[1, 2].all(x, x.y)",
        "[0].exists(x, 1 / x == 1)",
        "'abc'.all(x, true)",
        "{'a': 1}['b'] == 1",
        "{'a': 1}.exists(x, x)",
        "request.headers.all(name, name == 'x-tenant')",
    ] {
        assert!(!holds(expression), "{expression}");
    }
}

#[test]
fn bytes_conversions_times_and_spans_are_as_the_language_says() {
    for expression in [
        r#"b'a\x62\143' == b"abc" && size(b'\xff') == 1 && br'\x' == b'\\x' && rb'a' + b'b' == b'ab'"#,
        "bytes('ä') == b'\\xc3\\xa4' && string(b'abc') == 'abc' && b'a' < b'b'",
        "'''a'b''' == \"a'b\" && '\\a\\t' != '' && '\\101' == 'A'",
        "uint('3') == 3u && uint(3) == 3u && uint(3.9) == 3u && bool('true') && !bool('0')",
        "string(true) == 'true' && int(timestamp('1970-01-01T00:01:00Z')) == 60",
        "timestamp('2024-05-06T07:08:09.25Z').getFullYear() == 2024 && timestamp(60) == timestamp('1970-01-01T00:01:00Z')",
        "timestamp('2024-05-06T07:08:09.25Z').getMonth() == 4 && timestamp('2024-05-06T07:08:09Z').getDate() == 6",
        "timestamp('2024-05-06T07:08:09.25Z').getDayOfMonth() == 5 && timestamp('2024-05-06T07:08:09Z').getDayOfWeek() == 1",
        "timestamp('2024-12-31T07:08:09Z').getDayOfYear() == 365 && timestamp('2024-05-06T07:08:09Z').getHours() == 7",
        "timestamp('2024-05-06T23:08:09Z').getHours('+01:30') == 0 && timestamp('2024-05-06T00:08:09Z').getDate('-00:30') == 5",
        "timestamp('2024-05-06T07:08:09.25Z').getMilliseconds() == 250 && timestamp('2024-05-06T07:08:09Z').getMinutes() == 8",
        "timestamp('2024-05-06T07:08:09Z') - timestamp('2024-05-06T06:08:09Z') == duration('1h')",
        "timestamp('2024-05-06T07:08:09Z') + duration('51s') == timestamp('2024-05-06T07:09:00Z')",
        "duration('90m').getHours() == 1 && duration('90m').getMinutes() == 90 && duration('1.5s').getMilliseconds() == 500",
        "string(duration('90m')) == '5400s' && string(duration('-1500ms')) == '-1.5s'",
        "string(timestamp('2024-05-06T09:08:09.5+02:00')) == '2024-05-06T07:08:09.5Z'",
        "duration(request.method == 'GET' ? '1s' : '2s') == duration('1s')",
        "timestamp(['2024-05-06T07:08:09Z'][0]).getSeconds() == 9",
    ] {
        assert!(holds(expression), "{expression}");
    }
    for expression in [
        "duration('1h').getFullYear() == 0",
        "string(b'\\xff') == ''",
        "bool('yes') || true == false",
        "timestamp(['soon'][0]) == timestamp(0)",
        "uint(-1) == 0u",
    ] {
        assert!(!holds(expression), "{expression}");
    }
}

#[test]
fn comprehensions_end_with_the_budget_and_nothing_is_decided_after_that() {
    let list = format!("[{}]", vec!["1"; 60].join(","));
    let cubic = format!("{list}.all(x, {list}.all(y, {list}.all(z, x + y + z > 0)))");
    assert!(!holds(&cubic));
    assert!(!holds(&format!("{cubic} || true")));
    assert!(!holds(&format!("!({cubic})")));
    assert!(holds(&format!("{list}.map(x, x + 1).all(x, x == 2)")));
}

#[test]
fn what_has_no_value_is_not_true() {
    for expression in [
        "request.headers['x-none'] == 'a'",
        "!(request.headers['x-none'] == 'a')",
        "metadata.filter_metadata['none']['sub'] == 'bob'",
        "connection.dns_san_peer_certificate != 'a'",
        "1 / 0 == 1 || false",
        "9223372036854775807 + 1 > 0",
        "'a' < 1",
        "request.path",
        "metadata.filter_metadata['jwt']['groups'][9] == 'ops'",
    ] {
        assert!(!holds(expression), "{expression}");
    }
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    for (expression, reason) in [
        ("request.colour == 'red'", "request.colour"),
        ("foo", "\"foo\""),
        ("response.code == 200", "response.code is not known yet"),
        ("response.headers['a'] == 'b'", "no response yet"),
        ("request.headers == 'a'", "one field only"),
        ("request.path.reverse() == 'a'", "the function reverse"),
        ("[1].exists(1, true)", "the name of a variable"),
        ("[1].map(x)", "the name of a variable"),
        ("[1].all(x, y > 0)", "\"y\""),
        ("size(request.headers) > 0", "one field only"),
        (
            "timestamp('soon') < timestamp('2024-01-01T00:00:00Z')",
            "no timestamp",
        ),
        (
            "timestamp('2024-01-01T00:00:00Z').getHours('Europe/Paris') == 1",
            "Europe/Paris",
        ),
        ("b'\\u0041' == b'A'", "an escape is malformed"),
        ("request.path.matches(request.host)", "must be a literal"),
        ("request.path.matches('[')", "regex"),
        ("duration('soon') == duration('1s')", "no duration"),
        ("1 +", "a value is expected"),
        ("(1", ") is expected"),
        ("'a", "the end of a text"),
        ("1 2", "an operator is expected"),
        ("a ~ b", "is not expected"),
    ] {
        let refusal = Expression::parse(expression, None).unwrap_err().to_string();
        assert!(refusal.contains(reason), "{expression}: {refusal}");
    }
    let deep = "(".repeat(100) + "1" + &")".repeat(100);
    assert!(
        Expression::parse(&deep, None)
            .unwrap_err()
            .to_string()
            .contains("nested")
    );
    let long = vec!["1"; 1001].join("+");
    assert!(
        Expression::parse(&long, None)
            .unwrap_err()
            .to_string()
            .contains("too large")
    );
}

#[test]
fn an_evaluation_that_costs_too_much_is_not_true() {
    struct Long;
    impl Scene for Long {
        fn attribute(&self, _: Attribute) -> Option<Value<'_>> {
            Some(Value::Text("x".repeat(1 << 20).into()))
        }
        fn header(&self, _: Side, _: &HeaderName, _: usize) -> Option<std::borrow::Cow<'_, str>> {
            None
        }
    }
    let cheap = Expression::parse("has(request.path)", None).unwrap();
    assert!(cheap.holds(&Long));
    let long = Expression::parse("request.path.matches('x')", None).unwrap();
    assert!(!long.holds(&Long), "a megabyte costs more than the budget");
}

#[test]
fn parsed_messages_mean_the_same_as_text() {
    use pb::constant::ConstantKind;
    use pb::expr::ExprKind;
    let expr = |kind| pb::Expr {
        id: 0,
        expr_kind: Some(kind),
    };
    let name = |text: &str| expr(ExprKind::IdentExpr(pb::expr::Ident { name: text.into() }));
    let select = |operand: pb::Expr, field: &str| {
        expr(ExprKind::SelectExpr(Box::new(pb::expr::Select {
            operand: Some(Box::new(operand)),
            field: field.into(),
            test_only: false,
        })))
    };
    let constant = |text: &str| {
        expr(ExprKind::ConstExpr(pb::Constant {
            constant_kind: Some(ConstantKind::StringValue(text.into())),
        }))
    };
    let call = |function: &str, args: Vec<pb::Expr>| {
        expr(ExprKind::CallExpr(Box::new(pb::expr::Call {
            target: None,
            function: function.into(),
            args,
        })))
    };
    let tenant = call(
        "_[_]",
        vec![select(name("request"), "headers"), constant("x-tenant")],
    );
    let message = call("_==_", vec![tenant.clone(), constant("blue")]);
    let compiled = Expression::of_message(&message, None).unwrap();
    assert!(with_facts(|facts| compiled.holds(facts)));
    // `["red", x].exists(c, c == "blue")` as parsers write it.
    let list = expr(ExprKind::ListExpr(pb::expr::CreateList {
        elements: vec![constant("red"), tenant.clone()],
        ..Default::default()
    }));
    let truth = |value| {
        expr(ExprKind::ConstExpr(pb::Constant {
            constant_kind: Some(ConstantKind::BoolValue(value)),
        }))
    };
    let some = |expr| Some(Box::new(expr));
    let fold = expr(ExprKind::ComprehensionExpr(Box::new(pb::expr::Comprehension {
        iter_var: "c".into(),
        iter_range: some(list),
        accu_var: "__result__".into(),
        accu_init: some(truth(false)),
        loop_condition: some(call(
            "@not_strictly_false",
            vec![call("!_", vec![name("__result__")])],
        )),
        loop_step: some(call(
            "_||_",
            vec![
                name("__result__"),
                call("_==_", vec![name("c"), constant("blue")]),
            ],
        )),
        result: some(name("__result__")),
        ..Default::default()
    })));
    let compiled = Expression::of_message(&fold, None).unwrap();
    assert!(with_facts(|facts| compiled.holds(facts)));
    let unknown = call("_==_", vec![select(name("request"), "colour"), constant("blue")]);
    assert!(Expression::of_message(&unknown, None).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn no_text_makes_the_compiler_fail_otherwise_than_by_a_refusal(text in "[ -~]{0,60}") {
        if let Ok(compiled) = Expression::parse(&text, None) {
            with_facts(|facts| compiled.holds(facts));
        }
    }

    #[test]
    fn numbers_are_computed_as_everywhere(a in -1000i64..1000, b in -1000i64..1000, c in 1i64..50) {
        let expected = a + b * c - (a - b) / c;
        let (a, b) = (format!("({a})"), format!("({b})"));
        let expression = format!("{a} + {b} * {c} - ({a} - {b}) / {c} == {expected}");
        prop_assert!(holds(&expression));
    }
}
