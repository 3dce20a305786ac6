//! Istio's bookinfo sample: four services, faithful in ports, paths, headers and behaviour.

pub(crate) mod client;
pub(crate) mod details;
pub(crate) mod productpage;
pub(crate) mod ratings;
pub(crate) mod reviews;

/// The port that every bookinfo service listens on.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Port {
    /// Port to listen on
    #[arg(long, default_value_t = 9080)]
    pub(crate) port: u16,
}

/// What the original services read from their environment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Environment {
    /// `SERVICE_VERSION`, for example `v2` or `v-faulty`; otherwise taken from the image's name (`…-reviews-v2:…`).
    pub(crate) version: String,
    /// `DETAILS_HOSTNAME` and `DETAILS_SERVICE_PORT`; `SERVICES_DOMAIN` is appended to host names with a dot.
    pub(crate) details: String,
    /// `REVIEWS_HOSTNAME` and `REVIEWS_SERVICE_PORT`.
    pub(crate) reviews: String,
    /// `RATINGS_HOSTNAME` and `RATINGS_SERVICE_PORT`.
    pub(crate) ratings: String,
    /// `HOSTNAME`, the pod's name.
    pub(crate) pod_name: String,
    /// `CLUSTER_NAME`.
    pub(crate) cluster_name: Option<String>,
}

impl Environment {
    /// Reads the process's environment.
    pub(crate) fn read() -> Self {
        Self::from(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// Reads from a function, for tests.
    pub(crate) fn from(get: impl Fn(&str) -> Option<String>) -> Self {
        let services_domain = get("SERVICES_DOMAIN");
        let authority = |service: &str| {
            let upper = service.to_uppercase();
            let host = get(&format!("{upper}_HOSTNAME")).unwrap_or_else(|| service.to_owned());
            let host = services_domain
                .as_ref()
                .map_or(host.clone(), |domain| format!("{host}.{domain}"));
            // Kubernetes sets `<SERVICE>_SERVICE_PORT` for Services of the namespace.
            let port = get(&format!("{upper}_SERVICE_PORT")).unwrap_or_else(|| "9080".to_owned());
            format!("{host}:{port}")
        };
        let version = get("SERVICE_VERSION")
            .or_else(|| get("SERIN_IMAGE").as_deref().and_then(version_of_image))
            .unwrap_or_else(|| "v1".to_owned());
        Self {
            version,
            details: authority("details"),
            reviews: authority("reviews"),
            ratings: authority("ratings"),
            pod_name: get("HOSTNAME").unwrap_or_else(|| "unknown".to_owned()),
            cluster_name: get("CLUSTER_NAME"),
        }
    }
}

/// `docker.io/istio/examples-bookinfo-reviews-v2:1.20.3` is version `v2`.
fn version_of_image(reference: &str) -> Option<String> {
    let name = reference.rsplit('/').next()?.split([':', '@']).next()?;
    let start = name.rfind("-v")? + 1;
    Some(name[start..].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_comes_from_the_environment_or_from_the_image_name() {
        let reference = "docker.io/istio/examples-bookinfo-reviews-v3:1.20.3";
        assert_eq!(version_of_image(reference).as_deref(), Some("v3"));
        assert_eq!(
            version_of_image("examples-bookinfo-ratings-v-faulty").as_deref(),
            Some("v-faulty")
        );
        let environment = Environment::from(|name| match name {
            "SERVICE_VERSION" => Some("v2".to_owned()),
            "SERIN_IMAGE" => Some(reference.to_owned()),
            _ => None,
        });
        assert_eq!(environment.version, "v2");
    }

    #[test]
    fn a_services_domain_is_appended_to_every_host() {
        let environment = Environment::from(|name| (name == "SERVICES_DOMAIN").then(|| "prod".to_owned()));
        assert_eq!(environment.reviews, "reviews.prod:9080");
        assert_eq!(Environment::from(|_| None).ratings, "ratings:9080");
    }
}
