//! How a server begins and ends, and how exports come and go under it.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use support::{MemoryDisk, Served, raw::Raw};
use tokio::sync::Semaphore;
use weft_nbd::{Address, BindError, Config, Exports, NameError, Server};

const MIB: u64 = 1 << 20;

fn gated() -> MemoryDisk {
    let mut disk = MemoryDisk::new(MIB, 512);
    disk.gate = Some(Semaphore::new(0));
    disk
}

fn bind(address: &Address, config: Config) -> Result<Server, BindError> {
    Server::bind::<MemoryDisk>(address, Exports::new(), config)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_lets_requests_in_flight_finish() {
    let served = Served::new(gated());
    let socket = served.socket();
    let mut client = Raw::open(&socket, "disk").await;
    let mut idle = Raw::open(&socket, "disk").await;
    let mut haggling = Raw::greet(&socket, 3).await;
    client.request(0, 0, 1, 0, 512).await;
    served.disk.begun.acquire().await.unwrap().forget();

    let stopping = tokio::spawn(served.server.stop());
    idle.expect_end().await;
    haggling.expect_end().await;
    served.disk.gate.as_ref().unwrap().add_permits(1);
    assert_eq!(client.simple_reply().await, (0, 1));
    assert_eq!(client.receive(512).await, vec![0; 512]);
    client.expect_end().await;
    stopping.await.unwrap();
    assert!(!socket.exists(), "the socket's file stayed behind");
}

#[tokio::test]
async fn stop_does_not_wait_for_ever() {
    let config = Config {
        grace: Duration::from_millis(50),
        ..Config::default()
    };
    let served = Served::with(gated(), config);
    let mut client = Raw::open(&served.socket(), "disk").await;
    client.request(0, 0, 1, 0, 512).await;
    served.disk.begun.acquire().await.unwrap().forget();
    served.server.stop().await;
    client.expect_end().await;
    assert_eq!(
        Arc::strong_count(&served.disk),
        2,
        "a request still holds the export"
    );
}

#[tokio::test]
async fn a_removed_export_is_let_go_of() {
    let served = Served::new(MemoryDisk::new(MIB, 512));
    let other = Arc::new(MemoryDisk::new(2 * MIB, 512));
    served.exports.add("other", Arc::clone(&other)).unwrap();
    let mut client = Raw::open(&served.socket(), "disk").await;
    let mut stays = Raw::open(&served.socket(), "other").await;
    assert_eq!(client.read(0, 512).await, Ok(vec![0; 512]));

    assert!(served.exports.remove("disk").await);
    assert_eq!(
        Arc::strong_count(&served.disk),
        1,
        "remove returned, and something holds the export"
    );
    client.expect_end().await;
    assert!(!served.exports.remove("disk").await);
    assert_eq!(served.exports.names(), ["other"]);
    assert_eq!(stays.read(0, 512).await, Ok(vec![0; 512]));
    served.server.stop().await;
}

#[tokio::test]
async fn a_new_size_is_seen_by_new_connections() {
    let served = Served::new(MemoryDisk::new(MIB, 512));
    let mut old = Raw::open(&served.socket(), "disk").await;
    served.disk.info.lock().unwrap().bytes = 2 * MIB;
    let mut new = Raw::greet(&served.socket(), 3).await;
    assert_eq!(new.go("disk").await, 2 * MIB);
    assert_eq!(new.read(MIB, 512).await, Ok(vec![0; 512]));
    assert_eq!(
        old.read(MIB, 512).await,
        Err(22),
        "a connection keeps to what it was told"
    );
    served.server.stop().await;
}

#[tokio::test]
async fn connections_are_bounded() {
    let config = Config {
        connections_max: 1,
        ..Config::default()
    };
    let served = Served::with(MemoryDisk::new(MIB, 512), config);
    let mut first = Raw::open(&served.socket(), "disk").await;
    let mut second = tokio::net::UnixStream::connect(served.socket()).await.unwrap();
    let mut said = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut second, &mut said)
        .await
        .unwrap();
    assert_eq!(said, b"", "a client too many was greeted");
    assert_eq!(first.read(0, 512).await, Ok(vec![0; 512]));
    served.server.stop().await;
}

#[tokio::test]
async fn a_socket_is_taken_over_only_from_the_dead() {
    let served = Served::new(MemoryDisk::new(MIB, 512));
    let address = Address::Unix(served.socket());
    assert!(matches!(
        bind(&address, Config::default()),
        Err(BindError::InUse(_))
    ));
    let mode = std::fs::metadata(served.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    served.server.stop().await;

    // A listener that was dropped without removing its file: what a crash leaves.
    drop(UnixListener::bind(served.directory.path().join("nbd.sock")).unwrap());
    let server = bind(&address, Config::default()).unwrap();
    server.stop().await;

    let file = served.directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(
        bind(&Address::Unix(file.clone()), Config::default()),
        Err(BindError::NotASocket(_))
    ));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

#[tokio::test]
async fn a_file_that_took_the_sockets_place_is_left_alone() {
    let served = Served::new(MemoryDisk::new(MIB, 512));
    std::fs::remove_file(served.socket()).unwrap();
    std::fs::write(served.socket(), "someone else's").unwrap();
    let socket = served.socket();
    served.server.stop().await;
    assert_eq!(std::fs::read(socket).unwrap(), b"someone else's");
}

#[tokio::test]
async fn the_network_has_to_be_asked_for() {
    let anywhere = Address::Tcp("0.0.0.0:0".parse().unwrap());
    assert!(matches!(
        bind(&anywhere, Config::default()),
        Err(BindError::NotLoopback(_))
    ));
    let config = Config {
        is_remote_allowed: true,
        ..Config::default()
    };
    bind(&anywhere, config).unwrap().stop().await;
    let config = Config {
        bytes_max: 1 << 20,
        ..Config::default()
    };
    assert!(matches!(
        bind(&anywhere, config),
        Err(BindError::Bound {
            name: "bytes_max",
            ..
        })
    ));
}

#[test]
fn names_are_names_and_are_taken_once() {
    let exports = Exports::new();
    let disk = Arc::new(MemoryDisk::new(MIB, 512));
    exports.add("disk", Arc::clone(&disk)).unwrap();
    assert_eq!(
        exports.add("disk", Arc::clone(&disk)),
        Err(NameError::Taken("disk".to_owned()))
    );
    assert_eq!(
        exports.add("a\0b", Arc::clone(&disk)),
        Err(NameError::NotAName(3))
    );
    assert_eq!(
        exports.add(&"x".repeat(4097), disk),
        Err(NameError::NotAName(4097))
    );
}
