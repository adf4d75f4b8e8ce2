//! qcow2 images, decoded by `imago`, with the bounds of the file checked around it.

mod bounds;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use berth_core::units::Bytes;
use futures::executor::block_on;
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder as _, Mapping};

use crate::extents::{Extent, ExtentKind, ExtentReader, PIECE, ReadError, check_range, on_thread};
use crate::probe::{Qcow2Header, SECTOR, Source as _, Stop};
use bounds::Bounds;

/// Mappings looked at for one extent at most, so that a call stays short.
const STEPS: usize = 4096;
/// L2 tables, each as large as a cluster, that the decoder keeps at most.
const DECODER_TABLES: u64 = 128;
/// Once it keeps tables of this size in sum it is made anew, so that large clusters do not make it large.
const TABLES_KEPT: u64 = 4 << 20;

/// Reads a qcow2 image that stands for itself: no backing file, no data file, no encryption. Opens nothing but the file.
pub struct Qcow2Reader {
    inner: Arc<Inner>,
    /// Kept between reads.
    buffer: Vec<u8>,
}

struct Inner {
    path: PathBuf,
    file: Arc<File>,
    header: Qcow2Header,
    bounds: Bounds,
    decoder: Mutex<Decoder>,
}

/// The decoder, and which L2 tables it has been asked for: their number, and the last of them.
struct Decoder {
    access: Arc<FormatAccess<ImagoFile>>,
    tables: u64,
    last: Option<u64>,
}

/// Where the bytes at an offset of the disk are.
enum Place {
    Zero,
    /// In the file, at this offset.
    File(u64),
    /// In a compressed cluster, for the decoder to read.
    Compressed,
}

impl Qcow2Reader {
    /// Opens the file for reading only, and checks that every table lies inside of it.
    ///
    /// # Errors
    /// What [`crate::probe_file`] refuses; [`ReadError::Truncated`] and [`ReadError::Corrupt`] for the L1 table.
    pub async fn open(path: &Path) -> Result<Self, ReadError> {
        let owned = path.to_owned();
        let inner = on_thread(path, move || Inner::open(owned)).await?;
        Ok(Self { inner: Arc::new(inner), buffer: Vec::new() })
    }
}

impl ExtentReader for Qcow2Reader {
    fn virtual_size(&self) -> Bytes {
        self.inner.header.size.round_up(SECTOR)
    }

    async fn next_extent(&mut self, from: Bytes) -> Result<Option<Extent>, ReadError> {
        if from >= self.virtual_size() {
            return Ok(None);
        }
        let inner = Arc::clone(&self.inner);
        on_thread(&self.inner.path, move || inner.extent(from).map(Some)).await
    }

    async fn read_at(&mut self, offset: Bytes, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(&self.inner.path, self.virtual_size(), offset, buf.len())?;
        let mut at = offset.0;
        for piece in buf.chunks_mut(PIECE) {
            let (inner, mut buffer) = (Arc::clone(&self.inner), std::mem::take(&mut self.buffer));
            buffer.resize(piece.len(), 0);
            let read = move || inner.read(at, &mut buffer).map(|()| buffer);
            self.buffer = on_thread(&self.inner.path, read).await?;
            piece.copy_from_slice(&self.buffer);
            at += piece.len() as u64;
        }
        Ok(())
    }
}

impl Inner {
    fn open(path: PathBuf) -> Result<Self, ReadError> {
        let io = |source| ReadError::Io { path: path.clone(), source };
        let file = Arc::new(File::open(&path).map_err(io)?);
        let header = Qcow2Header::read(file.as_ref()).map_err(|stop| stopped(&path, stop))?;
        let length = file.size().map_err(|stop| stopped(&path, stop))?;
        let bounds = Bounds { path: path.clone(), header, length };
        bounds.check_l1(&file)?;
        let access = decoder(&file).map_err(|source| decoding(&path, source))?;
        let decoder = Mutex::new(Decoder { access, tables: 0, last: None });
        Ok(Self { path, file, header, bounds, decoder })
    }

