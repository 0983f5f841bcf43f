//! Every route of the API against wrong, huge, missing and hostile requests: each gets a refusal of one clear line,
//! and nothing is changed. The cases follow from the API's own document: a route or a field that is new there and
//! has no entry in [`VALID`] makes these tests fail.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Map, Value, json};
use support::Served;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use weft_control::rest;

/// Every route, with a body that is right and that names every field there is; `null` where there is no body.
const VALID: &[(&str, &str, &str)] = &[
    ("GET", "/v1/pool", "null"),
    ("POST", "/v1/pool", r#"{"name":"other"}"#),
    ("GET", "/v1/disks", "null"),
    (
        "POST",
        "/v1/disks",
        r#"{"path":"/srv/b","create_bytes":1073741824,"zone":"z","force":true,"accept_old":true}"#,
    ),
    ("DELETE", "/v1/disks/{id}", "null"),
    (
        "POST",
        "/v1/disks/{id}/replace",
        r#"{"with":{"path":"/srv/b","create_bytes":1073741824,"zone":"z","force":true,"accept_old":true}}"#,
    ),
    ("GET", "/v1/vdis", "null"),
    (
        "POST",
        "/v1/vdis",
        r#"{"name":"db","bytes":1073741824,"replicas":2,"sector_bytes":4096,"shard_bytes":1073741824}"#,
    ),
    ("GET", "/v1/vdis/{name}", "null"),
    ("DELETE", "/v1/vdis/{name}", "null"),
    ("POST", "/v1/vdis/{name}/resize", r#"{"bytes":2147483648}"#),
    (
        "POST",
        "/v1/vdis/{name}/attach",
        r#"{"target":"vhost-user:/run/a","read_only":true,"queues":2}"#,
    ),
    (
        "POST",
        "/v1/vdis/{name}/detach",
        r#"{"target":"vhost-user:/run/a"}"#,
    ),
    ("GET", "/v1/scrub", "null"),
    ("POST", "/v1/scrub", r#"{"vdi":"web01"}"#),
    ("GET", "/v1/status", "null"),
    ("GET", "/v1/version", "null"),
    ("GET", "/metrics", "null"),
];

const DISK: &str = "00000000-0000-0000-0000-000000000001";

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

/// What is not right about a refusal: it has to be one clear line, as JSON in the one form of a failure.
fn fault((status, content, body): &(u16, String, String)) -> Option<String> {
    if !(400..500).contains(status) || content != "application/problem+json" {
        return Some(format!("{status} {content} {body}"));
    }
    let problem: Value = serde_json::from_str(body).unwrap_or_default();
    for part in ["message", "hint"] {
        let Some(text) = problem[part].as_str() else {
            return Some(format!("no {part} in {body}"));
        };
        let is_hidden = |c: char| c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c);
        if text.len() > 600 || text.chars().any(is_hidden) {
            return Some(format!("a {part} of {} bytes: {text:.200?}", text.len()));
        }
    }
    let is_empty = problem["message"]
        .as_str()
        .is_some_and(|message| message.len() <= 8);
    is_empty.then(|| format!("no word in {body}"))
}

/// All that went wrong in a sweep; told together at its end.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn check(&mut self, what: &str, answer: &(u16, String, String)) {
        if let Some(fault) = fault(answer) {
            self.0.push(format!("{what}: {fault}"));
        }
    }

    fn report(self) {
        assert!(
            self.0.is_empty(),
            "{} faults:\n{}",
            self.0.len(),
            self.0.join("\n")
        );
    }
}

