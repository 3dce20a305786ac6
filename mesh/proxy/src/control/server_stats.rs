//! Statistics of the process and of the configuration, read when somebody asks (`server.*`, `cluster_manager.*`,
//! `listener_manager.*`, `control_plane.*`, `runtime.*`). Those of clusters are in [`crate::metrics::clusters::rows`].

use parking_lot::Mutex;
use serin_xds::client::ConnectionState;
use tokio::sync::watch;

use super::Proxy;
use crate::config::store::Store;
use crate::metrics::collect::{Family, Value};
use crate::metrics::series::{Histogram, HistogramValue};

/// Memory of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes in use that belong to this process alone.
    pub allocated: u64,
    /// Bytes of heap and other writable memory that are mapped.
    pub heap: u64,
    /// Resident bytes.
    pub physical: u64,
}

/// Reads `/proc/self/statm`.
pub fn memory() -> Memory {
    parse_memory(
        &std::fs::read_to_string("/proc/self/statm").unwrap_or_default(),
        page_size(),
    )
}

fn page_size() -> u64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096)
}

/// size resident shared text lib data dt, in pages.
fn parse_memory(text: &str, page: u64) -> Memory {
    let pages: Vec<u64> = text
        .split_ascii_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect();
    let at = |index: usize| pages.get(index).copied().unwrap_or(0) * page;
    Memory {
        allocated: at(1).saturating_sub(at(2)),
        heap: at(5),
        physical: at(1),
    }
}

fn gauge(name: &'static str, help: &'static str, value: f64) -> Family {
    Family {
        name,
        help,
        metrics: vec![(Vec::new(), Value::Gauge(value))],
    }
}

/// How the connection to the control plane stands.
#[derive(Debug, Default)]
pub(super) struct ControlPlaneStats(Mutex<Option<watch::Receiver<ConnectionState>>>);

impl ControlPlaneStats {
    /// From now on that one is told of.
    pub(super) fn follow(&self, state: watch::Receiver<ConnectionState>) {
        *self.0.lock() = Some(state);
    }

    /// Whether there is a connection; nothing where there is no control plane.
    fn connected(&self) -> Option<bool> {
        self.0.lock().as_ref().map(|state| state.borrow().connected)
    }
}

/// What is shown where no certificate ends, as Envoy shows it.
const NEVER: f64 = u32::MAX as f64;

/// The program's version as one number.
fn version() -> f64 {
    let part = |text: &str| text.parse::<u32>().unwrap_or(0);
    let number = part(env!("CARGO_PKG_VERSION_MAJOR")) * 1_000_000
        + part(env!("CARGO_PKG_VERSION_MINOR")) * 1_000
        + part(env!("CARGO_PKG_VERSION_PATCH"));
    f64::from(number)
}

