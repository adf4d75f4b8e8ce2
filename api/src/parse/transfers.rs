//! What a `TemplateImport` or an `ImageTransfer` asks for, in the one form that nodes work from.

use berth_core::ids::{Digest, ObjectName, Sha256Sum};
use berth_core::transfer::{Compression, Limits, OutputFormat, SourceFormat, Staging};
use berth_core::units::Bytes;

use super::{InvalidField, bytes, name_of, seconds};
use crate::defaults::{RETRY_LIMIT, SIZE_LIMIT_BYTES, STALL_TIMEOUT_SECONDS};
use crate::fields::{HttpSource, Quantity, S3Source, S3Target, Source, Span, TransferLimits};
use crate::image_transfer::{
    Compression as ApiCompression, DestinationFormat, ImageTransferSpec, SourceFormat as ApiSourceFormat,
    Staging as ApiStaging, StoreImage, TransferDestination, TransferFormat, TransferSource,
};
use crate::{ImageTransfer, TemplateImport};

/// What is asked for, of either kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Where the image comes from.
    pub source: AskedSource,
    /// Where it goes.
    pub destination: AskedDestination,
    /// The source's format; `None` if it is found out by reading its head. Never of a [`AskedSource::StoreImage`].
    pub source_format: Option<SourceFormat>,
    /// Whether the source comes into a pool first; `None` if that is left to the node.
    pub staging: Option<Staging>,
    /// What the source's bytes must add up to. Never of a [`AskedSource::StoreImage`].
    pub checksum: Option<Sha256Sum>,
    /// Bounds of the work.
    pub limits: Limits,
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AskedSource {
    /// A file behind an HTTP or HTTPS address.
    Http(HttpSource),
    /// An object in an S3 bucket.
    S3(S3Source),
    /// An image in an image store.
    StoreImage {
        /// The `ImageStore`.
        store: ObjectName,
        /// What the image is published as there.
        image: ObjectName,
    },
}

/// Where an image goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AskedDestination {
    /// An image in an image store.
    StoreImage {
        /// The `ImageStore`.
        store: ObjectName,
        /// What the image is to be published as there.
        image: ObjectName,
    },
    /// One object in an S3 bucket.
    Object {
        /// Where.
        target: S3Target,
        /// What is written.
        format: OutputFormat,
    },
}

impl Asked {
    /// The image stores that it needs: its source's and its destination's.
    pub fn stores(&self) -> Vec<ObjectName> {
        let source = match &self.source {
            AskedSource::StoreImage { store, .. } => Some(store),
            AskedSource::Http(_) | AskedSource::S3(_) => None,
        };
        let destination = match &self.destination {
            AskedDestination::StoreImage { store, .. } => Some(store),
            AskedDestination::Object { .. } => None,
        };
        let mut stores: Vec<ObjectName> = source.into_iter().chain(destination).cloned().collect();
        stores.dedup();
        stores
    }
}

/// What an import asks for: its image is published under its own name.
///
/// # Errors
/// [`InvalidField`] for a value that cannot be used.
pub fn asked_import(import: &TemplateImport) -> Result<Asked, InvalidField> {
    let (name, spec) = (name_of(&import.metadata), &import.spec);
    let source = match &spec.source {
        Source { http: Some(http), s3: None } => AskedSource::Http(http.clone()),
        Source { http: None, s3: Some(s3) } => AskedSource::S3(s3.clone()),
        _ => return Err(shape("spec.source", "exactly one of `http` and `s3` must be set")),
    };
    Ok(Asked {
        source,
        destination: AskedDestination::StoreImage {
            store: ObjectName::new(&name.namespace, &spec.store.name),
            image: name,
        },
        source_format: None,
        staging: None,
        checksum: checksum(spec.checksum.as_deref())?,
        limits: transfer_limits(&spec.limits)?,
    })
}

