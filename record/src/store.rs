//! One record file: making it, opening it, reading it and changing it.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageError, TableError,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{ChangeError, CreateError, OpenError, ReadError};
use crate::sabotage;
use crate::schema::{
    FORMAT_VERSION, HEADER, KEY_DAMAGE, KEY_OWNER, KEY_VERSION, Owner, RecordKey, StructTable,
};

/// Memory that the store may use for pages of an open record.
const PAGE_MEMORY: usize = 8 << 20;
/// The first bytes of every `redb` file.
pub(crate) const MAGIC: [u8; 9] = *b"redb\x1A\x0A\xA9\x0D\x0A";

/// An open record. While it is open nobody else can open it.
pub struct Record {
    db: Database,
    path: PathBuf,
    owner: Owner,
}

impl Record {
    /// Makes a record at `path` for `owner`, with these header values beside version and owner.
    ///
    /// The file appears under its name only when it is complete and on stable storage, and never replaces another.
    pub(crate) fn create(
        path: &Path,
        owner: &Owner,
        header: &[(&str, Vec<u8>)],
    ) -> Result<Self, CreateError> {
        let io = |source| CreateError::Io { path: path.to_owned(), source };
        if path.try_exists().map_err(io)? {
            return Err(CreateError::Exists { path: path.to_owned() });
        }
        let new = path.with_extension("new");
        let locked = clear_leftover(&new).map_err(io)?;
        if locked {
            return Err(CreateError::Busy { path: path.to_owned() });
        }
        let store =
            |source: redb::Error| CreateError::Store { path: path.to_owned(), source: Box::new(source) };
        let file = File::options().read(true).write(true).create_new(true).open(&new).map_err(io)?;
        let inode = file.metadata().map_err(io)?.ino();
        let db = Builder::new().set_cache_size(PAGE_MEMORY).create_file(file).map_err(|e| store(e.into()))?;
        write_header(&db, owner, header).map_err(store)?;
        let made =
            fs::hard_link(&new, path).and_then(|()| fs::remove_file(&new)).and_then(|()| sync_dir(path));
        match made.and_then(|()| fs::metadata(path)) {
            Ok(linked) if linked.ino() == inode => {
                Ok(Self { db, path: path.to_owned(), owner: owner.clone() })
            }
            Ok(_) => Err(CreateError::Busy { path: path.to_owned() }),
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                Err(CreateError::Exists { path: path.to_owned() })
            }
            Err(source) => Err(io(source)),
        }
    }

    /// Opens the record at `path`. With `expected`, only if it belongs to that owner. One of an older format has the present
    /// one from then on.
    ///
    /// Reads the whole file once to check every page; records are a few MiB.
    pub(crate) fn open(path: &Path, expected: Option<&Owner>) -> Result<Self, OpenError> {
        check_magic(path)?;
        let damaged = |reason: String| OpenError::Corrupt { path: path.to_owned(), reason };
        // The store answers most damage with an error and some of it with a failed assertion.
        let opened = catch_unwind(AssertUnwindSafe(|| open_database(path)));
        let (db, sound) = opened.unwrap_or_else(|panic| Err(damaged(panic_text(panic.as_ref()))))?;
        let header = |key| read_header(&db, key).map_err(damaged);
        if !sound {
            mark_damaged(&db);
            return Err(damaged("pages do not have their checksums".into()));
        }
        let version = header(KEY_VERSION)?.ok_or_else(|| damaged("it has no format version".into()))?;
        let found: u32 =
            serde_json::from_slice(&version).map_err(|e| damaged(format!("format version: {e}")))?;
        if found > FORMAT_VERSION {
            return Err(OpenError::NewerVersion { path: path.to_owned(), found });
        }
        if header(KEY_DAMAGE)?.is_some() {
            return Err(damaged("an earlier opening found it damaged".into()));
        }
        let owner = header(KEY_OWNER)?.ok_or_else(|| damaged("it has no owner".into()))?;
        let owner: Owner = serde_json::from_slice(&owner).map_err(|e| damaged(format!("owner: {e}")))?;
        if let Some(expected) = expected
            && *expected != owner
        {
            let (path, expected) = (path.to_owned(), expected.clone());
            return Err(OpenError::WrongOwner { path, found: owner, expected });
        }
        if found < FORMAT_VERSION {
            // What is written from now on may mean nothing to a program of that version.
            raise_version(&db).map_err(|e| damaged(format!("its format version cannot be raised: {e}")))?;
        }
        Ok(Self { db, path: path.to_owned(), owner })
    }

    /// Whose record it is.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The entry of `table` with this key.
    pub fn get<K: RecordKey, V: Serialize + DeserializeOwned>(
        &self,
        table: StructTable<K, V>,
        key: &K,
    ) -> Result<Option<V>, ReadError> {
        let txn = self.db.begin_read().map_err(|e| read_failed(table.name(), e.into()))?;
        match txn.open_table(table.definition()) {
            Ok(open) => get_in(&open, table, key),
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(source) => Err(read_failed(table.name(), source.into())),
        }
    }

    /// Every entry of `table`, in the order of the keys' texts. At most a few thousand, by the bound on promises.
    pub fn entries<K: RecordKey, V: Serialize + DeserializeOwned>(
        &self,
        table: StructTable<K, V>,
    ) -> Result<Vec<(K, V)>, ReadError> {
        let failed = |source| read_failed(table.name(), source);
        let txn = self.db.begin_read().map_err(|e| failed(e.into()))?;
        let open = match txn.open_table(table.definition()) {
            Ok(open) => open,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(source) => return Err(failed(source.into())),
        };
        let mut entries = Vec::new();
        for row in open.iter().map_err(|e| failed(e.into()))? {
            let (key, value) = row.map_err(|e| failed(e.into()))?;
            entries.push(decode_row(table, key.value(), value.value())?);
        }
        Ok(entries)
    }

    /// Carries out `change` as one transaction, which is on stable storage when this returns `Ok`. An error from
    /// `change` leaves everything as it was.
    pub fn commit<T, E: From<ChangeError>>(
        &self,
        change: impl FnOnce(&Change<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let failed =
            |source: redb::Error| ChangeError::Commit { path: self.path.clone(), source: Box::new(source) };
        let txn = begin(&self.db, sabotage::durability()).map_err(failed)?;
        let answer = change(&Change { txn: &txn })?;
        txn.commit().map_err(|e| failed(e.into()))?;
        Ok(answer)
    }

    /// Makes it another owner's, with what else changes then, in one transaction.
    pub(crate) fn give_to(
        &mut self,
        owner: &Owner,
        with: impl FnOnce(&Change<'_>) -> Result<(), ChangeError>,
    ) -> Result<(), ChangeError> {
        self.commit(|change| {
            change.put_header(KEY_OWNER, owner)?;
            with(change)
        })?;
        self.owner = owner.clone();
        Ok(())
    }

    pub(crate) fn header<T: DeserializeOwned>(&self, key: &'static str) -> Result<Option<T>, ReadError> {
        let decode = |reason| ReadError::Decode { table: "header", key: key.to_owned(), reason };
        let Some(bytes) = read_header(&self.db, key).map_err(decode)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| decode(e.to_string()))
    }
}

