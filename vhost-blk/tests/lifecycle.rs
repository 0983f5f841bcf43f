//! Connections, restarts and ring states, with a guest that does what drivers are not supposed to.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use support::MemoryPlane;
use support::guest::{Done, Guest};
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use weft_vhost_blk::{DeviceConfig, DeviceId, Server, VhostError};

const DISK_BYTES: usize = 1 << 20;

struct World {
    plane: Arc<MemoryPlane>,
    path: PathBuf,
    server: Option<Server>,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        World::with(config())
    }

    fn with(config: DeviceConfig) -> World {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.sock");
        let plane = MemoryPlane::new(DISK_BYTES);
        World {
            server: Some(serve(&path, config, &plane)),
            plane,
            path,
            _dir: dir,
        }
    }

    fn guest(&self) -> Guest {
        let mut guest = Guest::new();
        guest.start(&self.path);
        guest
    }
}

fn config() -> DeviceConfig {
    DeviceConfig {
        queue_size: 64,
        ..DeviceConfig::new(DISK_BYTES as u64, 512)
    }
}

fn serve(path: &Path, config: DeviceConfig, plane: &Arc<MemoryPlane>) -> Server {
    Server::start(path, DeviceId(1), config, Arc::clone(plane) as _).unwrap()
}

fn heads(done: &[Done]) -> Vec<u16> {
    assert!(done.iter().all(|done| done.status == 0), "{done:?}");
    done.iter().map(|done| done.head).collect()
}

fn check_round_trip(guest: &mut Guest, fill: u8) {
    guest.write(8, &[fill; 1024]);
    guest.finish(1);
    let head = guest.read(8, 1024);
    let done = guest.finish(1);
    assert_eq!(
        done,
        [Done {
            head,
            bytes: 1025,
            status: 0
        }]
    );
    assert_eq!(guest.content(head, 1024), [fill; 1024]);
}

#[test]
fn a_ring_works_with_and_without_event_indices() {
    let world = World::new();
    for features in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut guest = Guest::new();
        guest.features = guest.features & !(1 << VIRTIO_RING_F_EVENT_IDX) | features;
        guest.start(&world.path);
        for round in 0..50 {
            check_round_trip(&mut guest, round);
        }
    }
}

#[test]
fn a_kick_before_the_ring_is_enabled_is_not_lost() {
    let world = World::new();
    let mut guest = Guest::new();
    guest.connect(&world.path);
    let head = guest.write(0, &[1; 512]);
    guest.kick.read().ok();
    guest.enable(true);
    assert_eq!(heads(&guest.finish(1)), [head]);
}

#[test]
fn completions_out_of_order_are_published_in_order() {
    let world = World::new();
    let mut guest = world.guest();
    world.plane.change(|disk| {
        disk.is_holding = true;
        disk.is_reversed = true;
    });
    let submitted: Vec<u16> = (0..5).map(|i| guest.write(i, &[i as u8; 512])).collect();
    world.plane.wait_until(|disk| disk.taken == 5);
    assert_eq!(guest.used_index(), 0);
    world.plane.change(|disk| disk.is_holding = false);
    assert_eq!(heads(&guest.finish(5)), submitted);
}

#[test]
fn requests_in_flight_survive_the_death_of_the_server() {
    let mut world = World::new();
    let mut guest = world.guest();
    for round in 0..40u64 {
        guest.write(round, &[round as u8; 512]);
        guest.finish(1);
    }
    world.plane.change(|disk| disk.is_holding = true);
    let submitted: Vec<u16> = (100..105).map(|i| guest.write(i, &[i as u8; 512])).collect();
    world.plane.wait_until(|disk| disk.taken == 45);
    // The new life begins on the same path, with a disk that has seen none of the five.
    world.server.take().unwrap().stop();
    let old = std::mem::replace(&mut world.plane, MemoryPlane::new(DISK_BYTES));
    world.plane.disk.lock().unwrap().bytes = old.disk.lock().unwrap().bytes.clone();
    world.server = Some(serve(&world.path, config(), &world.plane));
    guest.start(&world.path);
    assert_eq!(heads(&guest.finish(5)), submitted);
    let disk = world.plane.disk.lock().unwrap();
    for sector in (0..40).chain(100..105) {
        assert_eq!(
            disk.bytes[sector * 512..][..512],
            [sector as u8; 512],
            "sector {sector}"
        );
    }
}

