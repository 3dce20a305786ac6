use serin_kit::unhonoured::Field;

use super::*;

fn note() -> Note {
    Note {
        kind: "VirtualService",
        namespace: "prod".into(),
        name: "reviews".into(),
        generation: 2,
        ..Note::default()
    }
}

fn liveness(acked: usize, needed: usize) -> Liveness {
    Liveness {
        generation: 2,
        observed: true,
        needed,
        sent: needed,
        acked,
        ..Liveness::default()
    }
}

/// `type=status/reason: message` of each condition.
fn written(note: &Note, liveness: &Liveness) -> Vec<String> {
    let mut all = Vec::new();
    conditions(&mut all, note, liveness, Timestamp::UNIX_EPOCH);
    all.iter()
        .map(|one| format!("{}={}/{}: {}", one.type_, one.status, one.reason, one.message))
        .collect()
}

#[test]
fn liveness_is_told_in_numbers_and_names() {
    let waiting = Liveness {
        slowest: Some("sidecar~10.0.0.7~a.prod~x".into()),
        ..liveness(38, 40)
    };
    let refused = Liveness {
        refused: 1,
        refusals: vec![crate::ledger::Refused {
            proxy: "p".into(),
            resource: "VHDS 80/reviews".into(),
            reason: "no".into(),
        }],
        ..liveness(1, 2)
    };
    let rejected = Liveness {
        rejected: Some("weights sum to zero".into()),
        ..liveness(0, 2)
    };
    let table = [
        (liveness(40, 40), "Live=True/Live: 40/40 proxies"),
        (
            waiting,
            "Live=Unknown/Propagating: 38/40 proxies; waiting for sidecar~10.0.0.7~a.prod~x",
        ),
        (
            refused,
            "Live=False/Refused: 1/2 proxies; refused by 1, first by p: VHDS 80/reviews: no",
        ),
        (
            rejected,
            "Live=False/Invalid: not sent to any proxy: weights sum to zero",
        ),
        (liveness(0, 0), "Live=True/NotNeeded: no connected proxy needs it"),
        (
            Liveness::default(),
            "Live=Unknown/Propagating: not translated yet",
        ),
    ];
    for (liveness, expected) in table {
        let conditions = written(&note(), &liveness);
        assert!(
            conditions.iter().any(|condition| condition == expected),
            "{expected}: {conditions:?}"
        );
    }
}

#[test]
fn broken_rules_missing_references_and_fields_that_are_not_honoured_are_named() {
    let note = Note {
        refused: vec!["spec.http[0]: weights sum to zero".into()],
        unresolved: vec!["spec.http[1]: referenced host x does not exist".into()],
        unhonoured: vec![Field::ignored("spec.tls", "not yet")],
        ..note()
    };
    let conditions = written(&note, &liveness(1, 1));
    for expected in [
        "Accepted=False/Invalid: spec.http[0]: weights sum to zero",
        "ResolvedRefs=False/RefNotFound: spec.http[1]: referenced host x does not exist",
        "FullyHonoured=False/FieldsNotHonoured: spec.tls is not honoured: not yet",
    ] {
        assert!(
            conditions.iter().any(|condition| condition == expected),
            "{expected}: {conditions:?}"
        );
    }
}

#[test]
fn a_status_that_stays_the_same_is_not_a_change() {
    let mut all = Vec::new();
    conditions(&mut all, &note(), &liveness(1, 1), Timestamp::UNIX_EPOCH);
    let before = all.clone();
    conditions(
        &mut all,
        &note(),
        &liveness(1, 1),
        Timestamp::from_second(60).unwrap(),
    );
    assert_eq!(all, before);
}
