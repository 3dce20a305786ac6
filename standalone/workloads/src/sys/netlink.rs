//! The dozen rtnetlink messages that a bridge and its pods need, built by hand and sent synchronously: creating a
//! pod's interface is one message (both ends, names, bridge port, target namespace, up), and a thread that has just
//! entered a new network namespace can configure it without an async runtime. rtnetlink(7), if_link.h, if_addr.h.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::libc;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTNH_F_ONLINK: u32 = 4;
/// Nested attributes carry this flag since Linux 5.2's strict parsing.
const NLA_F_NESTED: u16 = 1 << 15;

/// A route netlink socket of the network namespace in which it was opened.
pub(crate) struct Netlink {
    fd: OwnedFd,
    sequence: u32,
}

#[derive(Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn put(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (4 + value.len()) as u16;
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        while !self.0.len().is_multiple_of(4) {
            self.0.push(0);
        }
        self
    }

    fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.put(kind, &bytes)
    }

    fn number(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    fn nest(self, kind: u16, inner: Self) -> Self {
        self.put(kind | NLA_F_NESTED, &inner.0)
    }
}

/// `struct ifinfomsg`.
fn interface_header(index: u32, up: bool) -> Vec<u8> {
    let mut header = vec![0_u8; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    let flags = if up { libc::IFF_UP as u32 } else { 0 };
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    header
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self { fd, sequence: 0 })
    }

    fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend_from_slice(&((16 + body.len()) as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&0_u32.to_ne_bytes());
        message.extend_from_slice(body);
        send(self.fd.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut answer = [0_u8; 4096];
        loop {
            let length = recv(self.fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            let answer = &answer[..length];
            if length < 20 || field_u16(answer, 4) != NLMSG_ERROR || field_u32(answer, 8) != self.sequence {
                continue;
            }
            return match field_u32(answer, 16) as i32 {
                0 => Ok(()),
                errno => Err(io::Error::from_raw_os_error(-errno)),
            };
        }
    }

    /// Creates a bridge, up, with a hardware address of its own.
    ///
    /// Without one, a bridge takes the lowest address among its ports, and changes it whenever a port with a lower one
    /// joins or the lowest leaves. Whatever other namespaces then send to the address that they had learnt is dropped
    /// until they ask again: a new pod would cost its neighbours packets, of which a lost SYN costs a whole second.
    pub(crate) fn create_bridge(&mut self, name: &str, hardware: [u8; 6]) -> io::Result<()> {
        let mut body = interface_header(0, true);
        body.extend(
            Attributes::default()
                .text(IFLA_IFNAME, name)
                .put(IFLA_ADDRESS, &hardware)
                .nest(
                    IFLA_LINKINFO,
                    Attributes::default().text(IFLA_INFO_KIND, "bridge"),
                )
                .0,
        );
        self.request(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &body)
    }

    /// Gives an interface a hardware address.
    pub(crate) fn set_hardware_address(&mut self, index: u32, hardware: [u8; 6]) -> io::Result<()> {
        let mut body = interface_header(index, true);
        body.extend(Attributes::default().put(IFLA_ADDRESS, &hardware).0);
        self.request(libc::RTM_NEWLINK, 0, &body)
    }

    /// Creates a pair: `name` here, a port of `bridge`, up; `peer_name`, with the address `peer_hardware`, in the
    /// namespace `peer_namespace`.
    pub(crate) fn create_pod_interface(
        &mut self,
        name: &str,
        bridge: u32,
        peer_name: &str,
        peer_hardware: [u8; 6],
        peer_namespace: RawFd,
    ) -> io::Result<()> {
        // Down: a veth that comes up before it knows its peer is refused with ENOTCONN.
        let mut peer = interface_header(0, false);
        peer.extend(
            Attributes::default()
                .text(IFLA_IFNAME, peer_name)
                .put(IFLA_ADDRESS, &peer_hardware)
                .number(IFLA_NET_NS_FD, peer_namespace as u32)
                .0,
        );
        let mut body = interface_header(0, true);
        body.extend(
            Attributes::default()
                .text(IFLA_IFNAME, name)
                .number(IFLA_MASTER, bridge)
                .nest(
                    IFLA_LINKINFO,
                    Attributes::default()
                        .text(IFLA_INFO_KIND, "veth")
                        .nest(IFLA_INFO_DATA, Attributes::default().put(VETH_INFO_PEER, &peer)),
                )
                .0,
        );
        self.request(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &body)
    }

    /// Brings an interface up.
    pub(crate) fn set_up(&mut self, index: u32) -> io::Result<()> {
        self.request(libc::RTM_NEWLINK, 0, &interface_header(index, true))
    }

    /// Removes an interface (and its pair).
    pub(crate) fn delete(&mut self, index: u32) -> io::Result<()> {
        self.request(libc::RTM_DELLINK, 0, &interface_header(index, false))
    }

    /// Adds an address; one that is there already is fine.
    pub(crate) fn add_address(&mut self, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        // struct ifaddrmsg: family, prefixlen, flags, scope, index
        let mut body = vec![libc::AF_INET as u8, prefix, 0, 0];
        body.extend_from_slice(&index.to_ne_bytes());
        body.extend(
            Attributes::default()
                .put(IFA_LOCAL, &address.octets())
                .put(IFA_ADDRESS, &address.octets())
                .0,
        );
        match self.request(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &body) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Adds the default route by a gateway that need not be on a local subnet.
    pub(crate) fn add_default_route(&mut self, gateway: Ipv4Addr, interface: u32) -> io::Result<()> {
        // struct rtmsg: family, dst_len, src_len, tos, table, protocol (RTPROT_STATIC), scope, type, flags
        let mut body = vec![
            libc::AF_INET as u8,
            0,
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_STATIC,
            libc::RT_SCOPE_UNIVERSE,
            libc::RTN_UNICAST,
        ];
        body.extend_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
        body.extend(
            Attributes::default()
                .put(RTA_GATEWAY, &gateway.octets())
                .number(RTA_OIF, interface)
                .0,
        );
        self.request(libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &body)
    }
}

fn field_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn field_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The index of an interface in the calling thread's network namespace.
pub(crate) fn index_of(name: &str) -> io::Result<u32> {
    nix::net::if_::if_nametoindex(name).map_err(Into::into)
}
