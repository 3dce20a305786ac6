//! What a request must bring: one token, one of several, all of them, or none.

use serin_xds::pb::envoy::extensions::filters::http::jwt_authn::v3 as jwt;

use crate::config::convert::each;
use crate::error::{Refusal, Within};

/// What a request must bring.
#[derive(Debug)]
pub enum Requirement {
    /// A token of a provider, for one of these audiences where they are not the provider's own.
    Provider(usize, Option<Box<[Box<str>]>>),
    /// One of these.
    Any(Box<[Requirement]>),
    /// All of these.
    All(Box<[Requirement]>),
    /// No token, or good ones.
    AllowMissing,
    /// Anything; good tokens are used.
    AllowMissingOrFailed,
}

impl Requirement {
    /// Adds the providers that it names, however deep.
    pub fn providers(&self, out: &mut Vec<usize>) {
        match self {
            Self::Provider(index, _) => out.push(*index),
            Self::Any(list) | Self::All(list) => {
                for inner in list {
                    inner.providers(out);
                }
            }
            Self::AllowMissing | Self::AllowMissingOrFailed => {}
        }
    }

    /// Whether a request without a token meets it.
    pub fn is_lenient(&self) -> bool {
        matches!(self, Self::AllowMissing | Self::AllowMissingOrFailed)
    }
}

impl Requirement {
    pub(super) fn compile(from: &jwt::JwtRequirement, providers: &[&String]) -> Result<Self, Refusal> {
        use jwt::jwt_requirement::RequiresType;
        let provider = |name: &String| {
            providers
                .iter()
                .position(|own| *own == name)
                .ok_or_else(|| Refusal::new("provider_name", format!("there is no provider {name:?}")))
        };
        let list = |list: &[jwt::JwtRequirement], field: &str| {
            each(list, "requirements", |inner| Self::compile(inner, providers)).within(field)
        };
        match &from.requires_type {
            None => Err(Refusal::new("requires_type", "is missing")),
            Some(RequiresType::ProviderName(name)) => Ok(Self::Provider(provider(name)?, None)),
            Some(RequiresType::ProviderAndAudiences(both)) => Ok(Self::Provider(
                provider(&both.provider_name).within("provider_and_audiences")?,
                Some(
                    both.audiences
                        .iter()
                        .map(|audience| audience.as_str().into())
                        .collect(),
                ),
            )),
            Some(RequiresType::RequiresAny(any)) => Ok(Self::Any(list(&any.requirements, "requires_any")?)),
            Some(RequiresType::RequiresAll(all)) => Ok(Self::All(list(&all.requirements, "requires_all")?)),
            Some(RequiresType::AllowMissing(_)) => Ok(Self::AllowMissing),
            Some(RequiresType::AllowMissingOrFailed(_)) => Ok(Self::AllowMissingOrFailed),
            Some(RequiresType::ExtractOnlyWithoutValidation(_)) => Err(Refusal::new(
                "extract_only_without_validation",
                "not supported: claims that nobody verified would look like those that were",
            )),
        }
    }
}
