//! What the admin port counts of itself, by the names that Envoy's has (`http.admin.*`, `listener.admin.*`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::StatusCode;

use crate::metrics::collect::{Family, Labels, Value};

/// The prefix of the admin port's connection manager, in Envoy.
const PREFIX: (&str, &str) = ("envoy_http_conn_manager_prefix", "admin");

/// See the module. Whoever serves adds: the admin port has one thread and little to do.
#[derive(Debug, Default)]
pub struct AdminCounts {
    opened: AtomicU64,
    closed: AtomicU64,
    began: AtomicU64,
    ended: AtomicU64,
    classes: [AtomicU64; 5],
}

/// A connection that counts as open.
#[derive(Debug)]
pub struct Open(Arc<AdminCounts>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.closed.fetch_add(1, Ordering::Relaxed);
    }
}

/// A request that counts as being served.
#[derive(Debug)]
pub struct Serving<'a>(&'a AdminCounts);

impl Serving<'_> {
    /// It is answered.
    pub fn answered(self, status: StatusCode) {
        let class = usize::from(status.as_u16() / 100).checked_sub(1);
        if let Some(count) = class.and_then(|class| self.0.classes.get(class)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}

impl AdminCounts {
    /// A connection has come.
    pub fn open(self: &Arc<Self>) -> Open {
        self.opened.fetch_add(1, Ordering::Relaxed);
        Open(self.clone())
    }

    /// A request has come.
    pub fn serve(&self) -> Serving<'_> {
        self.began.fetch_add(1, Ordering::Relaxed);
        Serving(self)
    }

    /// What was counted; nothing before the first connection.
    pub fn families(&self) -> Vec<Family> {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (closed, ended) = (get(&self.closed), get(&self.ended));
        let (opened, began) = (get(&self.opened), get(&self.began));
        if opened == 0 {
            return Vec::new();
        }
        let prefix = || vec![(PREFIX.0, PREFIX.1.to_owned())];
        let mut out = Vec::new();
        let count = |value: u64| Value::Counter(value as f64);
        let less = |one: u64, other: u64| Value::Gauge(one.saturating_sub(other) as f64);
        for (total, active, destroy, labels) in [
            (
                "envoy_http_downstream_cx_total",
                "envoy_http_downstream_cx_active",
                "envoy_http_downstream_cx_destroy",
                prefix(),
            ),
            (
                "envoy_listener_admin_downstream_cx_total",
                "envoy_listener_admin_downstream_cx_active",
                "envoy_listener_admin_downstream_cx_destroy",
                Labels::new(),
            ),
        ] {
            add(&mut out, total, "Connections.", labels.clone(), count(opened));
            add(
                &mut out,
                active,
                "Open connections.",
                labels.clone(),
                less(opened, closed),
            );
            add(
                &mut out,
                destroy,
                "Connections that have ended.",
                labels,
                count(closed),
            );
        }
        // It speaks nothing else.
        add(
            &mut out,
            "envoy_http_downstream_cx_http1_total",
            "Connections of HTTP/1.",
            prefix(),
            count(opened),
        );
        add(
            &mut out,
            "envoy_http_downstream_cx_http1_active",
            "Open connections of HTTP/1.",
            prefix(),
            less(opened, closed),
        );
        add(
            &mut out,
            "envoy_http_downstream_rq_total",
            "Requests.",
            prefix(),
            count(began),
        );
        add(
            &mut out,
            "envoy_http_downstream_rq_http1_total",
            "Requests over HTTP/1.",
            prefix(),
            count(began),
        );
        add(
            &mut out,
            "envoy_http_downstream_rq_active",
            "Requests being served.",
            prefix(),
            less(began, ended),
        );
        let classes: Vec<u64> = self.classes.iter().map(get).collect();
        for (completed, by_class) in [
            (
                "envoy_http_downstream_rq_completed",
                "envoy_http_downstream_rq_xx",
            ),
            (
                "envoy_listener_admin_http_downstream_rq_completed",
                "envoy_listener_admin_http_downstream_rq_xx",
            ),
        ] {
            add(
                &mut out,
                completed,
                "Requests that have been answered.",
                prefix(),
                count(classes.iter().sum()),
            );
            let each = (1..).zip(&classes).map(|(class, answers)| {
                let mut labels = vec![("envoy_response_code_class", format!("{class}"))];
                labels.extend(prefix());
                (labels, count(*answers))
            });
            out.push(Family {
                name: by_class,
                help: "Answers by the class of their status.",
                metrics: each.collect(),
            });
        }
        out
    }
}

fn add(out: &mut Vec<Family>, name: &'static str, help: &'static str, labels: Labels, value: Value) {
    out.push(Family {
        name,
        help,
        metrics: vec![(labels, value)],
    });
}
