//! The commands that work without Kubernetes, on the same library as the agent.

pub mod preflight;
pub mod template;
