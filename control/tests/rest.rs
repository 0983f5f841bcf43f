//! The router over a real unix socket, with a daemon in memory behind it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use types::{DiskId, PoolId, VdiId};
use weft_control as control;
use weft_control::{
    ApiError, ApiResult, Attach, Attachment, Detach, DiskAdd, DiskInfo, DiskState, Health, Name, PoolCreate,
    PoolInfo, ScrubStatus, Service, StatusInfo, VdiCreate, VdiInfo, VersionInfo, rest,
};

/// Keeps what it is told; counts the calls that reached it, so that tests see what the border let through.
#[derive(Default)]
struct Fake {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    calls: u32,
    pool: Option<String>,
    disks: Vec<DiskInfo>,
    vdis: Vec<VdiInfo>,
}

impl Fake {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> ApiResult<T>) -> ApiResult<T> {
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        change(&mut state)
    }

    fn with_vdi(&self, name: &Name, change: impl FnOnce(&mut VdiInfo)) -> ApiResult<VdiInfo> {
        self.change(|state| {
            let vdi = state.vdis.iter_mut().find(|v| v.name == name.as_str());
            let vdi =
                vdi.ok_or_else(|| ApiError::not_found(format!("no VDI '{name}'"), "`weft vdi list`"))?;
            change(vdi);
            Ok(vdi.clone())
        })
    }
}

fn pool(name: &str) -> PoolInfo {
    PoolInfo {
        id: PoolId(1),
        name: name.to_owned(),
        created: "2026-11-22T01:00:00Z".parse().unwrap(),
        disks: 0,
        vdis: 0,
        capacity_bytes: 0,
        used_bytes: 0,
    }
}

fn disk(id: u128, request: &DiskAdd) -> DiskInfo {
    DiskInfo {
        id: DiskId(id),
        path: request.path.display().to_string(),
        state: DiskState::Active,
        zone: request.zone.as_ref().map(ToString::to_string).unwrap_or_default(),
        bytes: request.create_bytes.unwrap_or(1 << 40),
        capacity_bytes: 0,
        used_bytes: 0,
        segments: 0,
        segments_free: 0,
        replicas: 0,
        corrupt_blocks: 0,
        reason: String::new(),
    }
}

fn vdi(request: &VdiCreate) -> VdiInfo {
    VdiInfo {
        id: VdiId(1),
        name: request.name.to_string(),
        bytes: request.bytes,
        used_bytes: 0,
        stored_bytes: 0,
        sector_bytes: request.sector_bytes,
        replicas: request.replicas,
        shard_bytes: request.shard_bytes,
        created: "2026-11-22T01:00:00Z".parse().unwrap(),
        health: Health::Whole,
        shards: 1,
        shards_whole: 1,
        shards_waiting: 0,
        resync_leaves_left: 0,
        deleting: false,
        attachments: Vec::new(),
        disks: Vec::new(),
    }
}

fn fake_version() -> VersionInfo {
    VersionInfo {
        version: "0.1.0".into(),
        api: control::API_VERSION,
        disk_format: 1,
    }
}

impl Service for Fake {
    async fn pool_create(&self, request: PoolCreate) -> ApiResult<PoolInfo> {
        self.change(|state| {
            if state.pool.is_some() {
                return Err(ApiError::conflict("there is a pool", ""));
            }
            state.pool = Some(request.name.to_string());
            Ok(pool(request.name.as_str()))
        })
    }

    async fn pool_status(&self) -> ApiResult<PoolInfo> {
        self.change(|state| match &state.pool {
            Some(name) => Ok(pool(name)),
            None => Err(ApiError::not_found("there is no pool", "`weft pool create NAME`")),
        })
    }

    async fn disk_add(&self, request: DiskAdd) -> ApiResult<DiskInfo> {
        self.change(|state| {
            if request.path == Path::new("/dev/full") && !request.force {
                return Err(ApiError::needs_force(
                    "/dev/full has an ext4 file system",
                    "--force",
                ));
            }
            let info = disk(state.disks.len() as u128 + 1, &request);
            state.disks.push(info.clone());
            Ok(info)
        })
    }

    async fn disk_list(&self) -> ApiResult<Vec<DiskInfo>> {
        self.change(|state| Ok(state.disks.clone()))
    }

