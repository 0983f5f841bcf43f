//! `weft disk inspect` and `weft disk fsck`: what a disk says of itself, read without a daemon.
//!
//! Both take the disk's lock, so a disk that a daemon serves is refused, and a daemon that starts meanwhile waits.
//! Only `fsck --rebuild-index` writes to the disk: it opens it as the daemon does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use edge::BlockFile;
use edge::file::{Access, OpenError, OsFile, probe};
use edge::rocks::Rocks;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use store::{BadPlace, FsckReport, RecoveryReport, SegmentInfo, Superblock, SuperblockError};

use crate::failure::{Failure, Outcome};
use crate::output::{self, Align, Table, size};

/// A daemon keeps its lock for as long as it lives; one that was just killed lets go within this.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// Where the daemon keeps its state unless told otherwise.
pub const STATE: &str = "/var/lib/weft";
/// Bad places that a person is shown; `--json` has all that the check kept.
const PLACES_SHOWN: usize = 20;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  weft disk inspect /dev/sdb\n  weft disk inspect /dev/sdb --segments")]
pub struct InspectArgs {
    /// The device or file; no daemon may have it open
    path: PathBuf,
    /// Also list what each segment of the log holds
    #[arg(long)]
    segments: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  weft disk fsck /dev/sdb\n  weft disk fsck /dev/sdb --rebuild-index")]
pub struct FsckArgs {
    /// The device or file; no daemon may have it open
    path: PathBuf,
    /// Build the daemon's index of this disk anew from the log
    #[arg(long)]
    rebuild_index: bool,
    /// The index's directory [default: /var/lib/weft/index/DISK-ID]
    #[arg(long, value_name = "DIR", requires = "rebuild_index")]
    index: Option<PathBuf>,
}

/// `weft disk inspect`
pub fn inspect(args: &InspectArgs, json: bool) -> Outcome<()> {
    let file = open(&args.path, Access::ReadOnly)?;
    let superblock = superblock(&file, &args.path)?;
    let segments = if args.segments {
        let inspection = store::inspect(&file).map_err(|error| unusable(&args.path, &error))?;
        Some(inspection.segments)
    } else {
        None
    };
    if json {
        let mut value = as_json(&superblock);
        if let Some(segments) = segments {
            value["log"] = segments.iter().map(segment_json).collect();
        }
        output::json(&value);
        return Ok(());
    }
    let Superblock {
        capacity,
        segment_bytes,
        first_segment,
        segments: count,
        ..
    } = superblock;
    output::print(&output::fields(&[
        ("disk", superblock.disk.to_string()),
        ("pool", superblock.pool.to_string()),
        ("format", superblock.version.to_string()),
        ("device", size(file.bytes())),
        ("used by Weft", size(capacity)),
        (
            "segments",
            format!("{count} of {}, from {}", size(segment_bytes), size(first_segment)),
        ),
        ("opened", format!("{} times", superblock.open_count)),
        ("generation", superblock.generation.to_string()),
    ]));
    if let Some(segments) = segments {
        output::print(&format!("\n{}", segment_table(&segments)));
    }
    Ok(())
}

fn as_json(superblock: &Superblock) -> Value {
    json!({
        "disk": superblock.disk,
        "pool": superblock.pool,
        "format": superblock.version,
        "capacity_bytes": superblock.capacity,
        "segment_bytes": superblock.segment_bytes,
        "first_segment": superblock.first_segment,
        "segments": superblock.segments,
        "open_count": superblock.open_count,
        "generation": superblock.generation,
    })
}

fn segment_json(segment: &SegmentInfo) -> Value {
    json!({
        "segment": segment.segment,
        "generation": segment.generation,
        "first_batch": segment.batches.map(|(first, _)| first),
        "last_batch": segment.batches.map(|(_, last)| last),
        "batches": segment.count,
        "filled_blocks": segment.filled_blocks,
        "data_blocks": segment.data_blocks,
    })
}

fn segment_table(segments: &[SegmentInfo]) -> String {
    let heads = [
        "SEGMENT",
        "GENERATION",
        "FIRST BATCH",
        "LAST BATCH",
        "BATCHES",
        "FILLED",
        "DATA",
    ];
    let mut table = Table::new(&heads.map(|head| (head, Align::Right)));
    for segment in segments {
        let batch = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
        table.row(vec![
            segment.segment.to_string(),
            segment.generation.to_string(),
            batch(segment.batches.map(|(first, _)| first)),
            batch(segment.batches.map(|(_, last)| last)),
            segment.count.to_string(),
            size(u64::from(segment.filled_blocks) * types::BLOCK_BYTES),
            size(u64::from(segment.data_blocks) * types::BLOCK_BYTES),
        ]);
    }
    table.render(0)
}

/// `weft disk fsck`: every header and every block of the log against its checksum; then, if asked for, the index.
/// The check comes first and reads only, so its findings are known whatever becomes of the index.
pub fn fsck(args: &FsckArgs, json: bool) -> Outcome<()> {
    let access = if args.rebuild_index {
        Access::ReadWrite
    } else {
        Access::ReadOnly
    };
    let mut file = open(&args.path, access)?;
    let superblock = superblock(&file, &args.path)?;
    let report = check(&file, &args.path, superblock.segment_bytes)?;
    let rebuilt = if args.rebuild_index {
        let folder = args.index.clone().unwrap_or_else(|| index_folder(&superblock));
        Some(rebuild(&mut file, &args.path, &folder)?)
    } else {
        None
    };
    if json {
        output::json(&report_json(&report, rebuilt.as_ref()));
    } else {
        output::print(&summary(&report, rebuilt.as_ref()));
    }
    verdict(&report, rebuilt.as_ref())
}

fn check(file: &OsFile, path: &Path, segment_bytes: u64) -> Outcome<FsckReport> {
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{bar:30} {percent}%  {msg}").expect("a fixed template"));
    let started = Instant::now();
    let report = store::fsck(file, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        bar.set_message(rate_and_left(
            started.elapsed().as_secs_f64(),
            done,
            total,
            segment_bytes,
        ));
    });
    bar.finish_and_clear();
    report.map_err(|error| Failure::failed(format!("{}: {error}", path.display()), REPLACE))
}

