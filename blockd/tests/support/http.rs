//! REST without curl: a request as it is, and what comes back. For tests that ask thousands of questions.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::{Daemon, PATIENCE};

/// Sends a request; status, content type and body of the answer.
pub fn request(daemon: &Daemon, method: &str, target: &str, body: &str) -> (u16, String, String) {
    let head = format!(
        "{method} {target} HTTP/1.1\r\nhost: w\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    let answer = converse(daemon, &[head.as_bytes(), body.as_bytes()].concat());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.get(9..12).and_then(|code| code.parse().ok()).unwrap_or(0);
    let content = head
        .lines()
        .find_map(|line| line.strip_prefix("content-type: "))
        .unwrap_or_default();
    (status, content.to_owned(), body.to_owned())
}

/// Sends bytes; all that comes until the daemon hangs up. It may hang up before it has read everything.
pub fn converse(daemon: &Daemon, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(daemon.path("state/blockd.sock")).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}
