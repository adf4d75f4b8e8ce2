//! A deliberate defect that the safety commands must notice. Compiled in by the feature `sabotage` only.

use redb::Durability;

/// When a transaction is on stable storage: before it is answered. With the defect `ack-before-sync`, sometime.
#[cfg(feature = "sabotage")]
pub fn durability() -> Durability {
    match std::env::var("BERTH_SABOTAGE") {
        Ok(asked) if asked == "ack-before-sync" => Durability::None,
        _ => Durability::Immediate,
    }
}

/// When a transaction is on stable storage: before it is answered.
#[cfg(not(feature = "sabotage"))]
pub const fn durability() -> Durability {
    Durability::Immediate
}
