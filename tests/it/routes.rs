//! Routes that cannot work: the object says which rule it breaks, or which proxy refused what, and traffic goes on as it
//! did.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::api::{Api, condition, is, message};
use crate::cluster::TestCluster;
use crate::http;
use crate::traffic::Traffic;

const HOST: &str = "web.example.com";

const APPLICATION: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web, version: v1}}
    spec:
      containers:
        - name: web
          image: serin.dev/examples/podinfo:1.0.0
          ports: [{name: http, containerPort: 9898}]
          readinessProbe: {httpGet: {path: /readyz, port: http}, periodSeconds: 1}
";

const RULE: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec: {host: web, subsets: [{name: v1, labels: {version: v1}}]}
";

/// A VirtualService with these routes.
fn route(http: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: shop}}
spec:
  hosts: [{HOST}]
  gateways: [istio-system/public]
  http: {http}
"
    )
}

const GOOD: &str = "[{route: [{destination: {host: web, subset: v1}}]}]";

fn until(api: &Api, kind: &str, what: &str, type_: &str, status: &str) -> Value {
    api.until(kind, "shop", "web", what, |object| is(object, type_, status))
}

#[test]
fn a_route_that_cannot_work_names_the_rule_or_the_proxy_that_refused_it_and_the_last_good_one_stays() {
    let Some(cluster) = TestCluster::new() else { return };
    cluster.up();
    let api = cluster.api();
    api.apply(APPLICATION);
    api.apply(RULE);
    api.apply(&route(GOOD));
    until(&api, "Deployment", "be available", "Available", "True");
    until(&api, "VirtualService", "be live", "Live", "True");
    // The route may be live before the endpoints of a pod that has just become ready are.
    let deadline = Instant::now() + Duration::from_secs(20);
    while http::get(cluster.gateway_port, HOST, "/", &[]).0 != 200 {
        assert!(Instant::now() < deadline, "nothing answers behind the gateway");
    }
    let traffic = Traffic::start(&cluster, HOST, 100);

    for (http, rule) in [
        (
            "[{route: [{destination: {host: web, subset: v1}, weight: 0}, {destination: {host: web}, weight: 0}]}]",
            "spec.http[0].route: total destination weight = 0",
        ),
        (
            "[{route: [{destination: {host: ''}}]}]",
            "spec.http[0].route[0].destination.host: host is required",
        ),
    ] {
        api.apply(&route(http));
        // The one before is refused as well: what is told must be this one's rule.
        let refused = api.until(
            "VirtualService",
            "shop",
            "web",
            &format!("be refused for {rule:?}"),
            |object| is(object, "Accepted", "False") && message(object, "Accepted").contains(rule),
        );
        assert_eq!(condition(&refused, "Live")["reason"], "Invalid");
        served_by_version_1(&cluster);
    }
    api.apply(&route(GOOD));
    until(&api, "VirtualService", "be accepted again", "Accepted", "True");
    until(&api, "VirtualService", "be live again", "Live", "True");

    api.apply(&RULE.replace("labels: {version: v1}", "labels: {}"));
    let refused = until(&api, "DestinationRule", "be refused", "Accepted", "False");
    let told = message(&refused, "Accepted");
    assert!(
        told.contains("spec.subsets[0].labels: subset v1 has no labels"),
        "{told}"
    );
    served_by_version_1(&cluster);
    api.apply(RULE);
    until(&api, "DestinationRule", "be accepted again", "Accepted", "True");

    // Where requests would go to nothing, the route is named, and only those requests fail, as in Istio.
    api.apply(&route(
        "[{match: [{headers: {x-lost: {exact: 'yes'}}}], route: [{destination: {host: nowhere}}]}, {route: [{destination: {host: web, subset: v1}}]}]",
    ));
    let lost = until(
        &api,
        "VirtualService",
        "name the missing host",
        "ResolvedRefs",
        "False",
    );
    assert_eq!(condition(&lost, "ResolvedRefs")["reason"], "RefNotFound");
    assert!(
        message(&lost, "ResolvedRefs").contains("nowhere"),
        "{}",
        message(&lost, "ResolvedRefs")
    );
    until(&api, "VirtualService", "be live", "Live", "True");
    let (status, head, _) = http::get(cluster.gateway_port, HOST, "/", &["x-lost: yes"]);
    assert_eq!(status, 503, "{head}");
    served_by_version_1(&cluster);

    // What the control plane lets pass and a proxy does not.
    api.apply(&route(
        "[{headers: {request: {set: {x-made: '%NO_SUCH_VARIABLE%'}}}, route: [{destination: {host: web, subset: v1}}]}]",
    ));
    let refused = until(&api, "VirtualService", "be refused by a proxy", "Live", "False");
    assert_eq!(condition(&refused, "Live")["reason"], "Refused");
    let told = message(&refused, "Live");
    assert!(
        told.contains("istio-ingressgateway") && told.contains("NO_SUCH_VARIABLE"),
        "the proxy and its reason are named: {told}"
    );
    served_by_version_1(&cluster);
    api.apply(&route(GOOD));
    until(
        &api,
        "VirtualService",
        "be live after the refusal",
        "Live",
        "True",
    );

    let told = traffic.stop();
    told.nothing_was_lost();
    assert_eq!(told.0["statuses"]["200"], told.0["sent"], "{}", told.0);
}

#[track_caller]
fn served_by_version_1(cluster: &TestCluster) {
    let (status, head, _) = http::get(cluster.gateway_port, HOST, "/", &[]);
    assert_eq!(status, 200, "{head}");
    assert!(head.contains("x-podinfo-version: 1.0.0"), "{head}");
}
