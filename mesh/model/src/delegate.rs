//! A VirtualService's rule that hands over to another VirtualService: both conditions must hold, and what the delegate does not say the
//! root does.

use serin_crds::istio::{HttpMatchRequest, HttpRoute, StringMatch, StringMatchKind, VirtualService};

use crate::object::{Kind, ObjectKey, Provenance};
use crate::route::Route;
use crate::virtual_service::{gateway_name, route};

/// The routes of a delegate under one rule of its root: names are prefixed, conditions combined; a combination that contradicts itself
/// yields no route. A delegate's own delegations yield a route without destinations, as Istio has it.
pub(crate) fn merge_delegate(
    root: &HttpRoute,
    origin: &Provenance,
    root_namespace: &str,
    child: &VirtualService,
    domain: &str,
) -> Vec<Route> {
    let namespace = child.metadata.namespace.as_deref().unwrap_or("default");
    let child_origin = Provenance {
        object: ObjectKey::new(
            Kind::VirtualService,
            namespace,
            child.metadata.name.as_deref().unwrap_or(""),
        ),
        generation: child.metadata.generation.unwrap_or(0),
        rule: None,
    };
    let mut out = Vec::new();
    for (index, rule) in child.spec.http.iter().enumerate() {
        let child_origin = Provenance {
            rule: u32::try_from(index).ok(),
            ..child_origin.clone()
        };
        let mut merged = rule.clone();
        inherit(root, &mut merged);
        let root_blocks: Vec<Option<&HttpMatchRequest>> = if root.matches.is_empty() {
            vec![None]
        } else {
            root.matches.iter().map(Some).collect()
        };
        let child_blocks: Vec<Option<&HttpMatchRequest>> = if rule.matches.is_empty() {
            vec![None]
        } else {
            rule.matches.iter().map(Some).collect()
        };
        for outer in &root_blocks {
            for inner in &child_blocks {
                let Ok(block) = combine(*outer, *inner) else {
                    continue;
                };
                let mut made = route(&merged, block.as_ref(), &child_origin, namespace, domain);
                made.also = vec![origin.clone()];
                // Gateways of the root's blocks are named from the root's namespace.
                if let Some(outer) = outer {
                    made.audience.gateways.extend(
                        outer
                            .gateways
                            .iter()
                            .map(|gateway| gateway_name(gateway, root_namespace)),
                    );
                }
                out.push(made);
            }
        }
    }
    out
}

/// What the root says beside the delegation holds unless the delegate says otherwise.
fn inherit(root: &HttpRoute, child: &mut HttpRoute) {
    child.name = Some(
        match (
            root.name.as_deref().unwrap_or(""),
            child.name.as_deref().unwrap_or(""),
        ) {
            ("", name) => name.to_owned(),
            (name, "") => name.to_owned(),
            (outer, inner) => format!("{outer}-{inner}"),
        },
    );
    macro_rules! fallback {
        ($($field:ident),*) => { $( if child.$field.is_none() { child.$field = root.$field.clone(); } )* };
    }
    fallback!(
        rewrite,
        direct_response,
        timeout,
        retries,
        fault,
        mirror,
        mirror_percent,
        mirror_percentage,
        cors_policy,
        headers
    );
    if child.mirrors.is_empty() {
        child.mirrors = root.mirrors.clone();
    }
}

/// Two conditions that cannot both hold.
struct Contradiction;

fn combine(
    outer: Option<&HttpMatchRequest>,
    inner: Option<&HttpMatchRequest>,
) -> Result<Option<HttpMatchRequest>, Contradiction> {
    let (outer, inner) = match (outer, inner) {
        (None, None) => return Ok(None),
        (Some(only), None) | (None, Some(only)) => {
            return Ok(Some(HttpMatchRequest {
                gateways: Vec::new(),
                ..only.clone()
            }));
        }
        (Some(outer), Some(inner)) => (outer, inner),
    };
    let mut block = inner.clone();
    block.gateways.clear();
    let name = join_with(outer.name.as_deref(), inner.name.as_deref());
    block.name = (!name.is_empty()).then_some(name);
    block.uri = combine_uri(outer.uri.as_ref(), inner.uri.as_ref())?;
    for (mine, theirs) in [
        (&mut block.scheme, &outer.scheme),
        (&mut block.method, &outer.method),
        (&mut block.authority, &outer.authority),
    ] {
        if let Some(theirs) = theirs {
            if mine.as_ref().is_some_and(|mine| mine != theirs) {
                return Err(Contradiction);
            }
            *mine = Some(theirs.clone());
        }
    }
    for (mine, theirs) in [
        (&mut block.headers, &outer.headers),
        (&mut block.without_headers, &outer.without_headers),
        (&mut block.query_params, &outer.query_params),
    ] {
        for (name, value) in theirs {
            if mine.get(name).is_some_and(|mine| mine != value) {
                return Err(Contradiction);
            }
            mine.insert(name.clone(), value.clone());
        }
    }
    if let Some(port) = outer.port {
        if block.port.is_some_and(|mine| mine != port) {
            return Err(Contradiction);
        }
        block.port = Some(port);
    }
    for (key, value) in &outer.source_labels {
        if block.source_labels.get(key).is_some_and(|mine| mine != value) {
            return Err(Contradiction);
        }
        block.source_labels.insert(key.clone(), value.clone());
    }
    if outer.source_namespace.is_some() {
        if block.source_namespace.is_some() && block.source_namespace != outer.source_namespace {
            return Err(Contradiction);
        }
        block.source_namespace.clone_from(&outer.source_namespace);
    }
    block.ignore_uri_case = block.ignore_uri_case.or(outer.ignore_uri_case);
    block.stat_prefix = block.stat_prefix.or_else(|| outer.stat_prefix.clone());
    Ok(Some(block))
}

fn join_with(first: Option<&str>, second: Option<&str>) -> String {
    match (first.unwrap_or(""), second.unwrap_or("")) {
        ("", name) | (name, "") => name.to_owned(),
        (outer, inner) => format!("{outer}-{inner}"),
    }
}

/// The delegate's path condition must lie within the root's.
fn combine_uri(
    outer: Option<&StringMatch>,
    inner: Option<&StringMatch>,
) -> Result<Option<StringMatch>, Contradiction> {
    let (outer, inner) = match (outer, inner) {
        (None, only) => return Ok(only.cloned()),
        (Some(outer), None) => return Ok(Some(outer.clone())),
        (Some(outer), Some(inner)) => (outer, inner),
    };
    let within = match (outer.kind(), inner.kind()) {
        (StringMatchKind::Prefix(outer), StringMatchKind::Prefix(inner) | StringMatchKind::Exact(inner)) => {
            inner.starts_with(outer)
        }
        (StringMatchKind::Exact(outer), StringMatchKind::Exact(inner)) => outer == inner,
        (StringMatchKind::Presence, _) => true,
        (StringMatchKind::Regex(outer), StringMatchKind::Regex(inner)) => outer == inner,
        _ => false,
    };
    if within {
        Ok(Some(inner.clone()))
    } else {
        Err(Contradiction)
    }
}
