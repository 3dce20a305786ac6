//! What is wrong with a message, and how a client is told.

/// Why a message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A line that ends in LF without CR.
    BareLineFeed,
    /// `Content-Length` and `Transfer-Encoding` together.
    LengthAndCoding,
    /// More than one `Content-Length`.
    SeveralLengths,
    /// A `Content-Length` that is not a number.
    BadLength,
    /// A transfer coding other than `chunked`.
    UnknownCoding,
    /// `chunked` more than once, or `Transfer-Encoding` in HTTP/1.0.
    BadCoding,
    /// No `Host` in HTTP/1.1.
    NoHost,
    /// More than one `Host`.
    SeveralHosts,
    /// A `Host` that is not a host.
    BadHost,
    /// A field line that continues the one before (obs-fold).
    FoldedLine,
    /// Something that is not a field line, or space before the colon.
    BadField,
    /// Something that is not a request line, or not a status line.
    BadStartLine,
    /// A version other than HTTP/1.0 and HTTP/1.1.
    BadVersion,
    /// CONNECT.
    Connect,
    /// A head longer than allowed, or with too many fields.
    HeadTooLarge,
    /// Chunk framing that is not exactly as specified.
    BadChunk,
    /// A head that did not come to its end in time; not found by a parser, which has no clock.
    Unfinished,
}

impl Violation {
    /// The status that answers it.
    pub fn status(self) -> u16 {
        match self {
            Self::UnknownCoding => 501,
            Self::BadVersion => 505,
            Self::Connect => 405,
            Self::Unfinished => 408,
            Self::HeadTooLarge => 431,
            _ => 400,
        }
    }

    /// Response code details for logs.
    pub fn details(self) -> &'static str {
        match self {
            Self::BareLineFeed => "http1.bare_line_feed",
            Self::LengthAndCoding => "http1.content_length_and_chunked_not_allowed",
            Self::SeveralLengths => "http1.several_content_lengths",
            Self::BadLength => "http1.invalid_content_length",
            Self::UnknownCoding => "http1.invalid_transfer_encoding",
            Self::BadCoding => "http1.transfer_encoding_not_allowed",
            Self::NoHost => "missing_host_header",
            Self::SeveralHosts => "http1.several_hosts",
            Self::BadHost => "http1.invalid_host",
            Self::FoldedLine => "http1.obs_fold",
            Self::BadField => "http1.invalid_header_line",
            Self::BadStartLine => "http1.invalid_request_line",
            Self::BadVersion => "http1.unsupported_version",
            Self::Connect => "http1.connect_not_allowed",
            Self::HeadTooLarge => "request_headers_too_large",
            Self::BadChunk => "http1.invalid_chunk",
            Self::Unfinished => "request_header_timeout",
        }
    }
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.details())
    }
}

impl std::error::Error for Violation {}
