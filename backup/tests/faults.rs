//! Storages that fail at every operation, objects that are altered, prunes and creates at the same time: what is listed as
//! a backup restores to what was backed up, or the failure has a name.

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use support::*;
use weft_backup::prune::SILENT_SECONDS_MAX;
use weft_backup::{
    Error, Extent, Key, Manifest, Progress, PruneReport, Repository, Source, create, prune, verify,
};

/// A disk of which several chunks are the same, some patched, some not there.
fn small_disk(seed: u64) -> Disk {
    let mut disk = Disk::new(6 * MIB + 512);
    let mut random = Random::new(seed);
    disk.write(0, &random.bytes(1 << 20));
    disk.write(2 * MIB, &text(2 << 20, seed));
    let first = disk.content[..1 << 20].to_vec();
    disk.write(5 * MIB, &first);
    disk.write(6 * MIB, &random.bytes(512));
    disk
}

fn change(disk: &mut Disk, seed: u64) {
    disk.mark();
    disk.write(4096 * 3, &Random::new(seed).bytes(5000));
    disk.trim(2 * 256, 300);
    disk.write(4 * MIB + 100, &text(100, seed));
}

async fn prune_all(
    repository: &Repository,
    backups: &[&Manifest],
    silent: i64,
) -> Result<PruneReport, Error> {
    let ids: Vec<_> = backups.iter().map(|manifest| manifest.id).collect();
    prune(repository, &ids, silent, &Progress::default()).await
}

/// Whatever is listed as a backup is one.
async fn check_all(repository: &Repository, known: &[(&str, &[u8])], context: &str) -> usize {
    let backups = repository.backups().await.unwrap();
    for (id, manifest) in &backups {
        let manifest = manifest
            .as_ref()
            .unwrap_or_else(|error| panic!("{context}: {id}: {error}"));
        let (_, content) = known
            .iter()
            .find(|(name, _)| *name == manifest.name)
            .expect("a known name");
        let restored = restored(repository, manifest).await;
        let restored = restored.unwrap_or_else(|error| panic!("{context}: '{}': {error}", manifest.name));
        assert!(
            restored == *content,
            "{context}: '{}' restores to something else",
            manifest.name
        );
    }
    let report = verify(repository, &backups, false, 4, &Progress::default())
        .await
        .unwrap();
    assert_eq!(report.bad, 0, "{context}: {:?}", report.findings);
    backups.len()
}

async fn copy(from: &InMemory) -> Arc<InMemory> {
    let copy = Arc::new(InMemory::new());
    for path in paths(from).await {
        let path = path.as_str().into();
        let object = from.get(&path).await.unwrap().bytes().await.unwrap();
        copy.put(&path, object.into()).await.unwrap();
    }
    copy
}

#[tokio::test]
async fn a_run_that_is_cut_short_anywhere_leaves_no_backup_and_is_gone_on_with() {
    for fault in [Fault::Gone, Fault::DoneThenGone] {
        let mut at = 0;
        loop {
            let store = Arc::new(InMemory::new());
            let mut disk = small_disk(1);
            let faulty = Faulty::new(&store, Some((at, fault)));
            let mut names = Vec::new();
            // A full backup and one on it, wherever the fault comes.
            let outcome = async {
                let repository = open(faulty.clone(), None).await?;
                let first = backup(&repository, &disk, "web01@a", None).await?;
                names.push(first);
                Ok::<_, Error>(())
            };
            let is_whole = outcome.await.is_ok();
            let context = format!("{fault:?} at {at}");
            let before = paths(&*store).await;
            let healthy = Faulty::new(&store, None);
            let repository = open(healthy.clone(), None).await.unwrap();
            let first_content = disk.content.clone();
            let known = [("web01@a", &first_content[..])];
            let listed = check_all(&repository, &known, &context).await;
            assert!(
                listed >= names.len(),
                "{context}: a backup that was made is not there"
            );

            let again = backup(&repository, &disk, "web01@a", None).await.unwrap();
            let sent: BTreeSet<String> = healthy.puts.lock().unwrap().iter().cloned().collect();
            let shared = |path: &&String| !path.starts_with("sessions") && *path != "format";
            let twice: Vec<_> = sent
                .iter()
                .filter(shared)
                .filter(|path| before.contains(*path))
                .collect();
            assert!(twice.is_empty(), "{context}: sent again: {twice:?}");
            change(&mut disk, at);
            backup(&repository, &disk, "web01@b", Some(&again)).await.unwrap();
            let known = [("web01@a", &first_content[..]), ("web01@b", &disk.content[..])];
            check_all(&repository, &known, &context).await;
            if is_whole && faulty.operations() <= at {
                break;
            }
            at += 1;
        }
        assert!(at > 20, "{at} operations were cut");
    }
}

