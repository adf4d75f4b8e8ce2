//! The commands that work without Kubernetes, on the same library as the agent.

pub mod host_config;
pub mod preflight;
pub mod template;
