//! Compiling the forwarding action.

use http::HeaderMap;

use super::*;

fn header_value(text: &str, field: &str) -> Result<HeaderValue, Refusal> {
    HeaderValue::from_str(text).map_err(|_| Refusal::new(field, format!("{text:?} is not a header value")))
}

impl Forward {
    pub(super) fn compile(
        from: &route::RouteAction,
        outer: &route::Route,
        host: &route::VirtualHost,
        template: Option<&UriTemplate>,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        refuse_unsupported(from)?;
        let retry = match from.retry_policy.as_ref().or(host.retry_policy.as_ref()) {
            None => None,
            Some(policy) => {
                let retries = &mut context.slots.retries;
                retries
                    .of(policy, || RetryPolicy::compile(policy))
                    .within("retry_policy")?
            }
        };
        let timeout = match &from.timeout {
            // Envoy's rule: the one or the other.
            _ if from.max_stream_duration.is_some() => None,
            None => Some(DEFAULT_ROUTE_TIMEOUT),
            given => convert::timeout(given.as_ref()).within("timeout")?,
        };
        let hedge = compile_hedge(from.hedge_policy.as_ref().or(host.hedge_policy.as_ref()))
            .within("hedge_policy")?;
        let mirrors = from
            .request_mirror_policies
            .iter()
            .chain(&host.request_mirror_policies);
        let targets = compile_targets(from, context)?;
        let rate_limits = descriptors::compile_all(&from.rate_limits)?;
        let of_targets = matches!(&targets, Targets::Weighted(targets, ..)
            if targets.iter().any(|target| !target.per_filter.is_empty()));
        Ok(Self {
            target_before_filters: of_targets
                || rate_limits.iter().any(RateLimitEntry::needs_cluster)
                || !host.rate_limits.is_empty(),
            rate_limits,
            include_host_rate_limits: from
                .include_vh_rate_limits
                .as_ref()
                .is_some_and(|value| value.value),
            targets,
            timeout,
            idle_timeout: from
                .idle_timeout
                .as_ref()
                .map(|value| convert::timeout(Some(value)))
                .transpose()
                .within("idle_timeout")?,
            max_stream_duration: from
                .max_stream_duration
                .as_ref()
                .map_or(Ok(None), |value| {
                    convert::timeout(value.max_stream_duration.as_ref())
                })
                .within("max_stream_duration")?,
            grpc_timeout: GrpcTimeout::compile(
                ("max_grpc_timeout", from.max_grpc_timeout.as_ref()),
                ("grpc_timeout_offset", from.grpc_timeout_offset.as_ref()),
            )?,
            grpc_stream_duration: from
                .max_stream_duration
                .as_ref()
                .map_or(Ok(None), |value| {
                    GrpcTimeout::compile(
                        ("grpc_timeout_header_max", value.grpc_timeout_header_max.as_ref()),
                        (
                            "grpc_timeout_header_offset",
                            value.grpc_timeout_header_offset.as_ref(),
                        ),
                    )
                })
                .within("max_stream_duration")?,
            criteria: Criteria::compile(from.metadata_match.as_ref(), None),
            hedge,
            expected: expected(timeout, retry.as_deref().filter(|_| !hedge)),
            retry,
            rewrite: compile_rewrite(from, template)?.map(Box::new),
            host_rewrite: compile_host_rewrite(from)?.map(Box::new),
            append_forwarded_host: from.append_x_forwarded_host,
            mirrors: mirrors
                .enumerate()
                .filter_map(|(index, mirror)| {
                    compile_mirror(mirror, context)
                        .within(format!("request_mirror_policies[{index}]"))
                        .transpose()
                })
                .collect::<Result<_, _>>()?,
            cluster_not_found: match from.cluster_not_found_response_code {
                0 => StatusCode::SERVICE_UNAVAILABLE,
                1 => StatusCode::NOT_FOUND,
                2 => StatusCode::INTERNAL_SERVER_ERROR,
                other => {
                    return Err(Refusal::new(
                        "cluster_not_found_response_code",
                        format!("{other} is unknown"),
                    ));
                }
            },
            hash: from
                .hash_policy
                .iter()
                .enumerate()
                .map(|(index, policy)| HashPolicy::compile(policy).within(format!("hash_policy[{index}]")))
                .collect::<Result<_, _>>()?,
            request_buffer: outer
                .per_request_buffer_limit_bytes
                .as_ref()
                .or(host.per_request_buffer_limit_bytes.as_ref())
                .map_or(DEFAULT_REQUEST_BUFFER, |value| value.value as usize),
            priority: Priority::compile(from.priority)?,
            connect_tcp: connects_to_tcp(from)?,
            upgrades: from
                .upgrade_configs
                .iter()
                .map(|upgrade| {
                    let enabled = upgrade.enabled.as_ref().is_none_or(|value| value.value);
                    (upgrade.upgrade_type.to_ascii_lowercase().into(), enabled)
                })
                .collect(),
        })
    }
}

