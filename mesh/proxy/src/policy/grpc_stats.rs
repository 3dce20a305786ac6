//! Counters of gRPC calls per cluster, service and method, by Envoy's names (`cluster.<name>.grpc.<service>.<method>.*`).
//!
//! One table for all filters, a part of it per worker, so that counting waits for nobody. The number of methods is
//! bounded: what callers make up beyond `MAX_METHODS` is counted without a service and method.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serin_xds::pb::envoy::extensions::filters::http::grpc_stats::v3 as pb;

use crate::error::Refusal;
use crate::metrics::collect::{Family, Value};
use crate::metrics::histogram::{Histogram, HistogramValue};

/// Methods that one worker keeps apart.
const MAX_METHODS: usize = 1024;
/// Statuses that gRPC knows.
const STATUSES: usize = 17;

static NAMES: [&str; STATUSES] = [
    "envoy_cluster_grpc_0",
    "envoy_cluster_grpc_1",
    "envoy_cluster_grpc_2",
    "envoy_cluster_grpc_3",
    "envoy_cluster_grpc_4",
    "envoy_cluster_grpc_5",
    "envoy_cluster_grpc_6",
    "envoy_cluster_grpc_7",
    "envoy_cluster_grpc_8",
    "envoy_cluster_grpc_9",
    "envoy_cluster_grpc_10",
    "envoy_cluster_grpc_11",
    "envoy_cluster_grpc_12",
    "envoy_cluster_grpc_13",
    "envoy_cluster_grpc_14",
    "envoy_cluster_grpc_15",
    "envoy_cluster_grpc_16",
];

/// Cluster, and service and method where they are kept apart.
type Key = (Arc<str>, Option<(Box<str>, Box<str>)>);

#[derive(Clone, Debug, Default)]
struct Counts {
    total: u64,
    success: u64,
    failure: u64,
    requests: u64,
    responses: u64,
    statuses: [u64; STATUSES],
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.total += other.total;
        self.success += other.success;
        self.failure += other.failure;
        self.requests += other.requests;
        self.responses += other.responses;
        for (own, more) in self.statuses.iter_mut().zip(other.statuses) {
            *own += more;
        }
    }
}

/// What is kept of a method.
#[derive(Debug, Default)]
struct Kept {
    counts: Counts,
    /// How long endpoints took, where the filter measures that.
    time: Option<Box<Histogram>>,
}

type Part = Mutex<HashMap<Key, Kept, foldhash::fast::RandomState>>;

/// All counters. Owned by whoever compiles the configuration.
#[derive(Debug, Default)]
pub struct Table {
    workers: Mutex<Arc<[Part]>>,
}

impl Table {
    /// The parts, one per worker.
    fn parts(&self, workers: usize) -> Arc<[Part]> {
        let mut parts = self.workers.lock();
        if parts.is_empty() {
            *parts = (0..workers.max(1)).map(|_| Part::default()).collect();
        }
        parts.clone()
    }

    /// What was counted.
    pub fn collect(&self) -> Vec<Family> {
        let mut sums: BTreeMap<Key, (Counts, Option<HistogramValue>)> = BTreeMap::new();
        for part in self.workers.lock().iter() {
            for (key, kept) in &*part.lock() {
                let (counts, time) = sums.entry(key.clone()).or_default();
                counts.add(&kept.counts);
                if let Some(more) = &kept.time {
                    more.read(time.get_or_insert_default());
                }
            }
        }
        let mut families: BTreeMap<&'static str, Family> = BTreeMap::new();
        for ((cluster, method), (counts, time)) in sums {
            let mut labels = vec![("envoy_cluster_name", cluster.to_string())];
            if let Some((service, method)) = method {
                labels.push(("envoy_grpc_bridge_service", service.into()));
                labels.push(("envoy_grpc_bridge_method", method.into()));
            }
            let always = [
                ("envoy_cluster_grpc_total", counts.total),
                ("envoy_cluster_grpc_success", counts.success),
                ("envoy_cluster_grpc_failure", counts.failure),
                ("envoy_cluster_grpc_request_message_count", counts.requests),
                ("envoy_cluster_grpc_response_message_count", counts.responses),
            ];
            let seen = NAMES
                .into_iter()
                .zip(counts.statuses)
                .filter(|(_, count)| *count > 0);
            let counters = always.into_iter().chain(seen);
            let values = counters
                .map(|(name, count)| (name, Value::Counter(count as f64)))
                .chain(time.map(|time| {
                    (
                        "envoy_cluster_grpc_upstream_rq_time",
                        Value::Histogram(Box::new(time)),
                    )
                }));
            for (name, value) in values {
                families
                    .entry(name)
                    .or_insert_with(|| Family {
                        name,
                        help: "gRPC calls, by the gRPC stats filter.",
                        metrics: Vec::new(),
                    })
                    .metrics
                    .push((labels.clone(), value));
            }
        }
        families.into_values().collect()
    }
}

