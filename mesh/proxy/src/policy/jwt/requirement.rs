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
    Any(Box<[Requirement]>, Instead),
    /// All of these.
    All(Box<[Requirement]>),
    /// No token, or good ones.
    AllowMissing,
    /// Anything; good tokens are used.
    AllowMissingOrFailed,
}

/// What meets a list of which one is asked for, where none of it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Instead {
    /// Nothing.
    Nothing,
    /// That there is no token for any of it (`allow_missing` in the list).
    NoToken,
    /// Whatever there is (`allow_missing_or_failed` in the list).
    Anything,
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
        let list = |list: &[jwt::JwtRequirement], field: &str| -> Result<Box<[Self]>, Refusal> {
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
            Some(RequiresType::RequiresAny(any)) => {
                Ok(Self::any(list(&any.requirements, "requires_any")?.into_vec()))
            }
            Some(RequiresType::RequiresAll(all)) => Ok(Self::All(list(&all.requirements, "requires_all")?)),
            Some(RequiresType::AllowMissing(_)) => Ok(Self::AllowMissing),
            Some(RequiresType::AllowMissingOrFailed(_)) => Ok(Self::AllowMissingOrFailed),
            Some(RequiresType::ExtractOnlyWithoutValidation(_)) => Err(Refusal::new(
                "extract_only_without_validation",
                "not supported: claims that nobody verified would look like those that were",
            )),
        }
    }

    /// One of `list`. What a request without a token meets counts for the others of the list, and judges tokens only where
    /// there are no others (Envoy).
    fn any(mut list: Vec<Self>) -> Self {
        let lenience = |one: &Self| match one {
            Self::AllowMissing => Instead::NoToken,
            Self::AllowMissingOrFailed => Instead::Anything,
            Self::Provider(..) | Self::Any(..) | Self::All(_) => Instead::Nothing,
        };
        let instead = list.iter().map(lenience).max().unwrap_or(Instead::Nothing);
        list.retain(|one| lenience(one) == Instead::Nothing);
        match instead {
            Instead::NoToken if list.is_empty() => list.push(Self::AllowMissing),
            Instead::Anything if list.is_empty() => list.push(Self::AllowMissingOrFailed),
            Instead::Nothing | Instead::NoToken | Instead::Anything => {}
        }
        Self::Any(list.into(), instead)
    }
}
