use proptest::prelude::*;

use super::*;

fn session(bytes: u64, sector_bytes: u32) -> Session {
    Session {
        info: ExportInfo {
            bytes,
            sector_bytes,
            is_read_only: false,
            description: String::new(),
        },
        is_structured: true,
        has_allocation: true,
    }
}

fn header(kind: u16, flags: u16, offset: u64, length: u32) -> Header {
    Header {
        flags,
        kind,
        cookie: 7,
        offset,
        length,
    }
}

fn errno_of(header: Header, session: &Session) -> u32 {
    header.check(session).map_or_else(|refusal| refusal.errno, |_| 0)
}

#[test]
fn each_refusal_has_the_errno_of_the_specification() {
    use crate::proto::errno::{EINVAL, ENOSPC, EOVERFLOW, EPERM};
    const BYTES: u64 = 1 << 40;
    let cases = [
        ("read", 0, 0, 0, 4096, 0),
        ("read to the end", 0, 0, BYTES - 4096, 4096, 0),
        ("read past the end", 0, 0, BYTES - 4096, 8192, EINVAL),
        (
            "read at the end of all numbers",
            0,
            0,
            u64::MAX - 4095,
            4096,
            EINVAL,
        ),
        ("empty read", 0, 0, 0, 0, EINVAL),
        ("misaligned offset", 0, 0, 512, 4096, EINVAL),
        ("misaligned length", 0, 0, 0, 512, EINVAL),
        ("largest read", 0, 0, 0, 32 << 20, 0),
        ("too large a read", 0, 0, 0, (32 << 20) + 4096, EOVERFLOW),
        ("DF read", 0, command_flag::DF, 0, 4096, 0),
        ("FUA goes with everything", 0, command_flag::FUA, 0, 4096, 0),
        ("NO_HOLE read", 0, command_flag::NO_HOLE, 0, 4096, EINVAL),
        ("write", 1, command_flag::FUA, 0, 4096, 0),
        ("write past the end", 1, 0, BYTES, 4096, ENOSPC),
        ("misaligned write", 1, 0, 1, 4096, EINVAL),
        ("too large a write", 1, 0, 0, (32 << 20) + 4096, EOVERFLOW),
        ("DF write", 1, command_flag::DF, 0, 4096, EINVAL),
        ("flush", 3, 0, 0, 0, 0),
        ("flush with a range", 3, 0, 0, 4096, EINVAL),
        ("large trim", 4, 0, 0, 3 << 30, 0),
        ("trim past the end", 4, 0, BYTES - 4096, 1 << 30, ENOSPC),
        ("CACHE is not offered", 5, 0, 0, 4096, EINVAL),
        (
            "zeroes",
            6,
            command_flag::NO_HOLE | command_flag::FAST_ZERO,
            0,
            3 << 30,
            0,
        ),
        ("status", 7, command_flag::REQ_ONE, 0, 3 << 30, 0),
        ("status past the end", 7, 0, BYTES, 4096, EINVAL),
        ("RESIZE is not offered", 8, 0, 4096, 0, EINVAL),
        ("unknown flag", 0, 1 << 9, 0, 4096, EINVAL),
        ("unknown command", 77, 0, 0, 4096, EINVAL),
    ];
    for (what, kind, flags, offset, length, errno) in cases {
        assert_eq!(
            errno_of(header(kind, flags, offset, length), &session(BYTES, 4096)),
            errno,
            "{what}"
        );
    }
    let mut read_only = session(BYTES, 4096);
    read_only.info.is_read_only = true;
    for kind in [1, 4, 6] {
        assert_eq!(
            errno_of(header(kind, 0, 0, 4096), &read_only),
            EPERM,
            "command {kind} on read-only"
        );
    }
    let plain = Session {
        is_structured: false,
        has_allocation: false,
        ..session(BYTES, 512)
    };
    assert_eq!(
        errno_of(header(7, 0, 0, 4096), &plain),
        EINVAL,
        "status without a context"
    );
    assert_eq!(
        errno_of(header(0, command_flag::DF, 0, 4096), &plain),
        EINVAL,
        "DF without structured"
    );
    assert_eq!(errno_of(header(0, 0, 512, 512), &plain), 0, "one small sector");
}

#[test]
fn a_disconnect_is_never_refused() {
    let parsed = header(command::DISC, 0xffff, 1, 1).check(&session(512, 512));
    assert_eq!(parsed, Ok(Request::Disconnect));
}

proptest! {
    #[test]
    fn what_passes_is_inside_the_export(
        kind in 0_u16..10, flags in any::<u16>(), offset in any::<u64>(), length in any::<u32>(),
        sectors in 0_u64..1 << 50, is_large in any::<bool>(), is_near in any::<bool>(),
    ) {
        let sector_bytes = if is_large { 4096 } else { 512 };
        let session = session(sectors * u64::from(sector_bytes), sector_bytes);
        let sector = u64::from(sector_bytes);
        let (offset, length) = if is_near {
            (offset % session.info.bytes.max(1) / sector * sector, length / sector_bytes * sector_bytes)
        } else {
            (offset, length)
        };
        let header = header(kind, flags, offset, length);
        if let Ok(request) = header.check(&session) {
            prop_assert!(request.memory_bytes() <= PAYLOAD_BYTES_MAX);
            if !matches!(request, Request::Flush | Request::Disconnect) {
                prop_assert!(length > 0);
                prop_assert!(offset.checked_add(length.into()).unwrap() <= session.info.bytes);
                prop_assert!(offset % sector == 0 && u64::from(length) % sector == 0);
            }
        }
    }

    #[test]
    fn any_bytes_are_a_header_or_not(bytes in any::<[u8; HEADER_BYTES]>(), has_magic in any::<bool>()) {
        let mut bytes = bytes;
        if has_magic {
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        }
        let is_header = Header::parse(&bytes).is_ok();
        prop_assert_eq!(is_header, bytes[..4] == REQUEST_MAGIC.to_be_bytes());
    }
}
