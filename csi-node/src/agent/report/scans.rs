//! A host that looks into the disks of guests is told of.

use berth_api::staging_node::NodePool;
use berth_core::reason::Reason;

/// A pool whose devices the host looks into is used, and says so: only an administrator can change that.
pub(super) fn warn(told: &mut NodePool, scans: &[&str]) {
    if !scans.is_empty() {
        told.reason = Reason::HostScansGuestDisks.to_string();
        told.message = scans.join("; ");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_looks_into_guests_is_told_and_the_pool_stays_usable() {
        let ready = NodePool { usable: true, reason: "Ready".to_owned(), ..NodePool::default() };
        let mut told = ready.clone();
        warn(&mut told, &[]);
        assert_eq!(told, ready);
        warn(&mut told, &["no rule", "no filter"]);
        assert!(told.usable);
        assert_eq!(
            (told.reason.as_str(), told.message.as_str()),
            ("HostScansGuestDisks", "no rule; no filter")
        );
    }
}
