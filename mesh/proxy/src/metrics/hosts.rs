//! Requests and connections of each endpoint, by Envoy's names, for `/clusters`: a set of cells per worker, made with the
//! endpoint's first request or connection. An endpoint that nobody uses costs a pointer.
//!
//! As in Envoy a connection of TCP counts as a request too. It is a success once it is made.

use std::sync::OnceLock;

use super::series::Cell;

/// What one worker counts of an endpoint. On cache lines of its own, because the workers' cells lie side by side.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Cells {
    connections: Cell,
    connections_closed: Cell,
    connect_failures: Cell,
    requests: Cell,
    requests_ended: Cell,
    good: Cell,
    bad: Cell,
    timeouts: Cell,
}

thread_local! {
    /// Which worker this thread is, and how many there are.
    static WORKER: std::cell::Cell<(usize, usize)> = const { std::cell::Cell::new((0, 1)) };
}

/// From now on this thread counts as worker `id` of so many.
pub(crate) fn count_as(id: usize, workers: usize) {
    WORKER.set((id, workers.max(1)));
}

/// What all workers count of an endpoint.
#[derive(Debug, Default)]
pub struct HostCells(OnceLock<Box<[Cells]>>);

/// What was counted of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounts {
    /// Connections open, or being made.
    pub cx_active: u64,
    /// Connections that could not be made.
    pub cx_connect_fail: u64,
    /// Connections begun.
    pub cx_total: u64,
    /// Requests on their way.
    pub rq_active: u64,
    /// Answers of class 5, and requests without an answer.
    pub rq_error: u64,
    /// All other answers.
    pub rq_success: u64,
    /// Requests that took too long.
    pub rq_timeout: u64,
    /// Requests sent, each attempt.
    pub rq_total: u64,
}

impl HostCounts {
    /// Names and values in Envoy's order, and which are gauges.
    pub fn named(&self) -> [(&'static str, u64, bool); 8] {
        [
            ("cx_active", self.cx_active, true),
            ("cx_connect_fail", self.cx_connect_fail, false),
            ("cx_total", self.cx_total, false),
            ("rq_active", self.rq_active, true),
            ("rq_error", self.rq_error, false),
            ("rq_success", self.rq_success, false),
            ("rq_timeout", self.rq_timeout, false),
            ("rq_total", self.rq_total, false),
        ]
    }
}

impl HostCells {
    /// The cells of this thread's worker.
    fn own(&self) -> &Cells {
        let (id, workers) = WORKER.get();
        let all = self
            .0
            .get_or_init(|| (0..workers).map(|_| Cells::default()).collect());
        &all[id.min(all.len() - 1)]
    }

    pub(crate) fn request_begins(&self) {
        self.own().requests.add(1);
    }

    pub(crate) fn request_ends(&self) {
        self.own().requests_ended.add(1);
    }

    pub(crate) fn answered(&self, well: bool) {
        let own = self.own();
        if well { &own.good } else { &own.bad }.add(1);
    }

    pub(crate) fn timed_out(&self) {
        self.own().timeouts.add(1);
    }

    pub(crate) fn connecting(&self) {
        self.own().connections.add(1);
    }

    pub(crate) fn connect_failed(&self) {
        self.own().connect_failures.add(1);
    }

    pub(crate) fn connection_ends(&self) {
        self.own().connections_closed.add(1);
    }

    /// What all workers have counted.
    pub fn read(&self) -> HostCounts {
        let mut out = HostCounts::default();
        for cells in self.0.get().into_iter().flatten() {
            // What ends is read first: what begins meanwhile is then active, and nothing ends that has not begun.
            let (closed, ended) = (cells.connections_closed.get(), cells.requests_ended.get());
            out.cx_connect_fail += cells.connect_failures.get();
            out.cx_total += cells.connections.get();
            out.cx_active += cells.connections.get().saturating_sub(closed);
            out.rq_error += cells.bad.get();
            out.rq_success += cells.good.get();
            out.rq_timeout += cells.timeouts.get();
            out.rq_total += cells.requests.get();
            out.rq_active += cells.requests.get().saturating_sub(ended);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_worker_adds_to_cells_of_its_own_and_what_is_shown_is_their_sum() {
        let cells = HostCells::default();
        assert_eq!(cells.read(), HostCounts::default());
        std::thread::scope(|scope| {
            for id in 0..3 {
                let cells = &cells;
                scope.spawn(move || {
                    count_as(id, 3);
                    for index in 0..1_000 {
                        cells.request_begins();
                        cells.answered(index % 10 != 0);
                        if index > 0 {
                            cells.request_ends();
                        }
                    }
                });
            }
        });
        let counts = cells.read();
        assert_eq!((counts.rq_total, counts.rq_active), (3_000, 3));
        assert_eq!((counts.rq_success, counts.rq_error), (2_700, 300));
        assert_eq!(size_of::<Cells>(), 64);
    }
}