fn rate_and_left(seconds: f64, done: u64, total: u64, segment_bytes: u64) -> String {
    if seconds < 1.0 || done == 0 {
        return String::new();
    }
    let rate = done as f64 / seconds;
    let left = total.saturating_sub(done) as f64 / rate;
    format!(
        "{}/s  {} left",
        size((rate * segment_bytes as f64) as u64),
        output::duration(left)
    )
}

fn rebuild(file: &mut OsFile, path: &Path, folder: &Path) -> Outcome<RecoveryReport> {
    let mut index = empty_index(folder)?;
    let spinner = ProgressBar::new_spinner().with_message("rebuilding the index");
    spinner.enable_steady_tick(Duration::from_millis(200));
    let rebuilt = store::rebuild_index(file, &mut index, entropy()?);
    spinner.finish_and_clear();
    let (_, report) =
        rebuilt.map_err(|error| Failure::failed(format!("{}: {error}", path.display()), REPLACE))?;
    Ok(report)
}

pub const REPLACE: &str = "`weft disk replace` gives its place to another disk";

fn summary(report: &FsckReport, rebuilt: Option<&RecoveryReport>) -> String {
    let mut text = output::fields(&[
        ("disk", report.superblock.disk.to_string()),
        (
            "segments",
            format!("{} of {} used", report.segments_used, report.superblock.segments),
        ),
        (
            "log",
            format!("{} batches, {}", report.batches, size(report.filled_bytes)),
        ),
        ("verified", size(report.blocks * types::BLOCK_BYTES)),
        ("bad blocks", report.bad_blocks.to_string()),
    ]);
    let damaged = || report.places.iter().filter(|place| place.is_damage());
    for place in damaged().take(PLACES_SHOWN) {
        text.push_str(&format!("damage: {}\n", describe_place(place)));
    }
    if damaged().count() > PLACES_SHOWN {
        text.push_str("damage: and more, see --json\n");
    }
    if let Some(rebuilt) = rebuilt {
        text.push_str(&format!(
            "index rebuilt from {} batches\n",
            rebuilt.batches_replayed
        ));
        for damage in &rebuilt.damage {
            text.push_str(&format!("damage: {}\n", describe_loss(damage)));
        }
    }
    text
}

fn report_json(report: &FsckReport, rebuilt: Option<&RecoveryReport>) -> Value {
    json!({
        "disk": report.superblock.disk,
        "clean": report.is_clean() && rebuilt.is_none_or(|rebuilt| rebuilt.damage.is_empty()),
        "segments": report.superblock.segments,
        "segments_used": report.segments_used,
        "batches": report.batches,
        "last_batch": report.last_batch,
        "filled_bytes": report.filled_bytes,
        "blocks": report.blocks,
        "bad_blocks": report.bad_blocks,
        "damage": report.places.iter().filter(|p| p.is_damage()).map(describe_place).collect::<Vec<_>>(),
        "gaps": report.places.iter().filter(|p| !p.is_damage()).map(describe_place).collect::<Vec<_>>(),
        "rebuilt": rebuilt.map(|rebuilt| json!({
            "batches": rebuilt.batches_replayed,
            "batches_dropped": rebuilt.batches_dropped,
            "damage": rebuilt.damage.iter().map(describe_loss).collect::<Vec<_>>(),
        })),
    })
}

