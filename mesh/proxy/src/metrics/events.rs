//! Events that operators count by Envoy's names and that are rare next to requests: sets of cells that are made with the
//! first event, so that what never happens costs a pointer. What every request counts is elsewhere ([`super::clusters`],
//! [`crate::policy::stats`]).

use std::marker::PhantomData;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// A kind of events: an enumeration with a name for each.
pub trait Event: Copy + 'static {
    /// Name of the family and help, in the order of the enumeration. One without a name is for arithmetic only.
    const ALL: &'static [(&'static str, &'static str)];

    /// Its place among all.
    fn index(self) -> usize;
}

/// Counts of a kind of events. Anybody may add.
#[derive(Debug)]
pub struct Events<E> {
    cells: OnceLock<Box<[AtomicU64]>>,
    kind: PhantomData<fn(E)>,
}

impl<E> Default for Events<E> {
    fn default() -> Self {
        Self {
            cells: OnceLock::new(),
            kind: PhantomData,
        }
    }
}

impl<E: Event> Events<E> {
    /// One has happened.
    pub fn note(&self, event: E) {
        self.cells()[event.index()].fetch_add(1, Ordering::Relaxed);
    }

    /// How many there were.
    pub fn get(&self, event: E) -> u64 {
        self.at(event.index())
    }

    /// So many have happened.
    pub fn note_many(&self, event: E, times: u64) {
        if times > 0 {
            self.cells()[event.index()].fetch_add(times, Ordering::Relaxed);
        }
    }

    fn cells(&self) -> &[AtomicU64] {
        self.cells
            .get_or_init(|| E::ALL.iter().map(|_| AtomicU64::new(0)).collect())
    }

    /// How many there were of that place.
    pub fn at(&self, index: usize) -> u64 {
        let cells = self.cells.get();
        cells.map_or(0, |cells| cells[index].load(Ordering::Relaxed))
    }
}

/// The same with a set of cells per worker, for what may happen as often as requests do.
#[derive(Debug)]
pub struct WorkerEvents<E>(Box<[Events<E>]>);

impl<E: Event> WorkerEvents<E> {
    /// For that many workers.
    pub fn new(workers: usize) -> Self {
        Self((0..workers.max(1)).map(|_| Events::default()).collect())
    }

    /// One has happened on that worker.
    pub fn note(&self, event: E, worker: usize) {
        if let Some(events) = self.0.get(worker) {
            events.note(event);
        }
    }

    /// So many have happened on that worker.
    pub fn note_many(&self, event: E, times: u64, worker: usize) {
        if let Some(events) = self.0.get(worker) {
            events.note_many(event, times);
        }
    }

    /// How many there were.
    pub fn get(&self, event: E) -> u64 {
        self.at(event.index())
    }

    /// How many there were of that place.
    pub fn at(&self, index: usize) -> u64 {
        self.0.iter().map(|events| events.at(index)).sum()
    }
}