/// Which methods are kept apart.
#[derive(Debug)]
enum Methods {
    None,
    All,
    /// By service; a service without methods stands for none of them.
    Listed(HashMap<Box<str>, Box<[Box<str>]>>),
}

/// The compiled filter.
#[derive(Debug)]
pub struct GrpcStats {
    methods: Methods,
    replace_dots: bool,
    measures: bool,
    parts: Arc<[Part]>,
}

/// Messages of a body, by the length before each of them.
#[derive(Debug, Default)]
pub struct Messages {
    head: [u8; 5],
    have: usize,
    left: usize,
    /// How many have begun.
    pub count: u64,
}

impl Messages {
    /// The next bytes of the body.
    pub fn feed(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.left > 0 {
                let skip = self.left.min(data.len());
                self.left -= skip;
                data = &data[skip..];
                continue;
            }
            let take = (self.head.len() - self.have).min(data.len());
            self.head[self.have..self.have + take].copy_from_slice(&data[..take]);
            self.have += take;
            data = &data[take..];
            if self.have == self.head.len() {
                let [_, length @ ..] = self.head;
                self.left = u32::from_be_bytes(length) as usize;
                self.have = 0;
                self.count += 1;
            }
        }
    }
}

/// What is known of a call that has ended.
#[derive(Debug)]
pub struct Call<'a> {
    /// The cluster that it went to.
    pub cluster: &'a Arc<str>,
    /// `/package.Service/Method`.
    pub path: &'a str,
    /// gRPC status; a call without one is not counted.
    pub status: Option<u8>,
    /// Messages of the client.
    pub requests: u64,
    /// Messages of the server.
    pub responses: u64,
    /// From the last byte that the endpoint was sent to the last that it answered.
    pub took: Option<Duration>,
}

impl GrpcStats {
    /// Compiles the message.
    pub(crate) fn compile(from: &pb::FilterConfig, workers: usize, table: &Table) -> Result<Self, Refusal> {
        use pb::filter_config::PerMethodStatSpecifier as Spec;
        let methods = match &from.per_method_stat_specifier {
            None => Methods::None,
            Some(Spec::StatsForAllMethods(all)) if all.value => Methods::All,
            Some(Spec::StatsForAllMethods(_)) => Methods::None,
            Some(Spec::IndividualMethodStatsAllowlist(list)) => Methods::Listed(
                list.services
                    .iter()
                    .map(|service| {
                        let methods = service.method_names.iter().map(|name| name.as_str().into());
                        (service.name.as_str().into(), methods.collect())
                    })
                    .collect(),
            ),
        };
        Ok(Self {
            methods,
            replace_dots: from.replace_dots_in_grpc_service_name,
            measures: from.enable_upstream_stats,
            parts: table.parts(workers),
        })
    }