/// What a transfer asks for.
///
/// # Errors
/// [`InvalidField`] for a value that cannot be used, and for one that another field excludes.
pub fn asked_transfer(transfer: &ImageTransfer) -> Result<Asked, InvalidField> {
    let (name, spec) = (name_of(&transfer.metadata), &transfer.spec);
    let source = source(&name.namespace, &spec.source)?;
    if let AskedSource::StoreImage { .. } = source {
        let known = "must be absent where `spec.source.storeImage` is set";
        if spec.format.source.is_some() {
            return Err(shape("spec.format.source", known));
        }
        if spec.checksum.is_some() {
            return Err(shape("spec.checksum", known));
        }
    }
    Ok(Asked {
        source,
        destination: destination(&name.namespace, &spec.destination, &spec.format)?,
        source_format: spec.format.source.map(source_format),
        staging: spec.staging.map(staging),
        checksum: checksum(spec.checksum.as_deref())?,
        limits: transfer_limits(&spec.limits.common)?,
    })
}

/// How long after it was made a transfer may take, in seconds; `None` if for ever.
///
/// # Errors
/// [`InvalidField`] if it is no span of time, or none at all.
pub fn transfer_deadline(spec: &ImageTransferSpec) -> Result<Option<u64>, InvalidField> {
    spec.limits.deadline.as_ref().map(|span| above_zero_seconds("spec.limits.deadline", span)).transpose()
}

/// The bounds of the work, with their defaults: 256 GiB, 256 GiB, 60 s, 10 times.
///
/// # Errors
/// [`InvalidField`] for a value that cannot be used; sizes and the timeout must not be zero.
pub fn transfer_limits(limits: &TransferLimits) -> Result<Limits, InvalidField> {
    let size = |field, quantity: Option<&Quantity>| match quantity {
        None => Ok(Bytes(SIZE_LIMIT_BYTES)),
        Some(quantity) => match bytes(field, quantity)? {
            Bytes::ZERO => Err(above_zero(field, &quantity.0)),
            size => Ok(size),
        },
    };
    let stall_timeout = match &limits.stall_timeout {
        None => STALL_TIMEOUT_SECONDS,
        Some(span) => above_zero_seconds("spec.limits.stallTimeout", span)?,
    };
    let retries = limits.retries.map_or(Ok(RETRY_LIMIT), |retries| {
        u32::try_from(retries).map_err(|_| InvalidField::Range {
            field: "spec.limits.retries",
            value: retries.to_string(),
            allowed: "0 or more".to_owned(),
        })
    })?;
    Ok(Limits {
        virtual_size: size("spec.limits.virtualSize", limits.virtual_size.as_ref())?,
        bytes: size("spec.limits.bytes", limits.bytes.as_ref())?,
        stall_timeout,
        retries,
    })
}

fn source(namespace: &str, source: &TransferSource) -> Result<AskedSource, InvalidField> {
    match source {
        TransferSource { http: Some(http), s3: None, store_image: None } => {
            Ok(AskedSource::Http(http.clone()))
        }
        TransferSource { http: None, s3: Some(s3), store_image: None } => Ok(AskedSource::S3(s3.clone())),
        TransferSource { http: None, s3: None, store_image: Some(of) } => {
            let (store, image) = store_image(namespace, of);
            Ok(AskedSource::StoreImage { store, image })
        }
        _ => Err(shape("spec.source", "exactly one of `http`, `s3` and `storeImage` must be set")),
    }
}

fn destination(
    namespace: &str,
    destination: &TransferDestination,
    format: &TransferFormat,
) -> Result<AskedDestination, InvalidField> {
    match destination {
        TransferDestination { s3: Some(target), store_image: None } => {
            Ok(AskedDestination::Object { target: target.clone(), format: output(format)? })
        }
        TransferDestination { s3: None, store_image: Some(to) } => {
            if let Some(other) = format.destination.filter(|format| *format != DestinationFormat::Chunked) {
                return Err(InvalidField::Range {
                    field: "spec.format.destination",
                    value: format!("{other:?}"),
                    allowed: "absent or `Chunked` where `spec.destination.storeImage` is set".to_owned(),
                });
            }
            no_compression(format)?;
            let (store, image) = store_image(namespace, to);
            Ok(AskedDestination::StoreImage { store, image })
        }
        _ => Err(shape("spec.destination", "exactly one of `s3` and `storeImage` must be set")),
    }
}

