//! Every metric. The programs register these and no others, and the documentation lists them. Names only get added.

use std::fmt::Write as _;

/// How a metric moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only up, from zero at the program's start.
    Counter,
    /// Up and down.
    Gauge,
}

impl MetricKind {
    /// The name in `# TYPE` lines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        }
    }
}

/// Which program serves a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `berth-operator`.
    Operator,
    /// `berth-node`.
    Node,
    /// Both.
    Both,
}

impl Program {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Node => "node",
            Self::Both => "both",
        }
    }
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal, $kind:ident, $unit:literal, $program:ident, [$($label:literal),*];)*) => {
        /// A metric.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Metric {
            $($(#[doc = $doc])+ $name,)*
        }

        impl Metric {
            /// Every metric, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The name; counters end in `_total`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// What it says, one sentence.
            pub const fn help(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)* }
            }

            /// How it moves.
            pub const fn kind(self) -> MetricKind {
                match self { $(Self::$name => MetricKind::$kind,)* }
            }

            /// What is counted: `bytes`, `seconds`, or empty for a plain number.
            pub const fn unit(self) -> &'static str {
                match self { $(Self::$name => $unit,)* }
            }

            /// Which program serves it.
            pub const fn program(self) -> Program {
                match self { $(Self::$name => Program::$program,)* }
            }

            /// The labels that tell its series apart.
            pub const fn labels(self) -> &'static [&'static str] {
                match self { $(Self::$name => &[$($label),*],)* }
            }
        }
    };
}

metrics! {
    /// Bytes that may be promised in a pool on a node.
    PoolTotalBytes = "berth_pool_total_bytes", Gauge, "bytes", Operator, ["pool", "node"];
    /// Bytes that promises in a pool on a node count for: all of them, but less for volumes that are overcommitted.
    PoolPromisedBytes = "berth_pool_promised_bytes", Gauge, "bytes", Operator, ["pool", "node"];
    /// Bytes that are written in a pool on a node.
    PoolUsedBytes = "berth_pool_used_bytes", Gauge, "bytes", Operator, ["pool", "node"];
    /// Bytes that are promised to volumes in a pool made of kernel pools, in full: more than there are where they are overcommitted.
    PoolVolumesPromisedBytes = "berth_pool_volumes_promised_bytes", Gauge, "bytes", Operator, ["pool", "node"];
    /// Bytes that the kernel pool of volumes can attain beside what images are promised.
    PoolVolumesAttainableBytes = "berth_pool_volumes_attainable_bytes", Gauge, "bytes", Operator, ["pool", "node"];
    /// Bytes that volumes have written in a pool made of kernel pools.
    PoolVolumesUsedBytes = "berth_pool_volumes_used_bytes", Gauge, "bytes", Operator, ["pool", "node"];
    /// Bytes of a kernel pool's metadata that may be promised, by class: `Images` or `Volumes`.
    PoolMetadataTotalBytes = "berth_pool_metadata_total_bytes", Gauge, "bytes", Operator, ["pool", "node", "class"];
    /// Bytes of a kernel pool's metadata that are promised, by class.
    PoolMetadataPromisedBytes = "berth_pool_metadata_promised_bytes", Gauge, "bytes", Operator, ["pool", "node", "class"];
    /// Bytes of a kernel pool's metadata that are written, by class.
    PoolMetadataUsedBytes = "berth_pool_metadata_used_bytes", Gauge, "bytes", Operator, ["pool", "node", "class"];
    /// Bytes that are promised to images nothing refers to, over all nodes.
    PoolUnreferencedBytes = "berth_pool_unreferenced_bytes", Gauge, "bytes", Operator, ["pool"];
    /// 1 while the ledger of a pool on a node is behind what the node has obeyed, otherwise 0.
    PoolLedgerBehind = "berth_pool_ledger_behind", Gauge, "", Operator, ["pool", "node"];
    /// Reservations by state.
    Reservations = "berth_reservations", Gauge, "", Operator, ["state"];
    /// Imports by state.
    Imports = "berth_imports", Gauge, "", Operator, ["state"];
    /// Transfers by state, without imports.
    Transfers = "berth_transfers", Gauge, "", Operator, ["state"];
    /// Reservations that wait for space.
    QueueLength = "berth_queue_length", Gauge, "", Operator, [];
    /// Reservations that were given a place.
    AdmissionsTotal = "berth_admissions_total", Counter, "", Operator, ["pool"];
    /// Seconds that reservations that were given a place had waited for it, from when they were made.
    QueueWaitSecondsTotal = "berth_queue_wait_seconds_total", Counter, "seconds", Operator, ["pool"];
    /// Reservations that wait for space in a pool; one that may go to several counts in each.
    PoolQueueLength = "berth_pool_queue_length", Gauge, "", Operator, ["pool"];
    /// Reservations that ended because nothing used them any more.
    ExpiriesTotal = "berth_expiries_total", Counter, "", Operator, ["pool"];
    /// Volumes that were removed because nobody would ask for them again.
    AbandonedTotal = "berth_abandoned_total", Counter, "", Operator, [];
    /// Reservations that were refused.
    RefusalsTotal = "berth_refusals_total", Counter, "", Operator, ["reason"];
    /// Images that were removed because nothing referred to them, by cause.
    ReclaimsTotal = "berth_reclaims_total", Counter, "", Operator, ["pool", "cause"];
    /// Bytes that were promised to images that were removed because nothing referred to them, by cause.
    ReclaimedBytesTotal = "berth_reclaimed_bytes_total", Counter, "bytes", Operator, ["pool", "cause"];
    /// Ledgers that were rebuilt from the record of their node.
    LedgerRebuildsTotal = "berth_ledger_rebuilds_total", Counter, "", Operator, ["pool"];
    /// Ledger writes that another operator was faster with.
    LedgerConflictsTotal = "berth_ledger_conflicts_total", Counter, "", Operator, [];
    /// Passes over an object, by how they ended.
    ReconcileTotal = "berth_reconcile_total", Counter, "", Operator, ["kind", "outcome"];
    /// Kubernetes events that could not be written.
    EventsDroppedTotal = "berth_events_dropped_total", Counter, "", Operator, [];
    /// When the operator last saw something change, in seconds since 1970.
    LastEventTimestampSeconds = "berth_last_event_timestamp_seconds", Gauge, "seconds", Operator, [];
    /// Objects that the operator cannot read, by kind.
    UnreadableObjects = "berth_unreadable_objects", Gauge, "", Operator, ["kind"];
    /// 1 while a node renews its Lease and has reported, otherwise 0.
    NodeReady = "berth_node_ready", Gauge, "", Operator, ["node"];
    /// CSI calls answered, by method and answer.
    NodeRpcsTotal = "berth_node_rpcs_total", Counter, "", Node, ["method", "code"];
    /// Steps that the node's agent carried out, by kind and how they ended.
    NodeStepsTotal = "berth_node_steps_total", Counter, "", Node, ["step", "result"];
    /// Bytes that may be promised in a pool, as its node measures it.
    NodePoolTotalBytes = "berth_node_pool_total_bytes", Gauge, "bytes", Node, ["pool"];
    /// Bytes that are written in a pool, as its node measures it.
    NodePoolUsedBytes = "berth_node_pool_used_bytes", Gauge, "bytes", Node, ["pool"];
    /// Bytes that the node has obeyed promises of and not given back.
    NodePoolObeyedBytes = "berth_node_pool_obeyed_bytes", Gauge, "bytes", Node, ["pool"];
    /// Times at which there was no space for what a promise covers.
    NodeSpaceDefectsTotal = "berth_node_space_defects_total", Counter, "", Node, ["pool"];
    /// When the program was started, in seconds since 1970.
    ProcessStartTimeSeconds = "berth_process_start_time_seconds", Gauge, "seconds", Both, [];
}

