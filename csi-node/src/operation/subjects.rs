//! What an operation is about, and whether its values can be used at all.

use berth_core::ids::{PoolName, Uid};
use berth_core::reason::Reason;
use berth_core::units::Bytes;

use super::{Operation, OriginName, Refusal};
use crate::area::{Backend, ThinGroup};
use crate::values;

impl Operation {
    /// Its name, as in its JSON form but with a capital: for logs, and for those who have to wait for it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::PoolCreate { .. } => "PoolCreate",
            Self::PoolIntroduce { .. } => "PoolIntroduce",
            Self::PoolForget { .. } => "PoolForget",
            Self::PoolDestroy { .. } => "PoolDestroy",
            Self::PoolGrow { .. } => "PoolGrow",
            Self::PoolCheck { .. } => "PoolCheck",
            Self::PoolList {} => "PoolList",
            Self::TemplateAttach { .. } => "TemplateAttach",
            Self::TemplateDetach { .. } => "TemplateDetach",
            Self::VolumeCreate { .. } => "VolumeCreate",
            Self::VolumeClone { .. } => "VolumeClone",
            Self::VolumeSnapshot { .. } => "VolumeSnapshot",
            Self::VolumeAttach { .. } => "VolumeAttach",
            Self::VolumeDetach { .. } => "VolumeDetach",
            Self::VolumeResize { .. } => "VolumeResize",
            Self::VolumeDestroy { .. } => "VolumeDestroy",
            Self::VolumeMap { .. } => "VolumeMap",
            Self::VolumeDelta { .. } => "VolumeDelta",
            Self::VolumeList { .. } => "VolumeList",
        }
    }

    /// The pool that it works in.
    pub const fn pool(&self) -> Option<&PoolName> {
        match self {
            Self::PoolCreate { pool, .. }
            | Self::PoolIntroduce { pool, .. }
            | Self::PoolForget { pool }
            | Self::PoolDestroy { pool, .. }
            | Self::PoolGrow { pool, .. }
            | Self::PoolCheck { pool }
            | Self::TemplateAttach { pool, .. }
            | Self::TemplateDetach { pool, .. }
            | Self::VolumeCreate { pool, .. }
            | Self::VolumeClone { pool, .. }
            | Self::VolumeSnapshot { pool, .. }
            | Self::VolumeAttach { pool, .. }
            | Self::VolumeDetach { pool, .. }
            | Self::VolumeResize { pool, .. }
            | Self::VolumeDestroy { pool, .. }
            | Self::VolumeMap { pool, .. }
            | Self::VolumeDelta { pool, .. }
            | Self::VolumeList { pool } => Some(pool),
            Self::PoolList {} => None,
        }
    }

    /// The volumes, snapshots and templates that it makes, changes or needs unchanged. No other call works on them meanwhile.
    /// What is only read, which may take minutes, is not among them: it is read as it was.
    pub fn volumes(&self) -> Vec<&Uid> {
        match self {
            Self::TemplateAttach { template, .. } | Self::TemplateDetach { template, .. } => vec![template],
            Self::VolumeCreate { volume, origin: Some(OriginName::Template(template)), .. } => {
                vec![volume, template]
            }
            Self::VolumeClone { volume, source, .. } => vec![volume, source],
            Self::VolumeSnapshot { snapshot, source, .. } => vec![snapshot, source],
            Self::VolumeCreate { volume, .. }
            | Self::VolumeAttach { volume, .. }
            | Self::VolumeDetach { volume, .. }
            | Self::VolumeResize { volume, .. }
            | Self::VolumeDestroy { volume, .. } => vec![volume],
            Self::PoolCreate { .. }
            | Self::PoolIntroduce { .. }
            | Self::PoolForget { .. }
            | Self::PoolDestroy { .. }
            | Self::PoolGrow { .. }
            | Self::PoolCheck { .. }
            | Self::PoolList {}
            | Self::VolumeMap { .. }
            | Self::VolumeDelta { .. }
            | Self::VolumeList { .. } => Vec::new(),
        }
    }

    /// What it only reads.
    fn reads(&self) -> Vec<&Uid> {
        match self {
            Self::VolumeMap { volume, .. } => vec![volume],
            Self::VolumeDelta { old, volume, .. } => vec![old, volume],
            _ => Vec::new(),
        }
    }

    /// What it gives a name to that is new here.
    const fn makes(&self) -> Option<&Uid> {
        match self {
            Self::PoolCreate { uid: new, .. }
            | Self::PoolIntroduce { uid: Some(new), .. }
            | Self::TemplateAttach { template: new, .. }
            | Self::VolumeCreate { volume: new, .. }
            | Self::VolumeClone { volume: new, .. }
            | Self::VolumeSnapshot { snapshot: new, .. } => Some(new),
            _ => None,
        }
    }

    /// Refuses names, sizes and paths that cannot be used, whatever there is: names become parts of paths.
    ///
    /// # Errors
    /// A refusal with [`Reason::InvalidSpec`] that names the field.
    pub fn validate(&self) -> Result<(), Refusal> {
        let invalid = |field: &'static str| {
            move |problem: String| Refusal {
                reason: Reason::InvalidSpec,
                message: format!("{field}: {problem}"),
            }
        };
        if let Some(pool) = self.pool() {
            values::pool_name(pool.as_str()).map_err(invalid("pool"))?;
        }
        for volume in self.volumes().into_iter().chain(self.reads()) {
            values::uid(volume.as_str()).map_err(invalid("a UID"))?;
        }
        if let Some(new) = self.makes() {
            values::new_uid(new.as_str()).map_err(invalid("the new UID"))?;
        }
        match self {
            Self::PoolCreate { backend, .. } => check_backend(backend).map_err(invalid("backend")),
            Self::PoolIntroduce { area, backend, .. } => {
                values::uid(area.as_str()).map_err(invalid("area"))?;
                check_backend(backend).map_err(invalid("backend"))
            }
            Self::TemplateAttach { file, .. } => values::check_path(file).map_err(invalid("file")),
            Self::PoolGrow { size, .. }
            | Self::VolumeCreate { size, .. }
            | Self::VolumeClone { size: Some(size), .. }
            | Self::VolumeResize { size, .. } => check_size(*size).map_err(invalid("size")),
            _ => Ok(()),
        }
    }
}

