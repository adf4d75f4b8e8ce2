//! What an import writes under the name of its image, and what can be read back from it.

use berth_core::ids::Uid;
use berth_core::units::{Bytes, Generation, Timestamp};
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
        source_digest: Some(durable.source_digest),
        owner: owner.clone(),
        generation: Generation::FIRST,
        created,
        labels: labels.map(|(key, value)| (key.to_owned(), value.to_string())).into(),
    }
}

/// What a manifest says of its image; nothing if it was not written by an import.
pub(crate) fn durable(manifest: &Manifest) -> Option<Durable> {
    let number = |key: &str| manifest.labels.get(key)?.parse::<u64>().ok();
    Some(Durable {
        digest: manifest.digest,
        source_digest: manifest.source_digest?,
        stored_bytes: Bytes(number(STORED_BYTES)?),
        virtual_size: manifest.virtual_size,
        real_size: Bytes(number(REAL_BYTES)?),
        chunks: number(CHUNKS)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_core::ids::{Digest, Sha256Sum};

    #[test]
    fn what_is_durable_reads_back_from_its_manifest() {
        let found = Durable {
            digest: Digest(Sha256Sum::of(b"image")),
            source_digest: Digest(Sha256Sum::of(b"source")),
            stored_bytes: Bytes(5),
            virtual_size: Bytes(512),
            real_size: Bytes(7),
            chunks: 3,
        };
        let mut manifest = manifest(&found, ChunkSize::DEFAULT, &Uid::from("u"), Timestamp(1));
        assert_eq!(durable(&manifest), Some(found));
        manifest.labels.clear();
        assert_eq!(durable(&manifest), None);
    }
}
