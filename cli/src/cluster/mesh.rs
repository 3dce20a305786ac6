//! Where the mesh meets the rollouts: its ack ledger is their source of liveness, its telemetry their source of
//! measurements. Neither crate knows the other; this is the seam between them.
