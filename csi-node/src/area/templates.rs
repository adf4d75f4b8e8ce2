//! Image files as read-only block devices that volumes start from: a server, a kernel NBD device, and the record of both.
//!
//! The record knows of a template before its server and until after it; the device carries the template's UID, so whatever
//! is there belongs to what is recorded. What was begun is taken up by [`restore`] at the next start.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_core::ids::Uid;
use berth_core::reason::Reason;
use berth_core::units::Bytes;
use berth_device::nbd::{
    AttachConfig, AttachError, Attachment, BackendId, BackendIdError, Nbd, NetlinkError, Slots,
};
use berth_image::{ImageFormat, Probe, ProbeError, probe_file, probe_file_as};
use berth_record::{
    ChangeError, PoolRecord, ReadError, TemplateEntry, TemplateState, VolumeOrigin, VolumeState, tables,
};
use thiserror::Error;

use crate::agent::pools::OpenPool;
use crate::supervisor::DataPlane;
use crate::supervisor::servers::{DiskFormat, ServeError, ServerSpec};
use crate::telemetry::chain;

/// How long readers wait for a server that is away before they get errors: an upgrade of whoever runs it, and more.
pub(super) const DEAD_CONNECTION: Duration = Duration::from_secs(300);
/// How long a device may take for its first answer.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Why a template was not attached, detached or found.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// Its UID names no device.
    #[error("no device can be named after the template")]
    Name(#[from] BackendIdError),
    /// The file is not there, or cannot be looked at.
    #[error("failed to examine {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is a folder, a device, a pipe.
    #[error("{} is not a file", path.display())]
    NotAFile {
        /// What it is.
        path: PathBuf,
    },
    /// No format has this name.
    #[error("`{0}` is no format: raw, qcow2, vmdk, vpc and vhdx are")]
    NoFormat(String),
    /// The image is not one that is served.
    #[error("the image cannot be used")]
    Image(#[from] ProbeError),
    /// The image holds nothing.
    #[error("{} is an empty disk", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The template is there already, made of something else.
    #[error("template {template} is {} ({}, {}) already", found.file.display(), found.format, found.virtual_size)]
    Different {
        /// Which.
        template: Uid,
        /// What it is.
        found: Box<TemplateEntry>,
    },
    /// There is none of this UID.
    #[error("there is no template {template}")]
    NotFound {
        /// Which.
        template: Uid,
    },
    /// Volumes start from it.
    #[error("template {template} is the origin of {}", shown(volumes))]
    Origin {
        /// Which.
        template: Uid,
        /// Of which.
        volumes: Vec<Uid>,
    },
    /// The pool's record.
    #[error("the record refuses")]
    Record(#[from] ChangeError),
    /// Its server.
    #[error("template {template} is not served")]
    Serve {
        /// Which.
        template: Uid,
        /// Why.
        source: ServeError,
    },
    /// Its device.
    #[error("the device of template {template} fails")]
    Device {
        /// Which.
        template: Uid,
        /// Why.
        source: Box<AttachError>,
    },
}

impl TemplateError {
    /// The machine-readable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Name(_) | Self::NotAFile { .. } | Self::Empty { .. } => Reason::InvalidSpec,
            Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound => Reason::SourceNotFound,
            Self::File { .. } | Self::Image(ProbeError::Io { .. }) => Reason::SourceUnavailable,
            Self::NoFormat(_) => Reason::ImageFormatUnsupported,
            Self::Image(ProbeError::Refused { source, .. }) => source.reason(),
            Self::Different { .. } => Reason::AlreadyDifferent,
            Self::NotFound { .. } => Reason::VolumeNotFound,
            Self::Origin { .. } => Reason::InUse,
            Self::Record(_) => Reason::PoolAreaFailed,
            Self::Serve { source, .. } => serve_reason(source),
            Self::Device { source, .. } => source.reason(),
        }
    }
}

impl From<ReadError> for TemplateError {
    fn from(error: ReadError) -> Self {
        Self::Record(error.into())
    }
}