    /// The decoder to ask about `at`.
    fn decoder_for(&self, at: u64) -> Result<Arc<FormatAccess<ImagoFile>>, ReadError> {
        let mut held = self.decoder.lock().unwrap_or_else(PoisonError::into_inner);
        let table = at / self.header.table_reach();
        if held.last != Some(table) {
            held.last = Some(table);
            held.tables += 1;
            let kept = held.tables.min(DECODER_TABLES) * self.header.cluster_size();
            if held.tables > 1 && kept > TABLES_KEPT {
                held.access = decoder(&self.file).map_err(|source| decoding(&self.path, source))?;
                held.tables = 1;
            }
        }
        Ok(Arc::clone(&held.access))
    }

    /// Where the bytes at `at` are, and for how many this holds, at most `wanted`. Whatever is in the file is inside it.
    fn place(&self, at: u64, wanted: u64) -> Result<(Place, u64), ReadError> {
        let wanted = wanted.min(self.header.size.0.saturating_sub(at));
        let decoder = self.decoder_for(at)?;
        let mapped = block_on(decoder.get_mapping(at, wanted));
        let (mapping, len) = mapped.map_err(|source| decoding(&self.path, source))?;
        let len = len.min(wanted);
        if len == 0 {
            return Err(self.corrupt("a mapping of no length"));
        }
        let place = match mapping {
            Mapping::Zero { .. } => Place::Zero,
            Mapping::Raw { offset, .. } => {
                self.bounds.check_inside(offset, len)?;
                Place::File(offset)
            }
            Mapping::Special { .. } => {
                self.bounds.check_compressed(&self.file, at, len)?;
                Place::Compressed
            }
            _ => return Err(self.corrupt("a mapping beyond the end")),
        };
        Ok((place, len))
    }

    /// The extent at `from`, which is below the virtual size.
    fn extent(&self, from: Bytes) -> Result<Extent, ReadError> {
        let (size, padded) = (self.header.size.0, self.header.size.round_up(SECTOR));
        let mut at = from.0;
        let mut kind = None;
        for _ in 0..STEPS {
            if at >= size {
                break;
            }
            let (place, len) = self.place(at, size - at)?;
            let found = if matches!(place, Place::Zero) { ExtentKind::Zero } else { ExtentKind::Data };
            if kind.is_some_and(|kind| kind != found) {
                break;
            }
            kind = Some(found);
            at += len;
        }
        // The padding up to a whole sector belongs to what comes before it.
        let end = if at >= size { padded } else { Bytes(at) };
        Ok(Extent { offset: from, len: end.saturating_sub(from), kind: kind.unwrap_or(ExtentKind::Zero) })
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            if at >= self.header.size.0 {
                rest.fill(0);
                break;
            }
            let (place, len) = self.place(at, rest.len() as u64)?;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            let (part, remaining) = std::mem::take(&mut rest).split_at_mut(len);
            match place {
                Place::Zero => part.fill(0),
                Place::File(offset) => self
                    .file
                    .read_exact_at(part, offset)
                    .map_err(|source| ReadError::Io { path: self.path.clone(), source })?,
                Place::Compressed => block_on(self.decoder_for(at)?.read(&mut *part, at))
                    .map_err(|source| decoding(&self.path, source))?,
            }
            at += len as u64;
            rest = remaining;
        }
        Ok(())
    }

    fn corrupt(&self, what: &str) -> ReadError {
        ReadError::Corrupt { path: self.path.clone(), what: what.to_owned() }
    }
}

/// A decoder over the open file. The gate denies whatever the image might name.
fn decoder(file: &File) -> io::Result<Arc<FormatAccess<ImagoFile>>> {
    let storage = ImagoFile::try_from(file.try_clone()?)?;
    let image =
        block_on(Qcow2::<ImagoFile>::builder(storage).write(false).open(DenyImplicitOpenGate::default()))?;
    Ok(Arc::new(FormatAccess::new(image)))
}

/// The decoder's errors are about the image, unless the system's number says otherwise.
fn decoding(path: &Path, source: io::Error) -> ReadError {
    if source.raw_os_error().is_some() {
        return ReadError::Io { path: path.to_owned(), source };
    }
    ReadError::Corrupt { path: path.to_owned(), what: source.to_string() }
}

fn stopped(path: &Path, stop: Stop) -> ReadError {
    match stop {
        Stop::Refused(source) => crate::ProbeError::Refused { path: path.to_owned(), source }.into(),
        Stop::Io(source) => ReadError::Io { path: path.to_owned(), source },
        Stop::NotSampled { end } => {
            ReadError::Truncated { path: path.to_owned(), expected: end, found: Bytes::ZERO }
        }
    }
}
