//! Envoy and this proxy, each started by the same file with ports of its own, and what both count.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use serin_proxy::bootstrap::file;
use serin_proxy::control::admin::{AdminPort, Port};
use serin_proxy::control::run::apply_static;
use serin_proxy::control::{Proxy, health};
use tokio::process::Child;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::envoy;
use crate::fixture::*;
use crate::interop::wait_for;

/// The ports of one of them.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) admin: SocketAddr,
    pub(crate) listeners: Vec<SocketAddr>,
}

impl Place {
    /// Free ones.
    pub(crate) async fn with(listeners: usize) -> Self {
        let mut out = Self {
            admin: free_port().await,
            listeners: Vec::new(),
        };
        for _ in 0..listeners {
            out.listeners.push(free_port().await);
        }
        out
    }

    /// What it counts by name: the ports of listeners are called by their place, as in `L0`.
    pub(crate) async fn numbers(&self, path: &str) -> BTreeMap<String, String> {
        let mut text = get(self.admin, path).await.2;
        for (index, listener) in self.listeners.iter().enumerate() {
            text = text.replace(&format!("127.0.0.1_{}", listener.port()), &format!("L{index}"));
        }
        text.lines()
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }
}

/// This proxy from a file's text.
pub(crate) struct Started {
    pub(crate) proxy: Arc<Proxy>,
    cancel: CancellationToken,
    served: JoinHandle<()>,
    checks: JoinHandle<()>,
}

impl Started {
    /// With its admin port there.
    pub(crate) async fn from(text: &str, admin: SocketAddr) -> Self {
        let plan = file::parse(text, 1).unwrap();
        let (proxy, _log) = Proxy::start(plan.options).unwrap();
        apply_static(&proxy, &plan.static_resources).await.unwrap();
        proxy.set_ready();
        let port = AdminPort::bind(&proxy, admin, Port::Admin).unwrap();
        let cancel = CancellationToken::new();
        let served = tokio::spawn(port.serve(proxy.clone(), CancellationToken::new(), cancel.clone()));
        let checks = tokio::spawn(health::run(proxy.clone(), cancel.clone()));
        Self {
            proxy,
            cancel,
            served,
            checks,
        }
    }

    pub(crate) async fn stop(self) {
        self.cancel.cancel();
        self.served.await.unwrap();
        self.checks.await.unwrap();
        self.proxy.stop().await;
    }
}

/// Both of them.
pub(crate) struct Twins {
    pub(crate) ours: Place,
    pub(crate) theirs: Place,
    started: Started,
    child: Child,
    _folder: tempfile::TempDir,
}

impl Twins {
    /// Both, ready; nothing where there is no Envoy.
    pub(crate) async fn start(listeners: usize, config: impl Fn(&Place) -> String) -> Option<Self> {
        let program = envoy::program()?;
        let (ours, theirs) = (Place::with(listeners).await, Place::with(listeners).await);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("envoy.yaml");
        std::fs::write(&path, config(&theirs)).unwrap();
        let child = envoy::command(&program, &path).spawn().unwrap();
        let started = Started::from(&config(&ours), ours.admin).await;
        // Not its listeners: a look at one is a connection that counts.
        wait_for(theirs.admin).await;
        let live = async {
            while get(theirs.admin, "/ready").await.0 != 200 {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        soon("Envoy", live).await;
        Some(Self {
            ours,
            theirs,
            started,
            child,
            _folder: folder,
        })
    }

    /// The places of both.
    pub(crate) fn places(&self) -> [&Place; 2] {
        [&self.ours, &self.theirs]
    }

    /// Waits until both say the same wherever both say something, but for names that are pardoned: ends are counted a moment
    /// later, and Envoy looks at some of its gauges every five seconds only. Returns what this proxy says.
    pub(crate) async fn agree(
        &self,
        numbers: impl AsyncFn(&Place) -> BTreeMap<String, String>,
        is_pardoned: impl Fn(&str) -> bool,
    ) -> (BTreeMap<String, String>, usize) {
        let mut differences = Vec::new();
        let mut both = 0;
        for _ in 0..400 {
            let (ours, theirs) = (numbers(&self.ours).await, numbers(&self.theirs).await);
            both = ours.keys().filter(|name| theirs.contains_key(*name)).count();
            differences = ours
                .iter()
                .filter(|(name, _)| !is_pardoned(name))
                .filter_map(|(name, value)| {
                    let other = theirs.get(name)?;
                    (other != value).then(|| format!("{name}: ours {value}, theirs {other}"))
                })
                .collect();
            if differences.is_empty() {
                return (ours, both);
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!(
            "{} of {both} differ:\n{}",
            differences.len(),
            differences.join("\n")
        );
    }

    pub(crate) async fn stop(mut self) {
        self.child.kill().await.unwrap();
        self.started.stop().await;
    }
}
