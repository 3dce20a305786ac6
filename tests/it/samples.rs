//! Manifests of others, as they are: Istio's bookinfo sample and podinfo.

use std::path::{Path, PathBuf};

use crate::api::{Api, is};
use crate::cluster::TestCluster;
use crate::http;

/// A directory of the shared data; `None`, loudly, where it is missing.
fn shared(path: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let found = root.parent().unwrap().join("shared/data").join(path);
    if !found.is_dir() {
        eprintln!("SKIPPED: the samples are not run, ../shared is not here");
        return None;
    }
    Some(found)
}

/// Bookinfo's page as a reader sees it.
struct Page {
    status: u16,
    body: String,
}

impl Page {
    /// Stars: none (reviews v1), black (v2) or red (v3).
    fn stars(&self) -> &'static str {
        assert_eq!(self.status, 200, "{}", self.body);
        if self.body.contains("reviews-v1-") {
            "none"
        } else if self.body.contains("reviews-v2-") {
            "black"
        } else if self.body.contains("reviews-v3-") {
            "red"
        } else {
            panic!("the page shows no reviews: {}", self.body)
        }
    }
}

struct Bookinfo<'a> {
    cluster: &'a TestCluster,
    api: Api,
    directory: PathBuf,
}

impl Bookinfo<'_> {
    /// `kubectl apply -f` of a file of the sample.
    fn apply(&self, file: &str) {
        let file = self.directory.join(file);
        let out = self
            .cluster
            .kubectl_ok(&["apply", "-f", file.to_str().unwrap()], None);
        assert!(out.is_some());
    }

    /// Applies a route and waits until it is live.
    fn route(&self, file: &str, object: &str) {
        self.apply(&format!("networking/{file}"));
        self.live(object);
    }

    fn live(&self, object: &str) {
        self.api
            .until("VirtualService", "default", object, "be live", |route| {
                is(route, "Live", "True")
            });
    }

    fn page(&self, user: Option<&str>) -> Page {
        let cookie = user.map(|user| format!("cookie: session-user={user}"));
        let headers: Vec<&str> = cookie.as_deref().into_iter().collect();
        let (status, _, body) = http::get(
            self.cluster.gateway_port,
            "bookinfo.example.com",
            "/productpage",
            &headers,
        );
        Page { status, body }
    }

    /// Stars on so many pages: none, black, red.
    fn count(&self, pages: usize, user: Option<&str>) -> [usize; 3] {
        let mut counts = [0; 3];
        for _ in 0..pages {
            let which = match self.page(user).stars() {
                "none" => 0,
                "black" => 1,
                _ => 2,
            };
            counts[which] += 1;
        }
        counts
    }
}

