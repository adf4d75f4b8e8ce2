//! What a node does with what is asked of it: the view of one node, the closed set of steps, and the plan.

mod files;
pub mod plan;
pub mod step;
pub mod view;

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic in a test is a failure with a place
mod simulated;

pub use plan::{behind, plan};
pub use step::{Halted, Origin, Step};
pub use view::NodeView;
