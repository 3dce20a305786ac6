//! Compression of responses: gzip, brotli, zstd, chosen by what the client accepts.
//!
//! Each filter of a chain brings one encoding. A request's `Accept-Encoding` gives each a quality; the best one (the
//! first in the chain, if several are equally good) encodes the response, if the response may be changed at all.

use std::io::Write;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::compression::{
    brotli::compressor::v3 as brotli_v3, gzip::compressor::v3 as gzip_v3, zstd::compressor::v3 as zstd_v3,
};
use serin_xds::pb::envoy::extensions::filters::http::compressor::v3 as filter;

use crate::config::convert;
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};

/// Envoy's shortest response worth compressing.
const DEFAULT_MIN_LENGTH: u32 = 30;
/// Envoy's types worth compressing.
const DEFAULT_TYPES: [&str; 19] = [
    "application/javascript",
    "application/json",
    "application/x-javascript",
    "application/x-json",
    "application/ecmascript",
    "application/xhtml+xml",
    "application/xml",
    "application/wasm",
    "image/svg+xml",
    "text/css",
    "text/ecmascript",
    "text/html",
    "text/javascript",
    "text/js",
    "text/jscript",
    "text/plain",
    "text/x-javascript",
    "text/x-js",
    "text/xml",
];

/// How bodies are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// Level 0 to 9.
    Gzip(u32),
    /// Quality 0 to 11 and window bits.
    Brotli(u32, u32),
    /// Level.
    Zstd(i32),
}

/// The compiled filter.
#[derive(Debug)]
pub struct Compressor {
    library: Library,
    enabled: bool,
    min_length: u64,
    types: Types,
    keep_etag: bool,
    weaken_etag: bool,
    /// The application does not learn that the client accepts encodings.
    pub remove_accept_encoding: bool,
    spared: Box<[u16]>,
}

#[derive(Debug)]
enum Types {
    Listed(Box<[Box<str>]>),
    Matched(Box<[StringMatch]>),
}

/// What a route says; `None` switches the filter off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerRouteCompressor {
    /// In place of the filter's own.
    pub remove_accept_encoding: Option<bool>,
}

impl PerRouteCompressor {
    /// Compiles the message.
    pub(crate) fn compile(from: &filter::CompressorPerRoute) -> Result<Option<Self>, Refusal> {
        use filter::compressor_per_route::Override;
        match &from.r#override {
            Some(Override::Disabled(true)) => Ok(None),
            Some(Override::Disabled(false)) => Err(Refusal::new("disabled", "must be true")),
            Some(Override::Overrides(overrides)) if overrides.compressor_library.is_some() => {
                Err(Refusal::new("overrides.compressor_library", "not supported"))
            }
            Some(Override::Overrides(overrides)) => Ok(Some(Self {
                remove_accept_encoding: overrides
                    .response_direction_config
                    .as_ref()
                    .and_then(|config| config.remove_accept_encoding_header.as_ref())
                    .map(|value| value.value),
            })),
            None => Err(Refusal::new("override", "is missing")),
        }
    }
}

fn number(value: Option<&serin_xds::pb::google::protobuf::UInt32Value>, default: u32) -> u32 {
    value.map_or(default, |value| value.value)
}

fn flag(value: Option<&core::RuntimeFeatureFlag>) -> bool {
    value
        .and_then(|flag| flag.default_value.as_ref())
        .is_none_or(|value| value.value)
}

impl Library {
    fn compile(from: Option<&core::TypedExtensionConfig>) -> Result<Self, Refusal> {
        let any = from
            .and_then(|extension| extension.typed_config.as_ref())
            .ok_or_else(|| Refusal::new("compressor_library.typed_config", "is missing"))?;
        let type_name = any.type_url.rsplit('/').next().unwrap_or_default();
        match type_name {
            "envoy.extensions.compression.gzip.compressor.v3.Gzip" => {
                let message: gzip_v3::Gzip = convert::unpack(any, type_name)?;
                // 0 is the library's default, which is 6.
                Ok(Self::Gzip(match message.compression_level {
                    1..=9 => message.compression_level as u32,
                    _ => 6,
                }))
            }
            "envoy.extensions.compression.brotli.compressor.v3.Brotli" => {
                let message: brotli_v3::Brotli = convert::unpack(any, type_name)?;
                Ok(Self::Brotli(
                    number(message.quality.as_ref(), 3).min(11),
                    number(message.window_bits.as_ref(), 18).clamp(10, 24),
                ))
            }
            "envoy.extensions.compression.zstd.compressor.v3.Zstd" => {
                let message: zstd_v3::Zstd = convert::unpack(any, type_name)?;
                if message.dictionary.is_some() {
                    return Err(Refusal::new("compressor_library.dictionary", "not supported"));
                }
                Ok(Self::Zstd(
                    number(message.compression_level.as_ref(), 3).clamp(1, 22) as i32,
                ))
            }
            other => Err(Refusal::new(
                "compressor_library",
                format!("{other} is not supported"),
            )),
        }
    }

