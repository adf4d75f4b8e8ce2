//! How pools come, change hands and go.

use std::sync::Arc;

use berth_core::ids::{PoolName, Uid};
use berth_device::mounts;
use berth_record::{PoolRecord, tables};

use super::{Known, OpenPool, PoolError, PoolSpec, Pools, in_area, locked, record_path, unread};
use crate::area::{self, Area, Backend, templates};

impl Pools {
    /// Makes a pool that no cluster asks for. One that is there already stays as it is.
    pub fn create(&self, name: &PoolName, spec: &PoolSpec) -> Result<(), PoolError> {
        let _life = locked(&self.life);
        match self.known.get(name)? {
            Some(known) if known.spec != *spec => {
                Err(PoolError::Different { pool: name.clone(), found: Box::new(known.spec) })
            }
            _ => self.prepare_as(name, spec, true),
        }
    }

    /// Takes over an area that is there, and makes its record this pool's: under `uid`, or the UID that it has. What it holds
    /// is served as before.
    pub fn introduce(
        &self,
        name: &PoolName,
        area: &Uid,
        uid: Option<&Uid>,
        backend: &Backend,
    ) -> Result<(), PoolError> {
        let _life = locked(&self.life);
        self.require_free(name, area)?;
        if let Some(known) = self.known.get(name)?
            && (known.spec.area() != area || known.destroying)
        {
            return Err(PoolError::Different { pool: name.clone(), found: Box::new(known.spec) });
        }
        let open = self.get(name).map(|pool| pool.spec.uid.clone());
        let result = match (open, uid) {
            (None, _) => self.try_introduce(name, area, uid, backend),
            (Some(present), Some(uid)) if *uid != present => self.give_to(name, uid),
            (Some(_), _) => self.write_down(name), // the one before may have been cut off
        };
        self.note(name, &result);
        result
    }

    fn try_introduce(
        &self,
        name: &PoolName,
        area: &Uid,
        uid: Option<&Uid>,
        backend: &Backend,
    ) -> Result<(), PoolError> {
        let found = PoolSpec::new(area.clone(), backend.clone());
        let place = self.place(name, &found, true); // never made anew
        area::take_over(&place, backend).map_err(|source| in_area(name, source))?;
        let opened = area::open(&place, backend).map_err(|source| in_area(name, source))?;
        let adopted = self.adopt(name, area, uid, backend, &*opened);
        let owner = adopted.as_ref().map_or(area, |(record, _)| &record.identity().pool_uid).clone();
        let local = adopted.as_ref().is_ok_and(|(_, local)| *local);
        let spec = PoolSpec { area: (owner != *area).then(|| area.clone()), uid: owner, ..found };
        self.serve(name, &spec, opened, adopted.map(|(record, _)| record), local)
    }

    /// The record, and whether no cluster decides about the pool.
    fn adopt(
        &self,
        name: &PoolName,
        area: &Uid,
        uid: Option<&Uid>,
        backend: &Backend,
        opened: &dyn Area,
    ) -> Result<(PoolRecord, bool), PoolError> {
        let path = record_path(opened);
        let failed = |source| PoolError::Record { pool: name.clone(), source };
        let found = PoolRecord::open(&path, None).map_err(failed)?;
        let identity = found.identity().clone();
        let local = found.ledger_position().map_err(unread(name))?.lineage.is_none() && uid.is_none();
        drop(found);
        if identity.area() != area {
            return Err(PoolError::OtherArea { area: area.clone(), found: identity.area().clone() });
        }
        let made_of = serde_json::to_value(backend).ok();
        let adopted = PoolRecord::adopt(&path, uid.unwrap_or(&identity.pool_uid), name, &self.node, made_of);
        Ok((adopted.map_err(|source| PoolError::Adopt { pool: name.clone(), source })?, local))
    }

