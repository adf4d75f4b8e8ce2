//! What Berth's devices are called, and whose they are.
//!
//! The **name** is for people: `berth-<first 8 digits of the pool's UID>-<images | volumes | UID of the holder>`. The
//! **dm UUID** is the identity: it holds both UIDs in full, begins with [`UUID_PREFIX`] so that udev and LVM leave the
//! device alone, and reads back after everything else is lost. Commands go to the UUID, so a foreign device that merely
//! has our name is never touched. Both stay below the kernel's 128 bytes (`DM_NAME_LEN`, `DM_UUID_LEN`).

use std::fmt;
use std::path::PathBuf;

use berth_core::ids::Uid;
use berth_core::ledger::Class;
use berth_core::thin::Part;
use thiserror::Error;

/// How the dm UUID of every device of ours begins.
pub const UUID_PREFIX: &str = "BERTH-";
const NAME_PREFIX: &str = "berth-";

/// Why no device can be named after something.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// Not a UID as the API server gives them.
    #[error("`{0}` is not a UUID of lower-case hexadecimal digits")]
    NotAUuid(String),
}

/// A device of ours, by what it is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceName {
    /// A kernel thin pool of a staging pool.
    KernelPool {
        /// The staging pool.
        pool: Uid,
        /// Which of its two.
        class: Class,
    },
    /// The device of a template, which volumes lie on: a clone, later its destination.
    Template {
        /// The staging pool.
        pool: Uid,
        /// Whose it is: a staged image.
        holder: Uid,
    },
    /// The thin device with the metadata of a template that is a clone. In the kernel pool `images`.
    CloneMetadata {
        /// The staging pool.
        pool: Uid,
        /// Whose it is: a staged image.
        holder: Uid,
    },
    /// A thin device.
    Thin {
        /// The staging pool.
        pool: Uid,
        /// In which of its kernel pools it lies.
        class: Class,
        /// Whose it is: a reservation or a staged image.
        holder: Uid,
    },
}

impl DeviceName {
    /// The kernel pool of `pool` for `class`.
    pub fn kernel_pool(pool: &Uid, class: Class) -> Result<Self, NameError> {
        Ok(Self::KernelPool { pool: uuid(pool)?, class })
    }

    /// The thin device of `holder` in that kernel pool.
    pub fn thin(pool: &Uid, class: Class, holder: &Uid) -> Result<Self, NameError> {
        Ok(Self::Thin { pool: uuid(pool)?, class, holder: uuid(holder)? })
    }

    /// The template of `holder`.
    pub fn template(pool: &Uid, holder: &Uid) -> Result<Self, NameError> {
        Ok(Self::Template { pool: uuid(pool)?, holder: uuid(holder)? })
    }

    /// The thin device with the metadata of that template.
    pub fn clone_metadata(pool: &Uid, holder: &Uid) -> Result<Self, NameError> {
        Ok(Self::CloneMetadata { pool: uuid(pool)?, holder: uuid(holder)? })
    }

    /// The kernel pool that it is or lies in: a suspension of either concerns both.
    pub(super) fn in_kernel_pool(&self) -> Self {
        let (pool, class) = match self {
            Self::KernelPool { pool, class } | Self::Thin { pool, class, .. } => (pool, *class),
            Self::Template { pool, .. } | Self::CloneMetadata { pool, .. } => (pool, Class::Images),
        };
        Self::KernelPool { pool: pool.clone(), class }
    }

    /// The name below `/dev/mapper`. At most 60 bytes.
    pub fn name(&self) -> String {
        match self {
            Self::KernelPool { pool, class } => format!("{NAME_PREFIX}{}-{}", short(pool), word(*class)),
            Self::Template { pool, holder } => format!("{NAME_PREFIX}{}-{holder}-template", short(pool)),
            Self::CloneMetadata { pool, holder } => format!("{NAME_PREFIX}{}-{holder}-regions", short(pool)),
            Self::Thin { pool, holder, .. } => format!("{NAME_PREFIX}{}-{holder}", short(pool)),
        }
    }

