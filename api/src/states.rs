//! The API server's own rules for states, made from the tables that decisions go by.

use berth_core::states::{Machine, followers};
use berth_core::transfer::TransferKind;

/// What a refusal says.
pub(crate) const MESSAGE: &str = "state: it does not lead to this one; docs/semantics.md has the table";

/// A status may change its state only as the table says, and never takes it back.
pub(crate) fn rule<M: Machine>() -> String {
    rule_named(|state: M| Some(format!("{state:?}")))
}

/// The same of a kind that has names of its own for the states, and none for those that it is never in.
pub(crate) fn rule_of(kind: TransferKind) -> String {
    rule_named(|state| kind.name_of(state).map(str::to_owned))
}

fn rule_named<M: Machine>(name: impl Fn(M) -> Option<String>) -> String {
    let way = |state: &M| {
        let next: Vec<String> =
            followers(*state).into_iter().filter_map(&name).map(|next| format!("'{next}'")).collect();
        Some(format!("'{}': [{}]", name(*state)?, next.join(", ")))
    };
    let ways: Vec<String> = M::STATES.iter().filter_map(way).collect();
    format!(
        "!has(oldSelf.state) || (has(self.state) && (self.state == oldSelf.state || self.state in {{{}}}[oldSelf.state]))",
        ways.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::image::StagedState;

    #[test]
    fn the_rule_is_the_table() {
        let rule = rule::<StagedState>();
        assert!(rule.contains("'Ready': ['Filling', 'Usable', 'Ready']"), "{rule}");
        assert!(rule.contains("'Failed': ['Filling', 'Usable', 'Ready', 'Failed']"), "{rule}");
    }

    #[test]
    fn a_kind_has_its_own_names_in_it() {
        let (import, transfer) = (rule_of(TransferKind::Import), rule_of(TransferKind::Transfer));
        assert!(
            import.contains("'Importing': ['Pending', 'Probing', 'Queued', 'Importing', 'Ready', 'Failed']")
        );
        assert!(!import.contains("Suspended"), "{import}");
        assert!(transfer.contains("'Failed': ['Pending', 'Succeeded', 'Failed']"), "{transfer}");
        assert!(
            transfer.contains("'Suspended': ['Pending', 'Probing', 'Queued', 'Transferring', "),
            "{transfer}"
        );
    }
}