/// An open transaction.
pub struct Change<'t> {
    txn: &'t redb::WriteTransaction,
}

impl Change<'_> {
    /// The entry of `table` with this key, with what this transaction has changed already.
    pub fn get<K: RecordKey, V: Serialize + DeserializeOwned>(
        &self,
        table: StructTable<K, V>,
        key: &K,
    ) -> Result<Option<V>, ChangeError> {
        let open =
            self.txn.open_table(table.definition()).map_err(|e| read_failed(table.name(), e.into()))?;
        Ok(get_in(&open, table, key)?)
    }

    /// The entry of `table` with this key, or [`ChangeError::Missing`].
    pub fn require<K: RecordKey, V: Serialize + DeserializeOwned>(
        &self,
        table: StructTable<K, V>,
        key: &K,
    ) -> Result<V, ChangeError> {
        self.get(table, key)?.ok_or_else(|| ChangeError::Missing { table: table.name(), key: key.to_text() })
    }

    /// True if an entry of `table` meets `test`, with what this transaction has changed already.
    pub fn any<K: RecordKey, V: Serialize + DeserializeOwned>(
        &self,
        table: StructTable<K, V>,
        test: impl Fn(&V) -> bool,
    ) -> Result<bool, ChangeError> {
        let failed = |source| read_failed(table.name(), source);
        let open = self.txn.open_table(table.definition()).map_err(|e| failed(e.into()))?;
        for row in open.iter().map_err(|e| failed(e.into()))? {
            let (key, value) = row.map_err(|e| failed(e.into()))?;
            if test(&decode_row(table, key.value(), value.value())?.1) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Every entry of `table`, with what this transaction has changed already.
    pub fn entries<K: RecordKey, V: Serialize + DeserializeOwned>(
        &self,
        table: StructTable<K, V>,
    ) -> Result<Vec<(K, V)>, ChangeError> {
        let failed = |source| read_failed(table.name(), source);
        let open = self.txn.open_table(table.definition()).map_err(|e| failed(e.into()))?;
        let mut entries = Vec::new();
        for row in open.iter().map_err(|e| failed(e.into()))? {
            let (key, value) = row.map_err(|e| failed(e.into()))?;
            entries.push(decode_row(table, key.value(), value.value())?);
        }
        Ok(entries)
    }

    /// Writes the entry, whether or not there was one.
    pub fn put<K: RecordKey, V: Serialize + DeserializeOwned>(
        &self,
        table: StructTable<K, V>,
        key: &K,
        value: &V,
    ) -> Result<(), ChangeError> {
        let text = key.to_text();
        let bytes = to_json(value);
        let failed = |source: redb::Error| write_failed(table.name(), &text, source);
        let mut open = self.txn.open_table(table.definition()).map_err(|e| failed(e.into()))?;
        open.insert(text.as_str(), bytes.as_slice()).map_err(|e| failed(e.into()))?;
        Ok(())
    }

    /// Removes the entry, and tells whether there was one.
    pub fn remove<K: RecordKey, V: Serialize + DeserializeOwned>(
        &self,
        table: StructTable<K, V>,
        key: &K,
    ) -> Result<bool, ChangeError> {
        let text = key.to_text();
        let failed = |source: redb::Error| write_failed(table.name(), &text, source);
        let mut open = self.txn.open_table(table.definition()).map_err(|e| failed(e.into()))?;
        let old = open.remove(text.as_str()).map_err(|e| failed(e.into()))?;
        Ok(old.is_some())
    }

    pub(crate) fn put_header<T: Serialize>(&self, key: &'static str, value: &T) -> Result<(), ChangeError> {
        let failed = |source: redb::Error| write_failed("header", key, source);
        let mut open = self.txn.open_table(HEADER).map_err(|e| failed(e.into()))?;
        open.insert(key, to_json(value).as_slice()).map_err(|e| failed(e.into()))?;
        Ok(())
    }
}

/// The saved form of a value of ours: none has map keys that are not text or a `Serialize` that fails.
pub(crate) fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("entries of records are plain structs with text keys")
}

