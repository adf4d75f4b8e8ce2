//! What a reservation needs: its own promise, and the image that it starts from.

use crate::ids::{Digest, NodeName, ObjectName, PoolName, Uid, staged_image_name};
use crate::ledger::{Charge, Class, Holder, Promise};
use crate::reason::Reason;
use crate::thin::{BlockSize, directory_charge, image_charge, volume_charge};
use crate::transfer::TransferKind;
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{Access, AssignedImage, DurableImage, ImageView, PoolView, ReservationView, View};

/// A template that was made together with the reservation may be seen this much later.
const GRACE_MILLIS: u64 = 5_000;

/// What has to be promised for a reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// For the reservation itself, where it is charged for its bytes and nothing else.
    own: Promise,
    /// How they are used.
    access: Access,
    /// What it starts from.
    pub image: Option<ImageNeed>,
}

/// The image that a reservation starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageNeed {
    /// As it lies in its store.
    pub image: DurableImage,
    /// The store.
    pub store: ObjectName,
}

/// Why it cannot be told what a reservation needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmet {
    /// Why.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// True if that will not change.
    pub for_ever: bool,
}

impl Need {
    /// What `reservation` needs.
    ///
    /// # Errors
    /// [`Unmet`] if its fields or its template do not tell, or do not tell yet.
    pub fn of(view: &View, reservation: &ReservationView, now: Timestamp) -> Result<Self, Unmet> {
        is_valid(reservation)?;
        let image =
            reservation.template.as_ref().map(|name| template(view, reservation, name, now)).transpose()?;
        let virtual_size = image.as_ref().map_or(Bytes::ZERO, |need| need.image.virtual_size);
        Ok(Self { own: own(reservation, virtual_size), access: reservation.access, image })
    }

    /// What `reservation` itself needs where it is assigned: by the image that it was assigned, whatever its template has become.
    ///
    /// # Errors
    /// [`Unmet`] if its fields do not tell, or if it was assigned no image and its template does not tell.
    pub fn of_assigned(view: &View, reservation: &ReservationView, now: Timestamp) -> Result<Self, Unmet> {
        is_valid(reservation)?;
        match &reservation.assigned_image {
            Some(image) => {
                let own = own(reservation, image.virtual_size);
                Ok(Self { own, access: reservation.access, image: None })
            }
            None => Self::of(view, reservation, now),
        }
    }

    /// For the reservation itself, in a pool with such blocks: whole ones, what maps them, and for a directory the file
    /// system that it lies in.
    pub fn own_in(&self, block: Option<BlockSize>) -> Promise {
        Promise { charge: self.charge_of(self.own.charge.data, block), ..self.own.clone() }
    }

    fn charge_of(&self, data: Bytes, block: Option<BlockSize>) -> Charge {
        match (block, self.access) {
            (None, _) | (Some(_), Access::Stream) => Charge { data, metadata: Bytes::ZERO },
            (Some(block), Access::File) => directory_charge(data, block),
            (Some(block), Access::Block) => volume_charge(data, block),
        }
    }

    /// True if `entry` is what would be promised in this pool; of a pool that is gone, if it is enough. The size of a volume may
    /// have been changed since it was promised: it begins with that, if its image fits, and grows from there.
    pub(super) fn is_met_by(&self, entry: &Promise, pool: Option<&PoolView>) -> bool {
        let image = self.image.as_ref().map_or(Bytes::ZERO, |need| need.image.virtual_size);
        let data = match self.access {
            Access::Block => entry.charge.data.max(image),
            Access::File | Access::Stream => self.own.charge.data,
        };
        let enough = match pool {
            Some(pool) => entry.charge == self.charge_of(data, pool.block),
            None => entry.charge.data >= data,
        };
        enough && entry.class == self.own.class
    }

    /// What it counts as.
    pub const fn class(&self) -> Class {
        self.own.class
    }

    /// All that is to be promised in a pool with such blocks where the image is, or is not, promised already.
    pub(super) fn promises(
        &self,
        holder: &Uid,
        block: Option<BlockSize>,
        image: Option<(Uid, Promise)>,
    ) -> Vec<(Uid, Promise)> {
        std::iter::once((holder.clone(), self.own_in(block))).chain(image).collect()
    }

