//! Leader election over a Lease (`coordination.k8s.io/v1`), with the fields and rules of client-go's `leaderelection`.
//!
//! Several replicas may run; one acts. Each reads the Lease, and [`Election::decide`] (pure: the time is an argument) says
//! whether to create it, to take it, to renew it or to wait. [`Elector`] is the loop around it. Who leads is a
//! [`watch::Receiver<bool>`]; whoever acts waits for `true` and stops at `false`.
//!
//! As in client-go, a Lease is taken for expired when its record has not *changed* for `leaseDurationSeconds` by the
//! observer's own clock: the times inside it are for people, so that clocks that disagree cannot make two leaders. A
//! leader that could not renew for [`Timing::renew_deadline`] says `false` by itself; that is shorter than the lease, so
//! it has stopped before another one may begin. Every write carries the `resourceVersion` that was read: of two that take
//! an expired Lease at once, one loses with a conflict.
//!
//! An orderly end gives the Lease back (empty holder, one second), so that the next leader begins at once.
//!
//! In standalone there is one process: [`always`] leads without a Lease and without a request.
//!
//! Limits: between the expiry of `renew_deadline` and `false` being acted upon stands whatever the actor is in the middle of; a write
//! that is on its way then is made idempotent by server-side apply, as everything that controllers write is.

use std::future::Future;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

#[cfg(test)]
mod tests;

/// How long things take. client-go's users mostly have 15 s, 10 s, 2 s; Flagger 60 s, 15 s, 5 s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// `spec.leaseDurationSeconds`: how long others wait for a leader that fell silent. Whole seconds.
    pub lease_duration: Duration,
    /// A leader that could not renew for this long stops; shorter than the lease.
    pub renew_deadline: Duration,
    /// Between two tries, for leaders and for those that wait.
    pub retry_period: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }
}

/// Timings that would make two leaders, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TimingError {
    /// Others would take over while the leader still acts.
    #[error("the lease must last longer than its renewal may take (leaseDuration > renewDeadline)")]
    LeaseTooShort,
    /// One failed try would already be the end.
    #[error("the renewal must have time for a second try (renewDeadline > 1.2 x retryPeriod)")]
    DeadlineTooShort,
    /// `leaseDurationSeconds` would be 0.
    #[error("a lease lasts at least one second, and its retry period is longer than nothing")]
    Zero,
}

impl Timing {
    /// Checks what client-go's `NewLeaderElector` checks.
    pub fn check(&self) -> Result<(), TimingError> {
        if self.lease_duration < Duration::from_secs(1) || self.retry_period.is_zero() {
            Err(TimingError::Zero)
        } else if self.lease_duration <= self.renew_deadline {
            Err(TimingError::LeaseTooShort)
        } else if self.renew_deadline <= self.retry_period.mul_f64(JITTER) {
            Err(TimingError::DeadlineTooShort)
        } else {
            Ok(())
        }
    }
}

/// client-go's `JitterFactor`: those that wait try after up to this many retry periods.
const JITTER: f64 = 1.2;

/// Longest that one request may take.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

/// What a Lease says; its times are not part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    resource_version: String,
    holder: String,
    duration: Duration,
    transitions: i32,
}

impl Record {
    fn of(lease: &Lease) -> Self {
        let spec = lease.spec.clone().unwrap_or_default();
        let seconds = u64::try_from(spec.lease_duration_seconds.unwrap_or(0)).unwrap_or(0);
        Self {
            resource_version: lease.metadata.resource_version.clone().unwrap_or_default(),
            holder: spec.holder_identity.unwrap_or_default(),
            duration: Duration::from_secs(seconds),
            transitions: spec.lease_transitions.unwrap_or(0),
        }
    }
}

/// What to do about the Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is none: create it.
    Create,
    /// It is free or expired: replace the record.
    Take,
    /// It is ours: move its `renewTime`.
    Renew,
    /// Somebody else has it.
    Wait {
        /// `spec.holderIdentity`.
        holder: String,
        /// After this much longer without a sign of life it counts as expired.
        expires_in: Duration,
    },
}

/// The rules. Times are since any fixed moment of a clock that never goes back.
#[derive(Debug)]
pub struct Election {
    identity: String,
    seen: Option<(Record, Duration)>,
}

impl Election {
    /// `identity` tells this replica from all others, also from its own former process.
    pub fn new(identity: impl Into<String>) -> Self {
        Self {
            identity: identity.into(),
            seen: None,
        }
    }