pub(crate) fn read_header(db: &impl ReadableDatabase, key: &str) -> Result<Option<Vec<u8>>, String> {
    let txn = db.begin_read().map_err(|e| e.to_string())?;
    let table = match txn.open_table(HEADER) {
        Ok(table) => table,
        Err(TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    Ok(table.get(key).map_err(|e| e.to_string())?.map(|value| value.value().to_vec()))
}

/// The text of a caught panic.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    text.unwrap_or_else(|| "its structure is inconsistent".into())
}

fn read_failed(table: &'static str, source: redb::Error) -> ReadError {
    ReadError::Store { table, source: Box::new(source) }
}

fn write_failed(table: &'static str, key: &str, source: redb::Error) -> ChangeError {
    ChangeError::Write { table, key: key.to_owned(), source: Box::new(source) }
}

fn get_in<K: RecordKey, V: Serialize + DeserializeOwned>(
    open: &impl ReadableTable<&'static str, &'static [u8]>,
    table: StructTable<K, V>,
    key: &K,
) -> Result<Option<V>, ReadError> {
    let text = key.to_text();
    let found = open.get(text.as_str()).map_err(|e| read_failed(table.name(), e.into()))?;
    found.map(|value| decode_row(table, &text, value.value()).map(|(_, value)| value)).transpose()
}

fn decode_row<K: RecordKey, V: Serialize + DeserializeOwned>(
    table: StructTable<K, V>,
    key: &str,
    value: &[u8],
) -> Result<(K, V), ReadError> {
    let failed = |reason: String| ReadError::Decode { table: table.name(), key: key.to_owned(), reason };
    let value = serde_json::from_slice(value).map_err(|e| failed(e.to_string()))?;
    let key = K::from_text(key).ok_or_else(|| failed("the key is not one of this table".into()))?;
    Ok((key, value))
}

/// Begins a transaction. Its commit returns only when it is on stable storage, if `durability` says so. Two-phase, so that after a crash the
/// active state is never one that was half written: a bad checksum then always means damage.
fn begin(db: &Database, durability: Durability) -> Result<redb::WriteTransaction, redb::Error> {
    let mut txn = db.begin_write()?;
    txn.set_durability(durability)?;
    txn.set_two_phase_commit(true);
    Ok(txn)
}

fn write_header(db: &Database, owner: &Owner, header: &[(&str, Vec<u8>)]) -> Result<(), redb::Error> {
    let txn = begin(db, Durability::Immediate)?;
    {
        let mut table = txn.open_table(HEADER)?;
        table.insert(KEY_VERSION, to_json(&FORMAT_VERSION).as_slice())?;
        table.insert(KEY_OWNER, to_json(owner).as_slice())?;
        for (key, value) in header {
            table.insert(*key, value.as_slice())?;
        }
    }
    txn.commit()?;
    Ok(())
}

fn raise_version(db: &Database) -> Result<(), redb::Error> {
    let txn = begin(db, Durability::Immediate)?;
    txn.open_table(HEADER)?.insert(KEY_VERSION, to_json(&FORMAT_VERSION).as_slice())?;
    Ok(txn.commit()?)
}

/// The integrity check puts an older state in place of a damaged one; it must never pass for the record.
fn mark_damaged(db: &Database) {
    let marked = begin(db, Durability::Immediate).and_then(|txn| {
        let what = to_json(&"pages did not have their checksums when it was opened");
        txn.open_table(HEADER)?.insert(KEY_DAMAGE, what.as_slice())?;
        Ok(txn.commit()?)
    });
    // If even this fails, the next opening finds the same damage or this one.
    drop(marked);
}

fn open_database(path: &Path) -> Result<(Database, bool), OpenError> {
    let failed = |source| open_failed(path, source);
    let mut db = Builder::new().set_cache_size(PAGE_MEMORY).open(path).map_err(failed)?;
    let sound = db.check_integrity().map_err(failed)?;
    Ok((db, sound))
}

fn open_failed(path: &Path, source: DatabaseError) -> OpenError {
    let path = path.to_owned();
    match source {
        DatabaseError::DatabaseAlreadyOpen => OpenError::Locked { path },
        DatabaseError::Storage(StorageError::Io(source))
            if !matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
        {
            OpenError::Io { path, source }
        }
        other => OpenError::Corrupt { path, reason: other.to_string() },
    }
}

/// Tells a file that is no record from one before the store sees it: the store would fill an empty file.
fn check_magic(path: &Path) -> Result<(), OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(OpenError::NotFound { path: path.to_owned() });
        }
        Err(source) => return Err(io(source)),
    };
    let mut head = Vec::with_capacity(MAGIC.len());
    file.take(MAGIC.len() as u64).read_to_end(&mut head).map_err(io)?;
    if head == MAGIC {
        return Ok(());
    }
    Err(OpenError::Corrupt { path: path.to_owned(), reason: "it does not begin like a record".into() })
}

/// Removes what an interrupted making left behind; true if somebody is at it now.
fn clear_leftover(new: &Path) -> io::Result<bool> {
    let file = match File::open(new) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    match file.try_lock() {
        Ok(()) => fs::remove_file(new).map(|()| false),
        Err(fs::TryLockError::WouldBlock) => Ok(true),
        Err(fs::TryLockError::Error(e)) => Err(e),
    }
}

fn sync_dir(path: &Path) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
}
