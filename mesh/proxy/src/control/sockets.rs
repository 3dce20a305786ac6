//! The listening sockets of the process: bound for its listeners, inherited from its parent, handed over by the process before
//! it, and kept for the one after it.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};

use super::restart;

/// Connections that the kernel keeps waiting for accept.
const BACKLOG: i32 = 4096;

/// See the module.
#[derive(Debug)]
pub struct ListeningSockets {
    /// By the port of the listener that uses them.
    inherited: HashMap<u16, TcpListener>,
    /// Where each listener is bound.
    bound: Mutex<HashMap<Arc<str>, Vec<SocketAddr>>>,
    /// Sockets of the process before this one that no listener has taken yet.
    handed: Mutex<restart::Sockets>,
    /// Copies of all listening sockets by their owner, for a successor; `None` where nobody will ask.
    kept: Mutex<Option<HashMap<Arc<str>, Vec<TcpListener>>>>,
}

impl ListeningSockets {
    pub(super) fn new(inherited: HashMap<u16, TcpListener>) -> Self {
        Self {
            inherited,
            bound: Mutex::default(),
            handed: Mutex::default(),
            kept: Mutex::default(),
        }
    }

    /// Binds a listener: for each worker a socket for each of the addresses. An error names the address.
    pub(super) fn bind_all(
        &self,
        name: &Arc<str>,
        addresses: &[SocketAddr],
        workers: usize,
    ) -> Result<Vec<Vec<TcpListener>>, (SocketAddr, std::io::Error)> {
        let mut out: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
        for address in addresses {
            let sockets = self.bind(*address, workers).map_err(|error| (*address, error))?;
            for (of_worker, sockets) in out.iter_mut().zip(sockets) {
                of_worker.extend(sockets);
            }
        }
        let first = out.first().into_iter().flatten();
        let bound = first.filter_map(|socket| socket.local_addr().ok()).collect();
        self.bound.lock().insert(name.clone(), bound);
        self.keep(name, out.iter().flatten());
        Ok(out)
    }

    /// Whether these addresses could be bound now.
    pub(super) fn try_all(&self, addresses: &[SocketAddr]) -> Result<(), (SocketAddr, std::io::Error)> {
        for address in addresses {
            let ours =
                self.inherited.contains_key(&address.port()) || self.handed.lock().contains_key(address);
            if !ours {
                bound_socket(*address, Port::Shared).map_err(|error| (*address, error))?;
            }
        }
        Ok(())
    }

    /// At least one socket per worker for `address`.
    fn bind(&self, address: SocketAddr, workers: usize) -> std::io::Result<Vec<Vec<TcpListener>>> {
        if let Some(inherited) = self.inherited.get(&address.port()) {
            let each = |_| inherited.try_clone().map(|socket| vec![socket]);
            return (0..workers).map(each).collect();
        }
        let handed = self.handed.lock().remove(&address);
        if let Some(handed) = handed {
            return restart::distribute(handed, workers);
        }
        let mut sockets = Vec::with_capacity(workers);
        let mut address = address;
        for _ in 0..workers {
            let socket = listening_socket(address, Port::Shared)?;
            // Port 0 is the kernel's choice once; the others join it.
            address = socket.local_addr()?;
            sockets.push(vec![socket]);
        }
        Ok(sockets)
    }

    /// A socket for one of the process's own ports.
    pub(super) fn own(&self, name: &str, address: SocketAddr) -> std::io::Result<TcpListener> {
        let handed = self.handed.lock().remove(&address).and_then(|mut all| all.pop());
        let socket = match handed {
            Some(socket) => socket,
            None => listening_socket(address, Port::Alone)?,
        };
        self.keep(&Arc::from(name), std::iter::once(&socket));
        Ok(socket)
    }

    /// A listener is closed.
    pub(super) fn close(&self, name: &str) {
        self.bound.lock().remove(name);
        self.forget(name);
    }

    /// Gives the copies of a listener's sockets up: a copy would keep the socket listening.
    pub(super) fn forget(&self, name: &str) {
        if let Some(kept) = &mut *self.kept.lock() {
            kept.remove(name);
        }
    }

    /// Every address where a listener is bound, in the order of its configuration.
    pub fn addresses(&self, name: &str) -> Vec<SocketAddr> {
        self.bound.lock().get(name).cloned().unwrap_or_default()
    }

    /// Sockets of the process before this one are used for the listeners of their addresses.
    pub fn take_over(&self, sockets: restart::Sockets) {
        *self.handed.lock() = sockets;
    }

    /// Closes sockets of the process before this one that no listener has taken.
    pub fn close_handed(&self) {
        self.handed.lock().clear();
    }

    /// From now on copies of listening sockets are kept for a successor.
    pub fn keep_copies(&self) {
        self.kept.lock().get_or_insert_default();
    }

    /// Gives all copies up, and keeps no more.
    pub(super) fn drop_copies(&self) {
        *self.kept.lock() = None;
    }

    fn keep<'a>(&self, owner: &Arc<str>, sockets: impl Iterator<Item = &'a TcpListener>) {
        if let Some(kept) = &mut *self.kept.lock() {
            // A socket that cannot be copied is not handed over: the successor binds its own.
            let copies = sockets.filter_map(|socket| socket.try_clone().ok()).collect();
            kept.insert(owner.clone(), copies);
        }
    }

    /// Copies of all listening sockets.
    pub(super) fn copies(&self) -> std::io::Result<Vec<TcpListener>> {
        self.kept
            .lock()
            .iter()
            .flat_map(HashMap::values)
            .flatten()
            .map(TcpListener::try_clone)
            .collect()
    }
}

/// Who else listens on the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Port {
    /// Nobody.
    Alone,
    /// Other sockets of the process (`SO_REUSEPORT`).
    Shared,
}

/// A listening TCP socket, ready for a runtime.
fn listening_socket(address: SocketAddr, port: Port) -> std::io::Result<TcpListener> {
    let socket = bound_socket(address, port)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn bound_socket(address: SocketAddr, port: Port) -> std::io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if port == Port::Shared {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}