#[tokio::test]
async fn a_prune_that_is_cut_short_anywhere_harms_no_backup_and_is_gone_on_with() {
    let (store, repository) = fresh(None).await;
    let mut disk = small_disk(2);
    let old = backup(&repository, &disk, "web01@a", None).await.unwrap();
    change(&mut disk, 3);
    let kept = backup(&repository, &disk, "web01@b", Some(&old)).await.unwrap();
    let known = [("web01@b", &disk.content[..])];
    let expected = {
        let store = copy(&store).await;
        let repository = open(store.clone(), None).await.unwrap();
        prune_all(&repository, &[&old], SILENT_SECONDS_MAX).await.unwrap();
        check_all(&repository, &known, "undisturbed").await;
        paths(&*store).await
    };
    assert!(expected.len() < paths(&*store).await.len());
    for fault in [Fault::Gone, Fault::DoneThenGone] {
        // After the two reads of `format`.
        let mut at = 2;
        loop {
            let store = copy(&store).await;
            let faulty = Faulty::new(&store, Some((at, fault)));
            let repository = open(faulty.clone(), None).await.unwrap();
            let is_whole = prune_all(&repository, &[&old], SILENT_SECONDS_MAX).await.is_ok();
            let context = format!("{fault:?} at {at}");
            let repository = open(store.clone(), None).await.unwrap();
            assert!(repository.manifest(kept.id).await.is_ok(), "{context}");
            // As if half an hour had passed: what the first one left besides goes too.
            prune_all(&repository, &[&old], -1).await.unwrap();
            assert_eq!(check_all(&repository, &known, &context).await, 1);
            assert_eq!(
                paths(&*store).await,
                expected,
                "{context}: what nobody needs is gone"
            );
            if is_whole {
                break;
            }
            at += 1;
        }
        assert!(at > 8, "{at} operations were cut");
    }
}

