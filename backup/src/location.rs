//! Places for repositories: `file:///backups`, `s3://bucket/prefix`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, RetryConfig};

use crate::error::Error;

/// How long a storage that does not answer is asked again.
const RETRY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

/// A place, opened: nothing was asked of it yet.
#[derive(Clone, Debug)]
pub struct Location {
    /// Where its objects are.
    pub store: Arc<dyn ObjectStore>,
    /// As people wrote it.
    pub shown: String,
    /// Of a directory.
    pub directory: Option<PathBuf>,
}

/// The parts of an URL of a place.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Directory(PathBuf),
    Bucket { bucket: String, prefix: String },
}

fn parse(text: &str) -> Result<Place, Error> {
    let refuse = |reason: &str| Error::Location {
        location: text.to_owned(),
        reason: reason.to_owned(),
    };
    if let Some(path) = text.strip_prefix("file://") {
        if !path.starts_with('/') {
            return Err(refuse(
                "after file:// comes an absolute path, as in file:///srv/backups",
            ));
        }
        return Ok(Place::Directory(PathBuf::from(path)));
    }
    if let Some(rest) = text.strip_prefix("s3://") {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if bucket.is_empty() || !bucket.chars().all(is_name) {
            return Err(refuse(
                "after s3:// comes the name of a bucket, as in s3://bucket/prefix",
            ));
        }
        return Ok(Place::Bucket {
            bucket: bucket.to_owned(),
            prefix: prefix.trim_matches('/').to_owned(),
        });
    }
    Err(refuse("write file:///directory or s3://bucket/prefix"))
}

impl Location {
    /// Of an URL. A directory that is not there is made if `may_create`. A bucket's endpoint, region and credentials
    /// are those of the environment: `AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID` and so on.
    ///
    /// # Errors
    /// When it is no such URL, or the directory is not there.
    pub fn open(url: &str, may_create: bool) -> Result<Location, Error> {
        match parse(url)? {
            Place::Directory(path) => open_directory(url, &path, may_create),
            Place::Bucket { bucket, prefix } => open_bucket(url, bucket, &prefix),
        }
    }
}

fn open_directory(url: &str, path: &Path, may_create: bool) -> Result<Location, Error> {
    let refuse = |error: String| Error::Location {
        location: url.to_owned(),
        reason: error,
    };
    if may_create {
        std::fs::create_dir_all(path).map_err(|error| refuse(error.to_string()))?;
    }
    if !path.is_dir() {
        return Err(Error::NoRepository {
            location: url.to_owned(),
        });
    }
    // Objects are durable when they are said to be written, as a bucket's are.
    let store = LocalFileSystem::new_with_prefix(path)
        .map_err(|error| refuse(error.to_string()))?
        .with_fsync(true);
    Ok(Location {
        store: Arc::new(store),
        shown: url.to_owned(),
        directory: Some(path.to_owned()),
    })
}

fn open_bucket(url: &str, bucket: String, prefix: &str) -> Result<Location, Error> {
    let refuse = |error: object_store::Error| Error::Location {
        location: url.to_owned(),
        reason: error.to_string(),
    };
    // The HTTP client takes the process's provider of cryptography; who came first has chosen the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_retry(RetryConfig {
            retry_timeout: RETRY_TIMEOUT,
            ..RetryConfig::default()
        });
    let is_plain = |name| std::env::var(name).is_ok_and(|value| value.starts_with("http://"));
    if is_plain("AWS_ENDPOINT_URL") || is_plain("AWS_ENDPOINT") || is_plain("AWS_ENDPOINT_URL_S3") {
        // Whoever writes http:// means it.
        builder = builder.with_allow_http(true);
    }
    let store: Arc<dyn ObjectStore> = Arc::new(builder.build().map_err(refuse)?);
    let prefix = ObjectPath::parse(prefix).map_err(|error| refuse(error.into()))?;
    let store = if prefix.as_ref().is_empty() {
        store
    } else {
        Arc::new(PrefixStore::new(store, prefix))
    };
    Ok(Location {
        store,
        shown: url.to_owned(),
        directory: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_or_refused() {
        let bucket = |bucket: &str, prefix: &str| Place::Bucket {
            bucket: bucket.into(),
            prefix: prefix.into(),
        };
        assert_eq!(parse("file:///srv/b").unwrap(), Place::Directory("/srv/b".into()));
        assert_eq!(parse("s3://b").unwrap(), bucket("b", ""));
        assert_eq!(parse("s3://my-b.x/a/b/").unwrap(), bucket("my-b.x", "a/b"));
        for wrong in [
            "",
            "/srv",
            "file://srv",
            "s3://",
            "s3:///x",
            "s3://a b/x",
            "s3://a@b/x",
            "http://x",
            "S3://b",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_directory_is_made_only_for_who_may() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("file://{}/a/b", folder.path().display());
        assert!(matches!(
            Location::open(&url, false),
            Err(Error::NoRepository { .. })
        ));
        assert!(Location::open(&url, true).is_ok());
        assert!(folder.path().join("a/b").is_dir());
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,60}") {
            let _ = parse(&text);
            let _ = parse(&format!("s3://{text}"));
        }
    }
}