/// The table of `docs/metrics.md`.
pub fn docs_table() -> String {
    let mut table = String::from(
        "# Metrics\n\n*Generated by `cargo xtask codegen` from `core/src/metric.rs`; do not edit.*\n\nEvery metric that the \
         programs serve at `/metrics`. Names only get added.\n\n| metric | type | unit | labels | program | meaning |\n\
         |---|---|---|---|---|---|\n",
    );
    for metric in Metric::ALL {
        let labels: Vec<String> = metric.labels().iter().map(|label| format!("`{label}`")).collect();
        let (kind, program) = (metric.kind().as_str(), metric.program().as_str());
        let _ = writeln!(
            table,
            "| `{}` | {kind} | {} | {} | {program} | {} |",
            metric.name(),
            metric.unit(),
            labels.join(", "),
            metric.help(),
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_follow_the_rules() {
        for (index, metric) in Metric::ALL.iter().enumerate() {
            let name = metric.name();
            assert!(
                name.starts_with("berth_") && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{name}"
            );
            assert_eq!(metric.kind() == MetricKind::Counter, name.ends_with("_total"), "{name}");
            let stem = name.trim_end_matches("_total");
            assert_eq!(metric.unit() == "bytes", stem.ends_with("_bytes"), "{name}");
            assert_eq!(metric.unit() == "seconds", stem.ends_with("_seconds"), "{name}");
            assert!(metric.help().ends_with('.'), "{name}");
            assert!(Metric::ALL[..index].iter().all(|other| other.name() != name), "{name}");
        }
    }

    #[test]
    fn the_table_has_a_line_for_each() {
        let table = docs_table();
        assert_eq!(table.lines().filter(|line| line.starts_with("| `")).count(), Metric::ALL.len());
        let line =
            "| `berth_refusals_total` | counter |  | `reason` | operator | Reservations that were refused. |";
        assert!(table.lines().any(|other| other == line), "{table}");
    }
}
