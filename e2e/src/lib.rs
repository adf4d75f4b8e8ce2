//! What the end-to-end tests stand on: a real Kubernetes control plane and a real S3 server, started as
//! ordinary processes of one test on 127.0.0.1, without containers and without privileges; and on top of them, as
//! root, whole installations of Berth ([`site`]).
//!
//! Every process dies with the process that started it, whatever ends that one (see [`process`]); all data lie in
//! a directory that the caller gives.

pub mod cluster;
pub mod crash;
pub mod csi;
pub mod drive;
pub mod image;
pub mod kernel;
pub mod kill;
pub mod kill_transfers;
pub mod leaks;
pub mod minio;
pub mod ours;
pub mod ports;
pub mod process;
pub mod race;
pub mod sanity;
pub mod scale;
pub mod seeded;
pub mod site;
pub mod tools;
pub mod wait;
