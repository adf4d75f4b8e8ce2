//! What a reservation needs: its own promise, and the image that it starts from.

use crate::ids::{Digest, NodeName, ObjectName, PoolName, Uid, staged_image_name};
use crate::ledger::{Charge, Class, Holder, Promise};
use crate::reason::Reason;
use crate::units::{Bytes, Generation, Timestamp};
use crate::view::{Access, AssignedImage, DurableImage, ImageView, ReservationView, View};

/// A template that was made together with the reservation may be seen this much later.
const GRACE_MILLIS: u64 = 5_000;

/// What has to be promised for a reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// For the reservation itself.
    pub own: Promise,
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
        if let Some(message) = &reservation.invalid {
            return Err(Unmet { reason: Reason::InvalidSpec, message: message.clone(), for_ever: true });
        }
        let image =
            reservation.template.as_ref().map(|name| template(view, reservation, name, now)).transpose()?;
        let (class, data) = match reservation.access {
            Access::Stream => (Class::Images, Bytes::ZERO),
            Access::File => (Class::Images, reservation.max_size),
            Access::Block => {
                let virtual_size = image.as_ref().map_or(Bytes::ZERO, |need| need.image.virtual_size);
                (Class::Volumes, reservation.max_size.max(virtual_size))
            }
        };
        let charge = Charge { data, metadata: Bytes::ZERO };
        let holder = Holder::Reservation(reservation.name.clone());
        let own = Promise { holder, class, charge, generation: Generation::FIRST, revoked: None };
        Ok(Self { own, image })
    }

    /// All that is to be promised at a place where the image is, or is not, promised already.
    pub(super) fn promises(&self, holder: &Uid, image: Option<(Uid, Promise)>) -> Vec<(Uid, Promise)> {
        std::iter::once((holder.clone(), self.own.clone())).chain(image).collect()
    }

    /// Bytes of the reservation itself.
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
    /// The promise that it holds.
    pub fn promise(&self) -> Promise {
        image_promise(&self.name, self.data_bytes)
    }
}

/// The promise that a staged image of this size holds.
pub(super) fn image_promise(name: &str, data: Bytes) -> Promise {
    Promise {
        holder: Holder::Image(name.to_owned()),
        class: Class::Images,
        charge: Charge { data, metadata: Bytes::ZERO },
        generation: Generation::FIRST,
        revoked: None,
    }
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
    if let Some(image) = &import.durable {
        Ok(ImageNeed { image: image.clone(), store: import.store.clone() })
    } else {
        let message = format!("TemplateImport {name} is {:?}, not Ready", import.state);
        Err(Unmet { reason: Reason::TemplateNotReady, message, for_ever: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{reservation, template, view};
    use crate::view::ImportState;

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
        assert_eq!(
            (need.own.class, need.bytes()),
            (Class::Volumes, Bytes(50)),
            "never below the image's size"
        );
        assert_eq!(Need::of(&view, &block(60), NOW).expect("ready").bytes(), Bytes(60));
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
        import.state = ImportState::Importing;
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