    /// Bytes of the reservation itself, as it asks for them.
    pub const fn bytes(&self) -> Bytes {
        self.own.charge.data
    }
}

impl ImageNeed {
    /// The name of its staged image at a place.
    pub fn name_at(&self, pool: &PoolName, node: &NodeName) -> String {
        staged_image_name(&self.image.digest, pool, node)
    }

    /// What the assignment of a reservation says of it.
    pub fn assigned_at(&self, pool: &PoolName, node: &NodeName) -> AssignedImage {
        AssignedImage {
            digest: self.image.digest,
            staged_image: self.name_at(pool, node),
            virtual_size: self.image.virtual_size,
        }
    }
}

impl ImageView {
    /// The promise that it holds in a pool with such blocks.
    pub fn promise(&self, block: Option<BlockSize>) -> Promise {
        image_promise(&self.name, self.data_bytes, self.virtual_size, block)
    }
}

/// The promise that a staged image with so many bytes that are not holes has in a pool with such blocks.
pub(super) fn image_promise(
    name: &str,
    real: Bytes,
    virtual_size: Bytes,
    block: Option<BlockSize>,
) -> Promise {
    let plain = Charge { data: real, metadata: Bytes::ZERO };
    Promise {
        holder: Holder::Image(name.to_owned()),
        class: Class::Images,
        charge: block.map_or(plain, |block| image_charge(real, virtual_size, block)),
        generation: Generation::FIRST,
        revoked: None,
    }
}

fn is_valid(reservation: &ReservationView) -> Result<(), Unmet> {
    reservation.invalid.as_ref().map_or(Ok(()), |message| {
        Err(Unmet { reason: Reason::InvalidSpec, message: message.clone(), for_ever: true })
    })
}

/// For a reservation itself, which starts from an image of this size, or from none.
fn own(reservation: &ReservationView, virtual_size: Bytes) -> Promise {
    let (class, data) = match reservation.access {
        Access::Stream => (Class::Images, Bytes::ZERO),
        Access::File => (Class::Images, reservation.max_size),
        Access::Block => (Class::Volumes, reservation.max_size.max(virtual_size)),
    };
    let charge = Charge { data, metadata: Bytes::ZERO };
    let holder = Holder::Reservation(reservation.name.clone());
    Promise { holder, class, charge, generation: Generation::FIRST, revoked: None }
}

/// True if `digest` is what this reservation would start from.
pub(crate) fn wants(view: &View, reservation: &ReservationView, digest: &Digest) -> bool {
    let import = reservation.template.as_ref().and_then(|name| view.imports.get(name));
    import.and_then(|import| import.durable.as_ref()).is_some_and(|durable| durable.digest == *digest)
}

