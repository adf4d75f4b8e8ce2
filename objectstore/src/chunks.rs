//! Chunked images: content-addressed, compressed chunks and indexes in the casync layout.
//!
//! Writing goes [`session::Session::begin`] → [`upload::ChunkUploader`] → [`verify::verify`] → [`publish`]; reading is
//! [`read::ImageReader`] from the begin to the end, and [`remote::RemoteImage`] anywhere, for many readers at once.

pub mod caibx;
pub mod publish;
pub mod read;
pub mod remote;
pub mod session;
pub mod store;
pub mod upload;
pub mod usage;
pub mod verify;
pub mod zeros;

mod frame;
mod index_file;
mod local_index;
mod tombstones;

pub use index_file::IndexFileError;

#[cfg(test)]
mod tests;