impl Forward {
    /// Limit for the whole exchange of a request.
    pub fn timeout_of(&self, grpc: bool, headers: &HeaderMap) -> Option<Duration> {
        match &self.grpc_timeout {
            Some(rule) if grpc => rule.of(headers).unwrap_or_else(|most| most),
            _ => self.timeout,
        }
    }

    /// Tells the endpoint of a gRPC call how long it may take.
    pub fn tell_grpc_timeout(limit: Duration, headers: &mut HeaderMap) {
        GrpcTimeout::write(limit, headers);
    }

    /// Limit of a request's stream, if the route has one.
    pub fn stream_limit_of(&self, headers: &HeaderMap) -> Option<Duration> {
        match self.grpc_stream_duration.map(|rule| rule.of(headers)) {
            Some(Ok(limit)) => limit,
            Some(Err(_)) | None => self.max_stream_duration,
        }
    }
}

/// How long the endpoint may take: a try's time, where there is one, and at most the route's.
fn expected(timeout: Option<Duration>, retry: Option<&RetryPolicy>) -> Option<HeaderValue> {
    let per_try = retry.and_then(|policy| policy.per_try_timeout);
    let expected = match (per_try, timeout) {
        (Some(per_try), Some(timeout)) => per_try.min(timeout),
        (one, other) => one.or(other)?,
    };
    let millis = u64::try_from(expected.as_millis()).unwrap_or(u64::MAX);
    Some(HeaderValue::from(millis.max(1)))
}

fn refuse_unsupported(from: &route::RouteAction) -> Result<(), Refusal> {
    let unsupported = [
        (
            "internal_redirect_policy",
            from.internal_redirect_policy.is_some(),
        ),
        (
            "retry_policy_typed_config",
            from.retry_policy_typed_config.is_some(),
        ),
        ("early_data_policy", from.early_data_policy.is_some()),
    ];
    match unsupported.iter().find(|(_, present)| *present) {
        Some((field, _)) => Err(Refusal::new(*field, "not supported")),
        None => Ok(()),
    }
}

fn compile_targets(from: &route::RouteAction, context: &mut Context<'_>) -> Result<Targets, Refusal> {
    use route::route_action::ClusterSpecifier;
    match &from.cluster_specifier {
        Some(ClusterSpecifier::Cluster(name)) => Ok(Targets::One(context.slots.cluster(name))),
        Some(ClusterSpecifier::ClusterHeader(name)) => {
            let name = HeaderName::from_bytes(name.as_bytes())
                .map_err(|_| Refusal::new("cluster_header", format!("{name:?} is not a header name")))?;
            Ok(Targets::Named(name, context.slots.directory.clone()))
        }
        Some(ClusterSpecifier::WeightedClusters(weighted)) => {
            compile_weighted(weighted, from.metadata_match.as_ref(), context).within("weighted_clusters")
        }
        Some(
            ClusterSpecifier::ClusterSpecifierPlugin(_) | ClusterSpecifier::InlineClusterSpecifierPlugin(_),
        ) => Err(Refusal::new("cluster_specifier_plugin", "not supported")),
        None => Err(Refusal::new("cluster_specifier", "is missing")),
    }
}

fn compile_weighted(
    from: &route::WeightedCluster,
    above: Option<&core::Metadata>,
    context: &mut Context<'_>,
) -> Result<Targets, Refusal> {
    if from.random_value_specifier.is_some() {
        return Err(Refusal::new("random_value_specifier", "not supported"));
    }
    let mut targets = Vec::with_capacity(from.clusters.len());
    let mut weights = Vec::with_capacity(from.clusters.len());
    for (index, cluster) in from.clusters.iter().enumerate() {
        let path = format!("clusters[{index}]");
        let by_field = match &*cluster.cluster_header {
            "" => None,
            _ if !cluster.name.is_empty() => {
                return Err(Refusal::new(path, "has both a name and a cluster_header"));
            }
            field => {
                let field = HeaderName::from_bytes(field.as_bytes()).map_err(|_| {
                    Refusal::new(&path, format!("cluster_header {field:?} is not a header name"))
                })?;
                Some((field, context.slots.directory.clone()))
            }
        };
        let host_rewrite = match &cluster.host_rewrite_specifier {
            None => None,
            Some(route::weighted_cluster::cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(host)) => {
                Some(header_value(host, "host_rewrite_literal").within(&path)?)
            }
        };
        let (request_headers, response_headers) = HeaderOps::of(cluster).within(&path)?;
        targets.push(Target {
            cluster: match by_field {
                None => TargetCluster::Fixed(context.slots.cluster(&cluster.name)),
                Some((field, directory)) => TargetCluster::Named(field, directory),
            },
            request_headers,
            response_headers,
            host_rewrite,
            criteria: cluster
                .metadata_match
                .as_ref()
                .and_then(|own| Criteria::compile(Some(own), above)),
            per_filter: PerRoute::compile(&cluster.typed_per_filter_config, context).within(&path)?,
        });
        weights.push(cluster.weight.as_ref().map_or(0, |weight| weight.value));
    }
    match Weights::new(weights) {
        None if targets.is_empty() => Ok(Targets::Empty),
        None => Err(Refusal::new("clusters", "the weights add up to zero")),
        Some(weights) => {
            let turn = Turn::new(context.workers, weights.total(), context.seed % weights.total());
            Ok(Targets::Weighted(targets.into(), weights, turn))
        }
    }
}

