//! Response flags: Envoy's short codes for why an answer is what it is.

/// A set of response flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(u32);

macro_rules! flags {
    ($($name:ident = $bit:expr, $text:literal, $doc:literal;)*) => {
        impl Flags {
            $(#[doc = concat!("`", $text, "`: ", $doc)] pub const $name: Self = Self(1 << $bit);)*
            const ALL: &'static [(Self, &'static str)] = &[$((Self::$name, $text)),*];
        }
    };
}

// In the order in which they are written. Envoy writes them as they were set, and requests are delayed before anything else.
flags! {
    DELAY_INJECTED = 13, "DI", "delayed by fault injection";
    UPSTREAM_CONNECTION_FAILURE = 0, "UF", "no connection could be made";
    NO_HEALTHY_UPSTREAM = 1, "UH", "no endpoint may be used";
    NO_ROUTE = 2, "NR", "no route or filter chain";
    NO_CLUSTER = 3, "NC", "the route's cluster does not exist";
    UPSTREAM_TIMEOUT = 4, "UT", "the upstream took too long";
    UPSTREAM_CONNECTION_TERMINATION = 5, "UC", "the upstream closed the connection";
    UPSTREAM_RESET = 6, "UR", "the upstream reset the stream";
    UPSTREAM_OVERFLOW = 7, "UO", "a circuit breaker is open";
    RETRY_LIMIT = 8, "URX", "retries or connection attempts are used up";
    DOWNSTREAM_TERMINATION = 9, "DC", "the client went away";
    DOWNSTREAM_PROTOCOL_ERROR = 10, "DPE", "the client broke the protocol";
    UPSTREAM_PROTOCOL_ERROR = 11, "UPE", "the upstream broke the protocol";
    FAULT_INJECTED = 12, "FI", "aborted by fault injection";
    DURATION_TIMEOUT = 14, "DT", "the connection or request lasted too long";
    STREAM_IDLE = 15, "SI", "the stream was idle for too long";
    MAX_STREAM_DURATION = 16, "UMSDR", "the upstream stream lasted too long";
    DROP_OVERLOAD = 17, "DO", "dropped as EDS asks";
    LOCAL_RESET = 18, "LR", "reset by the proxy";
    DOWNSTREAM_RESET = 19, "DR", "the client reset the stream";
    RATE_LIMITED = 20, "RL", "over a rate limit";
    UNAUTHORIZED = 21, "UAEX", "denied by the authorisation service";
    RATE_LIMIT_SERVICE = 22, "RLSE", "the rate limit service failed";
    FAILED_LOCAL_HEALTH_CHECK = 23, "LH", "the application failed its health check";
    INVALID_ENVOY_HEADERS = 24, "IH", "a request field for the proxy is malformed";
    FROM_CACHE = 25, "RFCF", "answered from a cache";
    NO_FILTER_CONFIG = 26, "NFCF", "a filter's configuration has not arrived";
    OVERLOAD = 27, "OM", "shed by the overload manager";
    DNS_FAILURE = 28, "DF", "a name could not be resolved";
    UNCONDITIONAL_DROP = 29, "UDO", "everything is dropped as EDS asks";
}

impl Flags {
    /// Adds the flags of `other`.
    pub fn add(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Whether no flag is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The flag of that short code.
    pub fn of_code(code: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(_, text)| *text == code)
            .map(|(flag, _)| *flag)
    }

    /// Whether any flag of `other` is set.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

impl std::ops::BitOr for Flags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::fmt::Display for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        let mut first = true;
        for (flag, text) in Self::ALL {
            if self.has(*flag) {
                if !first {
                    f.write_str(",")?;
                }
                f.write_str(text)?;
                first = false;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_written_as_envoy_writes_them() {
        assert_eq!(Flags::default().to_string(), "-");
        assert_eq!(
            (Flags::UPSTREAM_CONNECTION_FAILURE | Flags::RETRY_LIMIT).to_string(),
            "UF,URX"
        );
        assert_eq!((Flags::NO_ROUTE | Flags::DELAY_INJECTED).to_string(), "DI,NR");
    }
}