/// What is written to an object.
fn output(format: &TransferFormat) -> Result<OutputFormat, InvalidField> {
    match format.destination {
        Some(DestinationFormat::Raw) => no_compression(format).map(|()| OutputFormat::Raw),
        Some(DestinationFormat::Vhd) => no_compression(format).map(|()| OutputFormat::Vhd),
        Some(DestinationFormat::Qcow2) => {
            Ok(OutputFormat::Qcow2 { compression: format.compression.map_or(Compression::Zlib, compression) })
        }
        Some(DestinationFormat::Vmdk) => match format.compression {
            None | Some(ApiCompression::Zlib) => Ok(OutputFormat::Vmdk),
            Some(other) => Err(excluded(other, "`Zlib` or absent where `spec.format.destination` is `Vmdk`")),
        },
        None | Some(DestinationFormat::Chunked) => Err(shape(
            "spec.format.destination",
            "must be `Raw`, `Qcow2`, `Vmdk` or `Vhd` where `spec.destination.s3` is set",
        )),
    }
}

fn no_compression(format: &TransferFormat) -> Result<(), InvalidField> {
    match format.compression {
        None => Ok(()),
        Some(other) => {
            Err(excluded(other, "absent where `spec.format.destination` is neither `Qcow2` nor `Vmdk`"))
        }
    }
}

fn excluded(value: ApiCompression, allowed: &str) -> InvalidField {
    InvalidField::Range {
        field: "spec.format.compression",
        value: format!("{value:?}"),
        allowed: allowed.to_owned(),
    }
}

fn store_image(namespace: &str, of: &StoreImage) -> (ObjectName, ObjectName) {
    (ObjectName::new(namespace, &of.store), ObjectName::new(namespace, &of.image))
}

fn checksum(text: Option<&str>) -> Result<Option<Sha256Sum>, InvalidField> {
    let parse = |text: &str| {
        let digest: Result<Digest, _> = text.parse();
        digest.map(|digest| digest.0).map_err(|_| InvalidField::Range {
            field: "spec.checksum",
            value: text.to_owned(),
            allowed: "`sha256:` and 64 lower-case hexadecimal digits".to_owned(),
        })
    };
    text.map(parse).transpose()
}

fn above_zero_seconds(field: &'static str, span: &Span) -> Result<u64, InvalidField> {
    match seconds(field, span)? {
        0 => Err(above_zero(field, &span.0)),
        seconds => Ok(seconds),
    }
}

fn above_zero(field: &'static str, value: &str) -> InvalidField {
    InvalidField::Range { field, value: value.to_owned(), allowed: "more than 0".to_owned() }
}

fn shape(field: &'static str, problem: &str) -> InvalidField {
    InvalidField::Shape { field, problem: problem.to_owned() }
}

const fn source_format(format: ApiSourceFormat) -> SourceFormat {
    match format {
        ApiSourceFormat::Raw => SourceFormat::Raw,
        ApiSourceFormat::Qcow2 => SourceFormat::Qcow2,
        ApiSourceFormat::Vmdk => SourceFormat::Vmdk,
        ApiSourceFormat::Vhd => SourceFormat::Vhd,
        ApiSourceFormat::Vhdx => SourceFormat::Vhdx,
    }
}

const fn compression(compression: ApiCompression) -> Compression {
    match compression {
        ApiCompression::None => Compression::None,
        ApiCompression::Zlib => Compression::Zlib,
        ApiCompression::Zstd => Compression::Zstd,
    }
}

