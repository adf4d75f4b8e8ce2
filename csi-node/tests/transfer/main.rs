//! Transfers against a real S3 protocol and a real web server, with images of `qemu-img`.
#![allow(clippy::unwrap_used)] // a panic in a test is a failure with a place

#[allow(dead_code)] // no test program uses all of it
#[path = "../bed/mod.rs"]
mod bed;
mod command;
mod direct;
mod import;
mod object;
mod store_away;