fn check_size(size: Bytes) -> Result<(), String> {
    let possible = size > Bytes::ZERO && i64::try_from(size.0).is_ok();
    if possible { Ok(()) } else { Err(format!("{} cannot be a size in bytes", size.0)) }
}

fn check_backend(backend: &Backend) -> Result<(), String> {
    match backend {
        Backend::Filesystem { path, size } => {
            check_size(*size)?;
            values::check_path(path)
        }
        Backend::Thin(spec) => {
            values::check_block(spec.block)?;
            match &spec.group {
                ThinGroup::Exclusive { devices, .. } if devices.is_empty() => {
                    Err("at least one device is needed".to_owned())
                }
                ThinGroup::Exclusive { devices, .. } => {
                    devices.iter().try_for_each(|path| values::check_path(path))
                }
                ThinGroup::Shared { name, size } => {
                    check_size(*size)?;
                    values::volume_group(name).map(drop)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Operation {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_could_leave_its_directory_is_refused_with_its_field() {
        for (text, field) in [
            (r#"{"do":"poolForget","pool":"../etc"}"#, "pool: "),
            (
                r#"{"do":"poolCreate","pool":"p","uid":"../x","backend":{"path":"/p","size":1}}"#,
                "the new UID: ",
            ),
            (
                r#"{"do":"poolCreate","pool":"p","uid":"0f8fad5b-d9cb-469f-a165-70867728950e","backend":{"path":"p","size":1}}"#,
                "backend: ",
            ),
            (
                r#"{"do":"poolCreate","pool":"p","uid":"0f8fad5b-d9cb-469f-a165-70867728950e","backend":{"path":"/p","size":0}}"#,
                "backend: ",
            ),
            (
                r#"{"do":"poolCreate","pool":"p","uid":"0f8fad5b-d9cb-469f-a165-70867728950e","backend":{"group":{"shared":{"name":"-v","size":1}},"block":65536}}"#,
                "backend: ",
            ),
            (
                r#"{"do":"poolCreate","pool":"p","uid":"0f8fad5b-d9cb-469f-a165-70867728950e","backend":{"group":{"exclusive":{"devices":[],"wipe":false}},"block":65536}}"#,
                "backend: at least one device",
            ),
            (
                r#"{"do":"poolIntroduce","pool":"p","area":"A","uid":null,"backend":{"path":"/p","size":1}}"#,
                "area: ",
            ),
            (r#"{"do":"volumeClone","pool":"p","volume":"v","source":"a/b","size":null}"#, "a UID: "),
            (r#"{"do":"volumeResize","pool":"p","volume":"v","size":0}"#, "size: "),
            (r#"{"do":"volumeMap","pool":"p","volume":"a/b"}"#, "a UID: "),
            (r#"{"do":"volumeDelta","pool":"p","old":"../v","volume":"v"}"#, "a UID: "),
            (
                r#"{"do":"volumeCreate","pool":"p","volume":"0f8fad5b-d9cb-469f-a165-70867728950e","size":18446744073709551615,"origin":null}"#,
                "size: ",
            ),
            (
                r#"{"do":"templateAttach","pool":"p","template":"0f8fad5b-d9cb-469f-a165-70867728950e","file":"../disk","format":null}"#,
                "file: ",
            ),
        ] {
            let refusal = read(text).validate().expect_err(text);
            assert_eq!(refusal.reason, Reason::InvalidSpec);
            assert!(refusal.message.starts_with(field), "{text}: {refusal}");
        }
        let good = read(r#"{"do":"volumeDestroy","pool":"p","volume":"v"}"#);
        assert_eq!(good.validate(), Ok(()));
    }

    #[test]
    fn both_ends_of_a_copy_are_held() {
        let clone = read(r#"{"do":"volumeClone","pool":"p","volume":"v","source":"s","size":null}"#);
        assert_eq!(clone.volumes(), [&Uid::from("v"), &Uid::from("s")]);
        let made = r#"{"do":"volumeCreate","pool":"p","volume":"v","size":1,"origin":{"template":"t"}}"#;
        assert_eq!(read(made).volumes(), [&Uid::from("v"), &Uid::from("t")]);
    }

    #[test]
    fn the_name_is_that_of_the_json_form() {
        let list = Operation::PoolList {};
        let text = serde_json::to_value(&list).unwrap();
        assert!(text["do"].as_str().unwrap().eq_ignore_ascii_case(list.name()));
    }
}
