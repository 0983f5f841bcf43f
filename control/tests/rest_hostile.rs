//! Every route of the API against wrong, huge, missing and hostile requests: each gets a refusal of one clear line,
//! and nothing is changed. The cases follow from the API's own document: a route or a field that is new there and
//! has no entry in `wrong::VALID` makes these tests fail.

mod support;
#[path = "support/wrong.rs"]
mod wrong;

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use support::Served;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use weft_control::rest;
use wrong::{Faults, VALID, follow, hostile_targets, place, schema, wrong_bodies};

fn document() -> Value {
    serde_json::from_str(&rest::openapi()).unwrap()
}

/// A served daemon that has something to lose.
async fn served() -> Served {
    let served = Served::start().await;
    let vdi = json!({"name": "web01", "bytes": 1_u64 << 30});
    let attach = json!({"target": "nbd:unix:/run/web01"});
    for (path, body) in [
        ("/v1/pool", json!({"name": "main"})),
        ("/v1/disks", json!({"path": "/srv/a"})),
        ("/v1/vdis", vdi),
        ("/v1/vdis/web01/attach", attach),
    ] {
        assert_eq!(served.call("POST", path, body).await.0, 200, "{path}");
    }
    served
}

/// All that the daemon says of itself.
async fn everything(served: &Served) -> String {
    let mut all = String::new();
    for (method, path, _) in VALID {
        if *method == "GET" {
            all.push_str(&served.raw("GET", &path.replace("{name}", "web01"), "").await.2);
        }
    }
    all
}

#[test]
fn every_route_and_every_field_has_an_entry() {
    let document = document();
    let mut documented = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            documented.insert((method.to_uppercase(), path.clone()));
        }
    }
    let listed: BTreeSet<_> = VALID
        .iter()
        .map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned()))
        .collect();
    assert_eq!(listed, documented);
    // The document is made by hand beside the router: what it does not name nobody would test.
    let source = include_str!("../src/rest.rs");
    let routed: BTreeSet<&str> = source
        .split(".route(")
        .skip(1)
        .map(|rest| rest.split('"').nth(1).unwrap())
        .collect();
    let mut paths: BTreeSet<&str> = documented.iter().map(|(_, path)| path.as_str()).collect();
    paths.insert("/openapi.json");
    assert_eq!(routed, paths);
    for (method, path, body) in VALID {
        let valid: Value = serde_json::from_str(body).unwrap();
        match schema(&document, method, path) {
            None => assert!(valid.is_null(), "{method} {path} takes no body"),
            Some(schema) => check_names_all(&document, &schema, &valid, path),
        }
    }
}

fn check_names_all(document: &Value, schema: &Value, valid: &Value, place: &str) {
    let known: BTreeSet<&String> = schema["properties"].as_object().unwrap().keys().collect();
    let named: BTreeSet<&String> = valid.as_object().unwrap().keys().collect();
    assert_eq!(named, known, "{place}");
    for (name, value) in valid.as_object().unwrap() {
        if value.is_object() {
            let inner = follow(document, &schema["properties"][name]);
            check_names_all(document, &inner, value, &format!("{place} {name}"));
        }
    }
}

#[tokio::test]
async fn every_wrong_body_is_refused_and_changes_nothing() {
    let served = served().await;
    let before = everything(&served).await;
    let calls = served.calls();
    let document = document();
    let mut faults = Faults::default();
    let mut count = 0;
    for (method, path, body) in VALID {
        for (what, text) in wrong_bodies(&document, method, path, body) {
            let answer = served.raw(method, &place(path), &text).await;
            faults.check(&format!("{method} {path}: {what}"), &answer);
            count += 1;
        }
    }
    faults.report();
    assert_eq!(served.calls(), calls, "something passed the border");
    assert_eq!(everything(&served).await, before);
    assert!(count > 700, "{count} bodies");
}

#[tokio::test]
async fn hostile_paths_queries_and_methods_are_refused_and_change_nothing() {
    let served = served().await;
    let before = everything(&served).await;
    let calls = served.calls();
    let mut faults = Faults::default();
    for (method, target, body) in hostile_targets() {
        let answer = served.raw(method, &target, body).await;
        faults.check(&format!("{method} {target}"), &answer);
    }
    let paths: BTreeSet<&str> = VALID.iter().map(|(_, path, _)| *path).collect();
    for path in paths {
        for method in [
            "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW", "get",
        ] {
            if !VALID.iter().any(|(known, at, _)| *known == method && *at == path) {
                let answer = served.raw(method, &place(path), "{}").await;
                assert_eq!(answer.0, 405, "{method} {path}");
                faults.check(&format!("{method} {path}"), &answer);
            }
        }
    }
    for path in [
        "/",
        "/v1",
        "/v1/",
        "/v1/pool/",
        "//v1/pool",
        "/v1/vdis/a/b/c",
        "/v2/pool",
        "/v1/%70ool/x",
        "/\u{7f}",
    ] {
        let answer = served.raw("GET", path, "").await;
        assert!((400..500).contains(&answer.0), "{path}: {answer:?}");
    }
    faults.report();
    assert_eq!(served.calls(), calls, "something passed the border");
    assert_eq!(everything(&served).await, before);
}

