//! The DNS server's sockets: UDP and TCP at the cluster's DNS address, and the way to the host's resolver.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, OpCode, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::zone::Zone;
use crate::node::broker::Broker;

/// Longest UDP answer to a client that announces no EDNS size (RFC 1035 section 4.2.1).
const PLAIN_UDP: usize = 512;
/// Longest UDP answer to anybody: no fragments on common networks (DNS flag day 2020).
const MAX_UDP: usize = 1232;
/// How long the host's resolver may take; resolvers retry after five seconds.
const UPSTREAM_DEADLINE: Duration = Duration::from_secs(3);
/// Queries that wait for the host's resolver at a time; further ones are refused at once.
const MAX_FORWARDED: usize = 128;
/// TCP connections at a time, and how long one may stay idle.
const MAX_CONNECTIONS: usize = 128;
const IDLE: Duration = Duration::from_secs(10);
/// Wait before the sockets are bound again.
const RETRY: Duration = Duration::from_secs(1);

struct Server {
    zone: Zone,
    broker: Broker,
    upstream: Option<SocketAddr>,
    forwarding: Arc<Semaphore>,
}

/// Serves until cancelled.
pub(crate) async fn serve(address: Ipv4Addr, zone: Zone, broker: Broker, cancel: CancellationToken) {
    let server = Arc::new(Server {
        zone,
        broker,
        upstream: upstream(
            &std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
            address,
        ),
        forwarding: Arc::new(Semaphore::new(MAX_FORWARDED)),
    });
    let address = SocketAddr::from((address, 53));
    let (udp, tcp) = loop {
        match (UdpSocket::bind(address).await, TcpListener::bind(address).await) {
            (Ok(udp), Ok(tcp)) => break (Arc::new(udp), tcp),
            (Err(error), _) | (_, Err(error)) => warn!(%address, %error, "bind the DNS server"),
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    };
    tokio::select! {
        () = cancel.cancelled() => {}
        () = serve_udp(&server, &udp) => {}
        () = serve_tcp(&server, &tcp) => {}
    }
}

/// The host's first resolver that is not ourselves.
fn upstream(resolv_conf: &str, own: Ipv4Addr) -> Option<SocketAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse::<IpAddr>().ok())
        .find(|address| *address != IpAddr::V4(own))
        .map(|address| SocketAddr::new(address, 53))
}

async fn serve_udp(server: &Arc<Server>, socket: &Arc<UdpSocket>) {
    let mut buffer = vec![0_u8; 4096];
    let mut forwarded = JoinSet::new();
    loop {
        while forwarded.try_join_next().is_some() {}
        let (length, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // An earlier answer's ICMP error may surface here; it says nothing about the next query.
                debug!(%error, "receive a DNS query");
                continue;
            }
        };
        let Ok(request) = Message::from_vec(&buffer[..length]) else {
            continue;
        };
        let limit = request.edns.as_ref().map_or(PLAIN_UDP, |edns| {
            usize::from(edns.max_payload()).clamp(PLAIN_UDP, MAX_UDP)
        });
        match server.zone.answer(&request) {
            Some(response) => {
                let _ = socket.send_to(&encode(&response, limit), client).await;
            }
            None => {
                let (server, socket, query) = (server.clone(), socket.clone(), buffer[..length].to_vec());
                forwarded.spawn(async move {
                    let answer = server.forward(&request, &query).await;
                    let _ = socket.send_to(&answer, client).await;
                });
            }
        }
    }
}

/// Too long an answer goes out empty with the truncation bit, so that the client comes back over TCP.
fn encode(response: &Message, limit: usize) -> Vec<u8> {
    let bytes = response.to_vec().unwrap_or_default();
    if bytes.len() <= limit {
        return bytes;
    }
    response.truncate().to_vec().unwrap_or_default()
}

async fn serve_tcp(server: &Arc<Server>, listener: &TcpListener) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let server = server.clone();
        connections.spawn(async move {
            serve_connection(&server, stream).await;
            drop(permit);
        });
    }
}

