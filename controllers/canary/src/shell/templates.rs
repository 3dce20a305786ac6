//! Asks metric providers when a check is due, and keeps their answers. Nothing here is waited for by a decision.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use serin_analysis::judge::values::{Rule, Values};
use serin_crds::flagger::{Canary, CanaryPhase, CanaryStatus, MetricProviderType};
use serin_providers::template::{self, Model};
use serin_providers::{Ask, Config, Connector, Credentials};
use tokio::task::JoinSet;

use super::Shared;
use super::observe::Seen;
use crate::decide::VALUES_STATE;
use crate::templates::{self, Outcome, Reading, Source, TemplatePlan};

/// The providers' answers for one Canary. Dropping it ends what is being asked.
#[derive(Default)]
pub(crate) struct Templates {
    plans: Vec<TemplatePlan>,
    readings: Vec<Option<Reading>>,
    in_flight: BTreeSet<usize>,
    asking: JoinSet<(usize, Answers)>,
    /// The run that `values` belong to.
    run: Option<Timestamp>,
    /// What the templates' own rules have seen, by metric.
    values: BTreeMap<String, Values>,
}

/// A question, ready to be asked.
struct Question {
    config: Config,
    query: String,
    /// The same for the primary, where the template's rule compares.
    primary_query: Option<String>,
    rule: Option<Rule>,
    namespace: String,
}

/// What came back.
struct Answers {
    asked_at: Timestamp,
    outcome: Outcome,
    primary: Option<Outcome>,
    rule: Option<Rule>,
}

impl Templates {
    /// Asks for what is due, and shows the answers so far.
    pub(crate) fn observe(
        &mut self,
        shared: &Shared,
        seen: &mut Seen,
        status: &CanaryStatus,
        now: Timestamp,
    ) {
        let running = status.phase == Some(CanaryPhase::Progressing) && !seen.plan.suspend;
        if !running || seen.plan.templates.is_empty() {
            if !self.plans.is_empty() {
                *self = Self::default();
            }
            return;
        }
        if self.plans != seen.plan.templates {
            *self = Self {
                plans: seen.plan.templates.clone(),
                readings: vec![None; seen.plan.templates.len()],
                ..Self::default()
            };
        }
        self.keep_run(status);
        let interval = SignedDuration::try_from(seen.plan.interval).unwrap_or(SignedDuration::MAX);
        let due = templates::opened(status, seen.observed.measured.since)
            .and_then(|opened| opened.checked_add(interval).ok())
            .filter(|due| now >= *due);
        if let Some(due) = due {
            for index in 0..self.plans.len() {
                let answered = templates::answered(self.readings[index].as_ref(), due).is_some();
                if !answered && self.in_flight.insert(index) {
                    self.ask(shared, &seen.canary, index, now);
                }
            }
        }
        seen.observed.readings.clone_from(&self.readings);
        seen.observed.values.clone_from(&self.values);
    }

    /// Begins with what the status kept of this run's values.
    fn keep_run(&mut self, status: &CanaryStatus) {
        let run = status.run.as_ref();
        let started = run.and_then(|run| run.started_at.as_ref()).map(|at| at.0);
        if self.run == started && started.is_some() {
            return;
        }
        self.run = started;
        self.readings.iter_mut().for_each(|reading| *reading = None);
        self.values = run
            .and_then(|run| run.evidence.as_ref())
            .and_then(|evidence| evidence.judges.get(VALUES_STATE))
            .and_then(|state| serde_json::from_value(state.clone()).ok())
            .unwrap_or_default();
    }

    fn ask(&mut self, shared: &Shared, canary: &Canary, index: usize, now: Timestamp) {
        let plan = &self.plans[index];
        let question = question(shared, canary, plan);
        let connector = shared.providers.clone();
        let (window, asker) = (plan.window, format!("{}-{}", canary.name_any(), plan.name));
        self.asking.spawn(async move {
            let failed = |reason| Answers {
                asked_at: now,
                outcome: Outcome::Failed(reason),
                primary: None,
                rule: None,
            };
            let question = match question {
                Ok(question) => question,
                Err(reason) => return (index, failed(reason)),
            };
            let ask = |query| Ask {
                query,
                interval: window,
                now,
                namespace: &question.namespace,
                asker: &asker,
            };
            let canary = outcome(&connector, &question.config, &ask(&question.query)).await;
            let primary = match &question.primary_query {
                Some(query) => Some(outcome(&connector, &question.config, &ask(query)).await),
                None => None,
            };
            let answers = Answers {
                asked_at: now,
                outcome: canary,
                primary,
                rule: question.rule,
            };
            (index, answers)
        });
    }

    /// Waits for the next answer.
    pub(crate) async fn next(&mut self) {
        match self.asking.join_next().await {
            Some(Ok((index, answers))) => {
                self.in_flight.remove(&index);
                let reading = self.judged(index, answers);
                if let Some(place) = self.readings.get_mut(index) {
                    *place = Some(reading);
                }
            }
            // It panicked: everything is asked again.
            Some(Err(_)) => self.in_flight.clear(),
            None => std::future::pending().await,
        }
    }
}

