//! The overload manager: what the proxy stops doing before memory or connections run out.
//!
//! Envoy's model. Monitors measure a *pressure* from 0 to 1 each interval; triggers make of pressures how active an
//! *action* is, from 0 to 1; an action that is active to 0.3 hits three in ten. Connections are not measured but counted
//! as they come: beyond the limit they are closed at once.
//!
//! A request pays for one relaxed load, of a flag that is set while any action is active.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use serin_xds::pb::envoy::config::overload::v3 as pb;
use serin_xds::pb::envoy::extensions::resource_monitors as monitors;
use serin_xds::pb::google::protobuf as google;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::config::convert::{self, each};
use crate::error::{Refusal, Within};

/// Envoy's interval of measurements.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);
/// An action that is fully active.
const SATURATED: u32 = 1_000_000;

/// What can be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Requests are answered 503.
    StopAcceptingRequests,
    /// Connections wait in the kernel's queue; only when fully active.
    StopAcceptingConnections,
    /// Connections are closed as they come.
    RejectIncomingConnections,
    /// Connections end with the request that they carry.
    DisableHttpKeepalive,
    /// Freed memory is given back to the system.
    ShrinkHeap,
}

impl Action {
    const ALL: [(Self, &'static str); 5] = [
        (
            Self::StopAcceptingRequests,
            "envoy.overload_actions.stop_accepting_requests",
        ),
        (
            Self::StopAcceptingConnections,
            "envoy.overload_actions.stop_accepting_connections",
        ),
        (
            Self::RejectIncomingConnections,
            "envoy.overload_actions.reject_incoming_connections",
        ),
        (
            Self::DisableHttpKeepalive,
            "envoy.overload_actions.disable_http_keepalive",
        ),
        (Self::ShrinkHeap, "envoy.overload_actions.shrink_heap"),
    ];
}

/// What is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Monitor {
    /// Resident memory of the process, of that many bytes.
    Memory(u64),
    /// Memory of the process' cgroup, of that many bytes or of its own limit if that is less.
    Cgroup(u64),
    /// A number in a file.
    File(PathBuf),
}

/// How active a pressure makes an action.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trigger {
    /// Fully from there on.
    Threshold(f64),
    /// From nothing to fully between the two.
    Scaled(f64, f64),
}

impl Trigger {
    fn level(self, pressure: f64) -> u32 {
        match self {
            Self::Threshold(at) => {
                if pressure >= at {
                    SATURATED
                } else {
                    0
                }
            }
            Self::Scaled(from, to) => {
                let share = ((pressure - from) / (to - from)).clamp(0.0, 1.0);
                (share * f64::from(SATURATED)) as u32
            }
        }
    }
}

/// The compiled configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    interval: Duration,
    monitors: Vec<Monitor>,
    /// Triggers of actions, by index of the monitor.
    actions: Vec<(Action, Vec<(usize, Trigger)>)>,
    max_connections: Option<u64>,
}

impl Rules {
    /// Compiles the message.
    pub(crate) fn compile(from: &pb::OverloadManager) -> Result<Self, Refusal> {
        if !from.loadshed_points.is_empty() {
            return Err(Refusal::new("loadshed_points", "not supported"));
        }
        if from.buffer_factory_config.is_some() {
            return Err(Refusal::new("buffer_factory_config", "not supported"));
        }
        let mut out = Self {
            interval: convert::timeout(from.refresh_interval.as_ref())
                .within("refresh_interval")?
                .unwrap_or(DEFAULT_INTERVAL),
            ..Self::default()
        };
        let mut names: Vec<&str> = Vec::new();
        for (index, monitor) in from.resource_monitors.iter().enumerate() {
            let path = format!("resource_monitors[{index}]");
            if names.contains(&monitor.name.as_str()) {
                return Err(Refusal::new(path, format!("{} is there twice", monitor.name)));
            }
            match compile_monitor(monitor).within(&path)? {
                Compiled::Measured(compiled) => {
                    names.push(&monitor.name);
                    out.monitors.push(compiled);
                }
                Compiled::Connections(limit) => out.max_connections = Some(limit),
            }
        }
        for (index, action) in from.actions.iter().enumerate() {
            let path = format!("actions[{index}]");
            let (known, _) = Action::ALL
                .iter()
                .find(|(_, name)| *name == action.name)
                .ok_or_else(|| Refusal::new(&path, format!("{} is not supported", action.name)))?;
            let triggers = each(&action.triggers, "triggers", |trigger| {
                compile_trigger(trigger, &names)
            })
            .within(&path)?;
            out.actions.push((*known, triggers));
        }
        Ok(out)
    }

