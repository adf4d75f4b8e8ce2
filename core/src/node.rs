//! What a node does with what is asked of it: the view of one node, the closed set of steps, and the plan.

pub mod plan;
pub mod step;
pub mod view;

#[cfg(test)]
mod simulated;

pub use plan::{behind, plan};
pub use step::{Origin, Step};
pub use view::NodeView;
