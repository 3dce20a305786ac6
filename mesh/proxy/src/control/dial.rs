//! Connections of the control thread to clusters: to a control plane behind TLS, to the services of secrets.
//!
//! The cluster is looked up when a connection is made, so a rotated client certificate and changed endpoints count from the
//! next connection on. Endpoints are taken in turn: one that does not answer is passed over by the next attempt.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use serin_xds::client::{Dialer, Endpoint, Io};

use super::Proxy;
use crate::upstream::connect::{ConnectOptions, Speaking, connect};

/// The control plane or service behind the cluster of that name.
pub fn cluster(proxy: &Arc<Proxy>, name: &str) -> Endpoint {
    let proxy = Arc::downgrade(proxy);
    let name: Arc<str> = name.into();
    let turn = Arc::new(AtomicUsize::new(0));
    let of = name.clone();
    Endpoint::Dialed(Dialer::new(name, move || {
        Box::pin(dial(
            proxy.clone(),
            of.clone(),
            turn.fetch_add(1, Ordering::Relaxed),
        ))
    }))
}

async fn dial(proxy: Weak<Proxy>, name: Arc<str>, turn: usize) -> io::Result<Box<dyn Io>> {
    let gone = || io::Error::other("the proxy has ended");
    let slot = proxy
        .upgrade()
        .ok_or_else(gone)?
        .store(|store| store.clusters().find(|slot| slot.name == name).cloned())
        .ok_or_else(|| io::Error::other(format!("there is no cluster {name:?}")))?;
    let (Some(config), Some(endpoints)) = (slot.config(), slot.endpoints()) else {
        return Err(io::Error::other(format!("cluster {name:?} has no endpoints yet")));
    };
    let endpoint = endpoints
        .all
        .get(turn % endpoints.all.len().max(1))
        .ok_or_else(|| io::Error::other(format!("cluster {name:?} has no endpoints")))?;
    let options = ConnectOptions::default();
    let connecting = connect(&config, endpoint, Speaking::Http2, &options);
    let connected = tokio::time::timeout(config.connect_timeout, connecting)
        .await
        .map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{}: no connection", endpoint.address),
            )
        })??;
    Ok(Box::new(connected.stream))
}