pub(super) fn serve_reason(error: &ServeError) -> Reason {
    match error {
        ServeError::Unavailable { .. } | ServeError::TooOld { .. } => Reason::SupervisorUnavailable,
        ServeError::InUse { .. } => Reason::InUse,
        ServeError::Refused { .. } => Reason::AlreadyDifferent,
        ServeError::Cannot { .. } => Reason::OriginSilent,
        ServeError::State(_) | ServeError::Elsewhere { .. } => Reason::PoolAreaFailed,
    }
}

fn shown(volumes: &[Uid]) -> String {
    const MOST: usize = 5;
    let names: Vec<_> = volumes.iter().take(MOST).map(Uid::as_str).collect();
    match volumes.len() - names.len() {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

/// Gives an image file a read-only block device that carries the UID of the template. The same again gives the same device.
/// Blocks, for a minute at most.
///
/// `format` is as `qemu-img` names it; found from the image's head if absent.
///
/// # Errors
/// What was begun for a template that is new is taken back, as far as that goes.
pub fn attach(
    pool: &OpenPool,
    data_plane: &DataPlane,
    template: &Uid,
    file: &Path,
    format: Option<&str>,
) -> Result<PathBuf, TemplateError> {
    let id = BackendId::new(template)?;
    let mut slots = data_plane.slots();
    let wanted = examine(file, format)?;
    let known = pool.record.template(template)?;
    if known.as_ref().is_some_and(|entry| entry.state == TemplateState::Detaching) {
        take_away(&pool.record, data_plane, &mut slots, template, &id)?;
    }
    let entry = pool.record.begin_template(template, &wanted)?;
    let described = |entry: &TemplateEntry| (entry.file.clone(), entry.format.clone(), entry.virtual_size);
    if described(&entry) != described(&wanted) {
        return Err(TemplateError::Different { template: template.clone(), found: Box::new(entry) });
    }
    match show(data_plane, &mut slots, template, &id, &entry) {
        Ok(device) => {
            pool.record.template_attached(template)?;
            Ok(device)
        }
        Err(error) => {
            if known.is_none()
                && let Err(left) = take_away(&pool.record, data_plane, &mut slots, template, &id)
            {
                tracing::warn!(%template, error = chain(&left), "what was begun stays");
            }
            Err(error)
        }
    }
}

/// Takes the device away, then the server, then forgets the template. Blocks, for a few seconds at most.
///
/// # Errors
/// [`TemplateError::Origin`] while a volume of the pool starts from it, [`TemplateError::Device`] while anybody has the
/// device open; it stays attached then. [`TemplateError::NotFound`].
pub fn detach(pool: &OpenPool, data_plane: &DataPlane, template: &Uid) -> Result<(), TemplateError> {
    let id = BackendId::new(template)?;
    let mut slots = data_plane.slots();
    let volumes = pool.record.volumes_of_template(template)?;
    if !volumes.is_empty() {
        return Err(TemplateError::Origin { template: template.clone(), volumes });
    }
    if pool.record.template(template)?.is_none() {
        return Err(TemplateError::NotFound { template: template.clone() });
    }
    if let Some(found) = find(template, &id)? {
        found.require_unused().map_err(|error| device_error(template, error))?;
    }
    take_away(&pool.record, data_plane, &mut slots, template, &id)
}

/// The device of a template that is attached; `None` if there is none of this UID, or it has no device at this moment.
pub fn device(pool: &OpenPool, template: &Uid) -> Result<Option<PathBuf>, TemplateError> {
    let attached =
        pool.record.template(template)?.is_some_and(|entry| entry.state == TemplateState::Attached);
    if !attached {
        return Ok(None);
    }
    let id = BackendId::new(template)?;
    Ok(find(template, &id)?.map(|found| found.path()))
}

/// Gives every template that is recorded its server and its device again, and ends what was being detached. One that fails
/// is told; what starts from it fails then for itself. Blocks.
pub fn restore(record: &PoolRecord, data_plane: &DataPlane) {
    let templates = record.record().entries(tables::TEMPLATES).unwrap_or_else(|error| {
        tracing::error!(error = chain(&error), "templates are not restored");
        Vec::new()
    });
    for (template, entry) in templates {
        let restored = restore_one(record, data_plane, &template, &entry);
        let trouble = restored.as_ref().err().map(|error| chain(error));
        let news = data_plane.is_news(&template, trouble.as_deref());
        if let Err(error) = restored
            && news
        {
            let reason = error.reason();
            tracing::error!(%reason, %template, file = %entry.file.display(), error = chain(&error), "not restored");
        }
    }
}

/// The same for those that have no device at this moment, because nobody could serve them when the pool was opened.
pub fn restore_missing(record: &PoolRecord, data_plane: &DataPlane) {
    let templates = record.record().entries(tables::TEMPLATES).unwrap_or_default();
    let lacks = |uid: &Uid| BackendId::new(uid).is_ok_and(|id| matches!(find(uid, &id), Ok(None)));
    if templates.iter().any(|(uid, _)| lacks(uid)) {
        restore(record, data_plane);
    }
}

/// True if a volume is not shown though what it starts from is: its template came after it.
pub fn hides_volumes(pool: &OpenPool) -> bool {
    let volumes = pool.record.record().entries(tables::VOLUMES).unwrap_or_default();
    volumes.into_iter().any(|(uid, volume)| match volume.origin {
        Some(VolumeOrigin::Template { template }) => {
            volume.state == VolumeState::Ready
                && !pool.area.has_volume(&uid)
                && matches!(device(pool, &template), Ok(Some(_)))
        }
        _ => false,
    })
}

/// Takes every device and server away and leaves the record as it is, for the next opening of the pool.
///
/// # Errors
/// [`TemplateError::Device`] while anybody has one open. The others may be gone by then; [`restore`] brings them back.
pub fn release(record: &PoolRecord, data_plane: &DataPlane) -> Result<(), TemplateError> {
    let mut slots = data_plane.slots();
    for (template, _) in record.record().entries(tables::TEMPLATES)? {
        let id = BackendId::new(&template)?;
        let_go(data_plane, &mut slots, &template, &id)?;
    }
    Ok(())
}

fn restore_one(
    record: &PoolRecord,
    data_plane: &DataPlane,
    template: &Uid,
    entry: &TemplateEntry,
) -> Result<(), TemplateError> {
    let id = BackendId::new(template)?;
    let mut slots = data_plane.slots();
    if entry.state == TemplateState::Detaching {
        return take_away(record, data_plane, &mut slots, template, &id);
    }
    show(data_plane, &mut slots, template, &id, entry)?;
    if entry.state == TemplateState::Attaching {
        record.template_attached(template)?;
    }
    Ok(())
}

/// What the image is, in its own words, read here before any other program sees it.
fn examine(file: &Path, format: Option<&str>) -> Result<TemplateEntry, TemplateError> {
    let failed = |source| TemplateError::File { path: file.to_owned(), source };
    let path = fs::canonicalize(file).map_err(failed)?;
    if !fs::metadata(&path).map_err(failed)?.is_file() {
        return Err(TemplateError::NotAFile { path });
    }
    let Probe { format, virtual_size, .. } = match format {
        Some(name) => probe_file_as(named(name)?, &path)?,
        None => probe_file(&path)?,
    };
    let virtual_size = virtual_size.filter(|size| *size > Bytes::ZERO);
    let virtual_size = virtual_size.ok_or_else(|| TemplateError::Empty { path: path.clone() })?;
    Ok(TemplateEntry {
        file: path,
        format: format.to_string(),
        virtual_size,
        state: TemplateState::Attaching,
    })
}

fn named(name: &str) -> Result<ImageFormat, TemplateError> {
    match name {
        "raw" => Ok(ImageFormat::Raw),
        "qcow2" => Ok(ImageFormat::Qcow2),
        "vmdk" => Ok(ImageFormat::Vmdk),
        "vpc" | "vhd" => Ok(ImageFormat::Vhd),
        "vhdx" => Ok(ImageFormat::Vhdx),
        other => Err(TemplateError::NoFormat(other.to_owned())),
    }
}

fn show(
    data_plane: &DataPlane,
    slots: &mut Slots,
    template: &Uid,
    id: &BackendId,
    entry: &TemplateEntry,
) -> Result<PathBuf, TemplateError> {
    let server = ServerSpec {
        id: template.clone(),
        image: entry.file.clone(),
        format: DiskFormat::from(named(&entry.format)?),
        size: entry.virtual_size,
    };
    let served = data_plane.servers().serve(&server);
    let socket = served.map_err(|source| TemplateError::Serve { template: template.clone(), source })?;
    let failed = |error| device_error(template, error);
    let mut nbd = Nbd::open().map_err(|error| failed(error.into()))?;
    let config = AttachConfig {
        id,
        socket: &socket,
        size: entry.virtual_size,
        dead_connection: DEAD_CONNECTION,
        limit: ANSWER_LIMIT,
    };
    let attached = Attachment::attach(&mut nbd, slots, &config).map_err(failed)?;
    Ok(attached.path())
}

fn take_away(
    record: &PoolRecord,
    data_plane: &DataPlane,
    slots: &mut Slots,
    template: &Uid,
    id: &BackendId,
) -> Result<(), TemplateError> {
    record.begin_detach_template(template)?;
    match let_go(data_plane, slots, template, id) {
        Err(TemplateError::Device { template, source }) if matches!(*source, AttachError::InUse { .. }) => {
            record.template_attached(&template)?; // somebody has opened it meanwhile
            Err(TemplateError::Device { template, source })
        }
        gone => {
            gone?;
            Ok(record.forget_template(template)?)
        }
    }
}

/// The device, then the server.
fn let_go(
    data_plane: &DataPlane,
    slots: &mut Slots,
    template: &Uid,
    id: &BackendId,
) -> Result<(), TemplateError> {
    if let Some(found) = find(template, id)? {
        let mut nbd = Nbd::open().map_err(|error| device_error(template, error.into()))?;
        found.detach(&mut nbd, slots).map_err(|error| device_error(template, error))?;
    }
    let stopped = data_plane.servers().stop(template);
    stopped.map_err(|source| TemplateError::Serve { template: template.clone(), source })
}

/// The device that carries the template's UID. None where there is no kernel NBD.
fn find(template: &Uid, id: &BackendId) -> Result<Option<Attachment>, TemplateError> {
    let failed = |error| device_error(template, error);
    match Nbd::open() {
        Err(NetlinkError::NoFamily) => Ok(None),
        opened => {
            let mut nbd = opened.map_err(|error| failed(error.into()))?;
            Attachment::find(&mut nbd, id).map_err(failed)
        }
    }
}

fn device_error(template: &Uid, error: AttachError) -> TemplateError {
    TemplateError::Device { template: template.clone(), source: Box::new(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_what_its_head_says_and_nothing_that_reaches_outside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, vec![0; 1000]).unwrap();
        let entry = examine(&path, None).unwrap();
        assert_eq!((entry.format.as_str(), entry.virtual_size), ("raw", Bytes(1024)), "padded");
        let mut header = vec![0; 4096];
        header[..8].copy_from_slice(b"QFI\xFB\0\0\0\x03");
        header[15] = 104;
        header[19] = 8;
        fs::write(&path, header).unwrap();
        let error = examine(&path, None).unwrap_err();
        assert!(matches!(error, TemplateError::Image(_)), "{}", chain(&error));
        assert_eq!(examine(&path, Some("raw")).unwrap().format, "raw", "its bytes, as they are");
        let reasons = [
            (examine(&path, Some("nbd")), Reason::ImageFormatUnsupported),
            (examine(&path, Some("vhdx")), Reason::ImageFormatUnsupported),
            (examine(dir.path(), None), Reason::InvalidSpec),
            (examine(&dir.path().join("absent"), None), Reason::SourceNotFound),
        ];
        for (outcome, reason) in reasons {
            assert_eq!(outcome.unwrap_err().reason(), reason);
        }
        fs::write(&path, "").unwrap();
        assert_eq!(examine(&path, Some("raw")).unwrap_err().reason(), Reason::InvalidSpec);
    }

    #[test]
    fn few_volumes_are_named_and_many_are_counted() {
        let uids: Vec<_> = (0..7).map(|n| Uid::from(n.to_string().as_str())).collect();
        assert_eq!(shown(&uids[..2]), "0, 1");
        assert_eq!(shown(&uids), "0, 1, 2, 3, 4 and 2 more");
    }
}