    /// What to do about the Lease as it was just read.
    pub fn decide(&mut self, lease: Option<&Lease>, now: Duration) -> Step {
        let Some(lease) = lease else {
            self.seen = None;
            return Step::Create;
        };
        let record = Record::of(lease);
        let since = match &self.seen {
            Some((seen, since)) if *seen == record => *since,
            _ => now,
        };
        let expires = since + record.duration;
        let step = if record.holder == self.identity {
            Step::Renew
        } else if record.holder.is_empty() || expires <= now {
            Step::Take
        } else {
            Step::Wait {
                holder: record.holder.clone(),
                expires_in: expires.saturating_sub(now),
            }
        };
        self.seen = Some((record, since));
        step
    }

    /// The Lease's specification after a step of ours; `before` is what was read.
    fn spec(&self, step: &Step, before: Option<&Lease>, timing: &Timing, at: Timestamp) -> LeaseSpec {
        let old = before.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let transitions = old.lease_transitions.unwrap_or(0);
        let at = Some(MicroTime(at));
        let (acquired, transitions) = match step {
            Step::Renew => (old.acquire_time.or_else(|| at.clone()), transitions),
            Step::Create => (at.clone(), 0),
            Step::Take | Step::Wait { .. } => (at.clone(), transitions.saturating_add(1)),
        };
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(timing.lease_duration.as_secs()).ok(),
            acquire_time: acquired,
            renew_time: at,
            lease_transitions: Some(transitions),
            ..old
        }
    }
}

/// Leads without a Lease: one process, nobody to share with.
pub fn always() -> watch::Receiver<bool> {
    // The value stays when its sender is gone.
    watch::channel(true).1
}

/// Runs `act` whenever this replica leads, with a token that is cancelled when it does not any more, and waits for its end
/// before it may lead again. Ends with `cancel`, with the first failure, or when `act` ends by itself while leading.
pub async fn while_leading<F, E>(
    mut leads: watch::Receiver<bool>,
    cancel: &CancellationToken,
    mut act: impl FnMut(CancellationToken) -> F,
) -> Result<(), E>
where
    F: Future<Output = Result<(), E>>,
{
    loop {
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            // A sender that is gone leaves its last word: `always` is such a one.
            led = async { leads.wait_for(|leads| *leads).await.is_ok() } => if !led { return Ok(()) },
        }
        let term = cancel.child_token();
        let lost = async {
            if leads.wait_for(|leads| !*leads).await.is_err() {
                // Nobody is left to say otherwise: leads for ever.
                std::future::pending::<()>().await;
            }
        };
        let acting = act(term.clone());
        tokio::pin!(acting, lost);
        tokio::select! {
            ended = &mut acting => return ended,
            () = &mut lost => {}
        }
        term.cancel();
        acting.await?;
    }
}

/// Takes part in the election of one Lease.
#[derive(Debug)]
pub struct Elector {
    api: Api<Lease>,
    name: String,
    namespace: String,
    timing: Timing,
    election: Election,
    leads: watch::Sender<bool>,
}

impl Elector {
    /// An elector for the Lease `namespace/name`.
    pub fn new(
        client: kube::Client,
        namespace: &str,
        name: &str,
        identity: impl Into<String>,
        timing: Timing,
    ) -> Result<Self, TimingError> {
        timing.check()?;
        Ok(Self {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            timing,
            election: Election::new(identity),
            leads: watch::channel(false).0,
        })
    }

    /// Runs until `cancel` fires and gives the Lease back then. The task ends by itself.
    pub fn start(self, cancel: CancellationToken) -> (watch::Receiver<bool>, JoinHandle<()>) {
        let receiver = self.leads.subscribe();
        (receiver, tokio::spawn(self.run(cancel)))
    }