async fn serve_connection(server: &Server, mut stream: TcpStream) {
    loop {
        let mut query = Vec::new();
        let read = async {
            let length = stream.read_u16().await?;
            query.resize(usize::from(length), 0);
            stream.read_exact(&mut query).await
        };
        if !matches!(tokio::time::timeout(IDLE, read).await, Ok(Ok(_))) {
            return;
        }
        let Ok(request) = Message::from_vec(&query) else {
            return;
        };
        let answer = match server.zone.answer(&request) {
            Some(response) => response.to_vec().unwrap_or_default(),
            None => server.forward(&request, &query).await,
        };
        let Ok(length) = u16::try_from(answer.len()) else {
            return;
        };
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend(answer);
        if !matches!(
            tokio::time::timeout(IDLE, stream.write_all(&framed)).await,
            Ok(Ok(()))
        ) {
            return;
        }
    }
}

impl Server {
    /// The host's resolver's answer, or a failure that says whose it is.
    async fn forward(&self, request: &Message, query: &[u8]) -> Vec<u8> {
        let failure = |code: ResponseCode| {
            let mut message = Message::error_msg(request.metadata.id, OpCode::Query, code);
            message.metadata.recursion_desired = request.metadata.recursion_desired;
            message.metadata.recursion_available = true;
            message.add_queries(request.queries.iter().cloned());
            message.to_vec().unwrap_or_default()
        };
        // Without a resolver nothing outside exists; that is quicker for the asker than SERVFAIL and its retries.
        let Some(upstream) = self.upstream else {
            return failure(ResponseCode::NXDomain);
        };
        let Ok(_permit) = self.forwarding.try_acquire() else {
            return failure(ResponseCode::Refused);
        };
        let exchange = async {
            let socket = std::net::UdpSocket::from(self.broker.connect_udp(upstream).await?);
            let socket = UdpSocket::from_std(socket)?;
            socket.send(query).await?;
            let mut buffer = vec![0_u8; 65_535];
            loop {
                let length = socket.recv(&mut buffer).await?;
                // A connected socket takes datagrams of that peer only; the id must be this query's.
                if length >= 12 && buffer[..2] == query[..2] {
                    buffer.truncate(length);
                    return Ok::<_, std::io::Error>(buffer);
                }
            }
        };
        match tokio::time::timeout(UPSTREAM_DEADLINE, exchange).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                debug!(%upstream, %error, "the host's resolver");
                failure(ResponseCode::ServFail)
            }
            Err(_) => failure(ResponseCode::ServFail),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_upstream_is_the_hosts_first_resolver_that_is_not_ourselves() {
        let own = Ipv4Addr::new(10, 96, 0, 10);
        assert_eq!(
            upstream("# x\nnameserver 10.96.0.10\nnameserver 9.9.9.9\n", own),
            Some("9.9.9.9:53".parse().unwrap())
        );
        assert_eq!(upstream("search x\n", own), None);
    }

    #[test]
    fn an_answer_that_does_not_fit_is_truncated_so_that_the_client_comes_back_over_tcp() {
        use hickory_proto::op::Query;
        use hickory_proto::rr::rdata::A;
        use hickory_proto::rr::{Name, RData, Record, RecordType};
        let name = Name::from_ascii("a.b.").unwrap();
        let mut response = Message::response(1, OpCode::Query);
        response.add_query(Query::query(name.clone(), RecordType::A));
        for last in 0..100 {
            response.add_answer(Record::from_rdata(
                name.clone(),
                1,
                RData::A(A(Ipv4Addr::new(10, 0, 0, last))),
            ));
        }
        let short = Message::from_vec(&encode(&response, 512)).unwrap();
        assert!(short.metadata.truncation && short.answers.is_empty());
        let long = Message::from_vec(&encode(&response, 4096)).unwrap();
        assert_eq!(long.answers.len(), 100);
    }
}