    async fn disk_remove(&self, disk: DiskId, force: bool) -> ApiResult<DiskInfo> {
        self.change(|state| {
            let found = state.disks.iter().position(|d| d.id == disk);
            let at = found.ok_or_else(|| ApiError::not_found(format!("no disk {disk}"), ""))?;
            if force {
                return Ok(state.disks.remove(at));
            }
            state.disks[at].state = DiskState::Removing;
            Ok(state.disks[at].clone())
        })
    }

    async fn disk_replace(&self, _: DiskId, with: DiskAdd) -> ApiResult<DiskInfo> {
        self.disk_add(with).await
    }

    async fn vdi_create(&self, request: VdiCreate) -> ApiResult<VdiInfo> {
        self.change(|state| {
            let info = vdi(&request);
            state.vdis.push(info.clone());
            Ok(info)
        })
    }

    async fn vdi_list(&self) -> ApiResult<Vec<VdiInfo>> {
        self.change(|state| Ok(state.vdis.clone()))
    }

    async fn vdi_show(&self, name: Name) -> ApiResult<VdiInfo> {
        self.with_vdi(&name, |_| {})
    }

    async fn vdi_resize(&self, name: Name, bytes: u64) -> ApiResult<VdiInfo> {
        self.with_vdi(&name, |vdi| vdi.bytes = bytes)
    }

    async fn vdi_delete(&self, name: Name) -> ApiResult<()> {
        self.with_vdi(&name, |_| {})?;
        self.change(|state| {
            state.vdis.retain(|v| v.name != name.as_str());
            Ok(())
        })
    }

    async fn vdi_attach(&self, name: Name, request: Attach) -> ApiResult<VdiInfo> {
        let Attach {
            target,
            read_only,
            queues,
        } = request;
        self.with_vdi(&name, |vdi| {
            vdi.attachments.push(Attachment {
                target,
                read_only,
                queues,
            });
        })
    }

    async fn vdi_detach(&self, name: Name, request: Detach) -> ApiResult<VdiInfo> {
        let stays = |a: &Attachment| request.target.as_ref().is_some_and(|target| a.target != *target);
        self.with_vdi(&name, |vdi| vdi.attachments.retain(stays))
    }

    async fn scrub_start(&self, _: Option<Name>) -> ApiResult<ScrubStatus> {
        self.change(|_| Ok(ScrubStatus::default()))
    }

    async fn scrub_status(&self) -> ApiResult<ScrubStatus> {
        self.change(|_| Ok(ScrubStatus::default()))
    }

    async fn status(&self) -> ApiResult<StatusInfo> {
        self.change(|state| {
            Ok(StatusInfo {
                version: fake_version(),
                pool: state.pool.as_deref().map(pool),
                disks: state.disks.clone(),
                vdis: state.vdis.clone(),
                resyncs: Vec::new(),
                scrubs: Vec::new(),
                events: Vec::new(),
            })
        })
    }

    async fn metrics(&self) -> ApiResult<String> {
        Ok("weft_up 1\n".to_owned())
    }

    async fn version(&self) -> ApiResult<VersionInfo> {
        Ok(fake_version())
    }
}