    /// The name in `Content-Encoding`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip(_) => "gzip",
            Self::Brotli(..) => "br",
            Self::Zstd(_) => "zstd",
        }
    }
}

impl Compressor {
    /// Compiles the message.
    pub(crate) fn compile(from: &filter::Compressor) -> Result<Self, Refusal> {
        let request = from
            .request_direction_config
            .as_ref()
            .and_then(|config| config.common_config.as_ref())
            .and_then(|common| common.enabled.as_ref());
        if from.request_direction_config.is_some() && request.is_none_or(|enabled| flag(Some(enabled))) {
            return Err(Refusal::new(
                "request_direction_config",
                "requests are not compressed",
            ));
        }
        let response = from.response_direction_config.as_ref();
        if from.choose_first {
            return Err(Refusal::new("choose_first", "not supported"));
        }
        if response.is_some_and(|response| response.status_header_enabled) {
            return Err(Refusal::new(
                "response_direction_config.status_header_enabled",
                "not supported",
            ));
        }
        let common = response.and_then(|response| response.common_config.as_ref());
        let matchers = common.map_or(&[][..], |common| &common.content_type_matcher);
        let listed = common.map_or(&from.content_type, |common| &common.content_type);
        let types = if matchers.is_empty() {
            let lower = |text: &str| text.to_ascii_lowercase().into();
            Types::Listed(if listed.is_empty() {
                DEFAULT_TYPES.iter().map(|text| (*text).into()).collect()
            } else {
                listed.iter().map(|text| lower(text)).collect()
            })
        } else {
            Types::Matched(
                matchers
                    .iter()
                    .map(StringMatch::compile)
                    .collect::<Result<_, _>>()
                    .within("response_direction_config.common_config.content_type_matcher")?,
            )
        };
        let min_length = common.map_or(from.content_length.as_ref(), |common| {
            common.min_content_length.as_ref()
        });
        Ok(Self {
            library: Library::compile(from.compressor_library.as_ref())?,
            enabled: flag(common.map_or(from.runtime_enabled.as_ref(), |common| common.enabled.as_ref())),
            min_length: u64::from(number(min_length, DEFAULT_MIN_LENGTH)),
            types,
            keep_etag: response.map_or(from.disable_on_etag_header, |response| {
                response.disable_on_etag_header
            }),
            weaken_etag: response.is_some_and(|response| response.weaken_etag_on_compress),
            remove_accept_encoding: response.map_or(from.remove_accept_encoding_header, |response| {
                response.remove_accept_encoding_header
            }),
            spared: response
                .map_or(&[][..], |response| &response.uncompressible_response_codes)
                .iter()
                .filter_map(|code| u16::try_from(*code).ok())
                .collect(),
        })
    }

    /// How much a client wants this encoding, in thousandths; 0 for not at all, or for less than none at all.
    pub fn quality(&self, request: &HeaderMap) -> u16 {
        let mut own = None;
        let mut any = None;
        let mut identity = None;
        for value in request.get_all(header::ACCEPT_ENCODING) {
            let Ok(text) = value.to_str() else { continue };
            for item in text.split(',') {
                let mut parts = item.split(';');
                let name = parts.next().unwrap_or("").trim();
                let quality = parts
                    .find_map(|part| part.trim().strip_prefix("q="))
                    .map_or(Some(1.0), |text| text.trim().parse::<f32>().ok())
                    .filter(|quality| (0.0..=1.0).contains(quality))
                    .map_or(0, |quality| (quality * 1000.0) as u16);
                if name.eq_ignore_ascii_case(self.library.name())
                    || (matches!(self.library, Library::Gzip(_)) && name.eq_ignore_ascii_case("x-gzip"))
                {
                    own = Some(quality);
                } else if name == "*" {
                    any = Some(quality);
                } else if name.eq_ignore_ascii_case("identity") {
                    identity = Some(quality);
                }
            }
        }
        let quality = own.or(any).unwrap_or(0);
        if identity.is_some_and(|identity| identity > quality) {
            0
        } else {
            quality
        }
    }

