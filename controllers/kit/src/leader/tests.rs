use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use kube::client::Body;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::*;

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn lease(holder: &str, seconds: i32, version: &str) -> Lease {
    Lease {
        metadata: ObjectMeta {
            resource_version: Some(version.into()),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(holder.into()),
            lease_duration_seconds: Some(seconds),
            lease_transitions: Some(3),
            ..LeaseSpec::default()
        }),
    }
}

#[test]
fn a_lease_that_is_not_there_is_created_and_one_that_is_free_is_taken() {
    let mut election = Election::new("me");
    assert_eq!(election.decide(None, s(0)), Step::Create);
    assert_eq!(election.decide(Some(&lease("", 1, "1")), s(0)), Step::Take);
    assert_eq!(election.decide(Some(&lease("me", 15, "2")), s(0)), Step::Renew);
}

#[test]
fn another_ones_lease_expires_by_our_own_clock_since_it_last_changed() {
    let mut election = Election::new("me");
    let wait = |seconds| Step::Wait {
        holder: "other".into(),
        expires_in: s(seconds),
    };
    // First seen now: it may have been renewed a moment ago, whatever its times say.
    assert_eq!(election.decide(Some(&lease("other", 15, "1")), s(100)), wait(15));
    assert_eq!(election.decide(Some(&lease("other", 15, "1")), s(110)), wait(5));
    // A sign of life.
    assert_eq!(election.decide(Some(&lease("other", 15, "2")), s(114)), wait(15));
    assert_eq!(election.decide(Some(&lease("other", 15, "2")), s(128)), wait(1));
    assert_eq!(
        election.decide(Some(&lease("other", 15, "2")), s(129)),
        Step::Take
    );
}

#[test]
fn the_duration_that_counts_is_the_holders_own() {
    let mut election = Election::new("me");
    election.decide(Some(&lease("other", 60, "1")), s(0));
    assert!(matches!(
        election.decide(Some(&lease("other", 60, "1")), s(59)),
        Step::Wait { .. }
    ));
    assert_eq!(election.decide(Some(&lease("other", 60, "1")), s(60)), Step::Take);
}

#[test]
fn transitions_count_changes_of_the_holder_and_renewals_keep_the_time_of_acquisition() {
    let election = Election::new("me");
    let timing = Timing::default();
    let (early, late) = (
        Timestamp::from_second(1000).unwrap(),
        Timestamp::from_second(2000).unwrap(),
    );
    let created = election.spec(&Step::Create, None, &timing, early);
    assert_eq!(
        (created.lease_transitions, created.lease_duration_seconds),
        (Some(0), Some(15))
    );
    assert_eq!(created.holder_identity.as_deref(), Some("me"));
    let mine = Lease {
        spec: Some(created),
        ..Lease::default()
    };
    let renewed = election.spec(&Step::Renew, Some(&mine), &timing, late);
    assert_eq!(renewed.acquire_time, Some(MicroTime(early)));
    assert_eq!(renewed.renew_time, Some(MicroTime(late)));
    assert_eq!(renewed.lease_transitions, Some(0));
    let taken = election.spec(&Step::Take, Some(&lease("other", 60, "1")), &timing, late);
    assert_eq!(
        (taken.lease_transitions, taken.lease_duration_seconds),
        (Some(4), Some(15))
    );
    assert_eq!(taken.acquire_time, Some(MicroTime(late)));
    let given_back = released(taken, early);
    assert_eq!(given_back.holder_identity.as_deref(), Some(""));
    assert_eq!(
        (given_back.lease_duration_seconds, given_back.lease_transitions),
        (Some(1), Some(4))
    );
}

