//! The device as a driver that others wrote uses it: the `blkio` crate's virtio-blk over vhost-user.
#![allow(unsafe_code)] // the driver's buffers are raw memory

mod support;

use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use support::MemoryPlane;
use weft_vhost_blk::{DeviceConfig, DeviceId, Server};

const DISK_BYTES: usize = 4 << 20;
const QUEUES: u16 = 3;

fn config() -> DeviceConfig {
    DeviceConfig {
        queues: QUEUES,
        queue_size: 64,
        serial: "weft-test".to_owned(),
        ..DeviceConfig::new(DISK_BYTES as u64, 512)
    }
}

struct Client {
    queues: Vec<Blkioq>,
    region: MemoryRegion,
    blkio: Blkio,
}

impl Client {
    fn connect(path: &Path, queues: u16) -> Client {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", path.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        blkio.set_i32("num-queues", i32::from(queues)).unwrap();
        blkio.set_i32("queue-size", 128).unwrap();
        let started = blkio.start().unwrap();
        let region = blkio.alloc_mem_region(1 << 20).unwrap();
        blkio.map_mem_region(&region).unwrap();
        Client {
            queues: started.queues,
            region,
            blkio,
        }
    }

    fn memory(&mut self) -> &mut [u8] {
        // SAFETY: the region is mapped as long as the client lives, and no request is under way when tests look.
        unsafe { std::slice::from_raw_parts_mut(self.region.addr as *mut u8, self.region.len) }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        (self.region.addr + offset) as *mut u8
    }

    /// Waits for `count` completions of a queue; all succeed.
    fn finish(&mut self, queue: usize, count: usize) {
        let mut completions: Vec<MaybeUninit<Completion>> =
            (0..count).map(|_| MaybeUninit::uninit()).collect();
        let mut done = 0;
        while done < count {
            let got = self.queues[queue]
                .do_io(&mut completions[done..], 1, None, None)
                .unwrap();
            for completion in &completions[done..done + got] {
                // SAFETY: do_io filled the first `got`.
                assert_eq!(unsafe { completion.assume_init_ref() }.ret, 0);
            }
            done += got;
        }
    }
}

/// xorshift: tests want the same numbers every time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn exercise(client: &mut Client, model: &mut [u8], random: &mut Random, rounds: usize) {
    const SLOT: usize = 32 << 10;
    for _ in 0..rounds {
        // Up to 16 requests at once per queue; the writes of one round do not overlap: each has its own stretch.
        for queue in 0..client.queues.len() {
            let count = 1 + random.below(16) as usize;
            let mut reads = Vec::new();
            for slot in 0..count {
                let stretch = (queue * 16 + slot) * (DISK_BYTES / 64);
                let offset = stretch + 512 * random.below((DISK_BYTES / 64 - SLOT) as u64 / 512) as usize;
                let length = 512 * (1 + random.below((SLOT / 512) as u64)) as usize;
                let buffer = client.at(slot * SLOT);
                let blkioq = &mut client.queues[queue];
                match random.below(5) {
                    0 => {
                        model[offset..offset + length].fill(0);
                        blkioq.write_zeroes(offset as u64, length as u64, 0, ReqFlags::empty());
                    }
                    1 => {
                        model[offset..offset + length].fill(0);
                        blkioq.discard(offset as u64, length as u64, 0, ReqFlags::empty());
                    }
                    2 => {
                        reads.push((slot, offset, length));
                        blkioq.read(offset as u64, buffer, length, 0, ReqFlags::empty());
                    }
                    _ => {
                        let seed = random.below(u64::MAX);
                        let content: Vec<u8> =
                            (0..length).map(|i| (seed >> (i % 8)) as u8 ^ i as u8).collect();
                        client.memory()[slot * SLOT..][..length].copy_from_slice(&content);
                        model[offset..offset + length].copy_from_slice(&content);
                        let buffer = client.at(slot * SLOT);
                        client.queues[queue].write(offset as u64, buffer, length, 0, ReqFlags::empty());
                    }
                }
            }
            client.finish(queue, count);
            for (slot, offset, length) in reads {
                assert_eq!(
                    &client.memory()[slot * SLOT..][..length],
                    &model[offset..offset + length],
                    "{length} bytes at {offset}"
                );
            }
        }
    }
    client.queues[0].flush(0, ReqFlags::empty());
    client.finish(0, 1);
}

#[test]
fn a_foreign_driver_does_not_mind_the_order_of_completion() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let plane = MemoryPlane::new(DISK_BYTES);
    plane.change(|disk| disk.is_reversed = true);
    let _server = Server::start(&path, DeviceId(1), config(), Arc::clone(&plane) as _).unwrap();
    let mut model = vec![0; DISK_BYTES];
    let mut client = Client::connect(&path, QUEUES);
    exercise(&mut client, &mut model, &mut Random(0xbac), 40);
    assert_eq!(plane.disk.lock().unwrap().bytes, model);
}

#[test]
fn the_device_describes_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let plane = MemoryPlane::new(DISK_BYTES);
    let config = DeviceConfig {
        discard_bytes_max: 64 << 20,
        ..DeviceConfig::new(DISK_BYTES as u64, 4096)
    };
    let _server = Server::start(&path, DeviceId(1), config, plane as _).unwrap();
    let client = Client::connect(&path, 1);
    let numbers = [
        "max-segments",
        "max-segment-len",
        "request-alignment",
        "optimal-io-size",
        "optimal-io-alignment",
    ]
    .map(|name| client.blkio.get_i32(name).unwrap());
    assert_eq!(numbers, [126, 266_240, 4096, 1 << 20, 4096]);
    assert_eq!(client.blkio.get_u64("max-discard-len").unwrap(), 64 << 20);
    assert_eq!(client.blkio.get_u64("max-write-zeroes-len").unwrap(), 1 << 30);
    assert!(client.blkio.get_bool("flush-needed").unwrap());
}

#[test]
fn a_foreign_driver_reads_what_it_wrote_over_three_connections() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let plane = MemoryPlane::new(DISK_BYTES);
    let server = Server::start(&path, DeviceId(1), config(), Arc::clone(&plane) as _).unwrap();
    let mut model = vec![0; DISK_BYTES];
    let mut random = Random(0x5eed);
    for queues in [QUEUES, 1, 2] {
        let mut client = Client::connect(&path, queues);
        assert_eq!(client.blkio.get_u64("capacity").unwrap(), DISK_BYTES as u64);
        exercise(&mut client, &mut model, &mut random, 40);
    }
    let disk = plane.disk.lock().unwrap();
    assert_eq!(disk.bytes, model);
    assert_eq!(disk.flushes, 3);
    assert!(disk.discards > 0);
    assert_eq!(disk.fua_writes, 0, "FLUSH was agreed on: the cache is write-back");
    drop(disk);
    server.stop();
    assert!(!path.exists());
}