macro_rules! events {
    ($(#[$about:meta])* $name:ident($area:literal) { $($event:ident = $text:literal, $help:literal;)* }
     hidden { $($hidden:ident, $what:literal;)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $(#[doc = $help] $event,)* $(#[doc = $what] $hidden,)* }

        impl Event for $name {
            const ALL: &'static [(&'static str, &'static str)] =
                &[$((concat!($area, $text), $help),)* $(("", $what),)*];

            fn index(self) -> usize {
                self as usize
            }
        }
    };
}

events! {
    /// Of a cluster (`cluster.<name>.*`).
    ClusterEvent("envoy_cluster_") {
        CxDestroyLocal = "upstream_cx_destroy_local", "Connections that we ended.";
        CxDestroyRemote = "upstream_cx_destroy_remote", "Connections that the endpoint ended.";
        CxDestroyWithRequest = "upstream_cx_destroy_with_active_rq", "Connections that ended while a request was on its way.";
        CxDestroyLocalWithRequest = "upstream_cx_destroy_local_with_active_rq", "Connections that we ended while a request was on its way.";
        CxDestroyRemoteWithRequest = "upstream_cx_destroy_remote_with_active_rq", "Connections that the endpoint ended while a request was on its way.";
        CxConnectAttemptsExceeded = "upstream_cx_connect_attempts_exceeded", "Connections that were given up after the allowed attempts.";
        CxIdleTimeout = "upstream_cx_idle_timeout", "Connections that were idle for too long.";
        BindError = "bind_errors", "Connections whose own end could not be bound.";
        CxCloseNotify = "upstream_cx_close_notify", "Connections that the endpoint has said it will close.";
        UpdateEmpty = "update_empty", "Updates without endpoints.";
        AssignmentTimeout = "assignment_timeout_received", "Updates whose endpoints are to be given up if no other follows.";
        AssignmentStale = "assignment_stale", "Times that endpoints were given up because no update followed.";
        CxMaxDuration = "upstream_cx_max_duration_reached", "Connections that became too old.";
        CxMaxRequests = "upstream_cx_max_requests", "Connections that had as many requests as they may have.";
        CxNoneHealthy = "upstream_cx_none_healthy", "Requests and connections for which no endpoint could be used.";
        CxProtocolError = "upstream_cx_protocol_error", "Connections on which the endpoint broke the protocol.";
        RqCancelled = "upstream_rq_cancelled", "Requests that were given up before they had a connection.";
        RqDropOverload = "upstream_rq_drop_overload", "Requests that were dropped as EDS asks.";
        RqMaxDuration = "upstream_rq_max_duration_reached", "Requests that lasted too long.";
        RqPendingFailure = "upstream_rq_pending_failure_eject", "Requests whose connection could not be made.";
        RetryBackoff = "upstream_rq_retry_backoff_exponential", "Retries after a wait of our own.";
        RetryAsked = "upstream_rq_retry_backoff_ratelimited", "Retries after a wait that the answer asked for.";
        RetryLimit = "upstream_rq_retry_limit_exceeded", "Requests whose retries were used up.";
        RqRxReset = "upstream_rq_rx_reset", "Requests that the endpoint reset.";
        RqTxReset = "upstream_rq_tx_reset", "Requests that we reset.";
        RetryAbandoned = "retry_or_shadow_abandoned", "Requests whose body was too large to be kept for a retry or a copy.";
        Panic = "lb_healthy_panic", "Requests for which hosts were chosen whatever their health.";
        ZoneDirect = "lb_zone_routing_all_directly", "Requests kept in the own zone.";
        ZoneRecalculated = "lb_recalculate_zone_structures", "Times that zones were compared.";
        ZoneSampled = "lb_zone_routing_sampled", "Requests kept in the own zone, of which others left it.";
        ZoneCrossed = "lb_zone_routing_cross_zone", "Requests that left the own zone.";
        ZoneTooSmall = "lb_zone_cluster_too_small", "Times that zones were not compared because there are too few hosts.";
        ZoneFull = "lb_zone_no_capacity_left", "Requests sent to any zone because none has hosts to spare.";
        SubsetCreated = "lb_subsets_created", "Subsets that came to have endpoints.";
        SubsetRemoved = "lb_subsets_removed", "Subsets that lost their last endpoint.";
        SubsetSelected = "lb_subsets_selected", "Requests that a subset took.";
        SubsetFallback = "lb_subsets_fallback", "Requests for which no subset was found.";
        SubsetPanic = "lb_subsets_fallback_panic", "Requests that any host took because their subset had none.";
        OriginalDestinationInvalid = "original_dst_host_invalid", "Connections whose original destination is unknown.";
        OutlierEnforced = "outlier_detection_ejections_enforced_total", "Ejections.";
        OutlierOverflow = "outlier_detection_ejections_overflow", "Ejections that were not made because too many hosts are out.";
        OutlierDetectedServer = "outlier_detection_ejections_detected_consecutive_5xx", "Rows of 5xx.";
        OutlierEnforcedServer = "outlier_detection_ejections_enforced_consecutive_5xx", "Ejections for a row of 5xx.";
        OutlierDetectedGateway = "outlier_detection_ejections_detected_consecutive_gateway_failure", "Rows of 502, 503 and 504.";
        OutlierEnforcedGateway = "outlier_detection_ejections_enforced_consecutive_gateway_failure", "Ejections for a row of 502, 503 and 504.";
        OutlierDetectedLocal = "outlier_detection_ejections_detected_consecutive_local_origin_failure", "Rows of connections that failed.";
        OutlierEnforcedLocal = "outlier_detection_ejections_enforced_consecutive_local_origin_failure", "Ejections for a row of connections that failed.";
        OutlierDetectedRate = "outlier_detection_ejections_detected_success_rate", "Hosts below their siblings' success rate.";
        OutlierEnforcedRate = "outlier_detection_ejections_enforced_success_rate", "Ejections for a success rate below the siblings'.";
        OutlierDetectedLocalRate = "outlier_detection_ejections_detected_local_origin_success_rate", "Hosts below their siblings' rate of connections.";
        OutlierEnforcedLocalRate = "outlier_detection_ejections_enforced_local_origin_success_rate", "Ejections for a rate of connections below the siblings'.";
        OutlierDetectedPercentage = "outlier_detection_ejections_detected_failure_percentage", "Hosts above the percentage of failures.";
        OutlierEnforcedPercentage = "outlier_detection_ejections_enforced_failure_percentage", "Ejections for the percentage of failures.";
        OutlierDetectedLocalPercentage = "outlier_detection_ejections_detected_local_origin_failure_percentage", "Hosts above the percentage of failed connections.";
        OutlierEnforcedLocalPercentage = "outlier_detection_ejections_enforced_local_origin_failure_percentage", "Ejections for the percentage of failed connections.";
        CheckAttempt = "health_check_attempt", "Checks.";
        CheckSuccess = "health_check_success", "Checks that passed.";
        CheckFailure = "health_check_failure", "Checks that failed.";
        CheckNetworkFailure = "health_check_network_failure", "Checks that failed for lack of an answer.";
        CheckVerifyCluster = "health_check_verify_cluster", "Checks that compared the name of the service.";
        Http2EmptyFlood = "http2_inbound_empty_frames_flood", "Connections that were ended for too many empty frames.";
        Http2PriorityFlood = "http2_inbound_priority_frames_flood", "Connections that were ended for too many PRIORITY frames.";
        Http2WindowFlood = "http2_inbound_window_update_frames_flood", "Connections that were ended for too many WINDOW_UPDATE frames.";
        Http2Keepalive = "http2_keepalive_timeout", "Connections of HTTP/2 that no longer answered.";
        Http2Messaging = "http2_rx_messaging_error", "Answers that are no message of HTTP/2.";
        Http2RxReset = "http2_rx_reset", "Streams that the endpoint reset.";
        Http2Refused = "http2_stream_refused_errors", "Streams that the endpoint refused.";
        Http2TxReset = "http2_tx_reset", "Streams that we reset.";
    }
    hidden {}
}

events! {
    /// Of what reads and writes HTTP towards clients, whichever manager it is for (`http1.*`, `http2.*`).
    CodecEvent("envoy_") {
        Http1Dropped = "http1_dropped_headers_with_underscores", "Fields that were left out for an underscore in their name.";
        Http1Rejected = "http1_requests_rejected_with_underscores_in_headers", "Requests that were refused for an underscore in a field's name.";
        Http2Dropped = "http2_dropped_headers_with_underscores", "Fields that were left out for an underscore in their name.";
        Http2Rejected = "http2_requests_rejected_with_underscores_in_headers", "Requests that were refused for an underscore in a field's name.";
        Http2Goaway = "http2_goaway_sent", "Connections that we have ended in good order.";
        Http2EmptyFlood = "http2_inbound_empty_frames_flood", "Connections that were ended for too many empty frames.";
        Http2PriorityFlood = "http2_inbound_priority_frames_flood", "Connections that were ended for too many PRIORITY frames.";
        Http2WindowFlood = "http2_inbound_window_update_frames_flood", "Connections that were ended for too many WINDOW_UPDATE frames.";
        Http2Keepalive = "http2_keepalive_timeout", "Connections whose client no longer answered.";
        Http2RxReset = "http2_rx_reset", "Streams that the client reset.";
        Http2Trailers = "http2_trailers", "Requests with trailers.";
        Http2TxReset = "http2_tx_reset", "Streams that we reset.";
    }
    hidden {}
}

events! {
    /// Of a connection manager (`http.<prefix>.*`).
    HttpEvent("envoy_http_") {
        CxDestroyLocal = "downstream_cx_destroy_local", "Connections that we ended.";
        CxDestroyRemote = "downstream_cx_destroy_remote", "Connections that the client ended.";
        CxDestroyWithRequest = "downstream_cx_destroy_active_rq", "Connections that ended while a request was on its way.";
        CxDestroyLocalWithRequest = "downstream_cx_destroy_local_active_rq", "Connections that we ended while a request was on its way.";
        CxDestroyRemoteWithRequest = "downstream_cx_destroy_remote_active_rq", "Connections that the client ended while a request was on its way.";
        CxDrainClose = "downstream_cx_drain_close", "Connections that were ended because the listener or the process drains.";
        CxIdleTimeout = "downstream_cx_idle_timeout", "Connections that were idle for too long.";
        CxMaxDuration = "downstream_cx_max_duration_reached", "Connections that became too old.";
        CxMaxRequests = "downstream_cx_max_requests_reached", "Connections that had as many requests as they may have.";
        CxOverload = "downstream_cx_overload_disable_keepalive", "Connections that were ended because of overload.";
        CxProtocolError = "downstream_cx_protocol_error", "Connections on which the client broke the protocol.";
        CxUpgrades = "downstream_cx_upgrades_total", "Connections and streams that became tunnels.";
        RqRxReset = "downstream_rq_rx_reset", "Requests that were reset or lost with their connection.";
        RqTxReset = "downstream_rq_tx_reset", "Requests that we reset.";
        RqHeaderTimeout = "downstream_rq_header_timeout", "Request heads that did not come in time.";
        RqIdleTimeout = "downstream_rq_idle_timeout", "Requests that were idle for too long.";
        RqMaxDuration = "downstream_rq_max_duration_reached", "Requests that lasted too long.";
        RqOverload = "downstream_rq_overload_close", "Requests that were turned away because of overload.";
        RqClientUnknown = "downstream_rq_rejected_via_ip_detection", "Requests that were turned away because nothing says who their client is.";
        RqTooLarge = "downstream_rq_too_large", "Requests with a body that is too large.";
        RqNoUpgrade = "downstream_rq_ws_on_non_ws_route", "Requests for an upgrade that the route does not allow.";
        RqPathRefused = "downstream_rq_failed_path_normalization", "Requests whose path could not be normalised.";
        RqPathRedirected = "downstream_rq_redirected_with_normalized_path", "Requests that were sent to their normalised path.";
        RqTooManyResets = "downstream_rq_too_many_premature_resets", "Connections that were ended for too many reset streams.";
        RqEarlyAnswer = "downstream_rq_response_before_rq_complete", "Requests that were answered before they had come whole.";
        NoRoute = "no_route", "Requests without a route.";
        NoCluster = "no_cluster", "Requests whose cluster does not exist.";
        DirectResponse = "rq_direct_response", "Requests that the route answers, or sends elsewhere.";
        ResetAfterStart = "rq_reset_after_downstream_response_started", "Requests that broke after the answer had begun.";
        TracedRandomly = "tracing_random_sampling", "Traces begun by chance.";
        TracedByService = "tracing_service_forced", "Traces that the service asked for.";
        TracedByClient = "tracing_client_enabled", "Traces that the client asked for.";
        NotTraced = "tracing_not_traceable", "Requests that are not traced.";
    }
    hidden {
        CxHttp2Ended, "Connections of HTTP/2 that have ended.";
        CxTlsEnded, "Connections of TLS that have ended.";
        CxUpgradesEnded, "Tunnels that have ended.";
    }
}

events! {
    /// Of a listener (`listener.<address>.*`).
    ListenerEvent("envoy_listener_") {
        OverloadReject = "downstream_cx_overload_reject", "Connections that the overload manager refused.";
        HandshakeTimeout = "downstream_cx_transport_socket_connect_timeout", "Handshakes that took too long.";
        GlobalOverflow = "downstream_global_cx_overflow", "Connections beyond the process's limit.";
        FilterTimeout = "downstream_pre_cx_timeout", "Connections that listener filters waited for too long for.";
        FilterError = "downstream_listener_filter_error", "Connections that could not be read within listener filters.";
        FilterRemoteClose = "downstream_listener_filter_remote_close", "Connections that the client ended within listener filters.";
        NoFilterChain = "no_filter_chain_match", "Connections that no filter chain is for.";
    }
    hidden {
        Accepted, "Connections that were accepted.";
        Classified, "Those whose filter chain is decided, or that have ended before.";
    }
}

events! {
    /// Of a TCP proxy (`tcp.<prefix>.*`).
    TcpEvent("envoy_tcp_") {
        Opened = "downstream_cx_total", "Connections.";
        NoRoute = "downstream_cx_no_route", "Connections without a cluster.";
        IdleTimeout = "idle_timeout", "Connections on which nothing moved for too long.";
        MaxDuration = "max_downstream_connection_duration", "Connections that lasted too long.";
    }
    hidden {
        Closed, "Connections that have ended.";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_happens_costs_a_pointer_and_what_happens_is_counted_by_its_place() {
        assert!(size_of::<Events<ClusterEvent>>() <= 24);
        let events: Events<ClusterEvent> = Events::default();
        assert_eq!(events.get(ClusterEvent::Panic), 0);
        events.note(ClusterEvent::Panic);
        events.note(ClusterEvent::Panic);
        assert_eq!(events.get(ClusterEvent::Panic), 2);
        assert_eq!(events.get(ClusterEvent::RetryLimit), 0);
        let workers: WorkerEvents<HttpEvent> = WorkerEvents::new(2);
        workers.note(HttpEvent::NoRoute, 0);
        workers.note(HttpEvent::NoRoute, 1);
        workers.note(HttpEvent::NoRoute, 7);
        assert_eq!(workers.get(HttpEvent::NoRoute), 2);
    }

    #[test]
    fn every_event_has_a_name_of_its_own_in_its_area() {
        fn check<E: Event>(area: &str) {
            let mut names: Vec<_> = E::ALL
                .iter()
                .map(|(name, _)| *name)
                .filter(|name| !name.is_empty())
                .collect();
            assert!(names.iter().all(|name| name.starts_with(area)), "{names:?}");
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count);
        }
        check::<ClusterEvent>("envoy_cluster_");
        check::<HttpEvent>("envoy_http_");
        check::<ListenerEvent>("envoy_listener_");
        check::<TcpEvent>("envoy_tcp_");
        check::<CodecEvent>("envoy_http");
    }
}