#[test]
fn restarts_at_any_moment_lose_nothing() {
    let mut world = World::new();
    let mut guest = world.guest();
    for round in 0..40u64 {
        world.plane.change(|disk| disk.is_reversed = round % 2 == 1);
        let submitted: Vec<u16> = (0..5)
            .map(|i| guest.write(round * 5 + i, &[(round * 5 + i) as u8; 512]))
            .collect();
        // Whatever the plane has done by now.
        world.server.take().unwrap().stop();
        world.server = Some(serve(&world.path, config(), &world.plane));
        guest.start(&world.path);
        assert_eq!(heads(&guest.finish(5)), submitted, "round {round}");
    }
    let disk = world.plane.disk.lock().unwrap();
    for sector in 0..200 {
        assert_eq!(
            disk.bytes[sector * 512..][..512],
            [sector as u8; 512],
            "sector {sector}"
        );
    }
}

#[test]
fn a_stopped_ring_tells_where_to_resume() {
    let world = World::new();
    let mut guest = world.guest();
    for _ in 0..3 {
        guest.write(0, &[7; 512]);
    }
    guest.finish(3);
    assert_eq!(guest.stop_ring(), 3, "drained: at the available index");
    guest.start_again();
    world.plane.change(|disk| disk.is_holding = true);
    let submitted = [guest.write(1, &[8; 512]), guest.write(2, &[9; 512])];
    world.plane.wait_until(|disk| disk.taken == 5);
    assert_eq!(
        guest.stop_ring(),
        3,
        "let go of with two in flight: at the used index"
    );
    world.plane.change(|disk| disk.is_holding = false);
    guest.start_again();
    assert_eq!(heads(&guest.finish(2)), submitted);
    world.plane.wait_until(|disk| disk.taken == 7);
}

#[test]
fn disabled_rings_rest_and_go_on() {
    let world = World::new();
    let mut guest = world.guest();
    check_round_trip(&mut guest, 3);
    guest.enable(false);
    let head = guest.write(0, &[1; 512]);
    assert_eq!(guest.used_index(), 2);
    guest.enable(true);
    assert_eq!(heads(&guest.finish(1)), [head]);
}

#[test]
fn new_memory_and_interrupts_come_under_a_running_ring() {
    let world = World::new();
    let mut guest = world.guest();
    world.plane.change(|disk| disk.is_holding = true);
    let submitted = [guest.write(1, &[8; 512]), guest.write(2, &[9; 512])];
    world.plane.wait_until(|disk| disk.taken == 2);
    guest.send_memory();
    guest.swap_call();
    world.plane.change(|disk| disk.is_holding = false);
    assert_eq!(heads(&guest.finish(2)), submitted);
}

#[test]
fn a_guest_without_flush_gets_write_through() {
    let world = World::new();
    let mut guest = Guest::new();
    guest.features &= !(1 << VIRTIO_BLK_F_FLUSH);
    guest.start(&world.path);
    guest.write(0, &[1; 512]);
    guest.finish(1);
    assert_eq!(world.plane.disk.lock().unwrap().fua_writes, 1);
}

#[test]
fn a_read_only_disk_refuses_writes_and_nothing_else() {
    let world = World::with(DeviceConfig {
        is_read_only: true,
        ..config()
    });
    let mut guest = world.guest();
    guest.write(0, &[1; 512]);
    assert_eq!(guest.finish(1)[0].status, 1);
    let head = guest.read(0, 512);
    assert_eq!(heads(&guest.finish(1)), [head]);
    assert_eq!(guest.content(head, 512), [0; 512]);
    guest.flush();
    heads(&guest.finish(1));
}

