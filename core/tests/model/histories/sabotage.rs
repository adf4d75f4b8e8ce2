//! Defects put in on purpose, to show that the histories would find them. They change what a decision is shown, or what
//! becomes of its writes; the decisions themselves are the shipped ones.

use super::observer::Wrong;

/// One defect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// None.
    #[default]
    None,
    /// Ledgers are overwritten whatever version was seen.
    LedgerWithoutVersion,
    /// Placements are overwritten whatever version was seen.
    AssignWithoutVersion,
    /// Operators assign what the ledger write of a round was to promise though that was refused.
    AssignUnpromised,
    /// Operators believe that every node has given everything back.
    EarlyRelease,
    /// Promises are swept at once, without waiting until their nodes know.
    SweepWithoutRevoking,
    /// Nodes do not say what their kernel pools have grown to.
    GrowthUntold,
    /// Operators take metadata devices for twice as large as they are.
    MetadataTwice,
    /// Operators overcommit volumes by twice as much as the policy says.
    OvercommitTwice,
    /// References that something uses end like any other.
    ExpireInUse,
    /// Images go by how long they were not used alone.
    EvictByRecency,
    /// Images go although no other copy is known.
    EvictOnlyCopy,
    /// Nodes obey a ledger that is older than what they have obeyed.
    ObeyBehind,
    /// Operators admit on a ledger that is older than what its node has obeyed.
    AdmitBehind,
    /// Nodes remove what is in use.
    RemoveInUse,
    /// Nodes say that bytes are gone that are there.
    ReleaseWithoutRemoving,
    /// Nodes remove files that are nowhere else.
    RemoveUnsent,
    /// Nodes forget what they obey when they are started again.
    ForgetObeyed,
    /// Nodes never say that bytes are gone.
    NeverReleased,
    /// Nodes obey promises whose holder is not assigned to them.
    ObeyWithoutAssignment,
}

impl Sabotage {
    /// All of them, with what they are called and the count that must notice them.
    pub const ALL: &'static [(Self, &'static str, Wrong)] = &[
        (Self::LedgerWithoutVersion, "ledger-without-compare-and-swap", Wrong::Overcommit),
        (Self::AssignWithoutVersion, "assign-without-compare-and-swap", Wrong::Overcommit),
        (Self::AssignUnpromised, "assign-though-the-ledger-was-refused", Wrong::Overcommit),
        (Self::EarlyRelease, "early-release", Wrong::Overcommit),
        (Self::SweepWithoutRevoking, "sweep-without-revoking", Wrong::Overcommit),
        (Self::GrowthUntold, "growth-untold", Wrong::Overcommit),
        (Self::MetadataTwice, "metadata-counted-twice", Wrong::Overcommit),
        (Self::OvercommitTwice, "overcommit-beyond-the-policy", Wrong::Overcommit),
        (Self::ExpireInUse, "expiry-of-a-live-holder", Wrong::EvictedInUse),
        (Self::EvictByRecency, "eviction-by-recency-alone", Wrong::EvictedInUse),
        (Self::EvictOnlyCopy, "eviction-of-the-only-copy", Wrong::LostOnlyCopy),
        (Self::ObeyBehind, "obey-a-ledger-that-is-behind", Wrong::Stuck),
        (Self::AdmitBehind, "admit-on-a-ledger-that-is-behind", Wrong::Stuck),
        (Self::RemoveInUse, "removal-in-use", Wrong::EvictedInUse),
        (Self::ReleaseWithoutRemoving, "release-without-removing", Wrong::Overcommit),
        (Self::RemoveUnsent, "removal-of-what-was-not-sent", Wrong::LostOnlyCopy),
        (Self::ForgetObeyed, "forgotten-on-restart", Wrong::Overcommit),
        (Self::NeverReleased, "never-released", Wrong::Stuck),
        (Self::ObeyWithoutAssignment, "no-generation-check", Wrong::Overcommit),
    ];

    /// What must notice it; `None` for no defect.
    pub fn noticed_by(self) -> Option<Wrong> {
        Self::ALL.iter().find(|(known, _, _)| *known == self).map(|(_, _, wrong)| *wrong)
    }
}
