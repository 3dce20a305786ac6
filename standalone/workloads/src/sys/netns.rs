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

/// The hardware address that goes with an address of the pod network, so that what the node has learnt about an address
/// stays true when another pod gets it. The prefix is the one that CNI's plugins use, from the locally administered
/// range.
fn hardware_address(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x58, a, b, c, d]
}

/// Prepares the calling thread's namespace as the node's: loopback, bridge, addresses, forwarding. Idempotent, since
/// a restarted node enters the namespace that its pods kept alive.
pub(crate) fn prepare_node(gateway: Ipv4Addr, prefix: u8, more: &[Ipv4Addr]) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.set_up(index_of("lo")?)?;
    let bridge = match index_of(BRIDGE) {
        Ok(index) => index,
        Err(_) => {
            netlink.create_bridge(BRIDGE, hardware_address(gateway))?;
            index_of(BRIDGE)?
        }
    };
    // Also of a bridge that an earlier release of this program made without one.
    netlink.set_hardware_address(bridge, hardware_address(gateway))?;
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
            node.create_pod_interface(
                &host_interface,
                bridge,
                POD_INTERFACE,
                hardware_address(address),
                namespace.as_raw_fd(),
            )?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn bridge_hardware_address() -> [u8; 6] {
        nix::ifaddrs::getifaddrs()
            .unwrap()
            .filter(|interface| interface.interface_name == BRIDGE)
            .find_map(|interface| interface.address?.as_link_addr()?.addr())
            .unwrap()
    }

    #[test]
    fn a_bridge_keeps_its_hardware_address_when_pods_come_and_go() {
        // On a thread of its own, which ends in a namespace of its own.
        std::thread::spawn(|| {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
                eprintln!("SKIPPED: a network namespace cannot be made here: {error}");
                return;
            }
            let gateway = Ipv4Addr::new(10, 201, 0, 1);
            prepare_node(gateway, 24, &[]).unwrap();
            let before = bridge_hardware_address();
            assert_eq!(before, hardware_address(gateway));
            let mut pods = Vec::new();
            // The host's ends have random addresses: with eight, the lowest one changes all but certainly.
            for n in 2..10 {
                pods.push(create_pod(&format!("pod{n}"), Ipv4Addr::new(10, 201, 0, n), gateway).unwrap());
                assert_eq!(bridge_hardware_address(), before, "after pod {n} came");
            }
            pods.clear();
            for n in 2..10 {
                let mut netlink = Netlink::open().unwrap();
                if let Ok(index) = index_of(&format!("pod{n}")) {
                    let _ = netlink.delete(index);
                }
                assert_eq!(bridge_hardware_address(), before, "after pod {n} went");
            }
        })
        .join()
        .unwrap();
    }
}