    /// Limits downstream connections, if nothing stricter does already.
    pub fn limit_connections(&mut self, limit: u64) {
        self.max_connections = Some(self.max_connections.map_or(limit, |known| known.min(limit)));
    }

    /// Levels of all actions under these pressures: of several triggers the strongest counts.
    fn levels(&self, pressures: &[f64]) -> [u32; Action::ALL.len()] {
        let mut out = [0; Action::ALL.len()];
        for (action, triggers) in &self.actions {
            for (monitor, trigger) in triggers {
                let level = trigger.level(pressures[*monitor]);
                out[*action as usize] = out[*action as usize].max(level);
            }
        }
        out
    }
}

enum Compiled {
    Measured(Monitor),
    Connections(u64),
}

fn compile_monitor(from: &pb::ResourceMonitor) -> Result<Compiled, Refusal> {
    let Some(pb::resource_monitor::ConfigType::TypedConfig(any)) = &from.config_type else {
        return Err(Refusal::new("typed_config", "is missing"));
    };
    fn read<M: prost::Message + Default>(any: &google::Any) -> Result<M, Refusal> {
        M::decode(any.value.as_slice()).map_err(|error| Refusal::new("typed_config", error.to_string()))
    }
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    Ok(match name.strip_prefix("envoy.extensions.resource_monitors.") {
        Some("fixed_heap.v3.FixedHeapConfig") => {
            let config: monitors::fixed_heap::v3::FixedHeapConfig = read(any)?;
            if config.max_heap_size_bytes == 0 {
                return Err(Refusal::new(
                    "typed_config.max_heap_size_bytes",
                    "is not above zero",
                ));
            }
            Compiled::Measured(Monitor::Memory(config.max_heap_size_bytes))
        }
        Some("cgroup_memory.v3.CgroupMemoryConfig") => {
            let config: monitors::cgroup_memory::v3::CgroupMemoryConfig = read(any)?;
            let limit = match config.max_memory_bytes {
                0 => u64::MAX,
                limit => limit,
            };
            Compiled::Measured(Monitor::Cgroup(limit))
        }
        Some("injected_resource.v3.InjectedResourceConfig") => {
            let config: monitors::injected_resource::v3::InjectedResourceConfig = read(any)?;
            Compiled::Measured(Monitor::File(config.filename.into()))
        }
        Some("downstream_connections.v3.DownstreamConnectionsConfig") => {
            let config: monitors::downstream_connections::v3::DownstreamConnectionsConfig = read(any)?;
            let limit = u64::try_from(config.max_active_downstream_connections)
                .ok()
                .filter(|limit| *limit > 0)
                .ok_or_else(|| {
                    Refusal::new(
                        "typed_config.max_active_downstream_connections",
                        "is not above zero",
                    )
                })?;
            Compiled::Connections(limit)
        }
        _ => {
            return Err(Refusal::new("typed_config", format!("{name} is not supported")));
        }
    })
}

fn compile_trigger(from: &pb::Trigger, monitors: &[&str]) -> Result<(usize, Trigger), Refusal> {
    use pb::trigger::TriggerOneof;
    let monitor = monitors
        .iter()
        .position(|name| *name == from.name)
        .ok_or_else(|| Refusal::new("name", format!("{:?} is no monitor that measures", from.name)))?;
    let trigger = match &from.trigger_oneof {
        Some(TriggerOneof::Threshold(threshold)) => Trigger::Threshold(threshold.value),
        Some(TriggerOneof::Scaled(scaled)) => {
            if scaled.scaling_threshold >= scaled.saturation_threshold {
                return Err(Refusal::new(
                    "scaled",
                    "scaling_threshold must be below saturation_threshold",
                ));
            }
            Trigger::Scaled(scaled.scaling_threshold, scaled.saturation_threshold)
        }
        None => return Err(Refusal::new("", "threshold or scaled is missing")),
    };
    Ok((monitor, trigger))
}