    /// Makes an open pool another one's. Its area stays open.
    fn give_to(&self, name: &PoolName, uid: &Uid) -> Result<(), PoolError> {
        let mut pool = self.take(name)?;
        let given = pool.record.give_to(uid, name, &self.node, None);
        if given.is_ok() {
            let area = pool.record.identity().area().clone();
            pool.spec = PoolSpec { uid: uid.clone(), area: (area != *uid).then_some(area), ..pool.spec };
        }
        locked(&self.open).insert(name.clone(), Arc::new(pool));
        given.map_err(|source| PoolError::Adopt { pool: name.clone(), source: source.into() })?;
        self.write_down(name)
    }

    /// Writes an open pool into the list as it is open. Whoever has given it a UID did so for a `StagingPool`.
    fn write_down(&self, name: &PoolName) -> Result<(), PoolError> {
        let Some(pool) = self.get(name) else { return Ok(()) };
        let known = self.known.get(name)?;
        let local = known.is_some_and(|known| known.local && known.spec.uid == pool.spec.uid);
        self.known.put(name, Known { spec: pool.spec.clone(), local, destroying: false })
    }

    /// Refuses an area that another pool has here.
    pub(super) fn require_free(&self, name: &PoolName, area: &Uid) -> Result<(), PoolError> {
        let mut known = self.known.read()?.into_iter();
        match known.find(|(other, known)| other != name && known.spec.area() == area) {
            Some((other, _)) => Err(PoolError::AreaTaken { pool: name.clone(), area: area.clone(), other }),
            None => Ok(()),
        }
    }

    /// Lets the area of a pool go in which nothing is in use, and forgets the pool. What lies on its disk stays. One that is
    /// not open stays as it is. Blocks.
    pub fn close(&self, name: &PoolName) -> Result<(), PoolError> {
        let _life = locked(&self.life);
        if self.get(name).is_none() {
            return Ok(());
        }
        self.close_open(name, |_| Ok(()))
    }

    /// The same as a person asks for it: refused while a volume is attached, and possible for a pool that cannot be opened as
    /// long as nothing of it is mounted. One that is not known is forgotten already.
    pub fn forget(&self, name: &PoolName) -> Result<(), PoolError> {
        let _life = locked(&self.life);
        if self.get(name).is_some() {
            return self.close_open(name, require_unused);
        }
        let mount_point = self.mount_root.join(name.as_str());
        let mounted = mounts::is_mounted(&mount_point).map_err(|source| in_area(name, source.into()))?;
        if let Some(mount) = mounted {
            let users = format!("what is mounted at {}", mount.mount_point.display());
            return Err(PoolError::InUse { pool: name.clone(), users });
        }
        self.known.remove(name)?;
        locked(&self.failed).remove(name);
        Ok(())
    }

    fn close_open(
        &self,
        name: &PoolName,
        allow: impl Fn(&OpenPool) -> Result<(), PoolError>,
    ) -> Result<(), PoolError> {
        drop(self.let_go(name, allow)?);
        self.known.remove(name)?; // only now: what is not known may be made anew
        tracing::info!(pool = %name, "pool closed");
        Ok(())
    }

    /// Takes an open pool out of the list and closes its area. While something in it is in use, it is served again; the same
    /// if it is not allowed, which is asked once nobody else can work in it any more.
    fn let_go(
        &self,
        name: &PoolName,
        allow: impl Fn(&OpenPool) -> Result<(), PoolError>,
    ) -> Result<Box<dyn Area>, PoolError> {
        if let Some(pool) = self.get(name) {
            allow(&pool)?; // while others work in it too: then it is told why
        }
        let pool = self.take(name)?;
        let released = allow(&pool).and_then(|()| {
            templates::release(&pool.record, &self.data_plane).map_err(|source| {
                templates::restore(&pool.record, &self.data_plane);
                PoolError::Template { pool: name.clone(), source: Box::new(source) }
            })
        });
        if let Err(refused) = released {
            locked(&self.open).insert(name.clone(), Arc::new(pool));
            return Err(refused);
        }
        let OpenPool { area, record, spec, .. } = pool;
        let owner = record.identity().owner();
        drop(record); // it lies in the area
        let Err(busy) = area.close() else { return Ok(area) };
        let record = PoolRecord::open(&record_path(&*area), Some(&owner))
            .map_err(|source| PoolError::Record { pool: name.clone(), source });
        let served = self.serve(name, &spec, area, record, self.is_local(name)?);
        self.note(name, &served);
        Err(in_area(name, busy))
    }