/// Whether CONNECT ends here.
fn connects_to_tcp(from: &route::RouteAction) -> Result<bool, Refusal> {
    let mut out = false;
    for (index, upgrade) in from.upgrade_configs.iter().enumerate() {
        let Some(config) = &upgrade.connect_config else {
            continue;
        };
        let path = format!("upgrade_configs[{index}].connect_config");
        if !upgrade.upgrade_type.eq_ignore_ascii_case("CONNECT") {
            return Err(Refusal::new(path, "is for CONNECT only"));
        }
        if config.proxy_protocol_config.is_some() || config.allow_post {
            return Err(Refusal::new(path, "PROXY protocol and POST are not supported"));
        }
        out = true;
    }
    Ok(out)
}

/// Whether a second try is made beside one that takes too long.
fn compile_hedge(from: Option<&route::HedgePolicy>) -> Result<bool, Refusal> {
    let Some(from) = from else { return Ok(false) };
    if from
        .initial_requests
        .as_ref()
        .is_some_and(|requests| requests.value != 1)
    {
        return Err(Refusal::new(
            "initial_requests",
            "only one is supported, as in Envoy",
        ));
    }
    if from
        .additional_request_chance
        .as_ref()
        .is_some_and(|chance| chance.numerator != 0)
    {
        return Err(Refusal::new(
            "additional_request_chance",
            "not supported, as in Envoy",
        ));
    }
    Ok(from.hedge_on_per_try_timeout)
}

fn compile_rewrite(
    from: &route::RouteAction,
    template: Option<&UriTemplate>,
) -> Result<Option<Rewrite>, Refusal> {
    if let Some(policy) = &from.path_rewrite_policy {
        if from.regex_rewrite.is_some() || !from.prefix_rewrite.is_empty() || !from.path_rewrite.is_empty() {
            return Err(Refusal::new(
                "path_rewrite_policy",
                "cannot be used together with another rewrite of the path",
            ));
        }
        return template::TemplateRewrite::compile(policy, template)
            .map(|rewrite| Some(Rewrite::Template(rewrite)))
            .within("path_rewrite_policy");
    }
    if let Some(regex) = &from.regex_rewrite {
        let (regex, with) = substitution(regex).within("regex_rewrite")?;
        return Ok(Some(Rewrite::Regex(regex, with)));
    }
    if !from.path_rewrite.is_empty() {
        return Ok(Some(Rewrite::Full(from.path_rewrite.as_str().into())));
    }
    Ok((!from.prefix_rewrite.is_empty()).then(|| Rewrite::Prefix(from.prefix_rewrite.as_str().into())))
}

fn compile_host_rewrite(from: &route::RouteAction) -> Result<Option<HostRewrite>, Refusal> {
    use route::route_action::HostRewriteSpecifier as Spec;
    Ok(match &from.host_rewrite_specifier {
        None => None,
        Some(Spec::HostRewriteLiteral(host) | Spec::HostRewrite(host)) => {
            Some(HostRewrite::Literal(header_value(host, "host_rewrite_literal")?))
        }
        Some(Spec::AutoHostRewrite(auto)) => auto.value.then_some(HostRewrite::Auto),
        Some(Spec::HostRewriteHeader(name)) => Some(HostRewrite::Header(
            HeaderName::from_bytes(name.as_bytes())
                .map_err(|_| Refusal::new("host_rewrite_header", format!("{name:?} is not a header name")))?,
        )),
        Some(Spec::HostRewritePathRegex(regex)) => {
            let (regex, with) = substitution(regex).within("host_rewrite_path_regex")?;
            Some(HostRewrite::PathRegex(regex, with))
        }
    })
}

fn compile_mirror(
    from: &route::route_action::RequestMirrorPolicy,
    context: &mut Context<'_>,
) -> Result<Option<Mirror>, Refusal> {
    if !from.cluster_header.is_empty() || !from.request_headers_mutations.is_empty() {
        return Err(Refusal::new(
            "cluster_header",
            "cluster_header and header mutations are not supported",
        ));
    }
    let share = context
        .slots
        .runtime
        .fraction(from.runtime_fraction.as_ref(), Fraction::ALL)
        .within("runtime_fraction")?;
    if share.is_never() {
        return Ok(None);
    }
    Ok(Some(Mirror {
        cluster: context.slots.cluster(&from.cluster),
        share,
        shadow_suffix: !from.disable_shadow_host_suffix_append,
        host_rewrite: match from.host_rewrite_literal.as_str() {
            "" => None,
            host => Some(header_value(host, "host_rewrite_literal")?),
        },
    }))
}
