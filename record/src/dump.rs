//! Showing a record, good or damaged, to a person.

use std::fs::{self, File};
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableHandle as _,
};
use serde_json::{Map, Value, json};

use crate::store::panic_text;

/// Everything that can be read from the record at `path`, as one JSON object: `path`, `bytes`, `header` and `tables` as
/// far as they can be read, and `problems`, which is empty for a sound record. A value that is no JSON is shown as
/// `{"undecodable": "<hex>"}`.
///
/// Never writes to the record: a damaged one is repaired, as far as that goes, in a copy under `scratch`, which is
/// removed again.
///
/// # Errors
/// If the file or the copy cannot be read or written at all.
pub fn dump(path: &Path, scratch: &Path) -> io::Result<Value> {
    let mut head = Vec::new();
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    Read::by_ref(&mut file).take(32).read_to_end(&mut head)?;
    let mut problems = Vec::new();
    let mut shown = json!({"path": path.display().to_string(), "bytes": length, "head": hex(&head)});
    match guarded(&mut problems, || Builder::new().set_cache_size(1 << 20).open_read_only(path)) {
        Some(Ok(db)) => read_all(&db, &mut shown, &mut problems),
        Some(Err(DatabaseError::DatabaseAlreadyOpen)) => problems.push("in use by another process".into()),
        refused => {
            if let Some(Err(e)) = refused {
                problems.push(format!("cannot be opened as it is: {e}"));
            }
            let copy = scratch.join(format!("berth-record-{}", std::process::id()));
            fs::copy(path, &copy)?;
            let opened = guarded(&mut problems, || Builder::new().set_cache_size(1 << 20).open(&copy));
            match opened {
                Some(Ok(db)) => read_repaired(db, &mut shown, &mut problems),
                Some(Err(e)) => problems.push(format!("cannot be repaired: {e}")),
                None => {}
            }
            fs::remove_file(&copy)?;
        }
    }
    shown["problems"] = problems.into();
    Ok(shown)
}

fn read_repaired(mut db: Database, shown: &mut Value, problems: &mut Vec<String>) {
    match guarded(problems, || db.check_integrity()) {
        Some(Ok(true)) => problems.push("was not closed; what follows is its last durable state".into()),
        Some(Ok(false)) => problems.push("damaged; what follows may be an older state".into()),
        Some(Err(e)) => problems.push(format!("damaged: {e}")),
        None => {}
    }
    read_all(&db, shown, problems);
}

fn read_all(db: &impl ReadableDatabase, shown: &mut Value, problems: &mut Vec<String>) {
    let mut tables = Map::new();
    let names = guarded(problems, || -> Result<Vec<String>, redb::Error> {
        Ok(db.begin_read()?.list_tables()?.map(|table| table.name().to_owned()).collect())
    });
    let names = match names {
        Some(Ok(names)) => names,
        Some(Err(e)) => {
            problems.push(format!("its tables cannot be listed: {e}"));
            Vec::new()
        }
        None => Vec::new(),
    };
    for name in names {
        let mut rows = Map::new();
        let read = guarded(problems, || read_table(db, &name, &mut rows));
        if let Some(Err(e)) = read {
            problems.push(format!("table {name}: {e}"));
        }
        for (key, value) in &rows {
            if value.get("undecodable").is_some() {
                problems.push(format!("table {name}: entry {key} is no JSON"));
            }
        }
        tables.insert(name, Value::Object(rows));
    }
    if let Some(header) = tables.remove("header") {
        if let Some(damage) = header.get("damage") {
            problems.push(format!("marked as damaged: {damage}"));
        }
        shown["header"] = header;
    }
    shown["tables"] = Value::Object(tables);
}

fn read_table(
    db: &impl ReadableDatabase,
    name: &str,
    rows: &mut Map<String, Value>,
) -> Result<(), redb::Error> {
    let definition: TableDefinition<'_, &str, &[u8]> = TableDefinition::new(name);
    let table = db.begin_read()?.open_table(definition)?;
    for row in table.iter()? {
        let (key, value) = row?;
        let value = value.value();
        let shown = serde_json::from_slice(value).unwrap_or_else(|_| json!({"undecodable": hex(value)}));
        rows.insert(key.value().to_owned(), shown);
    }
    Ok(())
}

/// The store answers some damage with a failed assertion.
fn guarded<T>(problems: &mut Vec<String>, read: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(answer) => Some(answer),
        Err(panic) => {
            problems.push(format!("inconsistent: {}", panic_text(panic.as_ref())));
            None
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
