//! Virtual clusters: kinds of requests of a virtual host that are counted apart, by Envoy's names
//! (`vhost.<host>.vcluster.<name>.upstream_rq_*`), and named in access logs.

use std::sync::Arc;
use std::time::Duration;

use serin_xds::pb::envoy::config::route::v3 as route;

use super::matchers::{HeaderMatch, RequestView};
use super::route::Context;
use crate::error::{Refusal, Within};
use crate::policy::stats::{Counter, Distribution};

/// Envoy's name for what fits none, where there are some.
const OTHER: &str = "other";

/// See the module.
#[derive(Debug)]
pub struct VirtualCluster {
    matchers: Box<[HeaderMatch]>,
    /// What is counted of it.
    pub counted: Arc<Counted>,
}

/// What is counted of a virtual cluster.
#[derive(Debug)]
pub struct Counted {
    /// Its name; `None` for the rest.
    name: Option<Box<str>>,
    total: Arc<Counter>,
    classes: [Arc<Counter>; 5],
    time: Arc<Distribution>,
}

impl VirtualCluster {
    /// Those of a virtual host, and one for what fits none of them.
    pub(super) fn compile_all(
        from: &route::VirtualHost,
        context: &mut Context<'_>,
    ) -> Result<Box<[Self]>, Refusal> {
        if from.virtual_clusters.is_empty() {
            return Ok(Box::default());
        }
        let mut out = Vec::with_capacity(from.virtual_clusters.len() + 1);
        for (index, one) in from.virtual_clusters.iter().enumerate() {
            let path = format!("virtual_clusters[{index}]");
            if one.name.is_empty() || one.headers.is_empty() {
                return Err(Refusal::new(path, "needs a name and headers"));
            }
            let matchers = one.headers.iter().map(HeaderMatch::compile);
            out.push(Self {
                matchers: matchers.collect::<Result<_, _>>().within(path)?,
                counted: Arc::new(Counted::new(&from.name, Some(&one.name), context)),
            });
        }
        out.push(Self {
            matchers: Box::default(),
            counted: Arc::new(Counted::new(&from.name, None, context)),
        });
        Ok(out.into())
    }

    /// The first that a request fits.
    pub fn find<'a>(all: &'a [Self], request: &RequestView<'_>) -> Option<&'a Arc<Counted>> {
        all.iter()
            .find(|one| one.matchers.iter().all(|matcher| matcher.matches(request)))
            .map(|one| &one.counted)
    }
}

impl Counted {
    fn new(host: &str, name: Option<&str>, context: &mut Context<'_>) -> Self {
        let (workers, registry) = context.counters();
        let labels = [
            ("envoy_virtual_cluster", name.unwrap_or(OTHER)),
            ("envoy_virtual_host", host),
        ];
        let [own, of_host] = labels;
        Self {
            name: name.map(Into::into),
            total: registry.counter(workers, "envoy_vhost_vcluster_upstream_rq_total", &labels),
            classes: ["1", "2", "3", "4", "5"].map(|class| {
                let labels = [("envoy_response_code_class", class), own, of_host];
                registry.counter(workers, "envoy_vhost_vcluster_upstream_rq_xx", &labels)
            }),
            time: registry.distribution(workers, "envoy_vhost_vcluster_upstream_rq_time", &labels),
        }
    }

    /// Its name, if it is not the rest.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Counts a request that has ended.
    pub fn count(&self, code: u16, took: Duration, worker: usize) {
        self.total.add(worker);
        self.time.observe(worker, took);
        let class = usize::from(code / 100).checked_sub(1);
        if let Some(counter) = class.and_then(|class| self.classes.get(class)) {
            counter.add(worker);
        }
    }
}
