//! What people and programs write: bodies of REST requests, the daemon's configuration, sizes,
//! names of snapshots, schedules.

use std::sync::LazyLock;

use clap::Parser;
use control::{
    Attach, AttachBody, Detach, DetachBody, DiskAdd, DiskAddBody, DiskReplaceBody, PoolCreate,
    PoolCreateBody, ScrubBody, VdiCreate, VdiCreateBody, VdiResizeBody,
};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::de::DeserializeOwned;
use types::ByteSize;

use crate::config::{Flags, Settings};

/// The longest message that is one clear line.
const MESSAGE_BYTES_MAX: usize = 1024;

fn check_text(text: &str) {
    assert!(!text.is_empty(), "a refusal without a word");
    assert!(
        text.len() <= MESSAGE_BYTES_MAX,
        "a refusal of {} bytes",
        text.len()
    );
    assert!(
        !text.chars().any(char::is_control),
        "control characters in {text:?}"
    );
}

/// A body as `T`, and if it is one, checked; refusals are one line.
fn body<T: DeserializeOwned, C>(input: &[u8], check: impl FnOnce(T) -> control::ApiResult<C>) -> Option<C> {
    let body = match control::rest::parse_body::<T>(input) {
        Ok(body) => body,
        Err(error) => {
            check_text(&error.message);
            return None;
        }
    };
    match check(body) {
        Ok(checked) => Some(checked),
        Err(error) => {
            check_text(&error.message);
            None
        }
    }
}

fn check_disk(disk: &DiskAdd) {
    assert!(disk.path.is_absolute() && disk.path.as_os_str().len() <= 1024);
    assert!(
        disk.create_bytes
            .is_none_or(|bytes| bytes.is_multiple_of(4096) && bytes > 0)
    );
}

/// Every body that the API takes; the first byte chooses.
pub fn rest_body(input: &[u8]) {
    let Some((kind, input)) = input.split_first() else {
        return;
    };
    match kind % 8 {
        0 => drop(body::<PoolCreateBody, _>(input, PoolCreate::try_from)),
        1 => {
            if let Some(disk) = body::<DiskAddBody, _>(input, DiskAdd::try_from) {
                check_disk(&disk);
            }
        }
        2 => {
            if let Some(disk) = body::<DiskReplaceBody, _>(input, |body| DiskAdd::try_from(body.with)) {
                check_disk(&disk);
            }
        }
        3 => {
            if let Some(vdi) = body::<VdiCreateBody, _>(input, VdiCreate::try_from) {
                assert!((1..=3).contains(&vdi.replicas) && vdi.bytes > 0);
                assert!(vdi.bytes.is_multiple_of(u64::from(vdi.sector_bytes)));
                assert!(vdi.bytes.div_ceil(vdi.shard_bytes) <= control::SHARDS_MAX);
            }
        }
        4 => drop(body::<VdiResizeBody, _>(input, VdiResizeBody::check)),
        5 => {
            if let Some(attach) = body::<AttachBody, _>(input, Attach::try_from) {
                assert!((1..=control::QUEUES_MAX).contains(&attach.queues));
                assert_eq!(attach.target.to_string().parse(), Ok(attach.target));
            }
        }
        6 => drop(body::<DetachBody, _>(input, Detach::try_from)),
        _ => drop(body::<ScrubBody, _>(input, ScrubBody::check)),
    }
}

/// The daemon's TOML file.
pub fn config_file(input: &[u8]) {
    static FLAGS: LazyLock<Flags> = LazyLock::new(|| Flags::parse_from(["blockd"]));
    match Settings::of_bytes(&FLAGS, input) {
        Ok(settings) => {
            assert!(settings.state.is_absolute() && settings.cores > 0);
            assert!(settings.cache.0 > 0 && settings.buffers.0 > 0);
        }
        // TOML's own complaints draw the line and point at it.
        Err(error) => assert!(!format!("{error:#}").is_empty()),
    }
}

/// A size such as `20GiB`; what it is shown as is a size again, at most a twentieth away.
pub fn size(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    match text.parse::<ByteSize>() {
        // Rounded up, the last tenth of a PiB is more than 64 bits hold.
        Ok(size) if size.0 > u64::MAX - (1 << 50) => {}
        Ok(size) => {
            let again: ByteSize = size.to_string().parse().expect("a size is shown as a size");
            assert!(
                again.0.abs_diff(size.0) <= size.0 / 20,
                "{size:?} is shown as {size}"
            );
        }
        Err(error) => check_text(&error.to_string()),
    }
}

/// A state of a VDI by name, such as `web01@before-upgrade`; shown, it is itself again.
pub fn snapshot_reference(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    match text.parse::<snapshot::Reference>() {
        Ok(read) => {
            let shown = read.to_string();
            assert_eq!(shown.parse(), Ok(read));
            // In a path, a URL and a shell's line it is one word.
            assert!(
                shown
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"@:._-".contains(&b))
            );
        }
        Err(error) => {
            check_text(&error.to_string());
            check_text(error.way_out());
        }
    }
}

/// A cron expression; it has a next time, and is due then and not again.
pub fn snapshot_schedule(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    match text.parse::<snapshot::schedule::Schedule>() {
        Ok(schedule) => {
            assert_eq!(schedule.to_string().parse(), Ok(schedule.clone()));
            let (start, zone) = (
                Timestamp::from_second(1_792_000_000).expect("2026"),
                TimeZone::UTC,
            );
            let next = schedule
                .next_after(start, &zone)
                .expect("what is read comes again");
            assert_eq!(schedule.due(start, next, &zone), Some(next));
            assert_eq!(schedule.due(next, next, &zone), None);
        }
        Err(error) => {
            check_text(&error.to_string());
            check_text(error.way_out());
        }
    }
}