#[test]
fn timings_that_allow_two_leaders_are_refused() {
    let with = |lease, renew, retry| Timing {
        lease_duration: s(lease),
        renew_deadline: s(renew),
        retry_period: s(retry),
    };
    assert_eq!(Timing::default().check(), Ok(()));
    assert_eq!(with(60, 15, 5).check(), Ok(()), "Flagger's");
    assert_eq!(with(10, 10, 2).check(), Err(TimingError::LeaseTooShort));
    assert_eq!(with(15, 2, 2).check(), Err(TimingError::DeadlineTooShort));
    assert_eq!(with(0, 0, 0).check(), Err(TimingError::Zero));
}

/// One Lease with optimistic concurrency; can be made to fail.
#[derive(Default)]
struct Place {
    lease: Option<Value>,
    version: u64,
    writes: usize,
    reads: usize,
    /// These identities get no answer any more.
    cut_off: Vec<String>,
}

fn client(place: &Arc<Mutex<Place>>, identity: &str) -> kube::Client {
    let (place, identity) = (place.clone(), identity.to_owned());
    crate::client::over_service(tower::service_fn(move |request: Request<Body>| {
        let (place, identity) = (place.clone(), identity.clone());
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            if place.lock().cut_off.contains(&identity) {
                std::future::pending::<()>().await;
            }
            let mut place = place.lock();
            let place = &mut *place;
            let status = |code: u16, reason: &str| {
                (
                    code,
                    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason}),
                )
            };
            let (code, answer) = match (parts.method, &place.lease) {
                (Method::GET, None) => status(404, "NotFound"),
                (Method::GET, Some(lease)) => {
                    place.reads += 1;
                    (200, lease.clone())
                }
                (Method::POST, Some(_)) => status(409, "AlreadyExists"),
                (_, before) => {
                    let mut lease: Value = serde_json::from_slice(&body).unwrap();
                    let (given, current) = (&lease["metadata"]["resourceVersion"], before);
                    if current
                        .as_ref()
                        .is_some_and(|c| c["metadata"]["resourceVersion"] != *given)
                    {
                        status(409, "Conflict")
                    } else {
                        place.version += 1;
                        place.writes += 1;
                        lease["metadata"]["resourceVersion"] = json!(place.version.to_string());
                        place.lease = Some(lease.clone());
                        (200, lease)
                    }
                }
            };
            let body = Full::new(Bytes::from(serde_json::to_vec(&answer).unwrap()));
            Ok::<_, Infallible>(Response::builder().status(code).body(body).unwrap())
        }
    }))
}

