//! The API server's own rules for states, made from the tables that decisions go by.

use berth_core::states::{Machine, followers};

/// What a refusal says.
pub(crate) const MESSAGE: &str = "state: it does not lead to this one; docs/semantics.md has the table";

/// A status may change its state only as the table says, and never takes it back.
pub(crate) fn rule<M: Machine>() -> String {
    let way = |state: &M| {
        let next: Vec<String> = followers(*state).iter().map(|next| format!("'{next:?}'")).collect();
        format!("'{state:?}': [{}]", next.join(", "))
    };
    let ways: Vec<String> = M::STATES.iter().map(way).collect();
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
        assert!(rule.contains("'Ready': ['Filling', 'Ready']"), "{rule}");
        assert!(rule.contains("'Failed': ['Filling', 'Ready', 'Failed']"), "{rule}");
    }
}
