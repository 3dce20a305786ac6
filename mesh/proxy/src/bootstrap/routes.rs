//! Route configurations of a bootstrap file.

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;

use super::fields::Fields;
use crate::error::Refusal;

pub(super) fn route_configuration(fields: &Fields<'_>) -> Result<route::RouteConfiguration, Refusal> {
    Ok(route::RouteConfiguration {
        name: fields.text("name")?,
        virtual_hosts: fields.list("virtual_hosts", virtual_host)?,
        ignore_port_in_host_matching: fields.flag("ignore_port_in_host_matching")?,
        request_headers_to_add: fields.list("request_headers_to_add", header_option)?,
        request_headers_to_remove: fields.texts("request_headers_to_remove")?,
        response_headers_to_add: fields.list("response_headers_to_add", header_option)?,
        response_headers_to_remove: fields.texts("response_headers_to_remove")?,
        ..Default::default()
    })
}

fn virtual_host(fields: &Fields<'_>) -> Result<route::VirtualHost, Refusal> {
    Ok(route::VirtualHost {
        name: fields.text("name")?,
        domains: fields.texts("domains")?,
        routes: fields.list("routes", one_route)?,
        include_request_attempt_count: fields.flag("include_request_attempt_count")?,
        request_headers_to_add: fields.list("request_headers_to_add", header_option)?,
        request_headers_to_remove: fields.texts("request_headers_to_remove")?,
        response_headers_to_add: fields.list("response_headers_to_add", header_option)?,
        response_headers_to_remove: fields.texts("response_headers_to_remove")?,
        retry_policy: fields.message("retry_policy", retry_policy)?,
        ..Default::default()
    })
}

fn header_option(fields: &Fields<'_>) -> Result<core::HeaderValueOption, Refusal> {
    let actions = [
        ("APPEND_IF_EXISTS_OR_ADD", 0),
        ("ADD_IF_ABSENT", 1),
        ("OVERWRITE_IF_EXISTS_OR_ADD", 2),
        ("OVERWRITE_IF_EXISTS", 3),
    ];
    Ok(core::HeaderValueOption {
        header: fields.message("header", |fields| {
            Ok(core::HeaderValue {
                key: fields.text("key")?,
                value: fields.text("value")?,
                ..Default::default()
            })
        })?,
        append_action: fields.choice("append_action", &actions)?.unwrap_or_default(),
        ..Default::default()
    })
}

fn one_route(fields: &Fields<'_>) -> Result<route::Route, Refusal> {
    use route::route::Action;
    let forward = fields.message("route", route_action)?.map(Action::Route);
    let redirect = fields.message("redirect", redirect)?.map(Action::Redirect);
    let direct = fields
        .message("direct_response", |fields| {
            let body = fields.message("body", |fields| {
                Ok(core::DataSource {
                    specifier: Some(core::data_source::Specifier::InlineString(
                        fields.text("inline_string")?,
                    )),
                    ..Default::default()
                })
            })?;
            Ok(route::DirectResponseAction {
                status: fields.number("status")?.unwrap_or_default(),
                body,
                ..Default::default()
            })
        })?
        .map(Action::DirectResponse);
    Ok(route::Route {
        name: fields.text("name")?,
        r#match: fields.message("match", route_match)?,
        action: forward.or(redirect).or(direct),
        request_headers_to_add: fields.list("request_headers_to_add", header_option)?,
        request_headers_to_remove: fields.texts("request_headers_to_remove")?,
        response_headers_to_add: fields.list("response_headers_to_add", header_option)?,
        response_headers_to_remove: fields.texts("response_headers_to_remove")?,
        ..Default::default()
    })
}

fn regex(fields: &Fields<'_>) -> Result<matcher::RegexMatcher, Refusal> {
    Ok(matcher::RegexMatcher {
        regex: fields.text("regex")?,
        ..Default::default()
    })
}

fn route_match(fields: &Fields<'_>) -> Result<route::RouteMatch, Refusal> {
    use route::route_match::PathSpecifier;
    let text = |name: &str, wrap: fn(String) -> PathSpecifier| {
        Ok::<_, Refusal>(
            fields
                .get(name)
                .is_some()
                .then(|| fields.text(name))
                .transpose()?
                .map(wrap),
        )
    };
    let path = text("prefix", PathSpecifier::Prefix)?
        .or(text("path", PathSpecifier::Path)?)
        .or(text("path_separated_prefix", PathSpecifier::PathSeparatedPrefix)?)
        .or(fields.message("safe_regex", regex)?.map(PathSpecifier::SafeRegex));
    Ok(route::RouteMatch {
        path_specifier: path,
        case_sensitive: fields.maybe_flag("case_sensitive")?,
        headers: fields.list("headers", header_matcher)?,
        query_parameters: fields.list("query_parameters", |fields| {
            use route::query_parameter_matcher::QueryParameterMatchSpecifier as Spec;
            let present = fields
                .maybe_flag("present_match")?
                .map(|flag| Spec::PresentMatch(flag.value));
            Ok(route::QueryParameterMatcher {
                name: fields.text("name")?,
                query_parameter_match_specifier: fields
                    .message("string_match", string_matcher)?
                    .map(Spec::StringMatch)
                    .or(present),
            })
        })?,
        ..Default::default()
    })
}

