//! Image files that volumes may start from: the intent before a server and a device are made or go.

use berth_core::ids::Uid;

use crate::entry::{TemplateEntry, TemplateState, VolumeEntry, VolumeOrigin};
use crate::error::{ChangeError, ReadError};
use crate::pool::{PoolRecord, wrong_state};
use crate::schema::tables;

impl PoolRecord {
    /// The template of this UID.
    pub fn template(&self, uid: &Uid) -> Result<Option<TemplateEntry>, ReadError> {
        self.record().get(tables::TEMPLATES, uid)
    }

    /// Records the intent to attach a template, in state [`TemplateState::Attaching`] whatever `template` says. One that
    /// is there already is returned as it is, so that a repeated request can be answered from it. Refused while it is
    /// being detached.
    pub fn begin_template(&self, uid: &Uid, template: &TemplateEntry) -> Result<TemplateEntry, ChangeError> {
        self.record().commit(|change| {
            if let Some(old) = change.get(tables::TEMPLATES, uid)? {
                if old.state == TemplateState::Detaching {
                    return Err(wrong_state(tables::TEMPLATES.name(), uid, "being detached", "attached"));
                }
                return Ok(old);
            }
            let entry = TemplateEntry { state: TemplateState::Attaching, ..template.clone() };
            change.put(tables::TEMPLATES, uid, &entry)?;
            Ok(entry)
        })
    }

    /// Records that a template has its device, after it has; also one that was to be detached and stays, because its
    /// device is in use.
    pub fn template_attached(&self, uid: &Uid) -> Result<(), ChangeError> {
        self.record().commit(|change| {
            let mut template = change.require(tables::TEMPLATES, uid)?;
            template.state = TemplateState::Attached;
            change.put(tables::TEMPLATES, uid, &template)
        })
    }

    /// Records the intent to detach a template: nothing may start from it any more. `None` if there is none. Refused
    /// while a volume starts from it.
    pub fn begin_detach_template(&self, uid: &Uid) -> Result<Option<TemplateEntry>, ChangeError> {
        self.record().commit(|change| {
            let Some(mut template) = change.get(tables::TEMPLATES, uid)? else { return Ok(None) };
            if change.any(tables::VOLUMES, |volume| starts_from(volume, uid))? {
                return Err(wrong_state(tables::TEMPLATES.name(), uid, "the origin of a volume", "detached"));
            }
            template.state = TemplateState::Detaching;
            change.put(tables::TEMPLATES, uid, &template)?;
            Ok(Some(template))
        })
    }

    /// Forgets a template, after its device and its server are gone. Only one that is being detached can be.
    pub fn forget_template(&self, uid: &Uid) -> Result<(), ChangeError> {
        self.record().commit(|change| {
            if let Some(template) = change.get(tables::TEMPLATES, uid)?
                && template.state != TemplateState::Detaching
            {
                return Err(wrong_state(tables::TEMPLATES.name(), uid, "not being detached", "forgotten"));
            }
            change.remove(tables::TEMPLATES, uid).map(|_| ())
        })
    }

    /// The volumes that start from a template.
    pub fn volumes_of_template(&self, uid: &Uid) -> Result<Vec<Uid>, ReadError> {
        let volumes = self.record().entries(tables::VOLUMES)?;
        Ok(volumes.into_iter().filter(|(_, volume)| starts_from(volume, uid)).map(|(uid, _)| uid).collect())
    }
}

fn starts_from(volume: &VolumeEntry, template: &Uid) -> bool {
    matches!(&volume.origin, Some(VolumeOrigin::Template { template: of }) if of == template)
}
