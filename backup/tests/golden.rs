//! Repositories of format 1 as they were written once, kept as files: every later program reads them.

mod support;

use std::path::{Path, PathBuf};

use object_store::ObjectStoreExt;
use support::*;
use weft_backup::location::Location;
use weft_backup::prune::SILENT_SECONDS_MAX;
use weft_backup::session::Session;
use weft_backup::{Error, Key, Progress, Repository, prune, verify};

/// blake3 of what the backups restore to.
const CONTENT: [(&str, &str); 2] = [
    (
        "web01@a",
        "70cc15162a3f06cde4dcc6346ab26b8a123e55474eabb5e3359006c54c94c445",
    ),
    (
        "web01@b",
        "1e3c83c02ac7716f92b6ab197bd1e8a437a12a8bf7feda37ae485decadeb5bcb",
    ),
];

fn key() -> Key {
    Key::new([7; 32])
}

fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

#[tokio::test]
async fn repositories_of_format_1_are_read() {
    for (name, key) in [("plain", None), ("sealed", Some(key()))] {
        let url = format!("file://{}", kept(name).display());
        let location = Location::open(&url, false).unwrap();
        let repository = Repository::open(location.clone(), key.as_ref()).await.unwrap();
        let backups = repository.backups().await.unwrap();
        let report = verify(&repository, &backups, false, 4, &Progress::default())
            .await
            .unwrap();
        assert_eq!(
            (report.backups, report.bad),
            (2, 0),
            "{name}: {:?}",
            report.findings
        );
        for ((_, manifest), (called, hash)) in backups.iter().zip(CONTENT) {
            let manifest = manifest.as_ref().unwrap();
            assert_eq!(manifest.name, called);
            let content = restored(&repository, manifest).await.unwrap();
            assert_eq!(blake3::hash(&content).to_hex().as_str(), hash, "{name}: {called}");
        }
        let all = walk(&kept(name));
        for folder in ["chunks", "patches", "pages", "backups", "condemned"] {
            assert!(
                all.iter().any(|path| path.starts_with(folder)),
                "{name} has {folder}"
            );
        }
        assert!(
            all.iter().any(|path| path.ends_with(".1")),
            "{name} has a second generation"
        );
        let wrong = Repository::open(location, Some(&Key::new([8; 32]))).await;
        assert!(
            matches!(wrong, Err(Error::WrongKey | Error::NotEncrypted)),
            "{name}"
        );

        // The condemned list that is there is read and carried out, in a copy.
        let copy = tempfile::tempdir().unwrap();
        for path in &all {
            let to = copy.path().join(path);
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(kept(name).join(path), to).unwrap();
        }
        let location = Location::open(&format!("file://{}", copy.path().display()), false).unwrap();
        let repository = Repository::open(location, key.as_ref()).await.unwrap();
        let pruned = prune(&repository, &[], SILENT_SECONDS_MAX, &Progress::default())
            .await
            .unwrap();
        assert!(
            pruned.objects > 0 && pruned.objects_waiting == 0,
            "{name}: {pruned:?}"
        );
        let backups = repository.backups().await.unwrap();
        let report = verify(&repository, &backups, false, 4, &Progress::default())
            .await
            .unwrap();
        assert_eq!(
            (report.backups, report.bad),
            (2, 0),
            "{name}: {:?}",
            report.findings
        );
    }
}

/// Paths of the files below a folder.
fn walk(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found
}

/// Makes them anew, for another version of the format: `cargo test -p weft-backup --test golden -- --ignored`.
#[tokio::test]
#[ignore = "writes the kept files"]
async fn write_repositories() {
    for (name, key) in [("plain", None), ("sealed", Some(key()))] {
        let (store, repository) = fresh(key.as_ref()).await;
        let mut disk = Disk::new(3 * MIB + 512);
        disk.write(0, &text(1 << 20, 1));
        disk.write(3 * MIB, &text(512, 2));
        let old = backup(&repository, &disk, "web01@old", None).await.unwrap();
        // Held by a session, what a prune condemns stays: there is a list, and content gets another generation.
        let session = Session::begin(&repository, "making test files").await.unwrap();
        prune(&repository, &[old.id], SILENT_SECONDS_MAX, &Progress::default())
            .await
            .unwrap();
        let first = backup(&repository, &disk, "web01@a", None).await.unwrap();
        println!("{}", blake3::hash(&disk.content).to_hex());
        disk.mark();
        disk.write(40_960, &text(5000, 3));
        disk.write(2 * MIB, &text(4096, 4));
        backup(&repository, &disk, "web01@b", Some(&first)).await.unwrap();
        println!("{}", blake3::hash(&disk.content).to_hex());
        session.end().await.unwrap();
        for path in paths(&*store).await {
            let object = store
                .get(&path.as_str().into())
                .await
                .unwrap()
                .bytes()
                .await
                .unwrap();
            let to = kept(name).join(&path);
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::write(to, object).unwrap();
        }
    }
}