#[test]
fn a_resize_is_told_and_holds_at_once() {
    let world = World::new();
    let server = world.server.as_ref().unwrap();
    let mut guest = world.guest();
    let mut news = guest.take_news();
    assert_eq!(guest.capacity_sectors(), DISK_BYTES as u64 / 512);
    server.resize(DISK_BYTES as u64 / 2);
    let mut message = [0; 12];
    news.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.capacity_sectors(), DISK_BYTES as u64 / 1024);
    guest.read(DISK_BYTES as u64 / 1024, 512);
    assert_eq!(guest.finish(1)[0].status, 1);
}

#[test]
fn a_second_frontend_waits_for_the_first_to_go() {
    let world = World::new();
    let mut first = world.guest();
    let waiting = std::thread::spawn({
        let path = world.path.clone();
        move || {
            let mut second = Guest::new();
            second.start(&path);
            check_round_trip(&mut second, 2);
        }
    });
    check_round_trip(&mut first, 1);
    assert_eq!(world.plane.disk.lock().unwrap().rings_started, 1);
    drop(first);
    waiting.join().unwrap();
}

#[test]
fn hostile_frontends_lose_their_connection_and_nobody_else_anything() {
    let world = World::new();
    let garbage: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 5000],
        // A header that announces 4 GiB.
        &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        // SET_MEM_TABLE of one region without its file.
        &[5, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        // SET_VRING_NUM of queue 77.
        &[8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 77, 0, 0, 0, 4, 0, 0, 0],
        // SET_VRING_KICK without a file.
        &[12, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ];
    for bytes in garbage {
        let mut stream = UnixStream::connect(&world.path).unwrap();
        stream.write_all(bytes).unwrap();
        // Without its end of the stream, the server has to hang up by itself.
        let mut rest = Vec::new();
        if let Err(error) = stream.read_to_end(&mut rest) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
    // Half a message, then gone.
    UnixStream::connect(&world.path)
        .unwrap()
        .write_all(&[1, 0, 0, 0, 1])
        .unwrap();
    check_round_trip(&mut world.guest(), 4);
}

#[test]
fn a_ring_outside_memory_or_run_away_is_not_served() {
    let world = World::new();
    let mut guest = world.guest();
    check_round_trip(&mut guest, 5);
    guest.run_away();
    world.plane.change(|_| {});
    guest.stop_ring();
    drop(guest);
    check_round_trip(&mut world.guest(), 6);
}

#[test]
fn a_guest_that_loses_its_memory_hurts_nobody() {
    let world = World::new();
    let neighbour = World::new();
    let mut good = neighbour.guest();
    let mut guest = world.guest();
    check_round_trip(&mut guest, 1);
    world.plane.change(|disk| disk.is_holding = true);
    guest.write(1, &[8; 512]);
    guest.read(1, 512);
    world.plane.wait_until(|disk| disk.taken == 4);
    guest.shrink_memory();
    // The completion is for memory that is no more.
    world.plane.change(|disk| disk.is_holding = false);
    world.plane.wait_until(|disk| disk.requests == 4);
    guest.kick.write(1).unwrap();
    check_round_trip(&mut good, 2);
    guest.forget();
    check_round_trip(&mut world.guest(), 3);
}

#[test]
fn a_live_socket_is_not_taken_and_a_dead_one_is() {
    let world = World::new();
    let plane = MemoryPlane::new(512);
    let second = |path: &Path| Server::start(path, DeviceId(2), config(), Arc::clone(&plane) as _);
    assert!(matches!(second(&world.path), Err(VhostError::SocketInUse(_))));
    let file = world.path.with_extension("txt");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(second(&file), Err(VhostError::NotASocket(_))));
    let stale = world.path.with_extension("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    second(&stale).unwrap().stop();
    check_round_trip(&mut world.guest(), 7);
}

#[test]
fn stopping_the_server_disconnects_its_guest() {
    let mut world = World::new();
    let mut guest = world.guest();
    check_round_trip(&mut guest, 1);
    world.server.take().unwrap().stop();
    assert!(guest.frontend().set_vring_enable(0, true).is_err());
}
