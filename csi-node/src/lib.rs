//! The node's program: the agent that stages images, the CSI services, and commands that work without Kubernetes.

pub mod agent;
pub mod area;
pub mod args;
pub mod commands;
pub mod credentials;
pub mod csi;
pub mod files;
pub mod metrics;
pub mod node;
pub mod node_lock;
pub mod operation;
pub mod rpc;
pub mod run;
pub mod sabotage;
pub mod socket;
pub mod store_server;
pub mod supervisor;
pub mod telemetry;
pub mod transfer;
pub mod values;
