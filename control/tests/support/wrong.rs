//! Requests that are wrong, made from the API's own document: for the tests of the border, over a daemon in memory, and
//! for those of the real one (blockd/tests).
#![allow(dead_code)] // each test binary uses its own part

use serde_json::{Map, Value, json};

/// Every route, with a body that is right and that names every field there is; `null` where there is no body.
pub const VALID: &[(&str, &str, &str)] = &[
    ("GET", "/v1/pool", "null"),
    ("POST", "/v1/pool", r#"{"name":"other"}"#),
    ("GET", "/v1/rebalance", "null"),
    ("POST", "/v1/rebalance", "null"),
    ("GET", "/v1/hosts", "null"),
    ("DELETE", "/v1/hosts/{id}", "null"),
    ("POST", "/v1/hosts/{id}/drain", "null"),
    ("GET", "/v1/disks", "null"),
    (
        "POST",
        "/v1/disks",
        r#"{"path":"/srv/b","create_bytes":1073741824,"zone":"z","force":true,"accept_old":true}"#,
    ),
    ("DELETE", "/v1/disks/{id}", "null"),
    ("GET", "/v1/disks/{id}/leftovers", "null"),
    ("DELETE", "/v1/disks/{id}/leftovers", "null"),
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
        r#"{"target":"nbd:unix:/run/a","read_only":true,"queues":1,"snapshot":"before"}"#,
    ),
    (
        "POST",
        "/v1/vdis/{name}/detach",
        r#"{"target":"vhost-user:/run/a"}"#,
    ),
    (
        "POST",
        "/v1/vdis/{name}/rollback",
        r#"{"to":"before","keep":"after","discard":false,"force":true}"#,
    ),
    ("POST", "/v1/snapshots", r#"{"snapshots":["web01@before"]}"#),
    ("GET", "/v1/vdis/{name}/snapshots", "null"),
    ("DELETE", "/v1/vdis/{name}/snapshots/{snapshot}", "null"),
    (
        "POST",
        "/v1/vdis/{name}/snapshots/{snapshot}/protect",
        r#"{"protected":true}"#,
    ),
    ("GET", "/v1/scrub", "null"),
    ("POST", "/v1/scrub", r#"{"vdi":"web01"}"#),
    ("GET", "/v1/status", "null"),
    ("GET", "/v1/version", "null"),
    ("GET", "/metrics", "null"),
];

pub const DISK: &str = "00000000-0000-0000-0000-000000000001";

/// Bodies for a route that are wrong in one place each, or altogether, with what is wrong; none where it takes none.
pub fn wrong_bodies(document: &Value, method: &str, path: &str, body: &str) -> Vec<(String, String)> {
    let Some(schema) = schema(document, method, path) else {
        return Vec::new();
    };
    let valid: Value = serde_json::from_str(body).unwrap();
    let mut bodies = wrong_in_one_place(document, &schema, &valid, "");
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
    bodies
}

/// Right requests but for a name in the path or a query that nobody asked for: method, target, body.
pub fn hostile_targets() -> Vec<(&'static str, String, &'static str)> {
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
    let mut targets = Vec::new();
    for (method, path, body) in VALID {
        for name in hostile.iter().copied().chain([long.as_str()]) {
            // A name of digits is a name; it is no id of a disk.
            if path.contains('{') && !(name == "0" && path.contains("{name}")) {
                let target = path.replace("{id}", name).replace("{name}", name);
                targets.push((*method, target.replace("{snapshot}", "before"), *body));
            }
            if path.contains("{snapshot}") && name != "0" {
                targets.push((*method, place(&path.replace("{snapshot}", name)), *body));
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
            targets.push((*method, format!("{}?{query}", place(path)), *body));
        }
    }
    targets
}

/// The schema of a route's body, references followed.
pub fn schema(document: &Value, method: &str, path: &str) -> Option<Value> {
    let body = &document["paths"][path][method.to_lowercase()]["requestBody"];
    let schema = body.pointer("/content/application~1json/schema")?;
    Some(follow(document, schema))
}

pub fn follow(document: &Value, schema: &Value) -> Value {
    match schema["$ref"].as_str() {
        Some(reference) => document.pointer(&reference[1..]).unwrap().clone(),
        None => schema.clone(),
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
        Value::Array(items) => {
            let texts = items.iter().filter(|item| item.is_string());
            let hostile = texts.flat_map(|_| hostile_texts());
            wrong.extend(hostile.map(|text| json!([text])));
            wrong.extend(items.iter().map(|item| json!([item, item])));
            wrong.extend([json!("x"), json!(true), json!(7), json!([7])]);
        }
        Value::Bool(_) => wrong.extend([json!("true"), json!(1), json!(0), json!("")]),
        _ => wrong.extend([json!("x"), json!(true), json!(7)]),
    }
    wrong
}

/// Bodies that are wrong in one place each, with what is wrong: for the object at `pointer` of `whole` and all in it.
fn wrong_in_one_place(
    document: &Value,
    schema: &Value,
    whole: &Value,
    pointer: &str,
) -> Vec<(String, String)> {
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
            bodies.extend(wrong_in_one_place(
                document,
                &inner,
                whole,
                &format!("{pointer}/{name}"),
            ));
        }
    }
    bodies
}

/// What is not right about a refusal: it has to be one clear line, as JSON in the one form of a failure.
pub fn fault((status, content, body): &(u16, String, String)) -> Option<String> {
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
pub struct Faults(Vec<String>);

impl Faults {
    pub fn check(&mut self, what: &str, answer: &(u16, String, String)) {
        if let Some(fault) = fault(answer) {
            self.0.push(format!("{what}: {fault}"));
        }
    }

    pub fn report(self) {
        assert!(
            self.0.is_empty(),
            "{} faults:\n{}",
            self.0.len(),
            self.0.join("\n")
        );
    }
}

pub fn place(path: &str) -> String {
    path.replace("{id}", DISK)
        .replace("{name}", "web01")
        .replace("{snapshot}", "before")
}
