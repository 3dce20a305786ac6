//! Who asks: the principals of a policy.

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::rbac::principals::mtls_authenticated::v3 as mtls_authenticated;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;

use super::{path_match, sourced};
use crate::config::convert::{self, each, required};
use crate::config::listener::Cidr;
use crate::config::matchers::{HeaderMatch, StringMatch};
use crate::error::{Refusal, Within};
use crate::policy::facts::{Facts, PeerIdentity};
use crate::policy::filter_state::StateMatch;
use crate::policy::metadata::MetadataMatch;

/// Filter state under which a mesh keeps the peer's identity.
pub(super) const PEER_PRINCIPAL: &str = "io.istio.peer_principal";

/// A compiled `Principal`.
#[derive(Debug)]
pub(super) enum Principal {
    Any,
    And(Box<[Principal]>),
    Or(Box<[Principal]>),
    Not(Box<Principal>),
    /// A verified certificate, with such a name if one is asked for.
    Authenticated(Option<StringMatch>),
    /// The same as an extension says it.
    MutualTls(MutualTls),
    DirectRemote(Cidr),
    Source(Cidr),
    Remote(Cidr),
    Header(HeaderMatch),
    Path(StringMatch),
    Metadata(MetadataMatch),
    State(StateMatch),
    /// The same of the key under which Istio keeps the peer's identity: that counts where nothing has been set.
    PeerState(StateMatch),
}

impl Principal {
    pub(super) fn compile(from: &rbac::Principal) -> Result<Self, Refusal> {
        use rbac::principal::Identifier;
        let identifier = required(from.identifier.as_ref(), "identifier")?;
        Ok(match identifier {
            Identifier::Any(true) => Self::Any,
            Identifier::Any(false) => return Err(Refusal::new("any", "must be true")),
            Identifier::AndIds(set) => Self::And(each(&set.ids, "and_ids.ids", Self::compile)?),
            Identifier::OrIds(set) => Self::Or(each(&set.ids, "or_ids.ids", Self::compile)?),
            Identifier::NotId(inner) => Self::Not(Box::new(Self::compile(inner).within("not_id")?)),
            Identifier::Authenticated(authenticated) => Self::Authenticated(
                authenticated
                    .principal_name
                    .as_ref()
                    .map(|name| StringMatch::compile(name).within("authenticated.principal_name"))
                    .transpose()?,
            ),
            Identifier::SourceIp(range) => Self::Source(Cidr::compile(range).within("source_ip")?),
            Identifier::DirectRemoteIp(range) => {
                Self::DirectRemote(Cidr::compile(range).within("direct_remote_ip")?)
            }
            Identifier::RemoteIp(range) => Self::Remote(Cidr::compile(range).within("remote_ip")?),
            Identifier::Header(header) => Self::Header(HeaderMatch::compile(header).within("header")?),
            Identifier::UrlPath(path) => Self::Path(path_match(path)?),
            Identifier::Metadata(matcher) => {
                Self::Metadata(MetadataMatch::compile(matcher).within("metadata")?)
            }
            Identifier::SourcedMetadata(matcher) => Self::Metadata(sourced(matcher)?),
            Identifier::FilterState(state) => {
                let test = StateMatch::compile(state).within("filter_state")?;
                if state.key == PEER_PRINCIPAL {
                    Self::PeerState(test)
                } else {
                    Self::State(test)
                }
            }
            Identifier::Custom(extension) => Self::MutualTls(MutualTls::compile(extension).within("custom")?),
        })
    }

    pub(super) fn matches(&self, facts: &Facts<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::And(all) => all.iter().all(|inner| inner.matches(facts)),
            Self::Or(any) => any.iter().any(|inner| inner.matches(facts)),
            Self::Not(inner) => !inner.matches(facts),
            Self::Authenticated(test) => match (facts.peer, test) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(peer), Some(test)) => authenticated_as(peer, test),
            },
            Self::MutualTls(test) => facts.peer.is_some_and(|peer| test.matches(peer)),
            Self::DirectRemote(range) => range.contains(facts.direct_remote.ip()),
            Self::Source(range) => range.contains(facts.source.ip()),
            Self::Remote(range) => range.contains(facts.remote.ip()),
            Self::Header(header) => facts.has(header),
            Self::Path(test) => facts.path().is_some_and(|path| test.matches(path)),
            Self::Metadata(test) => test.matches(facts.metadata),
            Self::State(test) => test.matches(&facts.metadata.state),
            Self::PeerState(test) => {
                let state = &facts.metadata.state;
                if state.get(PEER_PRINCIPAL).is_some() {
                    return test.matches(state);
                }
                let name = facts.peer.and_then(|peer| peer.uri_sans.first());
                name.is_some_and(|name| test.test_of(name))
            }
        }
    }
}

/// `mtls_authenticated`: a verified certificate, with a name of that kind if one is asked for.
#[derive(Debug)]
pub(super) struct MutualTls(Option<NameTest>);

#[derive(Debug)]
enum NameTest {
    Uri(StringMatch),
    Dns(StringMatch),
}

impl MutualTls {
    fn compile(from: &core::TypedExtensionConfig) -> Result<Self, Refusal> {
        use tls::subject_alt_name_matcher::SanType;
        const NAME: &str = "envoy.extensions.rbac.principals.mtls_authenticated.v3.Config";
        let any = from
            .typed_config
            .as_ref()
            .filter(|any| any.type_url.rsplit('/').next() == Some(NAME))
            .ok_or_else(|| Refusal::new("", format!("the principal {:?} is not supported", from.name)))?;
        let message: mtls_authenticated::Config = convert::unpack(any, NAME)?;
        let Some(san) = &message.san_matcher else {
            return if message.any_validated_client_certificate {
                Ok(Self(None))
            } else {
                Err(Refusal::new(
                    "",
                    "needs san_matcher or any_validated_client_certificate",
                ))
            };
        };
        let matcher = required(san.matcher.as_ref(), "san_matcher.matcher")?;
        let test = StringMatch::compile(matcher).within("san_matcher.matcher")?;
        match SanType::try_from(san.san_type) {
            Ok(SanType::Uri) => Ok(Self(Some(NameTest::Uri(test)))),
            Ok(SanType::Dns) => Ok(Self(Some(NameTest::Dns(test)))),
            _ => Err(Refusal::new(
                "san_matcher.san_type",
                "only DNS and URI are supported",
            )),
        }
    }

    fn matches(&self, peer: PeerIdentity<'_>) -> bool {
        match &self.0 {
            None => true,
            Some(NameTest::Uri(test)) => peer.uri_sans.iter().any(|name| test.matches(name)),
            Some(NameTest::Dns(test)) => peer.dns_sans.iter().any(|name| test.matches(name)),
        }
    }
}

/// URI names first, then DNS names, then the subject, each only where the kind before is absent (Envoy's order).
fn authenticated_as(peer: PeerIdentity<'_>, test: &StringMatch) -> bool {
    if !peer.uri_sans.is_empty() {
        peer.uri_sans.iter().any(|name| test.matches(name))
    } else if !peer.dns_sans.is_empty() {
        peer.dns_sans.iter().any(|name| test.matches(name))
    } else {
        test.matches(peer.subject)
    }
}
