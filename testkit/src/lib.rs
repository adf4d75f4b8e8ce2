//! Servers and fakes for tests: an S3 server and an HTTP file server that fail on request and keep a log of what they
//! really received.
//!
//! Assumes a trusted caller and an address on the loopback interface. Nothing here is part of a shipped program.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod http_source;
pub mod s3;
pub mod vhdx;
mod wire;