fn place(path: &str) -> String {
    path.replace("{id}", DISK).replace("{name}", "web01")
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
        .split(".route(\"")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
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

/// The schema of a route's body, references followed.
fn schema(document: &Value, method: &str, path: &str) -> Option<Value> {
    let body = &document["paths"][path][method.to_lowercase()]["requestBody"];
    let schema = body.pointer("/content/application~1json/schema")?;
    Some(follow(document, schema))
}

fn follow(document: &Value, schema: &Value) -> Value {
    match schema["$ref"].as_str() {
        Some(reference) => document.pointer(&reference[1..]).unwrap().clone(),
        None => schema.clone(),
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

/// A name that is hostile wherever it stands.
fn hostile_texts() -> Vec<String> {
    let mut texts: Vec<String> = [
        "",
        " ",
        "../x",
        "..",
        ".",
        "/",
        "//",
        "-rf",
        "--force",
        "a/../b",
        "a b",
        "a\0b",
        "a\nb",
        "a\r\nx: y",
        "\u{1b}[2J",
        "a\u{202e}b",
        "a\u{2028}b",
        "A",
        "é",
        "%2e%2e",
        "${HOME}",
        "$(id)",
        "'; drop",
        "~/x",
        "\u{feff}a",
    ]
    .map(str::to_owned)
    .to_vec();
    texts.push("a".repeat(300));
    texts.push("/".to_owned() + &"a/".repeat(3_000));
    texts.push("x".repeat(900 << 10));
    texts
}

/// Values that no field takes whose value is `valid`.
fn wrong_values(valid: &Value) -> Vec<Value> {
    let mut wrong = vec![
        json!([]),
        json!({}),
        json!([[valid]]),
        json!({"a": valid}),
        json!(1.5),
        json!(-1),
    ];
    match valid {
        Value::String(text) => {
            wrong.extend([json!(true), json!(0), json!(u64::MAX)]);
            wrong.extend(hostile_texts().into_iter().map(Value::String));
            // Hostile behind what makes it look right.
            for tail in ["\0", "\n", "\u{1b}[2J", "\u{202e}", "/../x"] {
                wrong.push(Value::String(format!("{text}{tail}")));
            }
        }
        Value::Number(_) => {
            wrong.extend([
                json!(0),
                json!(u64::MAX),
                json!(u64::MAX - 1),
                json!(1e308),
                json!(true),
            ]);
            wrong.extend([json!("1"), json!(""), json!(i64::MIN)]);
        }
        Value::Bool(_) => wrong.extend([json!("true"), json!(1), json!(0), json!("")]),
        _ => wrong.extend([json!("x"), json!(true), json!(7)]),
    }
    wrong
}

/// Bodies that are wrong in one place each, with what is wrong: for the object at `pointer` of `whole` and all in it.
fn wrong_bodies(document: &Value, schema: &Value, whole: &Value, pointer: &str) -> Vec<(String, String)> {
    let object = whole.pointer(pointer).unwrap().as_object().unwrap();
    let required = schema["required"].as_array().cloned().unwrap_or_default();
    let with = |name: &str, value: Option<Value>| {
        let mut changed = whole.clone();
        let target: &mut Map<String, Value> = changed.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
        match value {
            Some(value) => target.insert(name.to_owned(), value),
            None => target.remove(name),
        };
        changed.to_string()
    };
    let mut bodies = vec![
        (
            format!("{pointer} unknown field"),
            with("color", Some(json!("red"))),
        ),
        (
            format!("{pointer} hostile field"),
            with("\u{1b}[2J\n", Some(json!(1))),
        ),
        (
            format!("{pointer} huge field name"),
            with(&"n".repeat(500 << 10), Some(json!(1))),
        ),
    ];
    for (name, valid) in object {
        let property = &schema["properties"][name];
        let is_nullable = property["type"]
            .as_array()
            .is_some_and(|types| types.contains(&json!("null")));
        if required.contains(&json!(name)) {
            bodies.push((format!("{pointer}/{name} missing"), with(name, None)));
        }
        if !is_nullable {
            bodies.push((format!("{pointer}/{name} null"), with(name, Some(Value::Null))));
        }
        for wrong in wrong_values(valid) {
            let mut shown = wrong.to_string();
            shown.truncate(40.min(shown.len()));
            bodies.push((format!("{pointer}/{name} = {shown}"), with(name, Some(wrong))));
        }
        let twice = whole.to_string().replacen(
            &format!("\"{name}\":"),
            &format!("\"{name}\":{valid},\"{name}\":"),
            1,
        );
        bodies.push((format!("{pointer}/{name} twice"), twice));
        for number in [
            "18446744073709551616",
            "1e400",
            "-0.0",
            "00",
            "0x10",
            "NaN",
            "1e3",
        ] {
            let text = whole.to_string().replacen(&valid.to_string(), number, 1);
            bodies.push((format!("{pointer}/{name} = {number}"), text));
        }
        let deep = "[".repeat(10_000) + &"]".repeat(10_000);
        let text = whole.to_string().replacen(&valid.to_string(), &deep, 1);
        bodies.push((format!("{pointer}/{name} nested 10,000 deep"), text));
        if let Some(fields) = valid.as_object() {
            let in_a_row = Value::Array(fields.values().cloned().collect());
            bodies.push((
                format!("{pointer}/{name} as an array"),
                with(name, Some(in_a_row)),
            ));
            let inner = follow(document, property);
            bodies.extend(wrong_bodies(
                document,
                &inner,
                whole,
                &format!("{pointer}/{name}"),
            ));
        }
    }
    bodies
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
        let Some(schema) = schema(&document, method, path) else {
            continue;
        };
        let valid: Value = serde_json::from_str(body).unwrap();
        let mut bodies = wrong_bodies(&document, &schema, &valid, "");
        for text in [
            "",
            "null",
            "[]",
            "\"x\"",
            "7",
            "{",
            "}",
            "{\"",
            "\u{feff}{}",
            "\0",
            "a=1&b=2",
            "<a/>",
            "{}{}",
        ] {
            bodies.push((format!("{text:?} for a body"), text.to_owned()));
        }
        let in_a_row = Value::Array(valid.as_object().unwrap().values().cloned().collect());
        bodies.push(("an array of the fields".to_owned(), in_a_row.to_string()));
        bodies.push(("cut".to_owned(), body[..body.len() - 1].to_owned()));
        bodies.push(("more behind it".to_owned(), format!("{body} x")));
        for (what, text) in bodies {
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
    let hostile = [
        "%00",
        "%0a",
        "..",
        "%2e%2e",
        "%2e%2e%2fx",
        "-rf",
        "%ff",
        "%E2%80%AE",
        "A",
        "a%20b",
        "a%2Fb",
        "%1b[2J",
        "0",
        "x%",
    ];
    let long = "a".repeat(300);
    for (method, path, body) in VALID {
        for name in hostile.iter().copied().chain([long.as_str()]) {
            // A name of digits is a name; it is no id of a disk.
            if path.contains('{') && !(name == "0" && path.contains("{name}")) {
                let target = path.replace("{id}", name).replace("{name}", name);
                let answer = served.raw(method, &target, body).await;
                faults.check(&format!("{method} {target}"), &answer);
            }
        }
        for query in [
            "x=1",
            "force=perhaps",
            "force",
            "force=true&force=false",
            "force=true&x=1",
            "%00",
            &long,
        ] {
            let target = format!("{}?{query}", place(path));
            let answer = served.raw(method, &target, body).await;
            faults.check(&format!("{method} {target}"), &answer);
        }
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
