//! Which requests are logged.

use serin_xds::pb::envoy::config::accesslog::v3 as pb;
use serin_xds::pb::envoy::extensions::access_loggers::filters::cel::v3 as cel;

use super::record::{Record, Wants};
use crate::config::convert::{self, Fraction, each, required};
use crate::config::matchers::HeaderMatch;
use crate::error::{Refusal, Within};
use crate::metrics::flags::Flags;
use crate::policy::cel::Expression;
use crate::policy::metadata::MetadataMatch;

/// A compiled `AccessLogFilter`.
#[derive(Debug)]
pub enum Filter {
    /// By status.
    Status(Comparison),
    /// By duration in milliseconds.
    Duration(Comparison),
    /// Everything (no request is a health check that the proxy answers itself).
    Everything,
    /// Whose trace is recorded.
    Traced,
    /// A share.
    Share(Fraction),
    /// All of these.
    And(Box<[Filter]>),
    /// One of these.
    Or(Box<[Filter]>),
    /// By a field of the request; the index of the outcome.
    Header(usize),
    /// With any of these flags; any flag at all where none is named.
    AnyFlag(Option<Flags>),
    /// By gRPC status: with one of these, or with none of them.
    Grpc(Box<[u8]>, bool),
    /// For which a CEL expression is true.
    Expression(Expression),
    /// By dynamic metadata; what holds where there is none.
    Metadata(Option<MetadataMatch>, bool),
    /// Written for one of these reasons, or for none of them.
    Kind(Box<[i32]>, bool),
}

/// A comparison with a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    op: pb::comparison_filter::Op,
    value: u64,
}

impl Comparison {
    fn compile(from: Option<&pb::ComparisonFilter>) -> Result<Self, Refusal> {
        let from = from.ok_or_else(|| Refusal::new("comparison", "is missing"))?;
        Ok(Self {
            op: pb::comparison_filter::Op::try_from(from.op)
                .map_err(|_| Refusal::new("comparison.op", format!("{} is unknown", from.op)))?,
            value: from
                .value
                .as_ref()
                .map_or(0, |value| u64::from(value.default_value)),
        })
    }

    fn holds(self, value: u64) -> bool {
        use pb::comparison_filter::Op;
        match self.op {
            Op::Eq => value == self.value,
            Op::Ge => value >= self.value,
            Op::Le => value <= self.value,
            Op::Ne => value != self.value,
        }
    }
}

const CEL: &str = "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter";

fn is_cel(filter: &pb::ExtensionFilter) -> bool {
    matches!(&filter.config_type, Some(pb::extension_filter::ConfigType::TypedConfig(any)) if any.type_url.ends_with(CEL))
}

fn expression(filter: &pb::ExtensionFilter, wants: &mut Wants) -> Result<Expression, Refusal> {
    let Some(pb::extension_filter::ConfigType::TypedConfig(any)) = &filter.config_type else {
        return Err(Refusal::new("", "is missing"));
    };
    let message: cel::ExpressionFilter = convert::unpack(any, CEL)?;
    if message.cel_config.is_some() {
        return Err(Refusal::new("cel_config", "not supported"));
    }
    Expression::parse(
        &message.expression,
        Some(&mut |side, name| wants.field(side, name)),
    )
    .within("expression")
}

impl Filter {
    /// Compiles the message; what it must see of the request is added to `wants`.
    pub(crate) fn compile(from: &pb::AccessLogFilter, wants: &mut Wants) -> Result<Self, Refusal> {
        use pb::access_log_filter::FilterSpecifier as Spec;
        let spec = required(from.filter_specifier.as_ref(), "filter_specifier")?;
        let mut list = |filters: &[pb::AccessLogFilter], field: &str| {
            each(filters, &format!("{field}.filters"), |filter| {
                Self::compile(filter, wants)
            })
        };
        Ok(match spec {
            Spec::StatusCodeFilter(filter) => {
                Self::Status(Comparison::compile(filter.comparison.as_ref()).within("status_code_filter")?)
            }
            Spec::DurationFilter(filter) => {
                Self::Duration(Comparison::compile(filter.comparison.as_ref()).within("duration_filter")?)
            }
            Spec::NotHealthCheckFilter(_) => Self::Everything,
            Spec::TraceableFilter(_) => Self::Traced,
            Spec::RuntimeFilter(filter) => Self::Share(
                Fraction::compile(filter.percent_sampled.as_ref(), Fraction::NONE)
                    .within("runtime_filter")?,
            ),
            Spec::AndFilter(filter) => Self::And(list(&filter.filters, "and_filter")?),
            Spec::OrFilter(filter) => Self::Or(list(&filter.filters, "or_filter")?),
            Spec::HeaderFilter(filter) => {
                let header = required(filter.header.as_ref(), "header_filter.header")?;
                Self::Header(wants.matcher(HeaderMatch::compile(header).within("header_filter.header")?))
            }
            Spec::ResponseFlagFilter(filter) => {
                let mut flags = Flags::default();
                for code in &filter.flags {
                    flags.add(Flags::of_code(code).ok_or_else(|| {
                        Refusal::new("response_flag_filter.flags", format!("there is no flag {code:?}"))
                    })?);
                }
                Self::AnyFlag((!filter.flags.is_empty()).then_some(flags))
            }
            Spec::GrpcStatusFilter(filter) => Self::Grpc(
                filter
                    .statuses
                    .iter()
                    .filter_map(|status| u8::try_from(*status).ok())
                    .collect(),
                filter.exclude,
            ),
            Spec::MetadataFilter(filter) => Self::Metadata(
                filter
                    .matcher
                    .as_ref()
                    .map(MetadataMatch::compile)
                    .transpose()
                    .within("metadata_filter.matcher")?,
                filter
                    .match_if_key_not_found
                    .as_ref()
                    .is_none_or(|value| value.value),
            ),
            Spec::LogTypeFilter(filter) => Self::Kind(filter.types.as_slice().into(), filter.exclude),
            Spec::ExtensionFilter(filter) if is_cel(filter) => {
                Self::Expression(expression(filter, wants).within("extension_filter.typed_config")?)
            }
            Spec::ExtensionFilter(filter) => {
                return Err(Refusal::new(
                    "extension_filter",
                    format!("the filter {:?} is not supported", filter.name),
                ));
            }
        })
    }