    async fn run(mut self, cancel: CancellationToken) {
        let started = Instant::now();
        let mut renewed: Option<Instant> = None;
        let mut lease: Option<Lease> = None;
        loop {
            let asked = Instant::now();
            // A leader's try may not outlast its right to lead.
            let until = renewed.map_or(asked + REQUEST_DEADLINE, |at| {
                (at + self.timing.renew_deadline).min(asked + REQUEST_DEADLINE)
            });
            let outcome = tokio::select! {
                () = cancel.cancelled() => break,
                outcome = tokio::time::timeout_at(until, self.once(lease.take(), asked.duration_since(started))) => outcome,
            };
            match outcome {
                Ok(Ok(Some(held))) => {
                    // From the moment in which the write was begun: by others' clocks it cannot have been earlier.
                    renewed = Some(asked);
                    lease = Some(held);
                    if !self.leads.send_replace(true) {
                        info!(lease = %self.name, namespace = %self.namespace, "leading");
                    }
                }
                Ok(Ok(None)) => {
                    renewed = None;
                    self.step_down("another replica holds the lease");
                }
                Ok(Err(error)) => self.failed(&error.to_string()),
                Err(_) => self.failed("no answer in time"),
            }
            if let Some(at) = renewed
                && Instant::now() >= at + self.timing.renew_deadline
            {
                renewed = None;
                self.step_down("the lease could not be renewed in time");
            }
            let pause = match renewed {
                Some(_) => self.timing.retry_period,
                None => self
                    .timing
                    .retry_period
                    .mul_f64(1.0 + (JITTER - 1.0) * jitter(&self.election.identity, started.elapsed())),
            };
            // A leader whose deadline comes before the next try stops at its deadline.
            let wake = renewed.map_or(Instant::now() + pause, |at| {
                (Instant::now() + pause).min(at + self.timing.renew_deadline)
            });
            tokio::select! {
                () = cancel.cancelled() => break,
                () = tokio::time::sleep_until(wake) => {}
            }
        }
        let led = *self.leads.borrow();
        self.step_down("asked to stop");
        if led {
            self.release(lease).await;
        }
    }

    /// One try. `Some` is the Lease as we hold it now. What the last try returned saves the read, as in client-go; a conflict
    /// then shows that it was not enough.
    async fn once(&mut self, held: Option<Lease>, now: Duration) -> Result<Option<Lease>, kube::Error> {
        let known = match held {
            Some(lease) => Some(lease),
            None => self.api.get_opt(&self.name).await?,
        };
        let step = self.election.decide(known.as_ref(), now);
        if let Step::Wait { holder, expires_in } = &step {
            debug!(lease = %self.name, holder, ?expires_in, "another replica leads");
            return Ok(None);
        }
        let spec = self
            .election
            .spec(&step, known.as_ref(), &self.timing, Timestamp::now());
        let written = match known {
            None => {
                let lease = Lease {
                    metadata: ObjectMeta {
                        name: Some(self.name.clone()),
                        namespace: Some(self.namespace.clone()),
                        ..ObjectMeta::default()
                    },
                    spec: Some(spec),
                };
                self.api.create(&PostParams::default(), &lease).await
            }
            Some(mut lease) => {
                lease.spec = Some(spec);
                self.api.replace(&self.name, &PostParams::default(), &lease).await
            }
        };
        match written {
            Ok(lease) => {
                self.election.decide(Some(&lease), now);
                Ok(Some(lease))
            }
            Err(error) => Err(error),
        }
    }

    fn failed(&self, reason: &str) {
        warn!(lease = %self.name, namespace = %self.namespace, reason, "the lease could not be read or written; it is tried again");
    }

    fn step_down(&self, reason: &str) {
        if self.leads.send_replace(false) {
            info!(lease = %self.name, namespace = %self.namespace, reason, "not leading any more");
        }
    }

    async fn release(&self, held: Option<Lease>) {
        let write = async {
            let lease = match held {
                Some(lease) => Some(lease),
                None => self.api.get_opt(&self.name).await?,
            };
            let Some(mut lease) = lease.filter(|lease| Record::of(lease).holder == self.election.identity)
            else {
                return Ok(());
            };
            lease.spec = Some(released(lease.spec.take().unwrap_or_default(), Timestamp::now()));
            let written = self.api.replace(&self.name, &PostParams::default(), &lease).await;
            written.map(|_| ())
        };
        match tokio::time::timeout(REQUEST_DEADLINE, write).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(lease = %self.name, %error, "the lease was not given back; it expires"),
            Err(_) => warn!(lease = %self.name, "the lease was not given back in time; it expires"),
        }
    }
}

/// As client-go's `release`: nobody holds it, for one second.
fn released(old: LeaseSpec, at: Timestamp) -> LeaseSpec {
    let at = Some(MicroTime(at));
    LeaseSpec {
        holder_identity: Some(String::new()),
        lease_duration_seconds: Some(1),
        acquire_time: at.clone(),
        renew_time: at,
        ..old
    }
}

/// Between 0 and 1, different for each replica and try: enough to keep two that wait from trying in step.
fn jitter(identity: &str, elapsed: Duration) -> f64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (identity, elapsed.as_nanos()).hash(&mut hasher);
    f64::from(u16::try_from(hasher.finish() & 0xffff).unwrap_or(0)) / f64::from(u16::MAX)
}
