//! The router over a real unix socket, with a daemon in memory behind it.

mod support;

use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};
use support::Served;
use types::DiskId;
use weft_control::rest;

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
        "/v1/disks/{id}/leftovers",
        "/v1/disks/{id}/replace",
        "/v1/hosts",
        "/v1/hosts/{id}",
        "/v1/hosts/{id}/drain",
        "/v1/pool",
        "/v1/rebalance",
        "/v1/scrub",
        "/v1/snapshots",
        "/v1/status",
        "/v1/vdis",
        "/v1/vdis/{name}",
        "/v1/vdis/{name}/attach",
        "/v1/vdis/{name}/detach",
        "/v1/vdis/{name}/resize",
        "/v1/vdis/{name}/rollback",
        "/v1/vdis/{name}/snapshots",
        "/v1/vdis/{name}/snapshots/{snapshot}",
        "/v1/vdis/{name}/snapshots/{snapshot}/protect",
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