/// A served fake in a directory of its own.
struct Served {
    folder: tempfile::TempDir,
    fake: Arc<Fake>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Served {
    async fn start() -> Served {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let listener = rest::bind(&folder.path().join("blockd.sock")).await.unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let server = tokio::spawn(rest::serve(
            listener,
            rest::router(Arc::clone(&fake)),
            async move {
                let _ = stopped.await;
            },
        ));
        Served {
            folder,
            fake,
            stop: Some(stop),
            server,
        }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.folder.path().join("blockd.sock")
    }

    fn calls(&self) -> u32 {
        self.fake.state.lock().unwrap().calls
    }

    /// One request as raw HTTP/1.1; the answer's status, content type and body.
    async fn raw(&self, method: &str, path: &str, body: &str) -> (u16, String, String) {
        let mut stream = UnixStream::connect(self.socket()).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: weft\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // A body that is refused early may find the connection closed: what counts is the answer.
        let _ = stream.write_all(body.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let text = String::from_utf8(answer).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let content = head
            .lines()
            .find_map(|l| l.strip_prefix("content-type: "))
            .unwrap_or_default();
        (status, content.to_owned(), body.to_owned())
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let text = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let (status, content, answer) = self.raw(method, path, &text).await;
        if status >= 400 {
            assert_eq!(content, "application/problem+json", "{method} {path}: {answer}");
        }
        (status, serde_json::from_str(&answer).unwrap_or(Value::Null))
    }
}

#[tokio::test]
async fn a_vdi_lives_its_life_over_the_socket() {
    let served = Served::start().await;
    assert_eq!(served.call("GET", "/v1/pool", Value::Null).await.0, 404);
    assert_eq!(
        served.call("POST", "/v1/pool", json!({"name": "main"})).await.0,
        200
    );
    let (status, problem) = served.call("POST", "/v1/pool", json!({"name": "main"})).await;
    assert_eq!((status, problem["code"].as_str()), (409, Some("conflict")));

    let full = json!({"path": "/dev/full"});
    let (status, problem) = served.call("POST", "/v1/disks", full).await;
    assert_eq!((status, problem["code"].as_str()), (409, Some("needs_force")));
    assert_eq!(problem["hint"], "--force");
    let (status, disk) = served
        .call("POST", "/v1/disks", json!({"path": "/dev/full", "force": true}))
        .await;
    assert_eq!((status, disk["state"].as_str()), (200, Some("active")));

    let (status, web) = served
        .call(
            "POST",
            "/v1/vdis",
            json!({"name": "web01", "bytes": 20_u64 << 30}),
        )
        .await;
    assert_eq!(status, 200);
    assert_eq!(
        (&web["replicas"], &web["sector_bytes"], &web["shard_bytes"]),
        (&json!(3), &json!(512), &json!(1 << 30))
    );
    let attach = json!({"target": "vhost-user:/run/weft/web01.sock", "queues": 4});
    let (_, web) = served.call("POST", "/v1/vdis/web01/attach", attach).await;
    let wanted = json!([{"target": "vhost-user:/run/weft/web01.sock", "read_only": false, "queues": 4}]);
    assert_eq!(web["attachments"], wanted);
    let (_, web) = served.call("POST", "/v1/vdis/web01/detach", json!({})).await;
    assert_eq!(web["attachments"], json!([]));
    let (_, web) = served
        .call("POST", "/v1/vdis/web01/resize", json!({"bytes": 40_u64 << 30}))
        .await;
    assert_eq!(web["bytes"], json!(40_u64 << 30));
    let (_, status) = served.call("GET", "/v1/status", Value::Null).await;
    assert_eq!(status["vdis"][0]["name"], "web01");
    assert_eq!(
        served.call("DELETE", "/v1/vdis/web01", Value::Null).await,
        (204, Value::Null)
    );
    assert_eq!(served.call("GET", "/v1/vdis/web01", Value::Null).await.0, 404);
    let id = disk["id"].as_str().unwrap();
    let (_, disk) = served
        .call("DELETE", &format!("/v1/disks/{id}"), Value::Null)
        .await;
    assert_eq!(disk["state"], "removing");
    assert_eq!(
        served
            .call("DELETE", &format!("/v1/disks/{id}?force=true"), Value::Null)
            .await
            .0,
        200
    );
    assert_eq!(
        served.call("GET", "/v1/disks", Value::Null).await,
        (200, json!([]))
    );
    assert_eq!(served.raw("GET", "/metrics", "").await.2, "weft_up 1\n");
}

#[tokio::test]
async fn the_border_refuses_and_nothing_reaches_the_daemon() {
    let served = Served::start().await;
    let id = DiskId(1);
    let replace = format!("/v1/disks/{id}/replace");
    let remove = format!("/v1/disks/{id}?force=perhaps");
    let long = "a".repeat(64);
    let cases = [
        ("POST", "/v1/pool", json!({"name": ""}), 400),
        ("POST", "/v1/pool", json!({"name": "main", "color": "red"}), 400),
        ("POST", "/v1/pool", json!({}), 400),
        ("POST", "/v1/pool", json!([]), 400),
        ("POST", "/v1/pool", Value::Null, 400),
        ("POST", "/v1/pool", json!({"name": long}), 400),
        ("POST", "/v1/disks", json!({"path": "sdb"}), 400),
        ("POST", "/v1/disks", json!({"path": "/srv/../etc"}), 400),
        (
            "POST",
            "/v1/disks",
            json!({"path": "/srv/a", "create_bytes": 1}),
            400,
        ),
        (
            "POST",
            "/v1/disks",
            json!({"path": "/srv/a", "zone": "Rack 1"}),
            400,
        ),
        (
            "POST",
            "/v1/disks",
            json!({"path": "/srv/a", "force": "yes"}),
            400,
        ),
        ("POST", replace.as_str(), json!({"path": "/srv/a"}), 400),
        (
            "POST",
            "/v1/disks/xyz/replace",
            json!({"with": {"path": "/srv/a"}}),
            400,
        ),
        ("DELETE", "/v1/disks/xyz", Value::Null, 400),
        ("DELETE", remove.as_str(), Value::Null, 400),
        ("POST", "/v1/vdis", json!({"name": "web01"}), 400),
        ("POST", "/v1/vdis", json!({"name": "web01", "bytes": -1}), 400),
        ("POST", "/v1/vdis", json!({"name": "web01", "bytes": 1.5}), 400),
        (
            "POST",
            "/v1/vdis",
            json!({"name": "web01", "bytes": (1 << 20) + 1}),
            400,
        ),
        (
            "POST",
            "/v1/vdis",
            json!({"name": "web01", "bytes": 1 << 30, "replicas": 300}),
            400,
        ),
        ("GET", "/v1/vdis/WEB", Value::Null, 400),
        ("GET", "/v1/vdis/%2e%2e", Value::Null, 400),
        ("GET", "/v1/vdis/a%2Fb", Value::Null, 400),
        (
            "POST",
            "/v1/vdis/web01/attach",
            json!({"target": "vhost-user:relative"}),
            400,
        ),
        (
            "POST",
            "/v1/vdis/web01/attach",
            json!({"target": "nbd:tcp:localhost:1"}),
            400,
        ),
        ("POST", "/v1/vdis/web01/resize", json!({"bytes": 0}), 400),
        ("POST", "/v1/scrub", json!({"vdi": "?"}), 400),
        ("PUT", "/v1/pool", json!({"name": "main"}), 405),
        ("GET", "/v2/pool", Value::Null, 404),
        ("GET", "/", Value::Null, 404),
    ];
    for (method, path, body, wanted) in cases {
        let (status, problem) = served.call(method, path, body.clone()).await;
        assert_eq!(status, wanted, "{method} {path} {body}: {problem}");
        assert!(
            problem["message"].as_str().is_some_and(|m| !m.is_empty()),
            "{method} {path}: {problem}"
        );
    }
    assert_eq!(served.calls(), 0);
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused() {
    let served = Served::start().await;
    let body = format!("{{\"name\":\"{}\"}}", "a".repeat(rest::BODY_BYTES_MAX));
    let (status, content, text) = served.raw("POST", "/v1/pool", &body).await;
    assert_eq!(
        (status, content.as_str()),
        (413, "application/problem+json"),
        "{text}"
    );
    assert_eq!(served.calls(), 0);
    // The server is well.
    assert_eq!(served.call("GET", "/v1/version", Value::Null).await.0, 200);
}

#[tokio::test]
async fn the_document_names_every_path() {
    let served = Served::start().await;
    let (status, document) = served.call("GET", "/openapi.json", Value::Null).await;
    assert_eq!(status, 200);
    let paths: Vec<&String> = document["paths"].as_object().unwrap().keys().collect();
    let wanted = [
        "/metrics",
        "/v1/disks",
        "/v1/disks/{id}",
        "/v1/disks/{id}/replace",
        "/v1/pool",
        "/v1/scrub",
        "/v1/status",
        "/v1/vdis",
        "/v1/vdis/{name}",
        "/v1/vdis/{name}/attach",
        "/v1/vdis/{name}/detach",
        "/v1/vdis/{name}/resize",
        "/v1/version",
    ];
    assert_eq!(paths, wanted);
    // Every reference leads somewhere.
    let text = document.to_string();
    for reference in text
        .split("\"#")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
    {
        assert!(document.pointer(reference).is_some(), "{reference}");
    }
}

#[tokio::test]
async fn the_socket_is_the_owners_and_a_second_daemon_is_refused() {
    let served = Served::start().await;
    let mode = std::fs::metadata(served.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let left: Vec<_> = std::fs::read_dir(served.folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "nothing but the socket: {left:?}");
    let error = rest::bind(&served.socket()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    assert_eq!(
        served.call("GET", "/v1/version", Value::Null).await.0,
        200,
        "the first one is unharmed"
    );
}

#[tokio::test]
async fn a_dead_daemons_socket_is_replaced_and_a_file_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    rest::bind(&socket).await.unwrap();
    let file = folder.path().join("f");
    std::fs::write(&file, "precious").unwrap();
    let error = rest::bind(&file).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

#[tokio::test]
async fn serving_ends_when_told_to() {
    let mut served = Served::start().await;
    assert_eq!(served.call("GET", "/v1/version", Value::Null).await.0, 200);
    drop(served.stop.take());
    served.server.await.unwrap().unwrap();
}