    /// Whether a response is worth compressing, and may be.
    pub fn applies(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        let text = |name: header::HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let long_enough = text(header::CONTENT_LENGTH)
            .and_then(|length| length.parse::<u64>().ok())
            .is_none_or(|length| length >= self.min_length);
        let content_type = text(header::CONTENT_TYPE);
        let essence = content_type
            .unwrap_or_default()
            .split(';')
            .next()
            .unwrap_or("")
            .trim()
            .to_ascii_lowercase();
        // What says nothing of its type may be of any (Envoy).
        let fits = content_type.is_none()
            || match &self.types {
                Types::Listed(types) => types.iter().any(|wanted| **wanted == *essence),
                Types::Matched(matchers) => matchers.iter().any(|matcher| matcher.matches(&essence)),
            };
        let fixed = headers
            .get_all(header::CACHE_CONTROL)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.to_ascii_lowercase().contains("no-transform"));
        self.enabled
            && long_enough
            && fits
            && !fixed
            && !headers.contains_key(header::CONTENT_ENCODING)
            // A part of something is a part of what it was.
            && status != StatusCode::PARTIAL_CONTENT
            && !headers.contains_key(header::CONTENT_RANGE)
            && !(self.keep_etag && headers.contains_key(header::ETAG))
            && !self.spared.contains(&status.as_u16())
    }

    /// Says in a response's head that its body is encoded, and gives what encodes it.
    pub fn begin(&self, headers: &mut HeaderMap) -> std::io::Result<Encoder> {
        let encoder = Encoder::new(self.library)?;
        headers.remove(header::CONTENT_LENGTH);
        headers.insert(
            header::CONTENT_ENCODING,
            HeaderValue::from_static(self.library.name()),
        );
        // A strong tag names exactly these bytes, which are others now.
        if let Some(etag) = headers.get(header::ETAG).cloned() {
            let weak = etag.as_bytes().starts_with(b"W/") || etag.as_bytes().starts_with(b"w/");
            if !weak {
                let weakened = HeaderValue::from_bytes(&[b"W/", etag.as_bytes()].concat());
                match weakened {
                    Ok(value) if self.weaken_etag => {
                        headers.insert(header::ETAG, value);
                    }
                    _ => {
                        headers.remove(header::ETAG);
                    }
                }
            }
        }
        Ok(encoder)
    }
}

/// Tells caches that the response depends on `Accept-Encoding`, also where it was not encoded.
pub fn vary(headers: &mut HeaderMap) {
    let told = headers
        .get_all(header::VARY)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|name| name.trim() == "*" || name.trim().eq_ignore_ascii_case("accept-encoding"));
    if told {
        return;
    }
    let joined = headers
        .get(header::VARY)
        .and_then(|value| HeaderValue::from_bytes(&[value.as_bytes(), b", Accept-Encoding"].concat()).ok());
    headers.insert(
        header::VARY,
        joined.unwrap_or(HeaderValue::from_static("Accept-Encoding")),
    );
}

/// What encodes one body.
pub enum Encoder {
    /// gzip.
    Gzip(Box<flate2::write::GzEncoder<Vec<u8>>>),
    /// brotli.
    Brotli(Box<brotli::CompressorWriter<Vec<u8>>>),
    /// zstd.
    Zstd(Box<zstd::stream::write::Encoder<'static, Vec<u8>>>),
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gzip(_) => "gzip",
            Self::Brotli(_) => "br",
            Self::Zstd(_) => "zstd",
        })
    }
}

impl Encoder {
    /// Of that kind.
    pub fn new(library: Library) -> std::io::Result<Self> {
        Ok(match library {
            Library::Gzip(level) => Self::Gzip(Box::new(flate2::write::GzEncoder::new(
                Vec::new(),
                flate2::Compression::new(level),
            ))),
            Library::Brotli(quality, window) => Self::Brotli(Box::new(brotli::CompressorWriter::new(
                Vec::new(),
                4096,
                quality,
                window,
            ))),
            Library::Zstd(level) => {
                Self::Zstd(Box::new(zstd::stream::write::Encoder::new(Vec::new(), level)?))
            }
        })
    }

    /// Encodes some bytes; everything so far can be decoded from what was returned, so that events are not held back.
    pub fn push(&mut self, data: &[u8]) -> std::io::Result<Bytes> {
        let writer: &mut dyn Write = match self {
            Self::Gzip(encoder) => encoder,
            Self::Brotli(encoder) => encoder,
            Self::Zstd(encoder) => encoder,
        };
        writer.write_all(data)?;
        writer.flush()?;
        let out = match self {
            Self::Gzip(encoder) => encoder.get_mut(),
            Self::Brotli(encoder) => encoder.get_mut(),
            Self::Zstd(encoder) => encoder.get_mut(),
        };
        Ok(std::mem::take(out).into())
    }

