//! Every decision Berth makes, and nothing else: no IO, no clock, no randomness, no Kubernetes.
//!
//! Callers observe the world into a view, pass it in together with the current time, and carry out what comes back.

pub mod budget;
pub mod change;
pub mod check;
pub mod drain;
pub mod extents;
pub mod hydration;
pub mod ids;
pub mod image;
pub mod ledger;
pub mod local;
pub mod lost;
pub mod metric;
pub mod node;
pub mod overcommit;
pub mod pool;
pub mod progress;
pub mod reason;
pub mod rebuild;
pub mod reclaim;
pub mod reservation;
pub mod retire;
pub mod retry;
pub mod stages;
pub mod states;
pub mod store;
pub mod table;
pub mod thin;
pub mod transfer;
pub mod units;
pub mod view;

#[cfg(test)]
mod fixture;