struct Replica {
    leads: watch::Receiver<bool>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

fn replica(place: &Arc<Mutex<Place>>, identity: &str) -> Replica {
    let cancel = CancellationToken::new();
    let elector = Elector::new(
        client(place, identity),
        "serin-system",
        "serin",
        identity,
        Timing::default(),
    )
    .unwrap();
    let (leads, task) = elector.start(cancel.clone());
    Replica { leads, cancel, task }
}

fn holder(place: &Arc<Mutex<Place>>) -> String {
    let place = place.lock();
    let holder = place
        .lease
        .as_ref()
        .map(|lease| lease["spec"]["holderIdentity"].clone());
    holder
        .and_then(|holder| holder.as_str().map(str::to_owned))
        .unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn of_two_replicas_one_leads_and_the_other_follows_when_it_ends_in_order() {
    let place = Arc::default();
    let mut first = replica(&place, "first");
    first.leads.wait_for(|leads| *leads).await.unwrap();
    let mut second = replica(&place, "second");
    tokio::time::sleep(s(120)).await;
    assert!(*first.leads.borrow() && !*second.leads.borrow());
    assert_eq!(holder(&place), "first");
    assert!(
        place.lock().reads <= 120 / 2 + 2,
        "a leader renews without reading"
    );

    first.cancel.cancel();
    first.task.await.unwrap();
    assert!(!*first.leads.borrow());
    let stopped = Instant::now();
    second.leads.wait_for(|leads| *leads).await.unwrap();
    assert!(
        stopped + s(3) > Instant::now(),
        "a lease that was given back is not waited for"
    );
    assert_eq!(holder(&place), "second");
    assert_eq!(
        place.lock().lease.as_ref().unwrap()["spec"]["leaseTransitions"],
        1
    );
    second.cancel.cancel();
    second.task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_cut_off_stops_before_the_next_one_begins() {
    let place: Arc<Mutex<Place>> = Arc::default();
    let mut first = replica(&place, "first");
    first.leads.wait_for(|leads| *leads).await.unwrap();
    let mut second = replica(&place, "second");
    tokio::time::sleep(s(30)).await;
    place.lock().cut_off.push("first".into());
    let silent = Instant::now();
    first.leads.wait_for(|leads| !*leads).await.unwrap();
    assert!(!*second.leads.borrow(), "two leaders");
    let stopped = silent.elapsed();
    assert!(stopped <= Timing::default().renew_deadline, "{stopped:?}");
    second.leads.wait_for(|leads| *leads).await.unwrap();
    let taken = silent.elapsed();
    // The lease, what was left of the last renewal, one jittered try.
    assert!(taken <= s(15 + 3), "{taken:?}");
    // Back again, it sees that it is not the leader any more.
    place.lock().cut_off.clear();
    tokio::time::sleep(s(60)).await;
    assert!(!*first.leads.borrow() && *second.leads.borrow());
    assert_eq!(holder(&place), "second");
}

#[tokio::test(start_paused = true)]
async fn of_several_that_find_an_expired_lease_exactly_one_leads() {
    let place: Arc<Mutex<Place>> = Arc::default();
    let replicas: Vec<Replica> = (0..5).map(|i| replica(&place, &format!("r{i}"))).collect();
    for _ in 0..40 {
        tokio::time::sleep(s(1)).await;
        let leading = replicas.iter().filter(|replica| *replica.leads.borrow()).count();
        assert!(leading <= 1, "{leading} leaders");
    }
    let leading: Vec<usize> = (0..5).filter(|i| *replicas[*i].leads.borrow()).collect();
    assert_eq!(leading.len(), 1);
    assert_eq!(holder(&place), format!("r{}", leading[0]));
}

#[tokio::test]
async fn in_standalone_one_process_leads_without_a_lease() {
    let mut leads = always();
    assert!(*leads.wait_for(|leads| *leads).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn what_acts_ends_before_the_next_term_begins_and_goes_on_when_it_leads_again() {
    let (sender, leads) = watch::channel(false);
    let cancel = CancellationToken::new();
    let terms = Arc::new(Mutex::new(Vec::new()));
    let told = terms.clone();
    let stop = cancel.clone();
    let task = tokio::spawn(async move {
        while_leading(leads, &stop, |term| {
            let told = told.clone();
            async move {
                told.lock().push("begins");
                term.cancelled().await;
                // The last write of the term.
                tokio::time::sleep(s(3)).await;
                told.lock().push("ends");
                Ok::<_, Infallible>(())
            }
        })
        .await
    });
    tokio::time::sleep(s(1)).await;
    assert!(terms.lock().is_empty());
    sender.send_replace(true);
    tokio::time::sleep(s(1)).await;
    sender.send_replace(false);
    tokio::time::sleep(s(1)).await;
    sender.send_replace(true);
    tokio::time::sleep(s(1)).await;
    assert_eq!(*terms.lock(), ["begins"], "the first term has not ended yet");
    tokio::time::sleep(s(5)).await;
    assert_eq!(*terms.lock(), ["begins", "ends", "begins"]);
    cancel.cancel();
    task.await.unwrap().unwrap();
    assert_eq!(*terms.lock(), ["begins", "ends", "begins", "ends"]);
}

#[tokio::test(start_paused = true)]
async fn a_failure_while_leading_is_told_and_one_process_alone_acts_at_once() {
    let cancel = CancellationToken::new();
    let outcome = while_leading(always(), &cancel, |_| async { Err::<(), _>("broken") }).await;
    assert_eq!(outcome, Err("broken"));
}
