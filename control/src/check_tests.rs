//! The border, as tables.

use super::*;
use crate::ErrorKind;

fn vdi(bytes: u64) -> VdiCreateBody {
    VdiCreateBody {
        name: "a".into(),
        bytes,
        replicas: None,
        sector_bytes: None,
        shard_bytes: None,
    }
}

/// Refused as invalid, with a way out.
fn refused<T: std::fmt::Debug>(result: ApiResult<T>, case: &str) {
    let error = result.expect_err(case);
    assert_eq!(error.kind, ErrorKind::Invalid, "{case}");
    assert!(
        !error.message.is_empty() && !error.message.contains('\n'),
        "{case}: {error:?}"
    );
}

#[test]
fn names() {
    let longest = "a".repeat(63);
    for good in ["a", "0", "web01", "a.b_c-d", "0-", &longest] {
        assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
    }
    let too_long = "a".repeat(64);
    for bad in [
        "", "A", "-a", ".a", "_a", "a b", "a/b", "ä", "a\n", "a\0", "web01 ", &too_long,
    ] {
        refused(bad.parse::<Name>(), bad);
    }
}

#[test]
fn vdis_get_their_defaults() {
    let made = VdiCreate::try_from(vdi(20 << 30)).unwrap();
    assert_eq!(
        (made.replicas, made.sector_bytes, made.shard_bytes),
        (3, 512, 1 << 30)
    );
}

#[test]
fn vdi_sizes() {
    for good in [1 << 20, (1 << 20) + 512, 20 << 30, 64 << 40] {
        assert!(VdiCreate::try_from(vdi(good)).is_ok(), "{good}");
    }
    for bad in [0, 512, (1 << 20) - 512, (1 << 20) + 1, (64 << 40) + 512, u64::MAX] {
        refused(VdiCreate::try_from(vdi(bad)), &bad.to_string());
        refused(VdiResizeBody { bytes: bad }.check(), &bad.to_string());
    }
    refused(
        VdiCreate::try_from(VdiCreateBody {
            sector_bytes: Some(4096),
            ..vdi((1 << 20) + 512)
        }),
        "4 KiB sectors",
    );
}

#[test]
fn vdi_sectors_replicas_and_shards() {
    for sector in [0, 1, 511, 1024, 8192] {
        refused(
            VdiCreate::try_from(VdiCreateBody {
                sector_bytes: Some(sector),
                ..vdi(1 << 30)
            }),
            "sector",
        );
    }
    for (replicas, is_good) in [(0, false), (1, true), (3, true), (4, false), (255, false)] {
        let made = VdiCreate::try_from(VdiCreateBody {
            replicas: Some(replicas),
            ..vdi(1 << 30)
        });
        assert_eq!(made.is_ok(), is_good, "{replicas}");
    }
    for (bytes, shard, is_good) in [
        (1 << 30, 1 << 20, true),
        (1 << 30, 64 << 30, true),
        (64 << 40, 1 << 30, true),
        (64 << 40, 1 << 29, false),
        (1 << 36, 1 << 20, true),
        ((1 << 36) + 512, 1 << 20, false),
        (1 << 30, 0, false),
        (1 << 30, (1 << 20) + 4096, false),
        (1 << 30, (64 << 30) + (1 << 20), false),
    ] {
        let made = VdiCreate::try_from(VdiCreateBody {
            shard_bytes: Some(shard),
            ..vdi(bytes)
        });
        assert_eq!(made.is_ok(), is_good, "{bytes} in {shard}: {made:?}");
    }
}

#[test]
fn a_refused_shard_size_names_one_that_works() {
    let error = shards_fit(64 << 40, 1 << 20).unwrap_err();
    assert!(error.hint.contains("1GiB"), "{}", error.hint);
    assert!(shards_fit(64 << 40, 1 << 30).is_ok());
}

fn add(path: &str, create_bytes: Option<u64>) -> ApiResult<DiskAdd> {
    DiskAddBody {
        path: path.into(),
        create_bytes,
        zone: None,
        force: false,
        accept_old: false,
    }
    .try_into()
}

#[test]
fn disk_paths_and_sizes() {
    for good in [
        "/dev/sdb",
        "/dev/disk/by-id/ata-X_1:0",
        "/srv/with space/ä.img",
        "/a/./b",
    ] {
        assert_eq!(add(good, None).unwrap().path, PathBuf::from(good));
    }
    let long = format!("/{}", "a".repeat(PATH_BYTES_MAX));
    for bad in ["", "sdb", "./a", "/dev/../etc/passwd", "/a\nb", "/a\0b", &long] {
        refused(add(bad, None), bad);
    }
    assert!(add("/a", Some(DISK_BYTES_MIN)).is_ok());
    for bad in [0, DISK_BYTES_MIN - 4096, DISK_BYTES_MIN + 512, u64::MAX] {
        refused(add("/a", Some(bad)), &bad.to_string());
    }
}

fn attach(target: &str, queues: Option<u16>) -> ApiResult<Attach> {
    AttachBody {
        target: target.into(),
        read_only: false,
        queues,
        snapshot: None,
    }
    .try_into()
}

#[test]
fn attachments() {
    let longest = format!("vhost-user:/{}", "a".repeat(106));
    for good in [
        "vhost-user:/run/weft/web01.sock",
        "nbd:unix:/run/weft/web01.nbd",
        "nbd:tcp:127.0.0.1:10809",
        "nbd:tcp:[::1]:10809",
        &longest,
    ] {
        assert_eq!(attach(good, None).unwrap().target.to_string(), good);
    }
    let too_long = format!("vhost-user:/{}", "a".repeat(107));
    for bad in [
        "",
        "/run/weft/web01.sock",
        "vhost-user:",
        "vhost-user:web01.sock",
        "vhost-user:/run/../etc/x",
        "vhost-user:/run/./x",
        "vhost-user:/run/x/",
        "vhost-user:/run/x\0",
        "nbd:/run/x",
        "nbd:unix:x",
        "nbd:tcp:127.0.0.1",
        "nbd:tcp:localhost:10809",
        "nbd:tcp:127.0.0.1:99999",
        "iscsi:/x",
        &too_long,
    ] {
        refused(attach(bad, None), bad);
        refused(
            Detach::try_from(DetachBody {
                target: Some(bad.into()),
            }),
            bad,
        );
    }
    for (target, queues, is_good) in [
        ("vhost-user:/a", 0, false),
        ("vhost-user:/a", 1, true),
        ("vhost-user:/a", QUEUES_MAX, true),
        ("vhost-user:/a", QUEUES_MAX + 1, false),
        ("nbd:unix:/a", 1, true),
        ("nbd:unix:/a", 2, false),
    ] {
        assert_eq!(attach(target, Some(queues)).is_ok(), is_good, "{target} {queues}");
    }
    assert_eq!(Detach::try_from(DetachBody::default()).unwrap().target, None);
}

proptest::proptest! {
    #[test]
    fn hostile_text_is_refused_without_a_panic(text in ".{0,200}") {
        let _ = text.parse::<Name>();
        let _ = add(&text, None);
        for prefix in ["", "vhost-user:", "vhost-user:/", "nbd:unix:/", "nbd:tcp:"] {
            if let Ok(made) = attach(&format!("{prefix}{text}"), None) {
                // What is kept in a record reads back as the same.
                assert_eq!(made.target.to_string().parse::<AttachTarget>().unwrap(), made.target);
            }
        }
    }
}
