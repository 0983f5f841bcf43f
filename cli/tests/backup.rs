//! `weft backup` as a process: directories, a server that speaks S3, an NBD server, keys, runs that are killed.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use serde_json::Value;
use tempfile::TempDir;

const MIB: usize = 1 << 20;
const ACCESS: (&str, &str) = ("weft-test", "only-for-this-test");

/// A folder for images and repositories.
struct World {
    folder: TempDir,
    /// Of a server that speaks S3.
    environment: Vec<(&'static str, String)>,
}

impl World {
    fn new() -> World {
        World {
            folder: tempfile::tempdir().unwrap(),
            environment: Vec::new(),
        }
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("AWS_")) {
            command.env_remove(name);
        }
        command
            .arg("backup")
            .args(arguments.split_whitespace())
            .env("WEFT_SOCKET", "/nonexistent/s")
            .envs(self.environment.iter().map(|(name, value)| (*name, value)))
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The answer of a command that must succeed.
    fn json(&self, arguments: &str) -> Value {
        let output = self.run(&format!("{arguments} --json"));
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments}: {error}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Exit code and message of a command that must fail.
    fn refused(&self, arguments: &str) -> (i32, String) {
        let output = self.run(arguments);
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(
            line.starts_with("weft: ") && line.lines().count() == 1,
            "{arguments}: {line:?}"
        );
        (output.status.code().unwrap(), line)
    }

    /// An image with holes, text, and data that does not shrink.
    fn image(&self, name: &str, seed: u32) -> Vec<u8> {
        let mut content = vec![0; 24 * MIB + 1536];
        let noise = (0..).flat_map(|at: u32| *blake(seed, at).as_slice().first_chunk::<32>().unwrap());
        for (place, byte) in content[2 * MIB..9 * MIB].iter_mut().zip(noise) {
            *place = byte;
        }
        let text = b"a log of what a server did, line by line\n".iter().cycle();
        for (place, byte) in content[15 * MIB..].iter_mut().zip(text) {
            *place = *byte;
        }
        let file = std::fs::File::create(self.folder.path().join(name)).unwrap();
        file.set_len(content.len() as u64).unwrap();
        file.write_all_at(&content[2 * MIB..9 * MIB], 2 * MIB as u64)
            .unwrap();
        file.write_all_at(&content[15 * MIB..], 15 * MIB as u64).unwrap();
        content
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.folder.path().join(name)).unwrap()
    }
}

/// Bytes that do not shrink: a simple generator is enough, zstd finds nothing in it.
fn blake(seed: u32, at: u32) -> [u8; 32] {
    let mut state = u64::from(seed) << 32 | u64::from(at);
    std::array::from_fn(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

/// Serves a bucket called `bucket` from a folder for as long as the test lives.
fn serve_s3(world: &mut World) {
    let root = world.folder.path().join("s3");
    std::fs::create_dir_all(root.join("bucket")).unwrap();
    let (tell, told) = std::sync::mpsc::channel::<SocketAddr>();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
            builder.set_auth(SimpleAuth::from_single(ACCESS.0, ACCESS.1));
            let service = builder.build();
            let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                .await
                .unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let service = service.clone();
                tokio::spawn(async move {
                    // A client may go at any time.
                    let _ = Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(socket), service)
                        .await;
                });
            }
        });
    });
    let address = told.recv().unwrap();
    world.environment = vec![
        ("AWS_ENDPOINT_URL", format!("http://{address}")),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", ACCESS.0.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", ACCESS.1.to_owned()),
    ];
}