/// What all workers see of it.
#[derive(Debug, Default)]
pub struct Overload {
    any: AtomicBool,
    levels: [AtomicU32; Action::ALL.len()],
    changed: Notify,
    max_connections: Option<u64>,
    connections: AtomicU64,
}

/// A downstream connection that is counted against the limit of all.
#[derive(Debug)]
pub struct Counted(Option<Arc<Overload>>);

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(overload) = &self.0 {
            overload.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Overload {
    /// Nothing is active yet.
    pub fn new(rules: &Rules) -> Arc<Self> {
        Arc::new(Self {
            max_connections: rules.max_connections,
            ..Self::default()
        })
    }

    /// Whether an action hits one of what it is for; `random` is drawn when it is active only.
    pub fn hits(&self, action: Action, random: impl FnOnce() -> u64) -> bool {
        if !self.any.load(Ordering::Relaxed) {
            return false;
        }
        match self.levels[action as usize].load(Ordering::Relaxed) {
            0 => false,
            SATURATED => true,
            level => (((random() >> 32) * u64::from(SATURATED)) >> 32) < u64::from(level),
        }
    }

    /// Waits for as long as an action is fully active.
    pub async fn while_saturated(&self, action: Action) {
        loop {
            // Listening before looking: a change in between is not missed.
            let changed = self.changed.notified();
            let level = self.levels[action as usize].load(Ordering::Acquire);
            if level < SATURATED {
                return;
            }
            changed.await;
        }
    }

    /// A new connection's place among all; `None` when there is no room.
    pub fn count_connection(self: &Arc<Self>) -> Option<Counted> {
        let Some(limit) = self.max_connections else {
            return Some(Counted(None));
        };
        if self.connections.fetch_add(1, Ordering::Relaxed) >= limit {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Counted(Some(self.clone())))
    }

    fn set(&self, levels: &[u32]) {
        for (cell, level) in self.levels.iter().zip(levels) {
            cell.store(*level, Ordering::Release);
        }
        self.any
            .store(levels.iter().any(|level| *level > 0), Ordering::Release);
        self.changed.notify_waiters();
    }
}

/// Measures until cancelled.
pub async fn run(rules: Rules, overload: Arc<Overload>, cancel: CancellationToken) {
    if rules.monitors.is_empty() {
        return;
    }
    let mut pressures = vec![0.0; rules.monitors.len()];
    let mut before = [0; Action::ALL.len()];
    let mut tick = tokio::time::interval(rules.interval);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = tick.tick() => {}
        }
        for (pressure, monitor) in pressures.iter_mut().zip(&rules.monitors) {
            match measure(monitor) {
                Ok(measured) => *pressure = measured,
                // What was measured last stays.
                Err(error) => tracing::warn!(?monitor, %error, "overload manager: cannot measure"),
            }
        }
        let levels = rules.levels(&pressures);
        if levels != before {
            for (index, (_, name)) in Action::ALL.iter().enumerate() {
                if (levels[index] == SATURATED) != (before[index] == SATURATED) {
                    let saturated = levels[index] == SATURATED;
                    tracing::warn!(action = name, saturated, ?pressures, "overload");
                }
            }
            before = levels;
            overload.set(&levels);
        }
        if levels[Action::ShrinkHeap as usize] == SATURATED {
            crate::sys::collect_memory();
        }
    }
}

/// Pressure of a monitor. Reads files of the kernel's, which does not block.
fn measure(monitor: &Monitor) -> std::io::Result<f64> {
    match monitor {
        Monitor::Memory(limit) => Ok(resident()? as f64 / *limit as f64),
        Monitor::Cgroup(limit) => {
            let number = |path: &str| -> std::io::Result<u64> {
                let text = std::fs::read_to_string(path)?;
                match text.trim() {
                    "max" => Ok(u64::MAX),
                    text => text.parse().map_err(std::io::Error::other),
                }
            };
            let (used, most) = match number("/sys/fs/cgroup/memory.current") {
                Ok(used) => (used, number("/sys/fs/cgroup/memory.max").unwrap_or(u64::MAX)),
                // cgroup v1.
                Err(_) => (
                    number("/sys/fs/cgroup/memory/memory.usage_in_bytes")?,
                    number("/sys/fs/cgroup/memory/memory.limit_in_bytes").unwrap_or(u64::MAX),
                ),
            };
            let most = most.min(*limit);
            Ok(if most == u64::MAX {
                0.0
            } else {
                used as f64 / most as f64
            })
        }
        Monitor::File(path) => {
            let text = std::fs::read_to_string(path)?;
            text.trim().parse().map_err(std::io::Error::other)
        }
    }
}