fn string_matcher(fields: &Fields<'_>) -> Result<matcher::StringMatcher, Refusal> {
    use matcher::string_matcher::MatchPattern;
    let text = |name: &str, wrap: fn(String) -> MatchPattern| {
        Ok::<_, Refusal>(
            fields
                .get(name)
                .is_some()
                .then(|| fields.text(name))
                .transpose()?
                .map(wrap),
        )
    };
    let pattern = text("exact", MatchPattern::Exact)?
        .or(text("prefix", MatchPattern::Prefix)?)
        .or(text("suffix", MatchPattern::Suffix)?)
        .or(text("contains", MatchPattern::Contains)?)
        .or(fields.message("safe_regex", regex)?.map(MatchPattern::SafeRegex));
    Ok(matcher::StringMatcher {
        ignore_case: fields.flag("ignore_case")?,
        match_pattern: pattern,
    })
}

fn header_matcher(fields: &Fields<'_>) -> Result<route::HeaderMatcher, Refusal> {
    use route::header_matcher::HeaderMatchSpecifier as Spec;
    let present = fields
        .maybe_flag("present_match")?
        .map(|flag| Spec::PresentMatch(flag.value));
    Ok(route::HeaderMatcher {
        name: fields.text("name")?,
        invert_match: fields.flag("invert_match")?,
        treat_missing_header_as_empty: fields.flag("treat_missing_header_as_empty")?,
        header_match_specifier: fields
            .message("string_match", string_matcher)?
            .map(Spec::StringMatch)
            .or(present),
    })
}

fn retry_policy(fields: &Fields<'_>) -> Result<route::RetryPolicy, Refusal> {
    Ok(route::RetryPolicy {
        retry_on: fields.text("retry_on")?,
        num_retries: fields.wrapped("num_retries")?,
        per_try_timeout: fields.duration("per_try_timeout")?,
        ..Default::default()
    })
}

fn redirect(fields: &Fields<'_>) -> Result<route::RedirectAction, Refusal> {
    use route::redirect_action::{PathRewriteSpecifier, SchemeRewriteSpecifier};
    let codes = [
        ("MOVED_PERMANENTLY", 0),
        ("FOUND", 1),
        ("SEE_OTHER", 2),
        ("TEMPORARY_REDIRECT", 3),
        ("PERMANENT_REDIRECT", 4),
    ];
    let path = fields.text("path_redirect")?;
    let prefix = fields.text("prefix_rewrite")?;
    Ok(route::RedirectAction {
        host_redirect: fields.text("host_redirect")?,
        port_redirect: fields.number("port_redirect")?.unwrap_or_default(),
        response_code: fields.choice("response_code", &codes)?.unwrap_or_default(),
        strip_query: fields.flag("strip_query")?,
        scheme_rewrite_specifier: fields
            .maybe_flag("https_redirect")?
            .map(|flag| SchemeRewriteSpecifier::HttpsRedirect(flag.value)),
        path_rewrite_specifier: match (path.is_empty(), prefix.is_empty()) {
            (false, _) => Some(PathRewriteSpecifier::PathRedirect(path)),
            (true, false) => Some(PathRewriteSpecifier::PrefixRewrite(prefix)),
            (true, true) => None,
        },
    })
}

fn route_action(fields: &Fields<'_>) -> Result<route::RouteAction, Refusal> {
    use route::route_action::{ClusterSpecifier, HostRewriteSpecifier};
    let weighted = fields.message("weighted_clusters", |fields| {
        Ok(route::WeightedCluster {
            clusters: fields.list("clusters", |fields| {
                Ok(route::weighted_cluster::ClusterWeight {
                    name: fields.text("name")?,
                    weight: fields.wrapped("weight")?,
                    ..Default::default()
                })
            })?,
            ..Default::default()
        })
    })?;
    let cluster = fields.text("cluster")?;
    let literal = fields.text("host_rewrite_literal")?;
    Ok(route::RouteAction {
        cluster_specifier: Some(weighted.map_or(
            ClusterSpecifier::Cluster(cluster),
            ClusterSpecifier::WeightedClusters,
        )),
        timeout: fields.duration("timeout")?,
        idle_timeout: fields.duration("idle_timeout")?,
        prefix_rewrite: fields.text("prefix_rewrite")?,
        retry_policy: fields.message("retry_policy", retry_policy)?,
        host_rewrite_specifier: if literal.is_empty() {
            fields
                .maybe_flag("auto_host_rewrite")?
                .map(HostRewriteSpecifier::AutoHostRewrite)
        } else {
            Some(HostRewriteSpecifier::HostRewriteLiteral(literal))
        },
        request_mirror_policies: fields.list("request_mirror_policies", |fields| {
            Ok(route::route_action::RequestMirrorPolicy {
                cluster: fields.text("cluster")?,
                ..Default::default()
            })
        })?,
        ..Default::default()
    })
}
