//! The S3 server that other scenarios use does what they rely on: signatures, conditional writes, upload listings.

use std::path::Path;

use anyhow::{Context as _, ensure};
use berth_e2e::minio::{ACCESS_KEY_ID, Minio, REGION, SECRET_ACCESS_KEY};
use berth_e2e::tools::Tool;

use crate::scenario::{Need, Scenario};

pub fn scenarios() -> Vec<Scenario> {
    let needs = &[Need::Tool(Tool::Minio), Need::Command("curl")];
    vec![
        Scenario::new("minio::conditional_writes_create_once", needs, conditional_writes_create_once),
        Scenario::new("minio::open_uploads_are_listed", needs, open_uploads_are_listed),
        Scenario::new("minio::unsigned_requests_are_refused", needs, unsigned_requests_are_refused),
    ]
}

/// What the server answered: status and body.
struct Answer {
    status: String,
    body: String,
}

/// One request through curl, an implementation of the signature that is not ours. `secret` of `None`: unsigned.
async fn curl(url: &str, method: &str, secret: Option<&str>, more: &[&str]) -> anyhow::Result<Answer> {
    let mut command = tokio::process::Command::new("curl");
    command.args(["--silent", "--show-error", "--noproxy", "*", "--max-time", "30", "--request", method]);
    command.args(["--write-out", "\n%{http_code}"]).args(more).arg(url);
    if let Some(secret) = secret {
        command.args(["--aws-sigv4", &format!("aws:amz:{REGION}:s3")]);
        command.args(["--user", &format!("{ACCESS_KEY_ID}:{secret}")]);
    }
    let output = command.output().await?;
    ensure!(output.status.success(), "curl {method} {url}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let (body, status) = text.rsplit_once('\n').context("curl wrote no status")?;
    Ok(Answer { status: status.to_owned(), body: body.to_owned() })
}

async fn signed(url: &str, method: &str, more: &[&str]) -> anyhow::Result<Answer> {
    curl(url, method, Some(SECRET_ACCESS_KEY), more).await
}

/// A server with one empty bucket, and the bucket's address.
async fn bucket(dir: &Path) -> anyhow::Result<(Minio, String)> {
    let minio = Minio::start(dir).await?;
    let url = format!("{}/bucket", minio.endpoint());
    let made = signed(&url, "PUT", &[]).await?;
    ensure!(made.status == "200", "create bucket: {} {}", made.status, made.body);
    Ok((minio, url))
}

async fn conditional_writes_create_once() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let (minio, bucket) = bucket(dir.path()).await?;
    let url = format!("{bucket}/manifests/a.json");
    // Uploads from files: curl would sign a Content-Type for inline data that it then sends differently.
    let put = async |content: &str| {
        let file = dir.path().join(content);
        std::fs::write(&file, content)?;
        let file = file.to_string_lossy();
        signed(&url, "PUT", &["--header", "If-None-Match: *", "--upload-file", &file]).await
    };
    let first = put("first").await?;
    ensure!(first.status == "200", "first write: {} {}", first.status, first.body);
    let second = put("second").await?;
    ensure!(second.status == "412", "second write: {} {}", second.status, second.body);
    let kept = signed(&url, "GET", &[]).await?;
    ensure!(kept.body == "first", "kept: {}", kept.body);
    minio.stop();
    Ok(())
}

async fn open_uploads_are_listed() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let (_minio, bucket) = bucket(dir.path()).await?;
    let created = signed(&format!("{bucket}/images/disk.raw?uploads="), "POST", &[]).await?;
    let id = created.body.split_once("<UploadId>").and_then(|(_, rest)| rest.split_once('<'));
    let (id, _) = id.with_context(|| format!("create upload: {} {}", created.status, created.body))?;
    // This server knows two prefixes: none, and a whole key. With any other it lists no upload at all.
    for prefix in ["", "images%2Fdisk.raw"] {
        let listed = signed(&format!("{bucket}?prefix={prefix}&uploads="), "GET", &[]).await?;
        ensure!(listed.body.contains(id), "uploads below {prefix:?}: {} {}", listed.status, listed.body);
    }
    Ok(())
}

async fn unsigned_requests_are_refused() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let (_minio, bucket) = bucket(dir.path()).await?;
    let unsigned = curl(&bucket, "GET", None, &[]).await?;
    ensure!(unsigned.status == "403", "unsigned: {}", unsigned.status);
    let forged = curl(&bucket, "GET", Some("another-secret"), &[]).await?;
    ensure!(forged.status == "403", "wrong secret: {}", forged.status);
    Ok(())
}
