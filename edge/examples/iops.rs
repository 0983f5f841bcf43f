//! 4 KiB random reads (and writes with `--write`, and writes with a sync each with `--sync`) through the ring, at
//! depth 1 and 32, to catch gross errors against what fio says of the same disk:
//!
//! ```text
//! cargo run --release -p weft-edge --features uring --example iops -- FILE [--write|--sync] [SECONDS]
//! ```
//!
//! FILE is made (1 GiB, fully written) where it does not exist, and is overwritten by `--write` where it does.

use std::path::Path;
use std::time::{Duration, Instant};

use weft_edge::file::{Access, OsFile, create_preallocated};
use weft_edge::uring::{Buf, Event, Pool, PoolConfig, Ring, RingConfig, Wait};
use weft_edge::{AlignedBlock, BlockFile, DiskOp, IoId};

const FILE_BYTES: u64 = 1 << 30;

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Read,
    Write,
    WriteSync,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).peekable();
    let path = arguments
        .next()
        .ok_or("usage: iops FILE [--write|--sync] [SECONDS]")?;
    let mode = match arguments.peek().map(String::as_str) {
        Some("--write") => Mode::Write,
        Some("--sync") => Mode::WriteSync,
        _ => Mode::Read,
    };
    if mode != Mode::Read {
        arguments.next();
    }
    let seconds: f64 = arguments.next().map_or(Ok(2.0), |text| text.parse())?;
    let path = Path::new(&path);
    if !path.exists() {
        create_preallocated(path, FILE_BYTES)?;
        let mut file = OsFile::open(path, Access::ReadWrite)?;
        let content: Vec<u8> = (0..1 << 20)
            .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        for offset in (0..FILE_BYTES).step_by(content.len()) {
            file.write_at(offset, &content)?;
        }
        file.sync()?;
    }
    for depth in [1, 32] {
        measure(path, mode, depth, Duration::from_secs_f64(seconds))?;
    }
    Ok(())
}

fn measure(path: &Path, mode: Mode, depth: usize, time: Duration) -> Result<(), Box<dyn std::error::Error>> {
    let disk = OsFile::open(path, Access::ReadWrite)?;
    let blocks = disk.bytes() / 4096;
    let pool = Pool::new(PoolConfig::of_bytes(64 << 20))?;
    let mut ring = Ring::new(RingConfig { entries: 64, pool })?;
    let slot = ring.add_disk(disk.into_file(), &path.display().to_string())?;
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |id: u64| -> DiskOp<Buf> {
        // Xorshift: enough to spread the reads.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let offset = random % blocks * 4096;
        match mode {
            Mode::Read => DiskOp::Read { offset, bytes: 4096 },
            Mode::WriteSync if id % 2 == 1 => DiskOp::Sync,
            Mode::Write | Mode::WriteSync => DiskOp::Write {
                offset,
                header: AlignedBlock::zeroed(),
                data: Vec::new(),
            },
        }
    };
    let (cpu_before, started) = (cpu_time(), Instant::now());
    let (mut id, mut done, mut events) = (0u64, 0u64, Vec::new());
    let mut turns = 0u64;
    for _ in 0..depth {
        ring.submit(slot, IoId(id), next(id));
        id += 1;
    }
    while started.elapsed() < time {
        ring.turn(Wait::Forever, &mut events);
        turns += 1;
        for event in events.drain(..) {
            let Event::Disk(_, completion) = event else {
                continue;
            };
            completion.result?;
            done += 1;
            ring.submit(slot, IoId(id), next(id));
            id += 1;
        }
    }
    let (elapsed, cpu) = (
        started.elapsed().as_secs_f64(),
        (cpu_time() - cpu_before).as_secs_f64(),
    );
    let operations = if mode == Mode::WriteSync { done / 2 } else { done } as f64;
    println!(
        "depth {depth:2}: {:8.0} IOPS, {:6.1} us each, {:5.2} us of CPU, {:4.1} per turn, {:?}",
        operations / elapsed,
        elapsed * 1e6 * depth as f64 / operations,
        cpu * 1e6 / operations,
        done as f64 / turns as f64,
        ring.traits(),
    );
    Ok(())
}

/// User and system time of this process.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