fn describe_place(place: &BadPlace) -> String {
    match place {
        BadPlace::Superblock { offset } => format!("the superblock at {offset}"),
        BadPlace::SegmentHeader { segment } => format!("the header of segment {segment}"),
        BadPlace::Block {
            offset,
            shard,
            block,
            seq,
        } => {
            format!("block {block} of shard {shard}, write {seq}, at {offset}")
        }
        BadPlace::Gap { offset, blocks } => format!("{blocks} blocks at {offset} are no batch"),
        BadPlace::Unreadable { segment, blocks } => {
            format!("{blocks} blocks of segment {segment} cannot be read")
        }
    }
}

fn describe_loss(damage: &store::Damage) -> String {
    match damage {
        store::Damage::Batches { first, last } => format!("batches {first} to {last} are missing"),
        store::Damage::Segment { segment } => format!("segment {segment} has no readable header"),
    }
}

fn verdict(report: &FsckReport, rebuilt: Option<&RecoveryReport>) -> Outcome<()> {
    let elsewhere = report
        .places
        .iter()
        .filter(|p| p.is_damage() && !matches!(p, BadPlace::Block { .. }))
        .count();
    let lost = rebuilt.map_or(0, |rebuilt| rebuilt.damage.len());
    let mut found = Vec::new();
    for (count, what) in [
        (report.bad_blocks, "blocks do not match their checksums"),
        (elsewhere as u64, "other places are damaged"),
        (lost as u64, "parts of the log are missing"),
    ] {
        if count > 0 {
            found.push(format!("{count} {what}"));
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    Err(Failure::failed(
        found.join(", "),
        "start the daemon and run `weft scrub`: it repairs what is still in use from other replicas",
    ))
}

/// Opens a disk, or says who has it.
pub fn open(path: &Path, access: Access) -> Outcome<OsFile> {
    OsFile::open_waiting(path, access, LOCK_WAIT).map_err(|error| {
        let message = error.to_string();
        match error {
            OpenError::Locked { .. } | OpenError::Busy { .. } => Failure::refused(
                message,
                "stop the daemon that serves it: `systemctl stop weft-blockd`",
            ),
            OpenError::Io { ref source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Failure::not_found(message, "give the path of a device or file")
            }
            OpenError::Io { ref source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                Failure::failed(message, "use sudo")
            }
            OpenError::NotADisk { .. } => Failure::usage(message, "give the path of a device or file"),
            OpenError::Io { .. } => Failure::failed(message, ""),
        }
    })
}

/// What is no disk of Weft's is described, since the operator may have mistaken one device for another.
pub fn superblock(file: &OsFile, path: &Path) -> Outcome<Superblock> {
    store::read_superblock(file).map_err(|error| {
        if error != SuperblockError::NotFormatted {
            return unusable(path, &error);
        }
        let held = match probe(path) {
            Ok(report) if !report.signatures.is_empty() => {
                format!("it holds {}", report.signatures.join(", "))
            }
            Ok(report) if report.is_blank => "it looks blank".to_owned(),
            _ => "it holds something else".to_owned(),
        };
        let message = format!("{} is not a disk of a pool: {held}", path.display());
        Failure::failed(message, "`weft disk add` gives a disk to the pool")
    })
}

fn unusable(path: &Path, error: &SuperblockError) -> Failure {
    Failure::failed(format!("{}: {error}", path.display()), REPLACE)
}

fn index_folder(superblock: &Superblock) -> PathBuf {
    Path::new(STATE).join("index").join(superblock.disk.to_string())
}

/// An index that holds nothing. A folder that holds something else than an index is refused: it was a slip.
pub fn empty_index(folder: &Path) -> Outcome<Rocks> {
    let shown = folder.display();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries.count(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => {
            return Err(Failure::failed(
                format!("{shown}: {error}"),
                "see who owns the directory",
            ));
        }
    };
    if entries > 0 {
        if !folder.join("CURRENT").exists() {
            let message = format!("{shown} is not an index: it is not empty and RocksDB did not write it");
            return Err(Failure::refused(message, "name the right directory with --index"));
        }
        Rocks::destroy(folder)
            .map_err(|error| Failure::failed(error.to_string(), "stop the daemon that has it open"))?;
    }
    if let Some(parent) = folder.parent().filter(|parent| !parent.is_dir()) {
        let message = format!("{} is not a directory", parent.display());
        return Err(Failure::not_found(
            message,
            "name the index's directory with --index: STATE/index/DISK-ID of the daemon",
        ));
    }
    Rocks::open_index(folder)
        .map_err(|error| Failure::failed(error.to_string(), "see that there is space and permission"))
}

/// Random bits for segment secrets.
pub fn entropy() -> Outcome<u64> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|error| Failure::failed(format!("/dev/urandom: {error}"), ""))?;
    Ok(u64::from_le_bytes(bytes))
}
