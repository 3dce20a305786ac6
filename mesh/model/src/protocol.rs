//! Which protocol a port speaks: `appProtocol`, else the prefix of its name, else found out from the bytes.

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// HTTP/1.1.
    Http,
    /// HTTP/2.
    Http2,
    /// gRPC (HTTP/2).
    Grpc,
    /// gRPC-Web (HTTP/1.1).
    GrpcWeb,
    /// TLS with HTTP inside, not terminated by the mesh.
    Https,
    /// TLS with anything inside.
    Tls,
    /// Opaque bytes.
    Tcp,
    /// MongoDB, carried as TCP.
    Mongo,
    /// Redis, carried as TCP.
    Redis,
    /// MySQL, carried as TCP.
    MySql,
    /// Not carried by the mesh.
    Udp,
    /// Unknown: HTTP or TCP is found out per connection.
    Auto,
}

impl Protocol {
    /// Routed by HTTP rules for certain.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// Spoken as HTTP/2 towards the endpoint.
    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// HTTP, or may turn out to be.
    pub fn is_http_or_auto(self) -> bool {
        self.is_http() || self == Self::Auto
    }

    /// Carries TLS that the mesh does not terminate.
    pub fn is_tls(self) -> bool {
        matches!(self, Self::Https | Self::Tls)
    }

    /// The protocol of a word as port names and Gateways use it.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word.to_ascii_lowercase().as_str() {
            "http" => Self::Http,
            "http2" => Self::Http2,
            "grpc" => Self::Grpc,
            "grpc-web" => Self::GrpcWeb,
            "https" => Self::Https,
            "tls" => Self::Tls,
            "tcp" => Self::Tcp,
            "mongo" => Self::Mongo,
            "redis" => Self::Redis,
            "mysql" => Self::MySql,
            "udp" => Self::Udp,
            _ => return None,
        })
    }

    /// The protocol of a Service port.
    ///
    /// Server-first protocols on their well-known numbers (SMTP 25, DNS 53, MySQL 3306, MongoDB 27017) are never sniffed:
    /// the proxy would wait for bytes that the client never sends first.
    pub fn of_port(number: u16, name: &str, app_protocol: Option<&str>, transport: &str) -> Self {
        if transport.eq_ignore_ascii_case("UDP") {
            return Self::Udp;
        }
        if let Some(word) = app_protocol {
            match word {
                "kubernetes.io/h2c" => return Self::Http2,
                "kubernetes.io/ws" => return Self::Http,
                "kubernetes.io/wss" => return Self::Tcp,
                _ => {}
            }
            if let Some(protocol) = Self::parse(word) {
                return protocol;
            }
        }
        if let Some(protocol) = Self::of_name(name) {
            return protocol;
        }
        if matches!(number, 25 | 53 | 3306 | 27017) {
            Self::Tcp
        } else {
            Self::Auto
        }
    }

    fn of_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        if name == "grpc-web" || name.starts_with("grpc-web-") {
            return Some(Self::GrpcWeb);
        }
        Self::parse(name.split('-').next().unwrap_or(""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_app_protocol_wins_over_the_name_and_the_name_over_the_number() {
        for (number, name, app, protocol) in [
            (80, "http", None, Protocol::Http),
            (80, "http-admin", None, Protocol::Http),
            (80, "HTTP-admin", None, Protocol::Http),
            (80, "http", Some("tcp"), Protocol::Tcp),
            (80, "grpc-web-x", None, Protocol::GrpcWeb),
            (80, "grpc-x", None, Protocol::Grpc),
            (80, "web", None, Protocol::Auto),
            (80, "", None, Protocol::Auto),
            (3306, "", None, Protocol::Tcp),
            (3306, "http", None, Protocol::Http),
            (53, "x", Some("kubernetes.io/h2c"), Protocol::Http2),
            (1, "x", Some("kubernetes.io/wss"), Protocol::Tcp),
            (1, "tls", Some("something-else"), Protocol::Tls),
        ] {
            assert_eq!(
                Protocol::of_port(number, name, app, "TCP"),
                protocol,
                "{number} {name} {app:?}"
            );
        }
        assert_eq!(Protocol::of_port(80, "http", None, "UDP"), Protocol::Udp);
    }
}