    /// The dm UUID. At most 95 bytes.
    pub fn uuid(&self) -> String {
        match self {
            Self::KernelPool { pool, class } => format!("{UUID_PREFIX}pool-{}-{pool}", word(*class)),
            Self::Template { pool, holder } => format!("{UUID_PREFIX}template-images-{pool}-{holder}"),
            Self::CloneMetadata { pool, holder } => format!("{UUID_PREFIX}regions-images-{pool}-{holder}"),
            Self::Thin { pool, class, holder } => {
                format!("{UUID_PREFIX}thin-{}-{pool}-{holder}", word(*class))
            }
        }
    }

    /// The device with this dm UUID; `None` if it is none of ours, or of a kind that this program does not know.
    pub fn from_uuid(text: &str) -> Option<Self> {
        let (kind, rest) = text.strip_prefix(UUID_PREFIX)?.split_once('-')?;
        let (class, rest) = rest.split_once('-')?;
        let class = class_of(class)?;
        if kind == "pool" {
            return Self::kernel_pool(&Uid::from(rest), class).ok();
        }
        let (pool, holder) = rest.split_at_checked(UUID_LEN)?;
        let (pool, holder) = (Uid::from(pool), Uid::from(holder.strip_prefix('-')?));
        let name = match (kind, class) {
            ("thin", _) => Self::thin(&pool, class, &holder),
            ("template", Class::Images) => Self::template(&pool, &holder),
            ("regions", Class::Images) => Self::clone_metadata(&pool, &holder),
            _ => return None,
        };
        name.ok()
    }

    /// Its node.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/dev/mapper").join(self.name())
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// The logical volume that holds this part of a kernel pool: `berth-<pool8>-<class>-<part>`.
pub fn volume_name(pool: &Uid, class: Class, part: Part) -> Result<String, NameError> {
    let part = match part {
        Part::Data => "data",
        Part::Metadata => "metadata",
    };
    Ok(format!("{}-{part}", DeviceName::kernel_pool(pool, class)?.name()))
}

/// A logical volume of a staging pool besides those of its kernel pools: `berth-<pool8>-<what>`.
pub fn own_volume_name(pool: &Uid, what: &str) -> Result<String, NameError> {
    Ok(format!("{NAME_PREFIX}{}-{what}", short(&uuid(pool)?)))
}

/// Class and part of a logical volume with such a name, and the first 8 digits of its pool's UID.
pub fn parse_volume_name(name: &str) -> Option<(String, Class, Part)> {
    let mut pieces = name.strip_prefix(NAME_PREFIX)?.split('-');
    let (pool, class, part) = (pieces.next()?, class_of(pieces.next()?)?, pieces.next()?);
    let part = match part {
        "data" => Part::Data,
        "metadata" => Part::Metadata,
        _ => return None,
    };
    (pool.len() == 8 && pool.bytes().all(is_hex) && pieces.next().is_none())
        .then(|| (pool.to_owned(), class, part))
}

const UUID_LEN: usize = 36;

fn uuid(uid: &Uid) -> Result<Uid, NameError> {
    let groups = uid.as_str().split('-').map(str::len);
    if groups.eq([8, 4, 4, 4, 12]) && uid.as_str().bytes().all(|b| b == b'-' || is_hex(b)) {
        Ok(uid.clone())
    } else {
        Err(NameError::NotAUuid(uid.to_string()))
    }
}

fn is_hex(byte: u8) -> bool {
    byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)
}

fn short(pool: &Uid) -> &str {
    &pool.as_str()[..8]
}

fn word(class: Class) -> &'static str {
    match class {
        Class::Images => "images",
        Class::Volumes => "volumes",
    }
}