const fn staging(staging: ApiStaging) -> Staging {
    match staging {
        ApiStaging::Auto => Staging::Auto,
        ApiStaging::Never => Staging::Never,
        ApiStaging::Required => Staging::Required,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = "metadata: {name: t, namespace: ns, uid: u}\n";
    const HTTP: &str = "source: {http: {url: 'https://example.org/a.qcow2'}}";
    const STORED: &str = "source: {storeImage: {store: s, image: i}}";
    const OBJECT: &str = "destination: {s3: {endpoint: 'http://127.0.0.1:9000', bucket: out, key: a}}";
    const STORE: &str = "destination: {storeImage: {store: d, image: copy}}";

    fn transfer(spec: &str) -> ImageTransfer {
        let head = "apiVersion: staging.berth.dev/v1alpha1\nkind: ImageTransfer\n";
        serde_saphyr::from_str(&format!("{head}{META}spec: {{{spec}}}\n")).expect("readable")
    }

    fn import(spec: &str) -> TemplateImport {
        let head = "apiVersion: staging.berth.dev/v1alpha1\nkind: TemplateImport\n";
        serde_saphyr::from_str(&format!("{head}{META}spec: {{{spec}}}\n")).expect("readable")
    }

    #[test]
    fn an_import_is_published_under_its_own_name() {
        let sum = "a".repeat(64);
        let asked = asked_import(&import(&format!("{HTTP}, store: {{name: s}}, checksum: 'sha256:{sum}'")));
        let asked = asked.expect("usable");
        let AskedDestination::StoreImage { store, image } = &asked.destination else { panic!("{asked:?}") };
        assert_eq!((store.to_string().as_str(), image.to_string().as_str()), ("ns/s", "ns/t"));
        assert_eq!(asked.stores(), std::slice::from_ref(store));
        assert_eq!((asked.staging, asked.source_format), (None, None));
        assert_eq!(asked.checksum.map(|sum| sum.to_string()), Some(sum));
        let expected =
            Limits { virtual_size: Bytes::gib(256), bytes: Bytes::gib(256), stall_timeout: 60, retries: 10 };
        assert_eq!(asked.limits, expected);
    }

    #[test]
    fn a_transfer_between_stores_and_one_out_of_one() {
        let asked = asked_transfer(&transfer(&format!("{STORED}, {STORE}"))).expect("usable");
        let names: Vec<String> = asked.stores().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["ns/s", "ns/d"]);
        let AskedSource::StoreImage { image, .. } = &asked.source else { panic!("{asked:?}") };
        assert_eq!(image.to_string(), "ns/i");
        let within = format!("{STORED}, destination: {{storeImage: {{store: s, image: copy}}}}");
        assert_eq!(asked_transfer(&transfer(&within)).expect("usable").stores().len(), 1, "one store is one");
        let more =
            "staging: Required, format: {destination: Raw}, limits: {bytes: 1Gi, retries: 0, deadline: 1h}";
        let out = transfer(&format!("{STORED}, {OBJECT}, {more}"));
        let asked = asked_transfer(&out).expect("usable");
        let AskedDestination::Object { target, format } = &asked.destination else { panic!("{asked:?}") };
        assert_eq!((target.key.as_str(), *format), ("a", OutputFormat::Raw));
        assert_eq!((asked.staging, asked.limits.bytes), (Some(Staging::Required), Bytes::gib(1)));
        assert_eq!((asked.limits.retries, transfer_deadline(&out.spec)), (0, Ok(Some(3600))));
    }

    #[test]
    fn the_example_asks_for_what_it_says() {
        let text = include_str!("../../../examples/transfers/01-export.yaml");
        let example: ImageTransfer = serde_saphyr::from_str(text).expect("readable");
        let asked = asked_transfer(&example).expect("usable");
        assert!(
            matches!(&asked.source, AskedSource::StoreImage { image, .. } if image.to_string() == "default/debian")
        );
        let zlib = OutputFormat::Qcow2 { compression: Compression::Zlib };
        assert!(matches!(&asked.destination, AskedDestination::Object { format, .. } if *format == zlib));
        assert_eq!(transfer_deadline(&example.spec), Ok(Some(6 * 3600)));
    }

    #[test]
    fn formats_and_what_compresses_them() {
        let format = |format: &str| {
            let asked = asked_transfer(&transfer(&format!("{HTTP}, {OBJECT}, format: {{{format}}}")));
            asked.map(|asked| match asked.destination {
                AskedDestination::Object { format, .. } => format,
                AskedDestination::StoreImage { .. } => panic!("not asked for"),
            })
        };
        let qcow2 = |compression| Ok(OutputFormat::Qcow2 { compression });
        assert_eq!(format("destination: Qcow2"), qcow2(Compression::Zlib));
        assert_eq!(format("destination: Qcow2, compression: None"), qcow2(Compression::None));
        assert_eq!(format("destination: Qcow2, compression: Zstd"), qcow2(Compression::Zstd));
        assert_eq!(format("destination: Vmdk, compression: Zlib"), Ok(OutputFormat::Vmdk));
        assert_eq!(format("destination: Vhd"), Ok(OutputFormat::Vhd));
        let asked = asked_transfer(&transfer(&format!("{HTTP}, {STORE}, format: {{source: Vhdx}}")));
        assert_eq!(asked.expect("usable").source_format, Some(SourceFormat::Vhdx));
    }

    #[test]
    fn what_a_transfer_asks_for_that_cannot_be_is_named_with_field_and_value() {
        for (spec, message) in [
            (
                format!("source: {{}}, {STORE}"),
                "spec.source: exactly one of `http`, `s3` and `storeImage` must be set",
            ),
            (
                format!("{HTTP}, destination: {{}}"),
                "spec.destination: exactly one of `s3` and `storeImage` must be set",
            ),
            (
                format!("{HTTP}, {OBJECT}"),
                "spec.format.destination: must be `Raw`, `Qcow2`, `Vmdk` or `Vhd` where `spec.destination.s3` is set",
            ),
            (
                format!("{HTTP}, {STORE}, format: {{destination: Raw}}"),
                "spec.format.destination: `Raw` must be absent or `Chunked` where `spec.destination.storeImage` is set",
            ),
            (
                format!("{HTTP}, {STORE}, format: {{compression: Zstd}}"),
                "spec.format.compression: `Zstd` must be absent where `spec.format.destination` is neither `Qcow2` nor \
                 `Vmdk`",
            ),
            (
                format!("{HTTP}, {OBJECT}, format: {{destination: Raw, compression: None}}"),
                "spec.format.compression: `None` must be absent where `spec.format.destination` is neither `Qcow2` nor \
                 `Vmdk`",
            ),
            (
                format!("{HTTP}, {OBJECT}, format: {{destination: Vmdk, compression: Zstd}}"),
                "spec.format.compression: `Zstd` must be `Zlib` or absent where `spec.format.destination` is `Vmdk`",
            ),
            (
                format!("{STORED}, {STORE}, format: {{source: Raw}}"),
                "spec.format.source: must be absent where `spec.source.storeImage` is set",
            ),
            (
                format!("{STORED}, {STORE}, checksum: 'sha256:{}'", "a".repeat(64)),
                "spec.checksum: must be absent where `spec.source.storeImage` is set",
            ),
            (
                format!("{HTTP}, {STORE}, checksum: 'md5:1'"),
                "spec.checksum: `md5:1` must be `sha256:` and 64 lower-case hexadecimal digits",
            ),
            (
                format!("{HTTP}, {STORE}, limits: {{virtualSize: big}}"),
                "spec.limits.virtualSize: `big` is not a quantity of bytes such as `10Gi`",
            ),
        ] {
            let error = asked_transfer(&transfer(&spec)).expect_err(message);
            assert_eq!(error.to_string(), message);
        }
        for (deadline, message) in [
            ("0s", "spec.limits.deadline: `0s` must be more than 0"),
            ("soon", "spec.limits.deadline: `soon` is not a span of time such as `1h30m`"),
        ] {
            let error = transfer_deadline(
                &transfer(&format!("{HTTP}, {STORE}, limits: {{deadline: {deadline}}}")).spec,
            );
            assert_eq!(error.expect_err(message).to_string(), message);
        }
    }
}
