//! Services as pods see them: ClusterIPs that work without a sidecar, by nftables in the node's namespace.
//!
//! [`rules`] is the pure half: what the ruleset should be, and the script that turns what it is into that.
//! [`listeners`] is the other side: LoadBalancer and NodePort Services on the host's loopback.

pub(crate) mod forward;
pub(crate) mod listeners;
pub(crate) mod rules;

use std::net::Ipv4Addr;
use std::process::Stdio;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::mirror::{Change, Mirror};
use rules::{Ruleset, SERVICE_NAME_LABEL};

/// How long one run of nft may take.
const DEADLINE: Duration = Duration::from_secs(10);
/// Changes within this time are one script: a rollout changes many slices at once, and a run costs milliseconds.
const GATHER: Duration = Duration::from_millis(5);
/// Wait before a failed script is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Keeps the node's nftables equal to its Services.
pub(crate) struct Proxy {
    services: Mirror<Service>,
    slices: Mirror<EndpointSlice>,
    dns: Ipv4Addr,
    wanted: Ruleset,
}

impl Proxy {
    pub(crate) fn new(services: Mirror<Service>, slices: Mirror<EndpointSlice>, dns: Ipv4Addr) -> Self {
        Self {
            services,
            slices,
            dns,
            wanted: Ruleset::default(),
        }
    }

    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let (mut services, mut slices) = (self.services.changes(), self.slices.changes());
        // Nothing is assumed of what an earlier node left in the namespace.
        let mut applied: Option<Ruleset> = None;
        loop {
            if applied.as_ref() != Some(&self.wanted) {
                let script = rules::script(applied.as_ref(), &self.wanted);
                match run_nft(&script).await {
                    Ok(()) => applied = Some(self.wanted.clone()),
                    Err(NftError::Missing) => {
                        error!(
                            "the program `nft` is not there: ClusterIPs work only through a sidecar; install nftables"
                        );
                        cancel.cancelled().await;
                        return;
                    }
                    Err(NftError::Failed(reason)) => {
                        warn!(
                            reason,
                            "nftables script failed; the whole ruleset is written next"
                        );
                        debug!(script);
                        applied = None;
                        tokio::select! {
                            () = cancel.cancelled() => return,
                            () = tokio::time::sleep(RETRY) => continue,
                        }
                    }
                }
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                change = services.next() => self.on_service(&change),
                change = slices.next() => self.on_slice(&change),
            }
            tokio::time::sleep(GATHER).await;
            while let Some(change) = futures::FutureExt::now_or_never(services.next()) {
                self.on_service(&change);
            }
            while let Some(change) = futures::FutureExt::now_or_never(slices.next()) {
                self.on_slice(&change);
            }
        }
    }

    fn on_service(&mut self, change: &Change<Service>) {
        match change {
            Change::Applied(service) | Change::Deleted(service) => {
                self.update(&service.namespace().unwrap_or_default(), &service.name_any());
            }
            Change::Resync => self.resync(),
        }
    }

    fn on_slice(&mut self, change: &Change<EndpointSlice>) {
        match change {
            Change::Applied(slice) | Change::Deleted(slice) => {
                if let Some(name) = slice.labels().get(SERVICE_NAME_LABEL) {
                    self.update(&slice.namespace().unwrap_or_default(), name);
                }
            }
            Change::Resync => self.resync(),
        }
    }

    fn update(&mut self, namespace: &str, name: &str) {
        let service = self.services.get(namespace, name);
        let slices = slices_of(&self.slices, namespace, name);
        self.wanted
            .set(namespace, name, service.as_deref(), &slices, self.dns);
    }

    fn resync(&mut self) {
        self.wanted = Ruleset::default();
        for service in self.services.all() {
            self.update(&service.namespace().unwrap_or_default(), &service.name_any());
        }
    }
}

/// The slices of a Service.
pub(crate) fn slices_of(
    slices: &Mirror<EndpointSlice>,
    namespace: &str,
    service: &str,
) -> Vec<std::sync::Arc<EndpointSlice>> {
    slices
        .in_namespace(namespace)
        .into_iter()
        .filter(|slice| {
            slice
                .labels()
                .get(SERVICE_NAME_LABEL)
                .is_some_and(|name| name == service)
        })
        .collect()
}

enum NftError {
    Missing,
    Failed(String),
}

/// Runs a script atomically in the calling process' network namespace.
async fn run_nft(script: &str) -> Result<(), NftError> {
    let failed = |error: &dyn std::fmt::Display| NftError::Failed(error.to_string());
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| {
            if error.kind() == std::io::ErrorKind::NotFound {
                NftError::Missing
            } else {
                failed(&error)
            }
        })?;
    let exchange = async {
        if let Some(mut input) = child.stdin.take() {
            // A script that nft refuses early closes the pipe; its own message follows.
            let _ = input.write_all(script.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(DEADLINE, exchange)
        .await
        .map_err(|error| failed(&error))?
        .map_err(|error| failed(&error))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(NftError::Failed(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        ))
    }
}