fn class_of(word: &str) -> Option<Class> {
    match word {
        "images" => Some(Class::Images),
        "volumes" => Some(Class::Volumes),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: &str = "0f3c9a1e-5b7d-4c2a-9e10-00a1b2c3d4e5";
    const HOLDER: &str = "ffffffff-0000-4fff-8fff-123456789abc";

    fn all() -> Vec<DeviceName> {
        let (pool, holder) = (Uid::from(POOL), Uid::from(HOLDER));
        let of_classes = [Class::Images, Class::Volumes].into_iter().flat_map(|class| {
            [DeviceName::kernel_pool(&pool, class), DeviceName::thin(&pool, class, &holder)]
        });
        let of_templates = [DeviceName::template(&pool, &holder), DeviceName::clone_metadata(&pool, &holder)];
        of_classes.chain(of_templates).map(Result::unwrap).collect()
    }

    #[test]
    fn names_are_readable_and_uuids_read_back() {
        let names: Vec<_> = all().iter().map(DeviceName::name).collect();
        assert_eq!(names[0], "berth-0f3c9a1e-images");
        assert_eq!(names[1], format!("berth-0f3c9a1e-{HOLDER}"));
        assert_eq!(names[4], format!("berth-0f3c9a1e-{HOLDER}-template"));
        assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), 5, "one of each class");
        for device in all() {
            assert_eq!(DeviceName::from_uuid(&device.uuid()), Some(device.clone()));
            assert!(device.name().len() < 128 && device.uuid().len() < 128);
            assert!(device.uuid().starts_with("BERTH-"));
            assert_eq!(device.path(), PathBuf::from(format!("/dev/mapper/{device}")));
        }
    }

    #[test]
    fn hostile_uids_name_nothing() {
        let long = "a".repeat(200);
        for bad in ["", "images", "../../etc/passwd", &POOL.to_uppercase(), &format!("{POOL}-"), &long, "é"]
        {
            let bad = Uid::from(bad);
            assert!(DeviceName::kernel_pool(&bad, Class::Images).is_err(), "{bad}");
            assert!(DeviceName::thin(&Uid::from(POOL), Class::Images, &bad).is_err(), "{bad}");
            assert!(DeviceName::template(&Uid::from(POOL), &bad).is_err(), "{bad}");
            assert!(DeviceName::clone_metadata(&bad, &Uid::from(HOLDER)).is_err(), "{bad}");
            assert!(volume_name(&bad, Class::Images, Part::Data).is_err(), "{bad}");
        }
        let shifted = POOL.replacen("1e-5", "1-e5", 1);
        assert!(DeviceName::kernel_pool(&Uid::from(shifted.as_str()), Class::Images).is_err());
    }

    #[test]
    fn hostile_uuids_are_not_ours() {
        let thin = all()[1].uuid();
        for uuid in [&thin, &all()[4].uuid(), &all()[5].uuid()] {
            for (at, _) in uuid.char_indices() {
                assert_eq!(DeviceName::from_uuid(&uuid[..at]), None, "cut at {at}");
                let mut changed = uuid.clone();
                changed.replace_range(at..=at, "é");
                assert_eq!(DeviceName::from_uuid(&changed), None, "{changed}");
            }
        }
        for bad in ["LVM-abc", "BERTH-", "BERTH-pool", "BERTH-pool-images-", "BERTH-thin-images-x-y"] {
            assert_eq!(DeviceName::from_uuid(bad), None, "{bad}");
        }
        assert_eq!(DeviceName::from_uuid(&format!("{thin}x")), None);
        assert_eq!(
            DeviceName::from_uuid(&format!("BERTH-clone-images-{POOL}")),
            None,
            "a kind of the future"
        );
        let of_volumes = all()[4].uuid().replace("images", "volumes");
        assert_eq!(DeviceName::from_uuid(&of_volumes), None, "templates lie in images");
    }

    #[test]
    fn logical_volumes_read_back() {
        for class in [Class::Images, Class::Volumes] {
            for part in [Part::Data, Part::Metadata] {
                let name = volume_name(&Uid::from(POOL), class, part).unwrap();
                assert_eq!(parse_volume_name(&name), Some(("0f3c9a1e".to_owned(), class, part)), "{name}");
                assert_eq!(parse_volume_name(&format!("{name}-x")), None);
            }
        }
        for bad in
            ["", "berth-", "berth-0f3c9a1e-images", "berth-0F3C9A1E-images-data", "root", "berth-x-y-z"]
        {
            assert_eq!(parse_volume_name(bad), None, "{bad}");
        }
    }
}
