//! `Http2ProtocolOptions` of listeners and clusters: sizes, limits of what the peer may send, and pings.
//!
//! What `h2` has no say in is either counted below it ([`crate::stream::frames`]) or refused where the configuration asks for
//! something stricter than what holds.

use std::time::Duration;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::google::protobuf::UInt32Value;

use super::convert::{self, refuse_present};
use crate::error::{Refusal, Within};

/// Envoy's numbers where the configuration says nothing.
const EMPTY_FRAMES: u32 = 1;
const PRIORITY_FRAMES: u32 = 100;
const WINDOW_UPDATES: u32 = 10;
const RESET_BURST: u64 = 1000;
const RESET_RATE: u64 = 33;
const OUTBOUND_FRAMES: u32 = 10_000;
const JITTER: f64 = 15.0;

/// Control frames that `h2` may have waiting beside resets: an acknowledgement of each kind, and what says goodbye.
const LEAST_CONTROL_FRAMES: u32 = 8;
/// Streams that the peer may make us reset by breaking the protocol (MadeYouReset, CVE-2025-8671).
const MAX_ERRORS: usize = 1024;
/// Streams that a client may have reset before they were looked at (Rapid Reset, CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 20;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Http2Options {
    /// Size of the table of the peer's HPACK encoder, where it is not the protocol's.
    pub table_size: Option<u32>,
    /// Streams that the peer may make us reset by breaking the protocol.
    pub max_errors: usize,
    /// Streams that the peer may have reset before they were looked at.
    pub max_pending_resets: usize,
    /// What the peer may send.
    pub frames: FrameLimits,
    /// Whether the connection is asked now and then whether it lives.
    pub keepalive: Option<Keepalive>,
}

/// What a peer may send, by Envoy's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLimits {
    /// `max_consecutive_inbound_frames_with_empty_payload`.
    pub empty: u32,
    /// `max_inbound_priority_frames_per_stream`.
    pub priority: u32,
    /// `max_inbound_window_update_frames_per_data_frame_sent`.
    pub window_updates: u32,
    /// `stream_reset_burst` and, a second, `stream_reset_rate`, where the configuration gives either.
    pub resets: Option<(u64, u64)>,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self {
            empty: EMPTY_FRAMES,
            priority: PRIORITY_FRAMES,
            window_updates: WINDOW_UPDATES,
            resets: None,
        }
    }
}

impl Default for Http2Options {
    fn default() -> Self {
        Self {
            table_size: None,
            max_errors: MAX_ERRORS,
            max_pending_resets: MAX_PENDING_RESETS,
            frames: FrameLimits::default(),
            keepalive: None,
        }
    }
}

/// `connection_keepalive`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keepalive {
    /// Between two pings.
    pub interval: Option<Duration>,
    /// How long an answer may take while nothing else comes.
    pub timeout: Duration,
    /// Up to which part of an interval is added to it by chance.
    pub jitter: f64,
    /// A connection on which nothing has come for so long is pinged ahead of a new stream (towards endpoints only).
    pub idle: Option<Duration>,
}

impl Keepalive {
    fn compile(from: &core::KeepaliveSettings) -> Result<Self, Refusal> {
        let timeout = convert::timeout(from.timeout.as_ref()).within("timeout")?;
        Ok(Self {
            interval: convert::timeout(from.interval.as_ref()).within("interval")?,
            timeout: timeout.ok_or_else(|| Refusal::new("timeout", "is missing"))?,
            jitter: from
                .interval_jitter
                .as_ref()
                .map_or(JITTER, |percent| percent.value)
                / 100.0,
            idle: convert::timeout(from.connection_idle_interval.as_ref())
                .within("connection_idle_interval")?,
        })
    }

    /// The time until the next ping; `draw` is uniform in the whole range of its type.
    pub fn wait(&self, draw: u64) -> Option<Duration> {
        let interval = self.interval?;
        let share = draw as f64 / u64::MAX as f64;
        Some(interval.saturating_add(interval.mul_f64((self.jitter * share).clamp(0.0, 10.0))))
    }
}

impl Http2Options {
    /// `invalid_messages` is what is said of messages that are invalid beside the options (by connection managers).
    pub(super) fn compile(
        from: Option<&core::Http2ProtocolOptions>,
        invalid_messages: Option<bool>,
    ) -> Result<Self, Refusal> {
        let Some(from) = from else {
            return Ok(Self::default());
        };
        refuse(from, invalid_messages)?;
        let number =
            |given: &Option<UInt32Value>, default| given.as_ref().map_or(default, |value| value.value);
        let control = number(&from.max_outbound_control_frames, u32::MAX);
        let resets = (from.stream_reset_burst.is_some() || from.stream_reset_rate.is_some()).then(|| {
            let number = |given: &Option<serin_xds::pb::google::protobuf::UInt64Value>, default| {
                given.as_ref().map_or(default, |value| value.value)
            };
            (
                number(&from.stream_reset_burst, RESET_BURST),
                number(&from.stream_reset_rate, RESET_RATE),
            )
        });
        Ok(Self {
            table_size: from.hpack_table_size.as_ref().map(|value| value.value),
            max_errors: MAX_ERRORS.min(control as usize),
            max_pending_resets: MAX_PENDING_RESETS.min(control as usize),
            frames: FrameLimits {
                empty: number(
                    &from.max_consecutive_inbound_frames_with_empty_payload,
                    EMPTY_FRAMES,
                ),
                priority: number(&from.max_inbound_priority_frames_per_stream, PRIORITY_FRAMES),
                window_updates: number(
                    &from.max_inbound_window_update_frames_per_data_frame_sent,
                    WINDOW_UPDATES,
                )
                .max(1),
                resets,
            },
            keepalive: from
                .connection_keepalive
                .as_ref()
                .map(Keepalive::compile)
                .transpose()
                .within("connection_keepalive")?,
        })
    }
}

