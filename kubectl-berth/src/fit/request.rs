//! The request that is asked about: by flags, or a manifest.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use berth_api::StagingReservation;
use berth_api::fields::{ObjectRef, PoolSelector, Quantity};
use berth_api::staging_reservation::{Access, ImageReference, StagingReservationSpec, Topology};
use kube::ResourceExt as _;
use thiserror::Error;

use crate::args::{self, FitArgs, RequestFlags};

/// The largest manifest that is read, in bytes.
const LARGEST: u64 = 1 << 20;

/// Why there is no request.
#[derive(Debug, Error)]
pub enum RequestError {
    /// The file cannot be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no manifest.
    #[error("{} is not a manifest of a StagingReservation: {problem}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// The namespace is named twice.
    #[error("the manifest's namespace is {manifest}, and --namespace says {flag}")]
    TwoNamespaces {
        /// In the manifest.
        manifest: String,
        /// By flag.
        flag: String,
    },
}

/// The reservation that would be made. It has a name and a namespace, and no UID.
///
/// # Errors
/// [`RequestError`]. Values of fields are judged where every reservation's are.
pub fn request(args: &FitArgs, default_namespace: &str) -> Result<StagingReservation, RequestError> {
    let mut request = match &args.file {
        Some(path) => manifest(path)?,
        None => StagingReservation::new("request", spec(&args.flags)),
    };
    let namespace = match (request.namespace(), &args.namespace) {
        (Some(manifest), Some(flag)) if manifest != *flag => {
            return Err(RequestError::TwoNamespaces { manifest, flag: flag.clone() });
        }
        (Some(same), _) => same,
        (None, Some(flag)) => flag.clone(),
        (None, None) => default_namespace.to_owned(),
    };
    request.metadata.namespace = Some(namespace);
    // A manifest that was read back from the API server: it is asked about anew.
    request.metadata.uid = None;
    request.metadata.creation_timestamp = None;
    request.metadata.deletion_timestamp = None;
    request.status = None;
    Ok(request)
}

/// What the flags ask for.
pub fn spec(flags: &RequestFlags) -> StagingReservationSpec {
    let template = flags.template.as_ref().map(|(namespace, name)| ImageReference {
        template: ObjectRef { namespace: namespace.clone(), name: name.clone() },
    });
    let access = match (flags.access, &template) {
        (Some(args::Access::File), _) | (None, None) => Access::File,
        (Some(args::Access::Block), _) | (None, Some(_)) => Access::Block,
        (Some(args::Access::Stream), _) => Access::Stream,
    };
    StagingReservationSpec {
        pool_name: flags.pool.clone(),
        pool_selector: flags.selector.clone().map(|match_labels| PoolSelector { match_labels }),
        max_size: flags.size.clone().map_or_else(Quantity::default, Quantity),
        image: template,
        access,
        node_name: flags.node.clone(),
        topology: flags.zone.clone().map(|zone| Topology { zone }),
        priority: flags.priority,
        ..StagingReservationSpec::default()
    }
}