fn template(
    view: &View,
    reservation: &ReservationView,
    name: &ObjectName,
    now: Timestamp,
) -> Result<ImageNeed, Unmet> {
    let Some(import) = view.imports.get(name).filter(|import| !import.deleting) else {
        let message = format!("there is no TemplateImport {name}");
        let for_ever = now.millis_since(reservation.created) >= GRACE_MILLIS;
        return Err(Unmet { reason: Reason::TemplateNotFound, message, for_ever });
    };
    let namespace = &reservation.claim_namespace;
    let allowed = import.allowed_namespaces.iter().any(|allowed| allowed == "*" || allowed == namespace);
    if *namespace != name.namespace && !allowed {
        let message = format!("TemplateImport {name} does not allow namespace {namespace}");
        return Err(Unmet { reason: Reason::NamespaceNotAllowed, message, for_ever: true });
    }
    if let (Some(image), Some(store)) = (&import.durable, import.stores.last()) {
        Ok(ImageNeed { image: image.clone(), store: store.clone() })
    } else {
        let state = TransferKind::Import.name_of(import.state).unwrap_or("in no state");
        let message = format!("TemplateImport {name} is {state}, not Ready");
        Err(Unmet { reason: Reason::TemplateNotReady, message, for_ever: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{reservation, template, view};
    use crate::view::TransferState;

    const NOW: Timestamp = Timestamp(GRACE_MILLIS);

    fn block(size: u64) -> ReservationView {
        let mut block = reservation("r", size, 0);
        block.access = Access::Block;
        block.template = Some(ObjectName::new("ns", "template"));
        block
    }

    #[test]
    fn each_access_has_its_class_and_charge() {
        let mut view = view(&[("a", 100)]);
        let mut request = reservation("r", 7, 0);
        let own = Need::of(&view, &request, NOW).expect("plain").own;
        assert_eq!((own.class, own.charge.data), (Class::Images, Bytes(7)));
        request.access = Access::Stream;
        assert_eq!(Need::of(&view, &request, NOW).expect("plain").bytes(), Bytes::ZERO);
        let import = template(50, 20);
        view.imports.insert(import.name.clone(), import);
        let need = Need::of(&view, &block(30), NOW).expect("ready");
        assert_eq!(need.own_in(None), need.own);
        assert_eq!(
            (need.own.class, need.bytes()),
            (Class::Volumes, Bytes(50)),
            "never below the image's size"
        );
        assert_eq!(Need::of(&view, &block(60), NOW).expect("ready").bytes(), Bytes(60));
    }

    #[test]
    fn in_a_pool_with_blocks_whole_ones_and_what_maps_them_are_charged() {
        let view = view(&[("a", 100)]);
        let blocks = Some(BlockSize::DEFAULT);
        let charge = |access, size| {
            let mut request = reservation("r", size, 0);
            request.access = access;
            Need::of(&view, &request, NOW).expect("plain").own_in(blocks).charge
        };
        let volume = charge(Access::Block, (1 << 30) + 1);
        assert_eq!(volume, volume_charge(Bytes((1 << 30) + 1), BlockSize::DEFAULT));
        assert_eq!(volume.data, Bytes((1 << 30) + (64 << 10)));
        assert!(volume.metadata > Bytes::kib(500), "{}", volume.metadata);
        assert!(charge(Access::File, 1 << 30).data > Bytes((1 << 30) + (32 << 20)), "with its file system");
        assert_eq!(charge(Access::Stream, 1 << 30), Charge::default());
    }

    #[test]
    fn an_entry_that_was_made_for_another_size_is_told_apart() {
        let view = view(&[("a", 100)]);
        let mut pool = crate::fixture::pool("p");
        let need = Need::of(&view, &reservation("r", 100, 0), NOW).expect("plain");
        assert!(need.is_met_by(&need.own, Some(&pool)));
        pool.block = Some(BlockSize::DEFAULT);
        assert!(!need.is_met_by(&need.own, Some(&pool)), "without its file system");
        let entry = need.own_in(pool.block);
        assert!(need.is_met_by(&entry, Some(&pool)) && need.is_met_by(&entry, None));
        let larger = Need::of(&view, &reservation("r", 1 << 40, 0), NOW).expect("plain");
        assert!(!larger.is_met_by(&entry, Some(&pool)) && !larger.is_met_by(&entry, None));
    }

    #[test]
    fn templates_are_found_allowed_and_ready_or_it_is_said_why_not() {
        let mut view = view(&[("a", 100)]);
        let missing = Need::of(&view, &block(1), NOW).expect_err("no template");
        assert_eq!((missing.reason, missing.for_ever), (Reason::TemplateNotFound, true));
        let young = Need::of(&view, &block(1), Timestamp(1)).expect_err("no template yet");
        assert_eq!((young.reason, young.for_ever), (Reason::TemplateNotFound, false));
        let mut import = template(50, 20);
        import.durable = None;
        import.state = TransferState::Working;
        view.imports.insert(import.name.clone(), import);
        let early = Need::of(&view, &block(1), NOW).expect_err("not ready");
        assert_eq!((early.reason, early.for_ever), (Reason::TemplateNotReady, false));
        assert_eq!(early.message, "TemplateImport ns/template is Importing, not Ready");
        let mut foreign = block(1);
        foreign.claim_namespace = "other".to_owned();
        let denied = Need::of(&view, &foreign, NOW).expect_err("not allowed");
        assert_eq!((denied.reason, denied.for_ever), (Reason::NamespaceNotAllowed, true));
        for allowed in ["*", "other"] {
            let import = view.imports.values_mut().next().expect("one");
            import.allowed_namespaces = vec![allowed.to_owned()];
            assert_eq!(
                Need::of(&view, &foreign, NOW).expect_err("not ready").reason,
                Reason::TemplateNotReady
            );
        }
    }
}
