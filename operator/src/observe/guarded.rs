//! An object as a watch brings it: read, or its metadata and the field at which reading it failed.

use std::borrow::Cow;

use kube::Resource;
use kube::api::ObjectMeta;
use kube::core::PartialObjectMeta;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};

/// An object, or what is known of one that cannot be read.
#[derive(Clone, Debug)]
pub struct Guarded<K>(pub Result<K, Bad>);

/// An object that cannot be read.
#[derive(Clone, Debug)]
pub struct Bad {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// Which field, and what is wrong with it.
    pub problem: String,
}

impl<'de, K: Resource + DeserializeOwned> Deserialize<'de> for Guarded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = serde_json::Value::deserialize(deserializer)?;
        if let Ok(object) = K::deserialize(&object) {
            return Ok(Self(Ok(object)));
        }
        // Once more, to tell where it fails, which is not free.
        let error = match serde_path_to_error::deserialize::<_, K>(&object) {
            Ok(object) => return Ok(Self(Ok(object))),
            Err(error) => error,
        };
        let PartialObjectMeta { metadata, .. } =
            PartialObjectMeta::<K>::deserialize(&object).map_err(D::Error::custom)?;
        let path = error.path().to_string();
        let problem =
            if path == "." { error.inner().to_string() } else { format!("{path}: {}", error.inner()) };
        Ok(Self(Err(Bad { metadata, problem })))
    }
}

impl<K: Resource> Resource for Guarded<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(of: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(of)
    }

    fn group(of: &Self::DynamicType) -> Cow<'_, str> {
        K::group(of)
    }

    fn version(of: &Self::DynamicType) -> Cow<'_, str> {
        K::version(of)
    }

    fn plural(of: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(of)
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|bad| &bad.metadata, K::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.as_mut().map_or_else(|bad| &mut bad.metadata, K::meta_mut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_api::StagingReservation;

    #[test]
    fn what_cannot_be_read_is_told_with_its_field_and_its_labels() {
        let read = |spec: &str| {
            let text = format!(
                r#"{{"metadata": {{"name": "r", "namespace": "ns", "labels": {{"a": "b"}}}}, "spec": {spec}}}"#
            );
            serde_json::from_str::<Guarded<StagingReservation>>(&text).expect("guarded").0
        };
        assert!(read(r#"{"maxSize": "1Gi"}"#).is_ok());
        let bad = read(r#"{"maxSize": "1Gi", "access": "Sideways"}"#).expect_err("no such access");
        assert!(bad.problem.starts_with("spec.access: unknown variant `Sideways`"), "{}", bad.problem);
        assert_eq!(bad.metadata.labels.expect("read").get("a").map(String::as_str), Some("b"));
        let bad = read(r#"{"access": "Block"}"#).expect_err("no size");
        assert!(bad.problem.contains("missing field `maxSize`"), "{}", bad.problem);
    }
}
