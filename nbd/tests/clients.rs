//! Real clients: qemu-img, qemu-io, nbdinfo, nbdcopy and fio against a sparse disk in memory.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use support::{MemoryDisk, Served, pattern, run, try_run};
use weft_nbd::{Address, Config, Exports, Server};

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_img_converts_to_and_from() {
    let served = Served::new(MemoryDisk::new(64 * MIB, 512));
    let (image, back) = (served.file("image.raw"), served.file("back.raw"));
    let mut content = vec![0; 64 * MIB as usize];
    content[MIB as usize..5 * MIB as usize].copy_from_slice(&pattern(1, 4 * MIB as usize));
    content[63 * MIB as usize..].copy_from_slice(&pattern(2, MIB as usize));
    std::fs::write(&image, &content).unwrap();

    run(
        "qemu-img",
        &["convert", "-n", "-f", "raw", "-O", "raw", &image, &served.uri()],
    )
    .await;
    assert_eq!(
        served.disk.allocated_blocks(),
        5 * 256,
        "zeros did not arrive as data"
    );
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &image, &served.uri()],
    )
    .await;
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &served.uri(), &back],
    )
    .await;
    assert!(
        std::fs::read(&back).unwrap() == content,
        "what came back is not what was sent"
    );
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allocation_is_seen_by_qemu_img_map_and_nbdinfo() {
    let served = Served::new(MemoryDisk::new(100 * MIB, 4096));
    served.disk.fill(8 * MIB, &pattern(3, MIB as usize));
    served.disk.fill(40 * MIB + 4096, &pattern(4, 4096));

    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &served.uri()]).await;
    let lines: Vec<_> = map
        .lines()
        .filter(|line| line.contains("\"data\": true"))
        .collect();
    assert_eq!(lines.len(), 2, "{map}");
    assert!(
        lines[0].contains("\"start\": 8388608, \"length\": 1048576"),
        "{map}"
    );
    assert!(
        lines[1].contains("\"start\": 41947136, \"length\": 4096"),
        "{map}"
    );

    let map = run("nbdinfo", &["--map", &served.uri()]).await;
    let rows: Vec<Vec<_>> = map
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let expected = [
        ["0", "8388608", "3", "hole,zero"],
        ["8388608", "1048576", "0", "data"],
        ["9437184", "32509952", "3", "hole,zero"],
        ["41947136", "4096", "0", "data"],
        ["41951232", "62906368", "3", "hole,zero"],
    ];
    assert_eq!(rows, expected, "{map}");
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_sees_what_is_offered() {
    let served = Served::new(MemoryDisk::new(3 * MIB + 4096, 4096));
    served
        .exports
        .add("other", Arc::new(MemoryDisk::new(MIB, 512).read_only()))
        .unwrap();
    let said = run("nbdinfo", &[&served.uri()]).await;
    for fact in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        "export=\"disk\"",
        "description: a disk in memory",
        "export-size: 3149824",
        "base:allocation",
        "is_read_only: false",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "can_cache: false",
        "block_size_minimum: 4096",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(said.contains(fact), "{fact:?} is missing in\n{said}");
    }
    let list = format!("nbd+unix:///?socket={}", served.socket().display());
    let said = run("nbdinfo", &["--list", &list]).await;
    assert!(
        said.contains("export=\"disk\"") && said.contains("export=\"other\""),
        "{said}"
    );
    assert!(said.contains("is_read_only: true"), "{said}");
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_copies_both_ways_on_four_connections() {
    let served = Served::new(MemoryDisk::new(48 * MIB, 512));
    let (image, back) = (served.file("image.raw"), served.file("back.raw"));
    let mut content = pattern(5, 48 * MIB as usize);
    content[20 * MIB as usize..30 * MIB as usize].fill(0);
    std::fs::write(&image, &content).unwrap();
    run("nbdcopy", &["--connections=4", "--flush", &image, &served.uri()]).await;
    assert!(
        served.disk.flushes.load(Ordering::Relaxed) > 0,
        "--flush did not flush"
    );
    run("nbdcopy", &["--connections=4", &served.uri(), &back]).await;
    assert!(
        std::fs::read(&back).unwrap() == content,
        "what came back is not what was sent"
    );
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fio_verifies_random_writes_over_tcp() {
    let exports = Exports::new();
    exports
        .add("disk", Arc::new(MemoryDisk::new(16 * MIB, 512)))
        .unwrap();
    let address = Address::Tcp("127.0.0.1:0".parse().unwrap());
    let server = Server::bind(&address, exports, Config::default()).unwrap();
    let Address::Tcp(address) = *server.address() else {
        panic!("bound to {:?}", server.address());
    };
    let uri = format!("--uri=nbd://{address}/disk");
    let job = "--name=j --ioengine=nbd --rw=randrw --bsrange=512-64k --blockalign=512 --iodepth=16 --size=16m \
               --io_size=24m --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed=7 --fsync=32";
    let mut arguments: Vec<_> = job.split_whitespace().collect();
    arguments.push(&uri);
    run("fio", &arguments).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_io_discards_zeroes_flushes_and_forces() {
    let served = Served::new(MemoryDisk::new(16 * MIB, 512));
    served.disk.fill(0, &pattern(6, 4 * MIB as usize));
    let uri = served.uri();
    let said = run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-d",
            "unmap",
            "-t",
            "writeback",
            &uri,
            "-c",
            "write -P 0x11 512 1536",
            "-c",
            "write -f -P 0x22 8M 64k",
            "-c",
            "write -z -u 1M 1M",
            "-c",
            "write -z -f 2M 4k",
            "-c",
            "discard 3M 64k",
            "-c",
            "flush",
            "-c",
            "read -P 0x11 512 1536",
            "-c",
            "read -P 0x22 8M 64k",
            "-c",
            "read -P 0 1M 1M",
            "-c",
            "read -P 0 2M 4k",
            "-c",
            "read -P 0 3M 64k",
        ],
    )
    .await;
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!(count(&served.disk.zeroes), 2, "{said}");
    assert_eq!(count(&served.disk.trims), 1, "{said}");
    assert_eq!(count(&served.disk.fuas), 2, "{said}");
    assert!(count(&served.disk.flushes) > 0, "{said}");
    assert_eq!(served.disk.content(512, 4), [0x11; 4]);
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_read_is_an_error_for_the_client_with_its_reason() {
    let mut disk = MemoryDisk::new(MIB, 512);
    disk.bad_offset = Some(4096);
    let served = Served::new(disk);
    let output = try_run(
        "qemu-io",
        &["-f", "raw", "-r", &served.uri(), "-c", "read 4096 512"],
    )
    .await;
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("Input/output error"), "{said}");
    let said = run(
        "qemu-io",
        &["-f", "raw", "-r", &served.uri(), "-c", "read -P 0 8192 512"],
    )
    .await;
    assert!(said.contains("read 512/512 bytes"), "{said}");
    served.server.stop().await;
}
