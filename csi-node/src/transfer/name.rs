//! What an import writes under the name of its image, for people and collection: no import ever believes it.

use berth_core::ids::Uid;
use berth_core::units::{Generation, Timestamp};
use berth_objectstore::chunks::caibx::ChunkSize;
use berth_objectstore::chunks::publish::Manifest;

use super::job::Durable;

/// Label: bytes of the image that are no holes.
const REAL_BYTES: &str = "berth.real-bytes";
/// Label: bytes of its distinct chunks as they were stored.
const STORED_BYTES: &str = "berth.stored-bytes";
/// Label: how many distinct chunks it has.
const CHUNKS: &str = "berth.chunks";

/// The manifest of an image. The caller knows its generation, and the bytes of its distinct chunks.
pub(crate) fn manifest(
    durable: &Durable,
    chunk_size: ChunkSize,
    owner: &Uid,
    created: Timestamp,
) -> Manifest {
    let labels =
        [(REAL_BYTES, durable.real_size.0), (STORED_BYTES, durable.stored_bytes.0), (CHUNKS, durable.chunks)];
    Manifest {
        format_version: 1,
        digest: durable.digest,
        virtual_size: durable.virtual_size,
        chunk_size,
        data_bytes: durable.real_size,
        source_digest: durable.source_digest,
        owner: owner.clone(),
        generation: Generation::FIRST,
        created,
        labels: labels.map(|(key, value)| (key.to_owned(), value.to_string())).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::ids::{Digest, Sha256Sum};
    use berth_core::units::Bytes;

    #[test]
    fn the_numbers_of_an_image_are_told_with_its_name() {
        let durable = Durable {
            digest: Digest(Sha256Sum::of(b"image")),
            source_digest: Some(Digest(Sha256Sum::of(b"source"))),
            stored_bytes: Bytes(5),
            virtual_size: Bytes(512),
            real_size: Bytes(7),
            chunks: 3,
        };
        let manifest = manifest(&durable, ChunkSize::DEFAULT, &Uid::from("u"), Timestamp(1));
        let labels: Vec<(&str, &str)> =
            manifest.labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(labels, [(CHUNKS, "3"), (REAL_BYTES, "7"), (STORED_BYTES, "5")]);
        assert_eq!((manifest.digest, manifest.source_digest), (durable.digest, durable.source_digest));
    }
}