/// What is stricter than what holds.
fn refuse(from: &core::Http2ProtocolOptions, invalid_messages: Option<bool>) -> Result<(), Refusal> {
    let below = |given: &Option<UInt32Value>, least| given.as_ref().is_some_and(|value| value.value < least);
    let ends_connection = |value: Option<bool>| value == Some(false);
    let own = from
        .override_stream_error_on_invalid_http_message
        .as_ref()
        .map(|value| value.value);
    refuse_present(
        &[
            (
                "max_outbound_frames",
                below(&from.max_outbound_frames, OUTBOUND_FRAMES),
            ),
            (
                "max_outbound_control_frames",
                below(&from.max_outbound_control_frames, LEAST_CONTROL_FRAMES),
            ),
        ],
        "is less than what may wait: what is sent is bounded by bytes (400 KiB a stream), and 8 control frames",
    )?;
    refuse_present(
        &[
            ("allow_metadata", from.allow_metadata),
            (
                "custom_settings_parameters",
                !from.custom_settings_parameters.is_empty(),
            ),
            (
                "disallow_obs_text",
                from.disallow_obs_text.as_ref().is_some_and(|value| value.value),
            ),
        ],
        "not supported",
    )?;
    refuse_present(
        &[(
            "override_stream_error_on_invalid_http_message",
            ends_connection(own.or(invalid_messages.filter(|_| own.is_none()))),
        )],
        "an invalid message ends its stream, never its connection: false cannot be honoured",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(value: u32) -> Option<UInt32Value> {
        Some(UInt32Value { value })
    }

    #[test]
    fn what_is_not_given_is_as_in_envoy_and_what_is_given_holds() {
        let plain = Http2Options::compile(Some(&core::Http2ProtocolOptions::default()), None).unwrap();
        assert_eq!(plain, Http2Options::default());
        let given = Http2Options::compile(
            Some(&core::Http2ProtocolOptions {
                hpack_table_size: number(0),
                max_outbound_frames: number(10_000),
                max_outbound_control_frames: number(10),
                max_consecutive_inbound_frames_with_empty_payload: number(0),
                max_inbound_priority_frames_per_stream: number(3),
                max_inbound_window_update_frames_per_data_frame_sent: number(4),
                stream_reset_rate: Some(serin_xds::pb::google::protobuf::UInt64Value { value: 5 }),
                ..Default::default()
            }),
            None,
        )
        .unwrap();
        assert_eq!(
            (given.table_size, given.max_errors, given.max_pending_resets),
            (Some(0), 10, 10)
        );
        let frames = FrameLimits {
            empty: 0,
            priority: 3,
            window_updates: 4,
            resets: Some((1000, 5)),
        };
        assert_eq!(given.frames, frames);
    }

    #[test]
    fn what_is_stricter_than_what_holds_is_refused_by_name() {
        let plain = core::Http2ProtocolOptions::default;
        for (field, from) in [
            (
                "max_outbound_frames",
                core::Http2ProtocolOptions {
                    max_outbound_frames: number(9_999),
                    ..plain()
                },
            ),
            (
                "max_outbound_control_frames",
                core::Http2ProtocolOptions {
                    max_outbound_control_frames: number(7),
                    ..plain()
                },
            ),
            (
                "allow_metadata",
                core::Http2ProtocolOptions {
                    allow_metadata: true,
                    ..plain()
                },
            ),
            (
                "override_stream_error_on_invalid_http_message",
                core::Http2ProtocolOptions {
                    override_stream_error_on_invalid_http_message: Some(
                        serin_xds::pb::google::protobuf::BoolValue { value: false },
                    ),
                    ..plain()
                },
            ),
            (
                "connection_keepalive.timeout",
                core::Http2ProtocolOptions {
                    connection_keepalive: Some(core::KeepaliveSettings::default()),
                    ..plain()
                },
            ),
        ] {
            let refusal = Http2Options::compile(Some(&from), None).unwrap_err().to_string();
            assert!(refusal.contains(field), "{refusal}");
        }
        assert!(Http2Options::compile(Some(&plain()), Some(false)).is_err());
        assert!(Http2Options::compile(Some(&plain()), Some(true)).is_ok());
    }

    #[test]
    fn pings_come_after_an_interval_and_up_to_its_jitter() {
        let rules = Keepalive {
            interval: Some(Duration::from_secs(10)),
            timeout: Duration::from_secs(1),
            jitter: 0.5,
            idle: None,
        };
        assert_eq!(rules.wait(0), Some(Duration::from_secs(10)));
        assert_eq!(rules.wait(u64::MAX), Some(Duration::from_secs(15)));
        assert_eq!(
            Keepalive {
                interval: None,
                ..rules
            }
            .wait(0),
            None
        );
    }
}