/// A whole life of a repository there.
fn live(world: &World, url: &str, key: &str) {
    let content = world.image("web01.img", 1);
    let first = world.json(&format!("create web01.img --to {url} --name web01@a {key}"));
    assert_eq!(first["bytes"], content.len());
    assert!(
        first["sent_bytes"].as_u64().unwrap() < 8 * MIB as u64,
        "text shrinks, holes are not sent"
    );
    let again = world.json(&format!(
        "create web01.img --to {url} --name web01@b --parent web01@a {key}"
    ));
    assert_eq!(
        (&again["new_bytes"], &again["parent"]),
        (&Value::from(0), &first["id"])
    );
    let listed = world.json(&format!("list {url} {key}"));
    let names: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["name"])
        .collect();
    assert_eq!(names, ["web01@a", "web01@b"]);
    for how in ["", "--quick"] {
        assert_eq!(world.json(&format!("verify {url} {how} {key}"))["bad"], 0);
    }
    let restored = world.json(&format!("restore {url} web01@b out.img {key}"));
    assert!(world.read("out.img") == content);
    assert_eq!(restored["target"], "out.img");
    let (code, _) = world.refused(&format!("restore {url} web01@b out.img {key}"));
    assert_eq!(code, 1, "a file that is there stays");
    let pruned = world.json(&format!("prune {url} web01@a --yes {key}"));
    assert_eq!(
        (&pruned["backups"], &pruned["objects"]),
        (&Value::from(1), &Value::from(0))
    );
    assert_eq!(world.json(&format!("verify {url} {key}"))["backups"], 1);
    let pruned = world.json(&format!("prune {url} web01@b --yes {key}"));
    assert!(pruned["objects"].as_u64().unwrap() > 10, "{pruned}");
    assert_eq!(world.json(&format!("list {url} {key}")), Value::Array(Vec::new()));
}

#[test]
fn a_directory_holds_backups() {
    let world = World::new();
    live(
        &world,
        &format!("file://{}", world.folder.path().join("repository").display()),
        "",
    );
}

#[test]
fn a_bucket_holds_backups() {
    let mut world = World::new();
    serve_s3(&mut world);
    live(&world, "s3://bucket/lab/one", "");
    world.json("new-key key");
    std::fs::remove_file(world.folder.path().join("out.img")).unwrap();
    live(&world, "s3://bucket/lab/two", "--key-file key");
}

#[test]
fn a_bucket_that_refuses_is_named() {
    let mut world = World::new();
    world.image("web01.img", 1);
    serve_s3(&mut world);
    for (what, name, value) in [
        ("a wrong secret", "AWS_SECRET_ACCESS_KEY", "wrong"),
        ("an unknown user", "AWS_ACCESS_KEY_ID", "nobody"),
    ] {
        let mut command = world.command("create web01.img --to s3://bucket/lab");
        let output = command.env(name, value).output().unwrap();
        let line = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{what}: {line}");
        assert!(
            line.contains("cannot read format") && line.contains("AWS_ACCESS_KEY_ID"),
            "{what}: {line}"
        );
    }
    let (code, line) = world.refused("list s3://bucket/nothing-there");
    assert!(code == 4 && line.contains("no backup repository"), "{line}");
}

#[test]
fn keys_are_asked_for_by_name() {
    let world = World::new();
    world.image("web01.img", 1);
    let to = format!("file://{}", world.folder.path().join("repository").display());
    world.json("new-key key");
    world.json("new-key other");
    let (code, _) = world.refused("new-key key");
    assert_eq!(code, 5, "a key is never overwritten");
    world.json(&format!("create web01.img --to {to} --key-file key"));
    for (key, reason) in [
        ("", "is encrypted and no key was given"),
        ("--key-file other", "not the key of the repository"),
        ("--key-file web01.img", "key file web01.img"),
        ("--key-file nowhere", "key file nowhere"),
    ] {
        let (code, line) = world.refused(&format!("list {to} {key}"));
        assert!(code == 5 && line.contains(reason), "{key}: {line}");
    }
    let path = world.folder.path().join("key");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let (code, line) = world.refused(&format!("list {to} --key-file key"));
    assert!(code == 5 && line.contains("mode 0640"), "{line}");
}

#[test]
fn a_run_that_is_killed_is_gone_on_with() {
    let world = World::new();
    let content = world.image("web01.img", 2);
    let repository = world.folder.path().join("repository");
    let to = format!("file://{}", repository.display());
    let mut child = world
        .command(&format!("create web01.img --to {to} --parallel 1"))
        .spawn()
        .unwrap();
    // Somewhere in the middle: some chunks are there.
    let chunks = || {
        let folders = std::fs::read_dir(repository.join("chunks")).into_iter().flatten();
        folders
            .flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).into_iter().flatten())
            .count()
    };
    while chunks() < 3 && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let sent = chunks();
    let before = world.json(&format!("list {to}"));
    let made = world.json(&format!("create web01.img --to {to} --name again"));
    if before.as_array().unwrap().is_empty() {
        let new = made["new_bytes"].as_u64().unwrap() as usize;
        let rest = 17 * MIB - sent.saturating_sub(1) * MIB;
        assert!(new <= rest, "{sent} chunks were there, {new} bytes were new");
    }
    world.json(&format!("restore {to} again out.img"));
    assert!(world.read("out.img") == content);
}