/// Statistics of the process.
pub(super) fn server(proxy: &Proxy) -> Vec<Family> {
    let memory = memory();
    let state = match proxy.state() {
        "LIVE" => 0.0,
        "DRAINING" => 1.0,
        _ => 2.0,
    };
    let connections: u64 = proxy
        .shards
        .iter()
        .map(|shard| {
            let closed = shard.counters.connections_closed.get();
            shard.counters.connections.get().saturating_sub(closed)
        })
        .sum();
    let now = rustls_pki_types::UnixTime::now().as_secs();
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    let days = proxy.store(|store| super::certs::days_left(store.secrets(), now));
    let mut out = vec![
        gauge(
            "envoy_server_live",
            "1 while it serves and does not drain.",
            f64::from(u8::from(state == 0.0)),
        ),
        gauge(
            "envoy_server_state",
            "0 live, 1 draining, 2 before its first full configuration.",
            state,
        ),
        gauge(
            "envoy_server_uptime",
            "Seconds since the start.",
            proxy.uptime().as_secs() as f64,
        ),
        gauge(
            "envoy_server_concurrency",
            "Worker threads.",
            proxy.concurrency() as f64,
        ),
        gauge(
            "envoy_server_memory_allocated",
            "Bytes of its own memory.",
            memory.allocated as f64,
        ),
        gauge(
            "envoy_server_memory_heap_size",
            "Bytes of heap and other writable memory that are mapped.",
            memory.heap as f64,
        ),
        gauge(
            "envoy_server_memory_physical_size",
            "Resident bytes.",
            memory.physical as f64,
        ),
        gauge(
            "envoy_server_total_connections",
            "Connections of clients.",
            connections as f64,
        ),
        gauge(
            "envoy_server_days_until_first_cert_expiring",
            "Days until the first certificate in use ends; 4294967295 without one.",
            days.map_or(NEVER, |days| days as f64),
        ),
        gauge(
            "envoy_server_version",
            "Major, minor and patch, a thousand each.",
            version(),
        ),
    ];
    let (epoch, connections) = proxy.baseline.lock().before();
    out.extend([
        gauge(
            "envoy_server_hot_restart_epoch",
            "How many processes have handed over to one another before this one.",
            epoch as f64,
        ),
        gauge(
            "envoy_server_hot_restart_generation",
            "The same, and this one.",
            (epoch + 1) as f64,
        ),
        gauge(
            "envoy_server_parent_connections",
            "Connections of the process before this one.",
            connections as f64,
        ),
    ]);
    if let Some(took) = proxy.initialized.get() {
        let histogram = Histogram::default();
        histogram.observe_thousandths(took * 1000);
        let mut value = HistogramValue::default();
        histogram.read(&mut value);
        out.push(Family {
            name: "envoy_server_initialization_time_ms",
            help: "From the start to the first full configuration.",
            metrics: vec![(Vec::new(), Value::Histogram(Box::new(value)))],
        });
    }
    if let Some(connected) = proxy.control_plane.connected() {
        out.push(gauge(
            "envoy_control_plane_connected_state",
            "1 while there is a stream to the control plane.",
            f64::from(u8::from(connected)),
        ));
    }
    out
}

/// Statistics of the configuration.
pub(super) fn configuration(store: &mut Store) -> Vec<Family> {
    let listeners = store.listeners().filter(|listener| listener.bind).count();
    let (warming_clusters, warming_listeners) = store.warming_count();
    let mut out = vec![
        gauge(
            "envoy_cluster_manager_active_clusters",
            "Clusters.",
            store.clusters().count() as f64,
        ),
        gauge(
            "envoy_cluster_manager_warming_clusters",
            "Clusters that wait for something.",
            warming_clusters as f64,
        ),
        gauge(
            "envoy_listener_manager_total_listeners_active",
            "Bound listeners.",
            listeners as f64,
        ),
        gauge(
            "envoy_listener_manager_total_listeners_warming",
            "Listeners that wait for something.",
            warming_listeners as f64,
        ),
        gauge("envoy_listener_manager_workers_started", "The workers run.", 1.0),
    ];
    let counter = |name: &'static str, help: &'static str, value: u64| Family {
        name,
        help,
        metrics: vec![(Vec::new(), Value::Counter(value as f64))],
    };
    out.extend(
        store
            .counts()
            .told()
            .map(|(name, help, value)| counter(name, help, value)),
    );
    let [loads, failures] = store.runtime().loads();
    for (name, help, value) in [
        (
            "envoy_runtime_load_success",
            "Times that values of the runtime were taken.",
            loads,
        ),
        (
            "envoy_runtime_load_error",
            "Times that values of the runtime could not be taken.",
            failures,
        ),
        // Values on disk are refused, so that nothing there can take the place of others.
        (
            "envoy_runtime_override_dir_exists",
            "Times that values on disk took the place of others: there are none on disk.",
            0,
        ),
        (
            "envoy_runtime_override_dir_not_exists",
            "Times that there was nothing on disk to take the place of others.",
            loads,
        ),
    ] {
        out.push(counter(name, help, value));
    }
    let (keys, layers) = store.runtime().size();
    out.push(gauge(
        "envoy_runtime_num_keys",
        "Keys of the runtime.",
        keys as f64,
    ));
    out.push(gauge(
        "envoy_runtime_num_layers",
        "Layers of the runtime.",
        layers as f64,
    ));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_numbers() {
        let memory = parse_memory("1000 300 100 50 0 400 0\n", 4096);
        assert_eq!(memory.allocated, 200 * 4096);
        assert_eq!((memory.heap, memory.physical), (400 * 4096, 300 * 4096));
        assert_eq!(parse_memory("", 4096), Memory::default());
        assert!(super::memory().physical > 100_000);
    }
}
