//! Whole runs against a storage in memory: backups restore to what was backed up, and cost what they should.

mod support;

use std::sync::atomic::Ordering;

use object_store::ObjectStoreExt;
use support::*;
use weft_backup::verify::VerifyReport;
use weft_backup::{Error, Key, Manifest, Progress, Reader, Repository, verify};

async fn check(repository: &Repository, quick: bool) -> VerifyReport {
    let backups = repository.backups().await.unwrap();
    verify(repository, &backups, quick, 4, &Progress::default())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_disk_is_backed_up_and_restored() {
    for key in [None, Some(Key::generate())] {
        let (_, repository) = fresh(key.as_ref()).await;
        // Not a multiple of a chunk, nor of a block.
        let disk = Disk::filled(21 * MIB + 1536, 1);
        let made = backup(&repository, &disk, "web01@a", None).await.unwrap();
        let read = repository.manifest(made.id).await.unwrap();
        assert_eq!(read, made);
        assert_eq!(restored(&repository, &read).await.unwrap(), disk.content);
        let [quick, whole] = [check(&repository, true).await, check(&repository, false).await];
        assert_eq!((quick.bad, whole.bad), (0, 0), "{:?}", whole.findings);
        assert_eq!(quick.objects, whole.objects);
    }
}

#[tokio::test]
async fn content_that_is_there_is_not_stored_again() {
    let (store, repository) = fresh(None).await;
    let disk = Disk::filled(12 * MIB, 2);
    backup(&repository, &disk, "web01@a", None).await.unwrap();
    let before = paths(&*store).await;
    let again = backup(&repository, &disk, "web02@a", None).await.unwrap();
    assert_eq!((again.cost.new_bytes, again.cost.sent_bytes), (0, 0));
    assert_eq!(paths(&*store).await.len(), before.len() + 1, "a manifest more");
}

#[tokio::test]
async fn zeros_are_not_stored() {
    let (store, repository) = fresh(None).await;
    let mut disk = Disk::new(3 * MIB);
    // Written, but with zeros.
    disk.write(0, &vec![0; 2 << 20]);
    let made = backup(&repository, &disk, "web01@a", None).await.unwrap();
    assert_eq!(made.cost.new_bytes, 0);
    let expected = ["format".to_owned(), format!("backups/{}", made.id)];
    assert_eq!(paths(&*store).await, expected.into());
    assert_eq!(restored(&repository, &made).await.unwrap(), disk.content);
}

#[tokio::test]
async fn an_incremental_backup_reads_and_sends_what_changed() {
    let (_, repository) = fresh(None).await;
    let mut disk = Disk::new(64 * MIB);
    disk.write(0, &Random::new(3).bytes(64 << 20));
    let mut last = backup(&repository, &disk, "web01@0", None).await.unwrap();
    for round in 1..=6 {
        disk.mark();
        let mut random = Random::new(round);
        // One block in a hundred, anywhere: nearly every chunk is touched.
        let blocks = disk.content.len() as u64 / 4096;
        for _ in 0..blocks / 100 {
            let block = random.below(blocks);
            disk.write(block * 4096, &random.bytes(4096));
        }
        let changed = blocks / 100 * 4096;
        disk.read.store(0, Ordering::Relaxed);
        let made = backup(&repository, &disk, &format!("web01@{round}"), Some(&last))
            .await
            .unwrap();
        let read = disk.read.load(Ordering::Relaxed);
        assert!(read <= changed, "{read} bytes were read, {changed} changed");
        assert_eq!(made.cost.read_bytes, read);
        assert!(
            made.cost.sent_bytes < changed * (round + 1) * 5 / 4,
            "{round}: {} bytes were sent, {changed} changed",
            made.cost.sent_bytes
        );
        assert_eq!(
            restored(&repository, &made).await.unwrap(),
            disk.content,
            "round {round}"
        );
        last = made;
    }
    assert_eq!(check(&repository, false).await.bad, 0);
}

#[tokio::test]
async fn backups_follow_a_disk_whatever_is_done_to_it() {
    for seed in 0..30 {
        let (_, repository) = fresh(None).await;
        let mut random = Random::new(seed);
        let mut disk = Disk::filled(random.below(9 * MIB) + 1, seed);
        let mut made: Vec<(Manifest, Vec<u8>)> = Vec::new();
        for round in 0..6 {
            let parent = made.last().map(|(manifest, _)| manifest.clone());
            let name = format!("web01@{round}");
            let manifest = backup(&repository, &disk, &name, parent.as_ref()).await.unwrap();
            made.push((manifest, disk.content.clone()));
            disk.mark();
            for _ in 0..random.below(6) {
                let bytes = disk.content.len() as u64;
                let at = random.below(bytes);
                let limit = [9000, 2 * MIB][random.below(2) as usize];
                let length = (random.below(limit) + 1).min(bytes - at);
                match random.below(4) {
                    0 | 1 => disk.write(at, &random.bytes(length as usize)),
                    2 => disk.trim(at / 4096, (length / 4096).min(bytes / 4096 - at / 4096)),
                    _ => disk.resize((at + bytes / 2).clamp(1, 9 * MIB)),
                }
            }
        }
        for (round, (manifest, content)) in made.iter().enumerate() {
            let is_same = restored(&repository, manifest).await.unwrap() == *content;
            assert!(is_same, "seed {seed}: backup {round} restores to something else");
        }
    }
}

#[tokio::test]
async fn chunks_are_read_in_any_order() {
    let (_, repository) = fresh(Some(&Key::generate())).await;
    let disk = Disk::filled(7 * MIB + 512, 5);
    let reader = Reader::new(
        &repository,
        backup(&repository, &disk, "web01@a", None).await.unwrap(),
    );
    for chunk in [7, 0, 3, 3, 6, 1] {
        let start = (chunk * MIB) as usize;
        let expected = &disk.content[start..(start + (1 << 20)).min(disk.content.len())];
        match reader.read_chunk(chunk).await.unwrap() {
            Some(content) => assert_eq!(content, expected),
            None => assert!(expected.iter().all(|byte| *byte == 0)),
        }
    }
}

#[tokio::test]
async fn keys_are_asked_for_and_checked() {
    let (key, other) = (Key::generate(), Key::generate());
    let (sealed, _) = fresh(Some(&key)).await;
    let (plain, _) = fresh(None).await;
    assert!(matches!(open(sealed.clone(), None).await, Err(Error::NeedsKey)));
    assert!(matches!(
        open(sealed.clone(), Some(&other)).await,
        Err(Error::WrongKey)
    ));
    assert!(matches!(
        open(plain.clone(), Some(&key)).await,
        Err(Error::NotEncrypted)
    ));
    plain
        .put(&"format".into(), r#"{"weft_backup":9}"#.into())
        .await
        .unwrap();
    assert!(matches!(
        open(plain, None).await,
        Err(Error::NewerFormat { version: 9 })
    ));
    let nothing = std::sync::Arc::new(object_store::memory::InMemory::new());
    assert!(matches!(
        Repository::open(location(nothing), None).await,
        Err(Error::NoRepository { .. })
    ));
}

#[tokio::test]
async fn an_encrypted_repository_shows_nothing_of_the_disk() {
    let (store, repository) = fresh(Some(&Key::generate())).await;
    let mut disk = Disk::new(2 * MIB);
    disk.write(0, &text(1 << 20, 1));
    let made = backup(&repository, &disk, "secret01@name", None).await.unwrap();
    let plain_name = blake3::hash(&disk.content[..1 << 20]).to_hex().to_string();
    for path in paths(&*store).await {
        assert!(!path.contains(&plain_name), "chunks are named by a keyed hash");
        let object = store
            .get(&path.as_str().into())
            .await
            .unwrap()
            .bytes()
            .await
            .unwrap();
        let has = |words: &[u8]| object.windows(words.len()).any(|window| window == words);
        assert!(!has(b"secret01") && !has(b"snapshot of a disk"), "{path}");
    }
    // Without encryption both are there to be found.
    let (store, repository) = fresh(None).await;
    backup(&repository, &disk, "secret01@name", None).await.unwrap();
    let chunk = format!("chunks/{}/{plain_name}", &plain_name[..2]);
    assert!(
        paths(&*store).await.contains(&chunk),
        "named by blake3 of the content"
    );
    assert_eq!(made.name, "secret01@name");
}