#[test]
fn a_restore_that_fails_leaves_no_file() {
    let world = World::new();
    world.image("web01.img", 3);
    let repository = world.folder.path().join("repository");
    let to = format!("file://{}", repository.display());
    world.json(&format!("create web01.img --to {to}"));
    let folder = std::fs::read_dir(repository.join("chunks"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let chunk = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&chunk).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&chunk, bytes).unwrap();
    let (code, line) = world.refused(&format!("restore {to} web01 out.img"));
    assert!(code == 1 && line.contains("is damaged"), "{line}");
    let left: Vec<_> = std::fs::read_dir(world.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("out.img"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let output = world.run(&format!("verify {to}"));
    assert_eq!(output.status.code(), Some(1));
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    let name = chunk.file_name().unwrap().to_string_lossy().into_owned();
    assert!(shown.contains(&name) && shown.contains("damaged"), "{shown}");
}

/// qemu's NBD server, ended with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve_nbd(folder: &Path, arguments: &[&str]) -> Server {
    let socket = folder.join("s.nbd");
    let server = Command::new("qemu-nbd")
        .args([
            "--read-only",
            "--persistent",
            "--shared=4",
            "--export-name=web01",
            "--socket",
        ])
        .arg(&socket)
        .args(arguments)
        .current_dir(folder)
        .spawn()
        .unwrap();
    let mut server = Server(server);
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(server.0.try_wait().unwrap().is_none(), "qemu-nbd has ended");
        std::thread::yield_now();
    }
    server
}

fn qemu(folder: &Path, program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn an_nbd_export_is_backed_up_and_then_what_changed() {
    let world = World::new();
    let folder = world.folder.path();
    let mut content = world.image("web01.img", 5);
    let from = format!("nbd+unix:///web01?socket={}", folder.join("s.nbd").display());
    let to = format!("file://{}", folder.join("repository").display());
    qemu(
        folder,
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", "web01.img", "web01.qcow2"],
    );
    content.resize(content.len().next_multiple_of(512), 0);
    {
        let _server = serve_nbd(folder, &["--format=qcow2", "web01.qcow2"]);
        let made = world.json(&format!("create {from} --to {to} --name web01@a"));
        assert!(
            made["read_bytes"].as_u64().unwrap() < 18 * MIB as u64,
            "holes are not read: {made}"
        );
        let (code, line) = world.refused(&format!("create {from}x --to {to} --name x"));
        assert!(code == 1 && line.contains("weft: cannot read"), "{line}");
        let (code, line) = world.refused(&format!(
            "create {from} --to {to} --name x --parent web01@a --changed-in qemu:dirty-bitmap:none"
        ));
        assert!(code == 1 && line.contains("no metadata context"), "{line}");
    }
    qemu(
        folder,
        "qemu-img",
        &["bitmap", "--add", "-g", "4096", "web01.qcow2", "monday"],
    );
    qemu(
        folder,
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 7 5M 4k",
            "-c",
            "write -z 16M 8k",
            "web01.qcow2",
        ],
    );
    content[5 * MIB..][..4096].fill(7);
    content[16 * MIB..][..8192].fill(0);
    let _server = serve_nbd(folder, &["--format=qcow2", "--bitmap=monday", "web01.qcow2"]);
    let made = world.json(&format!(
        "create {from} --to {to} --name web01@b --parent web01@a --changed-in qemu:dirty-bitmap:monday"
    ));
    assert_eq!(
        made["read_bytes"],
        4096 + 8192,
        "what changed and no more: {made}"
    );
    world.json(&format!("restore {to} web01@b out.img"));
    assert!(world.read("out.img") == content);
}