/// Resident memory of this process in bytes.
fn resident() -> std::io::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse()
                .ok()
        })
        .map(|kilobytes: u64| kilobytes * 1024)
        .ok_or_else(|| std::io::Error::other("/proc/self/status tells no VmRSS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(action: &str, trigger: pb::trigger::TriggerOneof) -> pb::OverloadManager {
        use prost::Name as _;
        let config = monitors::injected_resource::v3::InjectedResourceConfig {
            filename: "/nowhere".into(),
        };
        pb::OverloadManager {
            resource_monitors: vec![pb::ResourceMonitor {
                name: "file".into(),
                config_type: Some(pb::resource_monitor::ConfigType::TypedConfig(google::Any {
                    type_url: monitors::injected_resource::v3::InjectedResourceConfig::type_url(),
                    value: prost::Message::encode_to_vec(&config),
                })),
            }],
            actions: vec![pb::OverloadAction {
                name: action.into(),
                triggers: vec![pb::Trigger {
                    name: "file".into(),
                    trigger_oneof: Some(trigger),
                }],
                typed_config: None,
            }],
            ..Default::default()
        }
    }

    fn scaled(from: f64, to: f64) -> pb::trigger::TriggerOneof {
        pb::trigger::TriggerOneof::Scaled(pb::ScaledTrigger {
            scaling_threshold: from,
            saturation_threshold: to,
        })
    }

    #[test]
    fn actions_follow_the_pressure_by_threshold_or_in_proportion() {
        let name = "envoy.overload_actions.stop_accepting_requests";
        let threshold = pb::trigger::TriggerOneof::Threshold(pb::ThresholdTrigger { value: 0.9 });
        let rules = Rules::compile(&manager(name, threshold)).unwrap();
        assert_eq!(rules.levels(&[0.89])[0], 0);
        assert_eq!(rules.levels(&[0.9])[0], SATURATED);
        let rules = Rules::compile(&manager(name, scaled(0.5, 0.9))).unwrap();
        let level = |pressure| rules.levels(&[pressure])[0];
        assert_eq!((level(0.5), level(0.9), level(2.0)), (0, SATURATED, SATURATED));
        assert!((499_000..501_000).contains(&level(0.7)), "{}", level(0.7));
        let overload = Overload::new(&rules);
        assert!(!overload.hits(Action::StopAcceptingRequests, || unreachable!(
            "nothing is active"
        )));
        overload.set(&rules.levels(&[0.7]));
        assert!(overload.hits(Action::StopAcceptingRequests, || 0));
        assert!(!overload.hits(Action::StopAcceptingRequests, || u64::MAX));
        assert!(!overload.hits(Action::DisableHttpKeepalive, || 0));
    }

    #[test]
    fn what_the_overload_manager_cannot_do_is_refused_by_name() {
        let cases = [
            (
                manager(
                    "envoy.overload_actions.reset_high_memory_stream",
                    scaled(0.1, 0.2),
                ),
                "actions[0]",
            ),
            (
                manager("envoy.overload_actions.shrink_heap", scaled(0.9, 0.2)),
                "actions[0].triggers[0].scaled",
            ),
        ];
        for (message, path) in cases {
            assert_eq!(Rules::compile(&message).unwrap_err().path, path);
        }
    }

    #[test]
    fn connections_beyond_the_limit_have_no_place_until_one_ends() {
        let overload = Overload::new(&Rules {
            max_connections: Some(2),
            ..Rules::default()
        });
        let held: Vec<_> = (0..2).map(|_| overload.count_connection().unwrap()).collect();
        assert!(overload.count_connection().is_none());
        drop(held);
        assert!(overload.count_connection().is_some());
    }

    #[test]
    fn the_resident_memory_of_a_process_is_known() {
        assert!(resident().unwrap() > 1 << 20);
        assert!(measure(&Monitor::Memory(1)).unwrap() > 1.0);
    }
}