/// Sends bytes as they are; all that comes back until the server hangs up.
async fn converse(served: &Served, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(served.socket()).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn other_content_types_are_refused() {
    let served = served().await;
    let before = everything(&served).await;
    for kind in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/jsonx",
        "",
    ] {
        let head = format!(
            "POST /v1/vdis HTTP/1.1\r\nhost: w\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: 34\r\n\r\n\
             {{\"name\":\"db01\",\"bytes\":1073741824}}"
        );
        let answer = converse(&served, head.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 415 "), "{kind}: {answer}");
    }
    assert_eq!(everything(&served).await, before);
}

/// Time is the test's: what waits for a client that never goes on is over at once.
#[tokio::test(start_paused = true)]
async fn clients_that_never_finish_are_hung_up_on() {
    let served = served().await;
    let post = "POST /v1/pool HTTP/1.1\r\nhost: w\r\n";
    for (what, bytes, status) in [
        ("nothing", String::new(), ""),
        ("half a head", "POST /v1/po".to_owned(), ""),
        ("no body", format!("{post}content-length: 20\r\n\r\n"), "408"),
        (
            "half a body",
            format!("{post}content-length: 20\r\n\r\n{{\"name\":"),
            "408",
        ),
        (
            "a body that never ends",
            format!("{post}transfer-encoding: chunked\r\n\r\n3\r\n{{ \n\r\n"),
            "408",
        ),
        (
            "ten gigabytes",
            format!("{post}content-length: 10737418240\r\n\r\n"),
            "408",
        ),
    ] {
        let answer = converse(&served, bytes.as_bytes()).await;
        assert_eq!(answer.get(9..12).unwrap_or_default(), status, "{what}: {answer}");
    }
    let begun = tokio::time::Instant::now();
    assert_eq!(served.call("GET", "/v1/version", Value::Null).await.0, 200);
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn messages_that_are_not_http_are_no_requests() {
    let served = served().await;
    let before = everything(&served).await;
    let calls = served.calls();
    let long_head = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100 << 10));
    let many_heads = format!("GET /v1/pool HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(5_000));
    for bytes in [
        &b"IHAVEOPT\0\0\0\x03"[..],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/pool HTTP/9.9\r\n\r\n",
        b"POST /v1/pool HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/pool HTTP/1.1\r\ncontent-length: 16\r\ncontent-length: 17\r\n\r\n{\"name\":\"other\"}",
        b"POST /v1/pool HTTP/1.1\r\ncontent-length: 18446744073709551616\r\n\r\n",
        b"POST /v1/pool HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"GET /v1/vdis/a\0b HTTP/1.1\r\n\r\n",
        long_head.as_bytes(),
        many_heads.as_bytes(),
    ] {
        let answer = converse(&served, bytes).await;
        assert!(
            answer.starts_with("HTTP/1.1 4"),
            "{:?}: {answer}",
            String::from_utf8_lossy(&bytes[..bytes.len().min(60)])
        );
    }
    assert_eq!(served.calls(), calls);
    assert_eq!(everything(&served).await, before);
}

#[tokio::test]
async fn too_many_connections_are_told_so() {
    let served = Served::start().await;
    let mut held = Vec::new();
    for _ in 0..rest::CONNECTIONS_MAX {
        let mut stream = UnixStream::connect(served.socket()).await.unwrap();
        // Answered, so it has been accepted.
        stream
            .write_all(b"GET /v1/version HTTP/1.1\r\nhost: w\r\n\r\n")
            .await
            .unwrap();
        assert!(stream.read(&mut [0; 1024]).await.unwrap() > 0);
        held.push(stream);
    }
    let answer = converse(&served, b"GET /v1/version HTTP/1.1\r\nhost: w\r\n\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.contains("\"unavailable\""),
        "{answer}"
    );
    held.pop();
    // The place is free once the server has seen the end of it.
    for _ in 0..1_000 {
        if served.raw("GET", "/v1/version", "").await.0 == 200 {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("a connection that was closed still takes its place");
}