    /// The end of the encoded body.
    pub fn finish(self) -> std::io::Result<Bytes> {
        Ok(match self {
            Self::Gzip(encoder) => encoder.finish()?,
            Self::Brotli(encoder) => encoder.into_inner(),
            Self::Zstd(encoder) => encoder.finish()?,
        }
        .into())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::given::headers;

    fn compressor(library: Library) -> Compressor {
        Compressor {
            library,
            enabled: true,
            min_length: 30,
            types: Types::Listed(Box::new(["text/plain".into()])),
            keep_etag: false,
            weaken_etag: false,
            remove_accept_encoding: false,
            spared: Box::new([500]),
        }
    }

    #[test]
    fn every_encoding_is_decoded_to_what_it_was() {
        let parts: [&[u8]; 3] = [b"hello ", &[7; 10_000], b" end"];
        for library in [Library::Gzip(6), Library::Brotli(4, 18), Library::Zstd(3)] {
            let mut encoder = Encoder::new(library).unwrap();
            let mut encoded = Vec::new();
            for part in parts {
                let out = encoder.push(part).unwrap();
                assert!(!out.is_empty(), "{library:?}: nothing is held back");
                encoded.extend_from_slice(&out);
            }
            encoded.extend_from_slice(&encoder.finish().unwrap());
            assert!(encoded.len() < 1000, "{library:?}: {}", encoded.len());
            let mut decoded = Vec::new();
            match library {
                Library::Gzip(_) => flate2::read::GzDecoder::new(&encoded[..])
                    .read_to_end(&mut decoded)
                    .unwrap(),
                Library::Brotli(..) => brotli::Decompressor::new(&encoded[..], 4096)
                    .read_to_end(&mut decoded)
                    .unwrap(),
                Library::Zstd(_) => zstd::stream::read::Decoder::new(&encoded[..])
                    .unwrap()
                    .read_to_end(&mut decoded)
                    .unwrap(),
            };
            assert_eq!(decoded, parts.concat(), "{library:?}");
        }
    }

    #[test]
    fn qualities_are_read_as_rfc_9110_says() {
        let gzip = compressor(Library::Gzip(6));
        for (accepted, expected) in [
            ("gzip", 1000),
            ("br, gzip;q=0.5", 500),
            ("*", 1000),
            ("*;q=0.2, gzip;q=0", 0),
            ("identity, gzip;q=0.5", 0),
            ("identity;q=0.1, gzip;q=0.5", 500),
            ("br", 0),
            ("gzip;q=2", 0),
            ("X-GZIP", 1000),
            ("", 0),
        ] {
            assert_eq!(
                gzip.quality(&headers(&[("accept-encoding", accepted)])),
                expected,
                "{accepted}"
            );
        }
        assert_eq!(gzip.quality(&HeaderMap::new()), 0);
    }

    #[test]
    fn only_what_may_be_changed_and_is_worth_it_is_compressed() {
        let gzip = compressor(Library::Gzip(6));
        let text = ("content-type", "text/plain; charset=utf-8");
        let cases: [(u16, &[(&'static str, &'static str)], bool); 9] = [
            (200, &[text, ("content-length", "30")], true),
            (200, &[text], true),
            (200, &[text, ("content-length", "29")], false),
            (200, &[("content-type", "image/png")], false),
            (200, &[text, ("content-encoding", "br")], false),
            (200, &[text, ("cache-control", "public, no-transform")], false),
            (206, &[text], false),
            (500, &[text], false),
            // Of whatever type.
            (200, &[], true),
        ];
        for (status, fields, expected) in cases {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(
                gzip.applies(status, &headers(fields)),
                expected,
                "{status} {fields:?}"
            );
        }
    }

    #[test]
    fn a_strong_tag_goes_or_becomes_weak_and_caches_are_told() {
        let mut headers = headers(&[("etag", "\"a\""), ("content-length", "100"), ("vary", "origin")]);
        let mut gzip = compressor(Library::Gzip(6));
        gzip.begin(&mut headers.clone()).unwrap();
        let mut plain = headers.clone();
        gzip.begin(&mut plain).unwrap();
        assert!(!plain.contains_key("etag") && !plain.contains_key("content-length"));
        gzip.weaken_etag = true;
        gzip.begin(&mut headers).unwrap();
        vary(&mut headers);
        vary(&mut headers);
        assert_eq!(
            (&headers["etag"], &headers["vary"]),
            (
                &HeaderValue::from_static("W/\"a\""),
                &HeaderValue::from_static("origin, Accept-Encoding")
            )
        );
        assert_eq!(headers["content-encoding"], "gzip");
    }
}