#[tokio::test]
async fn whatever_is_done_to_an_object_is_noticed() {
    for key in [None, Some(Key::new([1; 32]))] {
        let (store, repository) = fresh(key.as_ref()).await;
        let mut disk = small_disk(4);
        let first = backup(&repository, &disk, "web01@a", None).await.unwrap();
        let first_content = disk.content.clone();
        change(&mut disk, 5);
        backup(&repository, &disk, "web01@b", Some(&first)).await.unwrap();
        let all: Vec<String> = paths(&*store)
            .await
            .into_iter()
            .filter(|path| path != "format")
            .collect();
        let mut kinds = BTreeSet::new();
        for path in &all {
            kinds.insert(path.split('/').next().unwrap().to_owned());
            let object = store
                .get(&path.as_str().into())
                .await
                .unwrap()
                .bytes()
                .await
                .unwrap();
            let neighbour = all
                .iter()
                .find(|other| *other != path && other.split('/').next() == path.split('/').next());
            let mut hurts: Vec<(&str, Option<Bytes>)> = vec![
                ("missing", None),
                ("cut", Some(object.slice(..object.len() - 1))),
                ("cut to nothing", Some(Bytes::new())),
                ("longer", Some([&object[..], b"x"].concat().into())),
                ("not ours", Some(Bytes::from(vec![b'x'; object.len()]))),
                ("huge", Some(Bytes::from(vec![0; 40 << 20]))),
            ];
            for at in [0, 4, 5, 6, 7, 8, 12, 40, object.len() / 2, object.len() - 1] {
                let mut altered = object.to_vec();
                altered[at] ^= 0x40;
                hurts.push(("altered", Some(altered.into())));
            }
            if let Some(neighbour) = neighbour {
                let swapped = store
                    .get(&neighbour.as_str().into())
                    .await
                    .unwrap()
                    .bytes()
                    .await
                    .unwrap();
                hurts.push(("swapped", Some(swapped)));
            }
            for (what, hurt) in hurts {
                match &hurt {
                    Some(hurt) => drop(
                        store
                            .put(&path.as_str().into(), hurt.clone().into())
                            .await
                            .unwrap(),
                    ),
                    None => store.delete(&path.as_str().into()).await.unwrap(),
                }
                let context = format!("{path} {what}");
                let backups = repository.backups().await.unwrap();
                let report = verify(&repository, &backups, false, 4, &Progress::default())
                    .await
                    .unwrap();
                let is_gone = what == "missing" && path.starts_with("backups/");
                assert_eq!(report.bad > 0, !is_gone, "{context}");
                assert_eq!(report.broken.is_empty(), is_gone, "{context}");
                for (_, manifest) in &backups {
                    let Ok(manifest) = manifest else { continue };
                    let expected = if manifest.name == "web01@a" {
                        &first_content
                    } else {
                        &disk.content
                    };
                    match restored(&repository, manifest).await {
                        Ok(content) => assert!(content == *expected, "{context}: restored to something else"),
                        Err(error) => {
                            assert!(error.is_finding(), "{context}: {error}");
                            let number = backups.iter().position(|(id, _)| *id == manifest.id).unwrap();
                            assert!(report.broken.contains(&backups[number].0), "{context}");
                        }
                    }
                }
                store
                    .put(&path.as_str().into(), object.clone().into())
                    .await
                    .unwrap();
            }
        }
        let expected = ["backups", "chunks", "pages", "patches"].map(str::to_owned);
        assert_eq!(kinds, expected.into(), "every kind was hurt");
    }
}

#[tokio::test]
async fn a_manifest_that_cannot_be_read_keeps_everything() {
    let (store, repository) = fresh(None).await;
    let mut disk = small_disk(6);
    let first = backup(&repository, &disk, "web01@a", None).await.unwrap();
    change(&mut disk, 7);
    let second = backup(&repository, &disk, "web01@b", Some(&first)).await.unwrap();
    let path = format!("backups/{}", first.id);
    let object = store
        .get(&path.as_str().into())
        .await
        .unwrap()
        .bytes()
        .await
        .unwrap();
    store.put(&path.as_str().into(), "damaged".into()).await.unwrap();
    let before = paths(&*store).await;
    assert!(
        prune_all(&repository, &[&second], SILENT_SECONDS_MAX)
            .await
            .is_err()
    );
    let left = paths(&*store).await;
    let gone: Vec<_> = before.difference(&left).collect();
    assert_eq!(gone, [&format!("backups/{}", second.id)], "only what was named");
    store.put(&path.as_str().into(), object.into()).await.unwrap();
    prune_all(&repository, &[], SILENT_SECONDS_MAX).await.unwrap();
    check_all(&repository, &[("web01@a", &small_disk(6).content)], "mended").await;
}

/// Everything was read, the manifest is about to be written.
const AT_THE_END: u64 = u64::MAX;

/// A disk during whose n-th read a prune runs.
struct Interrupted<'a> {
    disk: &'a Disk,
    repository: &'a Repository,
    deletes: &'a [&'a Manifest],
    at: u64,
    reads: AtomicU64,
    silent: i64,
}

