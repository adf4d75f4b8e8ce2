//! The commands that work without Kubernetes, on the same library as the agent.

pub mod asking;
pub mod batch;
pub mod file;
pub mod host_config;
pub mod object_store;
pub mod pages;
pub mod pool;
pub mod preflight;
pub mod serve_store;
pub mod session;
pub mod template;
pub mod text;
pub mod transfer;
pub mod volume;
mod work_dir;