#[test]
fn istios_bookinfo_sample_runs_as_it_is_and_its_routes_do_what_istio_says() {
    let Some(directory) = shared("istio/samples/bookinfo") else {
        return;
    };
    let Some(cluster) = TestCluster::new() else { return };
    if !crate::cluster::on_path("kubectl") {
        eprintln!("SKIPPED: the sample is applied with kubectl, which is not on PATH");
        return;
    }
    cluster.up();
    let bookinfo = Bookinfo {
        api: cluster.api(),
        cluster: &cluster,
        directory,
    };
    bookinfo.api.merge(
        "Namespace",
        "",
        "default",
        &serde_json::json!({"metadata": {"labels": {"istio-injection": "enabled"}}}),
    );
    bookinfo.apply("platform/kube/bookinfo.yaml");
    for deployment in [
        "details-v1",
        "ratings-v1",
        "reviews-v1",
        "reviews-v2",
        "reviews-v3",
        "productpage-v1",
    ] {
        bookinfo
            .api
            .until("Deployment", "default", deployment, "be available", |object| {
                is(object, "Available", "True")
            });
    }
    bookinfo.route("bookinfo-gateway.yaml", "bookinfo");
    let title = bookinfo.page(None);
    assert!(
        title.status == 200 && title.body.contains("<title>Simple Bookstore App</title>"),
        "{}",
        title.body
    );
    let [none, black, red] = bookinfo.count(60, None);
    assert!(
        none > 5 && black > 5 && red > 5,
        "without a rule the versions take turns: {none} {black} {red}"
    );

    bookinfo.apply("networking/destination-rule-all.yaml");
    bookinfo.route("virtual-service-all-v1.yaml", "reviews");
    assert_eq!(bookinfo.count(20, None), [20, 0, 0], "all traffic to v1");

    bookinfo.route("virtual-service-reviews-test-v2.yaml", "reviews");
    assert_eq!(bookinfo.count(10, Some("jason")), [0, 10, 0], "jason sees v2");
    assert_eq!(bookinfo.count(10, None), [10, 0, 0], "everybody else sees v1");

    bookinfo.route("virtual-service-ratings-test-abort.yaml", "ratings");
    let aborted = bookinfo.page(Some("jason"));
    assert!(
        aborted.body.contains("Ratings service is currently unavailable"),
        "{}",
        aborted.body
    );
    assert_eq!(bookinfo.page(None).stars(), "none");

    bookinfo.route("virtual-service-ratings-test-delay.yaml", "ratings");
    let delayed = bookinfo.page(Some("jason"));
    assert!(
        delayed.status == 200
            && delayed
                .body
                .contains("Sorry, product reviews are currently unavailable for this book"),
        "productpage gives up after twice 3 s, reviews waits 7 s: {}",
        delayed.body
    );

    bookinfo.route("virtual-service-all-v1.yaml", "ratings");
    bookinfo.route("virtual-service-reviews-50-v3.yaml", "reviews");
    let [none, black, red] = bookinfo.count(100, None);
    assert!(
        (30..=70).contains(&none) && black == 0 && none + red == 100,
        "half to v1, half to v3: {none} {black} {red}"
    );
    bookinfo.route("virtual-service-reviews-90-10.yaml", "reviews");
    let [none, black, red] = bookinfo.count(100, None);
    assert!(
        none >= 75 && red == 0 && none + black == 100,
        "nine tenths to v1, one to v2: {none} {black} {red}"
    );
    bookinfo.route("virtual-service-reviews-v3.yaml", "reviews");
    assert_eq!(bookinfo.count(20, None), [0, 0, 20], "all traffic to v3");
    bookinfo.route("virtual-service-reviews-jason-v2-v3.yaml", "reviews");
    assert_eq!(bookinfo.count(10, Some("jason")), [0, 10, 0], "jason sees v2");
    assert_eq!(bookinfo.count(10, None), [0, 0, 10], "everybody else sees v3");
    let (status, _, body) = http::get(
        cluster.gateway_port,
        "bookinfo.example.com",
        "/api/v1/products/0/ratings",
        &[],
    );
    assert_eq!(status, 200, "{body}");

    bookinfo.route("fault-injection-details-v1.yaml", "details");
    let broken = bookinfo.page(None);
    assert!(
        broken
            .body
            .contains("Sorry, product details are currently unavailable for this book"),
        "{}",
        broken.body
    );
}

#[test]
fn podinfos_own_manifests_run_as_they_are_behind_the_gateway() {
    let Some(directory) = shared("flux/flux2/cmd/flux/testdata/build-kustomization/podinfo") else {
        return;
    };
    let Some(cluster) = TestCluster::new() else { return };
    cluster.up();
    let api = cluster.api();
    api.apply(
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio-injection: enabled}}}",
    );
    for file in ["deployment.yaml", "service.yaml"] {
        let file = directory.join(file);
        if cluster
            .kubectl_ok(&["-n", "shop", "apply", "-f", file.to_str().unwrap()], None)
            .is_none()
        {
            return;
        }
    }
    api.apply(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: podinfo, namespace: shop}
spec:
  hosts: [podinfo.example.com]
  gateways: [istio-system/public]
  http: [{route: [{destination: {host: podinfo, port: {number: 9898}}}]}]
",
    );
    api.until("Deployment", "shop", "podinfo", "be available", |object| {
        is(object, "Available", "True")
    });
    api.until("VirtualService", "shop", "podinfo", "be live", |object| {
        is(object, "Live", "True")
    });
    let (status, head, body) = http::get(cluster.gateway_port, "podinfo.example.com", "/", &[]);
    assert_eq!(status, 200, "{head}\n{body}");
    assert!(
        body.contains("\"version\": \"6.0.10\"") || body.contains("\"version\":\"6.0.10\""),
        "{body}"
    );
    assert!(body.contains("#34577c"), "{body}");
    for path in ["/healthz", "/readyz", "/version", "/metrics"] {
        let (status, head, _) = http::get(cluster.gateway_port, "podinfo.example.com", path, &[]);
        assert_eq!(status, 200, "{path}: {head}");
    }
    let (status, _, _) = http::get(cluster.gateway_port, "podinfo.example.com", "/status/418", &[]);
    assert_eq!(status, 418);
}