    /// Counts a call that has ended.
    pub fn count(&self, call: &Call<'_>, worker: usize) {
        let (Some(status), Some(part)) = (call.status, self.parts.get(worker)) else {
            return;
        };
        let named = call.path.strip_prefix('/').and_then(|path| path.split_once('/'));
        let apart = named.filter(|(service, method)| match &self.methods {
            Methods::None => false,
            Methods::All => true,
            Methods::Listed(services) => services
                .get(*service)
                .is_some_and(|methods| methods.iter().any(|own| &**own == *method)),
        });
        let apart = apart.map(|(service, method)| {
            let service = if self.replace_dots {
                service.replace('.', "_").into()
            } else {
                service.into()
            };
            (service, method.into())
        });
        let mut part = part.lock();
        let mut key: Key = (call.cluster.clone(), apart);
        if part.len() >= MAX_METHODS && !part.contains_key(&key) {
            key.1 = None;
        }
        let Kept { counts, time } = part.entry(key).or_default();
        if let Some(took) = call.took.filter(|_| self.measures) {
            let time = time.get_or_insert_default();
            time.observe_thousandths(took.as_micros() as u64);
        }
        let succeeded = status == 0;
        counts.add(&Counts {
            total: 1,
            success: u64::from(succeeded),
            failure: u64::from(!succeeded),
            requests: call.requests,
            responses: call.responses,
            ..Default::default()
        });
        if let Some(count) = counts.statuses.get_mut(usize::from(status)) {
            *count += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serin_xds::pb::envoy::config::core::v3 as core;

    use super::*;

    fn counted(from: &pb::FilterConfig) -> Vec<(String, String)> {
        let table = Table::default();
        let filter = GrpcStats::compile(from, 1, &table).unwrap();
        let cluster = Arc::from("c");
        for path in ["/p.Shop/Buy", "/p.Shop/Look"] {
            let call = Call {
                cluster: &cluster,
                path,
                status: Some(0),
                requests: 1,
                responses: 2,
                took: None,
            };
            filter.count(&call, 0);
        }
        let total = table.collect();
        let family = total
            .iter()
            .find(|family| family.name == "envoy_cluster_grpc_total");
        let mut out = Vec::new();
        for (labels, value) in &family.unwrap().metrics {
            let text = labels[1..]
                .iter()
                .map(|(_, value)| &**value)
                .collect::<Vec<_>>()
                .join("/");
            out.push((text, format!("{value:?}")));
        }
        out
    }

    #[test]
    fn methods_are_kept_apart_as_the_filter_says() {
        use pb::filter_config::PerMethodStatSpecifier as Spec;
        let two = |text: &str| (text.to_owned(), "Counter(2.0)".to_owned());
        let one = |text: &str| (text.to_owned(), "Counter(1.0)".to_owned());
        assert_eq!(counted(&pb::FilterConfig::default()), [two("")]);
        let mut from = pb::FilterConfig {
            replace_dots_in_grpc_service_name: true,
            per_method_stat_specifier: Some(Spec::StatsForAllMethods(
                serin_xds::pb::google::protobuf::BoolValue { value: true },
            )),
            ..Default::default()
        };
        assert_eq!(counted(&from), [one("p_Shop/Buy"), one("p_Shop/Look")]);
        from.per_method_stat_specifier = Some(Spec::IndividualMethodStatsAllowlist(core::GrpcMethodList {
            services: vec![core::grpc_method_list::Service {
                name: "p.Shop".into(),
                method_names: vec!["Buy".into()],
            }],
        }));
        assert_eq!(counted(&from), [one(""), one("p_Shop/Buy")]);
    }

    #[test]
    fn made_up_methods_are_counted_together_once_there_are_too_many() {
        use pb::filter_config::PerMethodStatSpecifier as Spec;
        let table = Table::default();
        let from = pb::FilterConfig {
            per_method_stat_specifier: Some(Spec::StatsForAllMethods(
                serin_xds::pb::google::protobuf::BoolValue { value: true },
            )),
            ..Default::default()
        };
        let filter = GrpcStats::compile(&from, 1, &table).unwrap();
        let cluster = Arc::from("c");
        for number in 0..2 * MAX_METHODS {
            let path = format!("/s/m{number}");
            let call = Call {
                cluster: &cluster,
                path: &path,
                status: Some(0),
                requests: 0,
                responses: 0,
                took: None,
            };
            filter.count(&call, 0);
        }
        assert_eq!(filter.parts[0].lock().len(), MAX_METHODS + 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn messages_are_counted_however_the_bytes_come(
            lengths in proptest::collection::vec(0usize..40, 0..10),
            cut in 1usize..9,
        ) {
            let mut bytes = Vec::new();
            for length in &lengths {
                bytes.push(0);
                bytes.extend_from_slice(&(*length as u32).to_be_bytes());
                bytes.extend(std::iter::repeat_n(7, *length));
            }
            let mut messages = Messages::default();
            for chunk in bytes.chunks(cut) {
                messages.feed(chunk);
            }
            prop_assert_eq!(messages.count, lengths.len() as u64);
        }
    }
}