impl Source for Interrupted<'_> {
    fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    fn sector_bytes(&self) -> u32 {
        512
    }

    fn is_since_parent(&self) -> bool {
        self.disk.is_since_parent()
    }

    async fn extents(&self, from: u64) -> Result<Vec<Extent>, Error> {
        self.disk.extents(from).await
    }

    async fn read(&self, offset: u64, bytes: usize) -> Result<Bytes, Error> {
        if self.reads.fetch_add(1, Ordering::Relaxed) == self.at {
            prune_all(self.repository, self.deletes, self.silent)
                .await
                .unwrap();
        }
        self.disk.read(offset, bytes).await
    }

    async fn finish(&self) -> Result<(), Error> {
        if self.at == AT_THE_END {
            prune_all(self.repository, self.deletes, self.silent)
                .await
                .unwrap();
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_prune_in_the_middle_of_a_backup_takes_nothing_from_it() {
    for is_incremental in [false, true] {
        for at in 0..6 {
            let (store, repository) = fresh(None).await;
            let mut disk = small_disk(8);
            let parent = backup(&repository, &disk, "web01@a", None).await.unwrap();
            if is_incremental {
                change(&mut disk, 9);
            }
            let source = Interrupted {
                disk: &disk,
                repository: &repository,
                deletes: &[&parent],
                at,
                reads: AtomicU64::new(0),
                silent: SILENT_SECONDS_MAX,
            };
            let options = options("web01@b", is_incremental.then(|| parent.clone()));
            create(&repository, &source, &options, &Progress::default())
                .await
                .unwrap();
            let context = format!("incremental {is_incremental}, pruned at read {at}");
            let known = [("web01@b", &disk.content[..])];
            let is_pruned = source.reads.load(Ordering::Relaxed) > at;
            let backups = check_all(
                &repository,
                &[known[0], ("web01@a", &small_disk(8).content)],
                &context,
            )
            .await;
            assert_eq!(backups, if is_pruned { 1 } else { 2 }, "{context}");
            // What waited for the run goes now, and nothing that the run relied on.
            let report = prune_all(&repository, &[&parent], SILENT_SECONDS_MAX)
                .await
                .unwrap();
            assert_eq!(report.objects_waiting, 0);
            assert_eq!(check_all(&repository, &known, &context).await, 1);
            assert!(
                !paths(&*store)
                    .await
                    .iter()
                    .any(|path| path.starts_with("condemned"))
            );
        }
    }
}

#[tokio::test]
async fn content_that_is_condemned_is_stored_again_under_the_next_generation() {
    let (store, repository) = fresh(None).await;
    let disk = small_disk(10);
    let old = backup(&repository, &disk, "web01@a", None).await.unwrap();
    // This run holds what the prune condemns, until it has ended.
    let session = weft_backup::session::Session::begin(&repository, "a test")
        .await
        .unwrap();
    let report = prune_all(&repository, &[&old], SILENT_SECONDS_MAX).await.unwrap();
    assert!(report.objects == 0 && report.objects_waiting > 0 && report.waiting_for.len() == 1);
    let new = backup(&repository, &disk, "web01@b", None).await.unwrap();
    assert!(new.cost.new_bytes > 0, "nothing condemned is relied on");
    assert!(
        paths(&*store)
            .await
            .iter()
            .any(|path| path.starts_with("chunks/") && path.ends_with(".1"))
    );
    let known = [("web01@b", &disk.content[..]), ("web01@c", &disk.content[..])];
    check_all(&repository, &known, "before").await;
    session.end().await.unwrap();
    let report = prune_all(&repository, &[], SILENT_SECONDS_MAX).await.unwrap();
    assert!(report.objects > 0 && report.objects_waiting == 0);
    assert_eq!(check_all(&repository, &known, "after").await, 1);
    // An incremental one on it finds its chunks under that generation.
    let mut changed = disk.clone();
    changed.mark();
    let more = backup(&repository, &changed, "web01@c", Some(&new))
        .await
        .unwrap();
    assert_eq!((more.cost.read_bytes, more.cost.new_bytes), (0, 0));
    assert_eq!(check_all(&repository, &known, "incremental").await, 2);
}

#[tokio::test]
async fn a_parent_whose_objects_are_condemned_is_not_relied_on() {
    for (is_changed, at) in [(true, 1), (true, AT_THE_END), (false, 1), (false, AT_THE_END)] {
        let (_, repository) = fresh(None).await;
        let mut disk = small_disk(11);
        let old = backup(&repository, &disk, "web01@a", None).await.unwrap();
        let interrupted = |disk: &Disk, at| (disk.clone(), at);
        let run = async |(disk, at): (Disk, u64), delete: &Manifest, options| {
            let source = Interrupted {
                disk: &disk,
                repository: &repository,
                deletes: &[delete],
                at,
                reads: AtomicU64::new(0),
                silent: SILENT_SECONDS_MAX,
            };
            create(&repository, &source, &options, &Progress::default())
                .await
                .unwrap()
        };
        // The run of the parent began before the prune and relies on what the prune condemns.
        let parent = run(interrupted(&disk, 3), &old, options("web01@b", None)).await;
        let first_content = disk.content.clone();
        disk.mark();
        if is_changed {
            change(&mut disk, 12);
        }
        // The lists are there; this run knows them. Then the parent goes, and what it held with it.
        let options = options("web01@c", Some(parent.clone()));
        run(interrupted(&disk, at), &parent, options).await;
        let known = [("web01@b", &first_content[..]), ("web01@c", &disk.content[..])];
        let context = format!("changed {is_changed}, pruned at {at}");
        check_all(&repository, &known, &context).await;
        prune_all(&repository, &[&parent], SILENT_SECONDS_MAX)
            .await
            .unwrap();
        assert_eq!(check_all(&repository, &known, &context).await, 1, "{context}");
    }
}

#[tokio::test]
async fn a_run_that_was_taken_for_dead_makes_no_backup() {
    let (store, repository) = fresh(None).await;
    let disk = small_disk(13);
    let old = backup(&repository, &disk, "web01@a", None).await.unwrap();
    let source = Interrupted {
        disk: &disk,
        repository: &repository,
        deletes: &[&old],
        at: 4,
        reads: AtomicU64::new(0),
        // Whoever has said nothing for less than no time.
        silent: -1,
    };
    let refused = create(
        &repository,
        &source,
        &options("web01@b", None),
        &Progress::default(),
    )
    .await;
    assert!(matches!(refused, Err(Error::TakenForDead)), "{refused:?}");
    assert_eq!(repository.ids().await.unwrap(), []);
    assert!(
        !paths(&*store)
            .await
            .iter()
            .any(|path| path.starts_with("sessions"))
    );
    backup(&repository, &disk, "web01@b", None).await.unwrap();
    check_all(&repository, &[("web01@b", &disk.content)], "the next run").await;
}

#[tokio::test]
async fn two_first_backups_at_once_agree_on_the_repository() {
    for _ in 0..20 {
        let store = Arc::new(InMemory::new());
        let key = Key::generate();
        let disk = small_disk(14);
        let run = |name: &'static str| {
            let (store, key, disk) = (Arc::clone(&store), key.clone(), disk.clone());
            async move {
                let repository = open(store, Some(&key)).await.unwrap();
                backup(&repository, &disk, name, None).await.unwrap();
            }
        };
        tokio::join!(run("web01@a"), run("web01@b"));
        let repository = open(store, Some(&key)).await.unwrap();
        let known = [("web01@a", &disk.content[..]), ("web01@b", &disk.content[..])];
        assert_eq!(check_all(&repository, &known, "two at once").await, 2);
    }
}

#[tokio::test]
async fn backups_and_prunes_in_any_order_keep_every_backup() {
    for seed in 0..40 {
        let store = Arc::new(InMemory::new());
        let base = small_disk(seed);
        let first = open(store.clone(), None).await.unwrap();
        let old = backup(&first, &base, "web01@old", None).await.unwrap();
        let older = backup(&first, &base, "web01@older", None).await.unwrap();
        let mut random = Random::new(seed);
        let mut slow = |store: &Arc<InMemory>| Slow::new(store, random.next());
        let mut changed = base.clone();
        change(&mut changed, seed);
        let creates = async |store: Arc<Slow>, disk: &Disk, name: &str, parent: Option<&Manifest>| {
            let repository = open(store, None).await.unwrap();
            // A parent that was deleted before the run began is missed, by name.
            match backup(&repository, disk, name, parent).await {
                Ok(_) => true,
                Err(error) => {
                    assert!(
                        parent.is_some() && matches!(error, Error::Missing { .. }),
                        "seed {seed}: {error}"
                    );
                    false
                }
            }
        };
        let prunes = async |store: Arc<Slow>, backups: &[&Manifest]| {
            let repository = open(store, None).await.unwrap();
            // A manifest or page that the other prune deletes meanwhile may be missed.
            let pruned = prune_all(&repository, backups, SILENT_SECONDS_MAX).await;
            assert!(
                pruned.as_ref().err().is_none_or(Error::is_finding),
                "seed {seed}: {pruned:?}"
            );
        };
        let stores: Vec<_> = (0..5).map(|_| slow(&store)).collect();
        let deleted = [&old, &older];
        let (a, b, c, (), ()) = tokio::join!(
            creates(stores[0].clone(), &base, "web01@a", None),
            creates(stores[1].clone(), &changed, "web01@b", Some(&old)),
            creates(stores[2].clone(), &base, "web01@c", None),
            prunes(stores[3].clone(), &deleted[..1]),
            prunes(stores[4].clone(), &deleted[1..]),
        );
        let repository = open(store.clone(), None).await.unwrap();
        let known = [
            ("web01@a", &base.content[..]),
            ("web01@b", &changed.content[..]),
            ("web01@c", &base.content[..]),
        ];
        let context = format!("seed {seed}");
        let made = usize::from(a) + usize::from(b) + usize::from(c);
        assert_eq!(check_all(&repository, &known, &context).await, made, "{context}");
        prune_all(&repository, &[], SILENT_SECONDS_MAX).await.unwrap();
        assert_eq!(
            check_all(&repository, &known, &context).await,
            made,
            "{context}, pruned"
        );
    }
}

#[tokio::test]
async fn a_page_that_names_a_chunk_of_another_length_is_refused() {
    use weft_backup::object::{Kind, ObjectRef, SharedObject};
    use weft_backup::page::{self, Entry};
    use weft_backup::sealed::Sealer;

    let (store, repository) = fresh(None).await;
    let format = store.get(&"format".into()).await.unwrap().bytes().await.unwrap();
    let sealer: Sealer = weft_backup::format::decode(&format, None).unwrap();
    let mut disk = Disk::new(MIB);
    disk.write(0, &text(1 << 20, 1));
    let mut manifest = backup(&repository, &disk, "web01@a", None).await.unwrap();
    // Everything is as it should be, with the right hashes, but the chunk is as long as another disk's end.
    let short = text(512, 2);
    let chunk = SharedObject {
        kind: Kind::Chunk,
        reference: ObjectRef::first(sealer.hash(&short)),
    };
    let entries = page::encode(&[Entry::Chunk(chunk.reference)]).unwrap();
    let page = SharedObject {
        kind: Kind::Page,
        reference: ObjectRef::first(sealer.hash(&entries)),
    };
    manifest.pages = vec![Some(page.reference)];
    for (kind, path, name, content) in [
        (
            Kind::Chunk,
            chunk.to_string(),
            chunk.reference.hash.to_vec(),
            short,
        ),
        (
            Kind::Page,
            page.to_string(),
            page.reference.hash.to_vec(),
            entries,
        ),
        (
            Kind::Manifest,
            format!("backups/{}", manifest.id),
            manifest.id.0.to_vec(),
            manifest.encode(),
        ),
    ] {
        let object = sealer.seal(kind, &name, &content, 3);
        store.put(&path.as_str().into(), object.into()).await.unwrap();
    }
    let refused = restored(&repository, &manifest).await.unwrap_err();
    assert!(refused.to_string().contains("another length"), "{refused}");
    let backups = repository.backups().await.unwrap();
    let report = verify(&repository, &backups, false, 4, &Progress::default())
        .await
        .unwrap();
    assert_eq!((report.bad, report.broken), (1, vec![manifest.id]));
}