fn manifest(path: &Path) -> Result<StagingReservation, RequestError> {
    let failed = |source| RequestError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().take(LARGEST).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(LARGEST).read_to_string(&mut text))
    };
    read.map_err(failed)?;
    let bad = |problem: String| RequestError::Manifest { path: path.to_owned(), problem };
    let value: serde_json::Value = serde_saphyr::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let kind = (value["apiVersion"].as_str().unwrap_or_default(), value["kind"].as_str().unwrap_or_default());
    if kind != ("staging.berth.dev/v1alpha1", "StagingReservation") {
        return Err(bad(format!("apiVersion and kind are `{}` and `{}`", kind.0, kind.1)));
    }
    serde_json::from_value(value).map_err(|error| bad(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, ClusterCommand, Command};
    use berth_api::parse::reservation_view;
    use berth_core::ids::ObjectName;
    use berth_core::units::Bytes;
    use berth_core::view::{Access as View, PoolChoice};
    use clap::Parser as _;

    fn flags(words: &[&str]) -> FitArgs {
        let parsed = Args::try_parse_from(["kubectl-berth", "fit"].iter().chain(words)).expect("valid");
        let Command::Cluster(ClusterCommand::Fit(args)) = parsed.command else { panic!("another command") };
        args
    }

    fn with_manifest(text: &str, more: &[&str]) -> Result<StagingReservation, RequestError> {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kubectl-berth-fit-{}-{count}", std::process::id()));
        std::fs::write(&path, text).expect("written");
        let name = path.display().to_string();
        let words: Vec<&str> = ["-f", name.as_str()].iter().chain(more).copied().collect();
        let made = request(&flags(&words), "default");
        std::fs::remove_file(&path).expect("its own file");
        made
    }

    const HEAD: &str = "apiVersion: staging.berth.dev/v1alpha1\nkind: StagingReservation\n";

    #[test]
    fn flags_say_everything_that_a_manifest_could() {
        let words = [
            "--size",
            "20Gi",
            "-l",
            "tier=fast",
            "--access",
            "Block",
            "--node",
            "n1",
            "--zone",
            "z",
            "--priority",
            "7",
        ];
        let view = reservation_view(&request(&flags(&words), "team").expect("a request"));
        assert_eq!((view.max_size, view.access, view.priority), (Bytes::gib(20), View::Block, 7));
        assert_eq!(view.node.as_ref().map(berth_core::ids::NodeName::as_str), Some("n1"));
        assert_eq!((view.zone.as_deref(), view.name.namespace.as_str()), (Some("z"), "team"));
        assert!(matches!(&view.pools, PoolChoice::Labelled(labels) if labels["tier"] == "fast"));
        assert_eq!((view.invalid, view.uid.as_str()), (None, ""));
        let view =
            reservation_view(&request(&flags(&["--template", "images/debian"]), "team").expect("a request"));
        assert_eq!((view.access, view.max_size), (View::Block, Bytes::ZERO));
        assert_eq!(view.template, Some(ObjectName::new("images", "debian")));
    }

    #[test]
    fn a_manifest_is_read_as_if_it_were_new() {
        let text = format!(
            "{HEAD}metadata: {{name: r, namespace: team, uid: u}}\nspec: {{maxSize: 5Gi}}\nstatus: {{state: Ready}}\n"
        );
        let made = with_manifest(&text, &[]).expect("a request");
        assert_eq!((made.namespace().as_deref(), made.uid(), made.status), (Some("team"), None, None));
        let unnamed = format!("{HEAD}metadata: {{name: r}}\nspec: {{maxSize: 5Gi}}\n");
        let namespace = |more: &[&str]| with_manifest(&unnamed, more).expect("a request").namespace();
        assert_eq!(namespace(&[]).as_deref(), Some("default"));
        assert_eq!(namespace(&["-n", "other"]).as_deref(), Some("other"));
    }

    #[test]
    fn what_is_no_request_says_why() {
        let says = |text: &str, more: &[&str]| with_manifest(text, more).expect_err("refused").to_string();
        assert!(says("kind: Pod\napiVersion: v1\n", &[]).contains("`v1` and `Pod`"));
        assert!(says(": : :", &[]).contains("is not a manifest"));
        assert!(says(&format!("{HEAD}metadata: {{name: r}}\nspec: {{}}\n"), &[]).contains("maxSize"));
        let named = format!("{HEAD}metadata: {{name: r, namespace: team}}\nspec: {{maxSize: 1Gi}}\n");
        assert!(says(&named, &["-n", "other"]).contains("team, and --namespace says other"));
        let missing = request(&flags(&["-f", "/no/such/file"]), "x").expect_err("refused").to_string();
        assert_eq!(missing, "could not read /no/such/file");
    }
}