    /// Whether a request of this outcome may be logged, as far as that says: no more of it need be known where it may not.
    pub fn may_pass(&self, code: u16, duration: std::time::Duration, flags: Flags) -> bool {
        match self {
            Self::Status(comparison) => comparison.holds(u64::from(code)),
            Self::Duration(comparison) => comparison.holds(duration.as_millis() as u64),
            Self::And(all) => all.iter().all(|filter| filter.may_pass(code, duration, flags)),
            Self::Or(any) => any.iter().any(|filter| filter.may_pass(code, duration, flags)),
            Self::AnyFlag(None) => !flags.is_empty(),
            Self::AnyFlag(Some(wanted)) => flags.has(*wanted),
            Self::Everything
            | Self::Traced
            | Self::Share(_)
            | Self::Header(_)
            | Self::Grpc(..)
            | Self::Expression(_)
            | Self::Metadata(..)
            | Self::Kind(..) => true,
        }
    }

    /// Whether a request is logged. `random` is called for shares.
    pub fn passes(&self, record: &Record<'_>, random: &impl Fn() -> u64) -> bool {
        match self {
            Self::Status(comparison) => comparison.holds(u64::from(record.code)),
            Self::Duration(comparison) => comparison.holds(record.duration.as_millis() as u64),
            Self::Everything => true,
            Self::Kind(kinds, exclude) => kinds.contains(&(record.kind as i32)) != *exclude,
            Self::Traced => record.trace.is_some_and(|(_, recorded)| recorded),
            Self::Share(share) => share.hit(random()),
            Self::And(all) => all.iter().all(|filter| filter.passes(record, random)),
            Self::Or(any) => any.iter().any(|filter| filter.passes(record, random)),
            Self::Header(index) => record.kept.matched(*index),
            Self::AnyFlag(None) => !record.flags.is_empty(),
            Self::AnyFlag(Some(flags)) => record.flags.has(*flags),
            Self::Grpc(statuses, exclude) => {
                let named = record
                    .grpc_status
                    .is_some_and(|status| statuses.contains(&status));
                named != *exclude
            }
            Self::Expression(expression) => expression.holds(record),
            Self::Metadata(None, _) => true,
            Self::Metadata(Some(matcher), without) => {
                if matcher.finds(record.metadata) {
                    matcher.matches(record.metadata)
                } else {
                    *without
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::format::tests::record;
    use super::super::record::Kept;
    use super::*;
    use crate::policy::metadata::Metadata;

    fn comparisons() -> impl Strategy<Value = Comparison> {
        use pb::comparison_filter::Op;
        let op = prop_oneof![Just(Op::Eq), Just(Op::Ge), Just(Op::Le), Just(Op::Ne)];
        (op, 0..4u64).prop_map(|(op, value)| Comparison { op, value })
    }

    fn filters() -> impl Strategy<Value = Filter> {
        let leaf = (0..7, comparisons()).prop_map(|(kind, comparison)| match kind {
            0 | 1 => Filter::Status(comparison),
            2 => Filter::Duration(comparison),
            3 => Filter::AnyFlag(None),
            4 => Filter::AnyFlag(Some(Flags::RETRY_LIMIT)),
            5 => Filter::Traced,
            _ => Filter::Grpc(Box::new([7]), false),
        });
        leaf.prop_recursive(3, 12, 3, |inner| {
            let list = prop::collection::vec(inner, 0..3);
            (any::<bool>(), list).prop_map(|(all, list)| {
                if all {
                    Filter::And(list.into())
                } else {
                    Filter::Or(list.into())
                }
            })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn what_is_logged_might_have_been_by_its_outcome_alone(
            filter in filters(),
            code in 0..4u16,
            millis in 0..4u64,
            flag in any::<bool>(),
            recorded in any::<bool>(),
        ) {
            let (kept, metadata) = (Kept::default(), Metadata::EMPTY);
            let mut record = record(&kept, &metadata);
            record.code = code;
            record.duration = Duration::from_millis(millis);
            record.flags = if flag { Flags::RETRY_LIMIT } else { Flags::default() };
            record.trace = Some(("", recorded));
            let may_pass = filter.may_pass(code, record.duration, record.flags);
            prop_assert!(may_pass || !filter.passes(&record, &|| 0));
        }
    }

    #[test]
    fn a_request_without_error_is_not_looked_at_for_a_log_of_errors() {
        let errors = Filter::Or(Box::new([
            Filter::Status(Comparison {
                op: pb::comparison_filter::Op::Ge,
                value: 500,
            }),
            Filter::AnyFlag(None),
        ]));
        let may_pass = |code, flags| errors.may_pass(code, Duration::ZERO, flags);
        assert!(!may_pass(200, Flags::default()));
        assert!(may_pass(503, Flags::default()) && may_pass(200, Flags::RETRY_LIMIT));
    }
}