impl Templates {
    /// Gives the values to the template's own rule.
    fn judged(&mut self, index: usize, answers: Answers) -> Reading {
        let Answers {
            asked_at,
            mut outcome,
            primary,
            rule,
        } = answers;
        let mut verdict = None;
        if let (Some(rule), Some(plan), Outcome::Value(value)) = (&rule, self.plans.get(index), &outcome) {
            let value = *value;
            match primary {
                Some(Outcome::NoValues(why)) => outcome = Outcome::NoValues(format!("primary: {why}")),
                Some(Outcome::Failed(why)) => outcome = Outcome::Failed(format!("primary: {why}")),
                Some(Outcome::Value(primary)) => {
                    let values = self.values.entry(plan.name.clone()).or_default();
                    values.observe(value, Some(primary), rule);
                    verdict = Some(values.verdict(rule));
                }
                None => {
                    let values = self.values.entry(plan.name.clone()).or_default();
                    values.observe(value, None, rule);
                    verdict = Some(values.verdict(rule));
                }
            }
        }
        Reading {
            asked_at,
            outcome,
            verdict,
            compares: rule.as_ref().is_some_and(Rule::compares),
        }
    }
}

async fn outcome(connector: &Connector, config: &Config, ask: &Ask<'_>) -> Outcome {
    match Box::pin(connector.query(config, ask)).await {
        Ok(value) => Outcome::Value(value),
        Err(error) if error.is_no_values() => Outcome::NoValues(error.to_string()),
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// Reads template and Secret from the caches and renders the query.
fn question(shared: &Shared, canary: &Canary, plan: &TemplatePlan) -> Result<Question, String> {
    let own = canary.namespace().unwrap_or_default();
    let model = model(canary, plan);
    let (name, namespace) = match &plan.source {
        Source::Inline { address, query } => {
            let config = Config {
                kind: MetricProviderType::Prometheus,
                address: Some(address.clone()),
                ..Config::default()
            };
            let query = template::render(query, &model).map_err(|error| error.to_string())?;
            return Ok(Question {
                config,
                query,
                primary_query: None,
                rule: None,
                namespace: own,
            });
        }
        Source::Template { namespace, name } => (name, namespace.clone().unwrap_or_else(|| own.clone())),
    };
    if namespace != own && shared.context.options.no_cross_namespace_refs {
        return Err(format!(
            "can't access metric template {name}.{namespace}, cross-namespace references are blocked"
        ));
    }
    let found = shared.caches.templates.get(Some(&namespace), name);
    let found = found.ok_or_else(|| format!("MetricTemplate {namespace}/{name} does not exist"))?;
    let provider = &found.spec.provider;
    let credentials = match &provider.secret_ref {
        Some(reference) => Some(credentials(shared, &namespace, &reference.name)?),
        None => None,
    };
    let render = |text: &str| {
        template::render(text, &model).map_err(|error| format!("MetricTemplate {namespace}/{name}: {error}"))
    };
    let address = match (&provider.address, &provider.r#type) {
        (Some(address), MetricProviderType::Web) => Some(render(address)?),
        (address, _) => address.clone(),
    };
    let config = Config {
        kind: provider.r#type.clone(),
        address,
        headers: provider.headers.clone(),
        region: provider.region.clone(),
        insecure_skip_verify: provider.insecure_skip_verify.unwrap_or(false),
        credentials,
    };
    let told = |reason: String| format!("MetricTemplate {namespace}/{name}: {reason}");
    let rule = match &found.spec.comparison {
        Some(comparison) => Some(templates::rule(comparison, plan.range).map_err(told)?),
        None => None,
    };
    let query = render(&found.spec.query)?;
    let mut primary_query = None;
    if rule.as_ref().is_some_and(Rule::compares) {
        let primary = Model {
            target: format!("{}-primary", model.target),
            ..model.clone()
        };
        let text = template::render(&found.spec.query, &primary).map_err(|error| told(error.to_string()))?;
        if text == query {
            return Err(told(
                "the query is the same for canary and primary; it must contain {{ target }}".to_owned(),
            ));
        }
        primary_query = Some(text);
    }
    Ok(Question {
        config,
        query,
        primary_query,
        rule,
        namespace,
    })
}

fn credentials(shared: &Shared, namespace: &str, name: &str) -> Result<Credentials, String> {
    let secret = shared.caches.secrets.get(Some(namespace), name);
    let secret =
        secret.ok_or_else(|| format!("Secret {namespace}/{name} of the metric provider does not exist"))?;
    let data = secret.data.iter().flatten();
    Ok(data.map(|(key, value)| (key.clone(), value.0.clone())).collect())
}

/// Flagger's template model.
fn model(canary: &Canary, plan: &TemplatePlan) -> Model {
    let spec = &canary.spec;
    let target = spec.target_ref.name.clone();
    let named = spec.service.as_ref().and_then(|service| service.name.clone());
    Model {
        name: canary.name_any(),
        namespace: canary.namespace().unwrap_or_default(),
        service: named
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| target.clone()),
        ingress: spec
            .ingress_ref
            .as_ref()
            .map_or_else(|| target.clone(), |reference| reference.name.clone()),
        route: spec
            .route_ref
            .as_ref()
            .map_or_else(|| target.clone(), |reference| reference.name.clone()),
        target,
        interval: plan.interval.clone(),
        variables: plan.variables.clone(),
    }
}
