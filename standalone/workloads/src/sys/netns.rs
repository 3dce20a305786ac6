//! Network namespaces: the node's (one bridge) and one for each pod.
//!
//! A pod's address is a /32 whose only route leads to the bridge's address, so that pods reach each other *through*
//! the node's routing and connection tracking. Were they neighbours on one subnet, a reply from a Service's endpoint
//! would go straight to the client over the bridge, past the tracking that has to translate it back.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sched::{CloneFlags, unshare};

use super::netlink::{Netlink, index_of};

/// The name of the bridge in the node's namespace.
pub(crate) const BRIDGE: &str = "serin0";
/// The name of a pod's interface, inside.
pub(crate) const POD_INTERFACE: &str = "eth0";

/// Prepares the calling thread's namespace as the node's: loopback, bridge, addresses, forwarding. Idempotent, since
/// a restarted node enters the namespace that its pods kept alive.
pub(crate) fn prepare_node(gateway: Ipv4Addr, prefix: u8, more: &[Ipv4Addr]) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.set_up(index_of("lo")?)?;
    let bridge = match index_of(BRIDGE) {
        Ok(index) => index,
        Err(_) => {
            netlink.create_bridge(BRIDGE)?;
            index_of(BRIDGE)?
        }
    };
    netlink.set_up(bridge)?;
    netlink.add_address(bridge, gateway, prefix)?;
    for address in more {
        netlink.add_address(bridge, *address, 32)?;
    }
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    // Packets leave through the interface they came by (see the module's head): that is meant, not a detour.
    for scope in ["all", BRIDGE] {
        std::fs::write(format!("/proc/sys/net/ipv4/conf/{scope}/send_redirects"), "0")?;
    }
    // With br_netfilter a frame would pass the IP hooks inside the bridge already, be translated there and bridged back
    // to the port it came from, which a bridge does not do: a pod could not reach itself through a Service. Where the
    // module is not there, neither is the file.
    let bridged = std::path::Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables");
    if bridged.exists() {
        std::fs::write(bridged, "0")?;
    }
    Ok(())
}

/// Creates a pod's network namespace with its interface, a port of the node's bridge. The namespace lives as long as
/// the descriptor or a process in it does.
///
/// Blocks for about a millisecond; runs on a thread of its own that ends in the new namespace.
pub(crate) fn create_pod(host_interface: &str, address: Ipv4Addr, gateway: Ipv4Addr) -> io::Result<OwnedFd> {
    let host_interface = host_interface.to_owned();
    let thread = std::thread::Builder::new()
        .name("pod-network".to_owned())
        .spawn(move || {
            let mut node = Netlink::open()?;
            let bridge = index_of(BRIDGE)?;
            if let Ok(stale) = index_of(&host_interface) {
                node.delete(stale)?;
            }
            unshare(CloneFlags::CLONE_NEWNET)?;
            let namespace = File::open("/proc/thread-self/ns/net")?;
            let mut pod = Netlink::open()?;
            pod.set_up(index_of("lo")?)?;
            node.create_pod_interface(&host_interface, bridge, POD_INTERFACE, namespace.as_raw_fd())?;
            let interface = index_of(POD_INTERFACE)?;
            pod.set_up(interface)?;
            pod.add_address(interface, address, 32)?;
            pod.add_default_route(gateway, interface)?;
            // Containers bind low ports without being root, as container runtimes let them.
            std::fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")?;
            Ok(OwnedFd::from(namespace))
        })?;
    thread.join().unwrap_or_else(|_| {
        Err(io::Error::other(
            "the thread that creates a pod's network ended early",
        ))
    })
}