    /// Deletes a pool that nobody uses, with all it holds if that is said. One that is not there is deleted already.
    pub fn destroy(&self, name: &PoolName, with_contents: bool) -> Result<(), PoolError> {
        let _life = locked(&self.life);
        let Some(known) = self.known.get(name)? else { return Ok(()) };
        let open = self.get(name).is_some();
        let result = if open {
            self.destroy_open(name, known, with_contents)
        } else if known.destroying {
            area::destroy_rest(&self.place(name, &known.spec, true), &known.spec.backend)
                .map_err(|source| in_area(name, source))
        } else {
            let why = self.failure(name).map(|(_, message)| message).unwrap_or_default();
            return Err(PoolError::NotOpen { pool: name.clone(), why });
        };
        self.note(name, &result);
        result?;
        self.known.remove(name)?;
        tracing::info!(pool = %name, "pool destroyed");
        Ok(())
    }

    fn destroy_open(&self, name: &PoolName, known: Known, with_contents: bool) -> Result<(), PoolError> {
        let area = self.let_go(name, |pool| {
            require_unused(pool)?;
            require_consent(pool, with_contents)
        })?;
        self.known.put(name, Known { destroying: true, ..known })?;
        area.destroy().map_err(|source| in_area(name, source))
    }

    /// Takes an open pool out of the list, if nobody works in it.
    fn take(&self, name: &PoolName) -> Result<OpenPool, PoolError> {
        let busy = || PoolError::InUse { pool: name.clone(), users: "a call or a job".to_owned() };
        let mut open = locked(&self.open);
        let pool = open.remove(name).ok_or_else(|| PoolError::NoPool { pool: name.clone() })?;
        Arc::try_unwrap(pool).map_err(|pool| {
            open.insert(name.clone(), pool);
            busy()
        })
    }
}

/// Refuses while a volume is attached or used, or a template is.
fn require_unused(pool: &OpenPool) -> Result<(), PoolError> {
    let (name, record) = (&pool.name, pool.record.record());
    let attached = record.entries(tables::ATTACHMENTS).map_err(unread(name))?;
    let templates = record.entries(tables::TEMPLATES).map_err(unread(name))?;
    let in_use = |users| Err(PoolError::InUse { pool: name.clone(), users });
    if let Some((uid, attachment)) = attached.first() {
        let shown = attachment.loop_device.as_deref().unwrap_or(&attachment.backing_file);
        return in_use(format!("volume {uid}, which is attached as {}", shown.display()));
    }
    if let Some((uid, _)) = templates.first() {
        return in_use(format!("template {uid}, which is attached"));
    }
    for (uid, _) in record.entries(tables::VOLUMES).map_err(unread(name))? {
        let users = pool.area.users(&uid).map_err(|source| in_area(name, source))?;
        if let Some(user) = users.first() {
            return in_use(format!("{user}, which has volume {uid} open"));
        }
    }
    Ok(())
}

/// Refuses to destroy what a pool holds unless that is said.
fn require_consent(pool: &OpenPool, with_contents: bool) -> Result<(), PoolError> {
    let (name, record) = (&pool.name, pool.record.record());
    let images = record.entries(tables::IMAGES).map_err(unread(name))?.len();
    let volumes = record.entries(tables::VOLUMES).map_err(unread(name))?.len();
    let staging = record.entries(tables::STAGING).map_err(unread(name))?.len();
    if with_contents || images + volumes + staging == 0 {
        return Ok(());
    }
    let contents = format!("{volumes} volumes and snapshots, {images} images and {staging} directories");
    Err(PoolError::NotEmpty { pool: name.clone(), contents })
}
