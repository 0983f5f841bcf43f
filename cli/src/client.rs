//! One request to the daemon: HTTP/1.1 over its unix socket, a connection each.

use std::path::{Path, PathBuf};
use std::time::Duration;

use control::{ApiError, ErrorKind, Problem};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::failure::{Failure, Outcome};

/// Where the daemon listens unless it was told otherwise; tried in this order.
const SOCKETS: [&str; 2] = ["/run/weft/blockd.sock", "/var/lib/weft/blockd.sock"];
/// A living daemon accepts at once.
const CONNECT_WAIT: Duration = Duration::from_secs(5);
/// Formatting a large file as a disk is the longest thing a request waits for.
const ANSWER_WAIT: Duration = Duration::from_secs(900);
/// Longest answer; a pool of 100,000 VDIs stays below.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// The daemon, and how answers are to be shown.
#[derive(Debug)]
pub struct Client {
    socket: Option<PathBuf>,
    /// `--json`.
    pub json: bool,
}

impl Client {
    /// Tries `socket`, or where daemons usually listen.
    pub fn new(socket: Option<PathBuf>, json: bool) -> Client {
        Client { socket, json }
    }

    /// `GET path`.
    pub async fn get(&self, path: &str) -> Outcome<Value> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    /// `DELETE path`.
    pub async fn delete(&self, path: &str) -> Outcome<Value> {
        self.request(Method::DELETE, path, Bytes::new()).await
    }

    /// `POST path` with a JSON body.
    pub async fn post(&self, path: &str, body: &impl Serialize) -> Outcome<Value> {
        self.try_post(path, body).await?.map_err(Failure::from)
    }

    /// `POST path`; what the daemon refused is an answer here, not a failure.
    pub async fn try_post(&self, path: &str, body: &impl Serialize) -> Outcome<Result<Value, ApiError>> {
        let body = serde_json::to_vec(body).expect("request bodies have string keys only");
        self.exchange(Method::POST, path, body.into()).await
    }

    /// `DELETE path`; what the daemon refused is an answer here, not a failure.
    pub async fn try_delete(&self, path: &str) -> Outcome<Result<Value, ApiError>> {
        self.exchange(Method::DELETE, path, Bytes::new()).await
    }

    async fn request(&self, method: Method, path: &str, body: Bytes) -> Outcome<Value> {
        self.exchange(method, path, body).await?.map_err(Failure::from)
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Outcome<Result<Value, ApiError>> {
        let (stream, socket) = self.connect().await?;
        let broken = |reason: &dyn std::fmt::Display| {
            Failure::unreachable(
                format!("the daemon at {} broke off: {reason}", socket.display()),
                "see its log; `weft status` shows whether the command was done",
            )
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| broken(&e))?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "weft")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| Failure::usage(format!("'{path}' cannot be asked for: {error}"), ""))?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|e| broken(&e))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
                .collect()
                .await;
            Ok::<_, Failure>((status, body.map_err(|e| broken(&e))?.to_bytes()))
        };
        let late = format!("no answer in {} s", ANSWER_WAIT.as_secs());
        let (status, body) = tokio::time::timeout(ANSWER_WAIT, exchange)
            .await
            .map_err(|_| broken(&late))??;
        driver.abort();
        answer(status, &body)
    }

    async fn connect(&self) -> Outcome<(UnixStream, PathBuf)> {
        let candidates: Vec<PathBuf> = match &self.socket {
            Some(socket) => vec![socket.clone()],
            None => SOCKETS.iter().map(PathBuf::from).collect(),
        };
        let mut tried = Vec::new();
        for socket in candidates {
            match tokio::time::timeout(CONNECT_WAIT, UnixStream::connect(&socket)).await {
                Ok(Ok(stream)) => return Ok((stream, socket)),
                Ok(Err(error)) => tried.push((socket, reason(&error))),
                Err(_) => tried.push((socket, format!("does not accept in {} s", CONNECT_WAIT.as_secs()))),
            }
        }
        Err(unreachable(&tried))
    }
}

/// In the words of someone who looks for a daemon, not a file.
fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such socket".to_owned(),
        std::io::ErrorKind::ConnectionRefused => "nobody listens there".to_owned(),
        std::io::ErrorKind::PermissionDenied => "permission denied, use sudo".to_owned(),
        _ => error.to_string(),
    }
}

fn unreachable(tried: &[(PathBuf, String)]) -> Failure {
    let shown = |(path, reason): &(PathBuf, String)| format!("{} ({reason})", Path::display(path));
    let tried: Vec<String> = tried.iter().map(shown).collect();
    Failure::unreachable(
        format!("the daemon cannot be reached; tried {}", tried.join(", ")),
        "start it with `systemctl start weft-blockd`, or name its socket with --socket or WEFT_SOCKET",
    )
}

fn answer(status: StatusCode, body: &[u8]) -> Outcome<Result<Value, ApiError>> {
    if status.is_success() {
        if body.is_empty() {
            return Ok(Ok(Value::Null));
        }
        return serde_json::from_slice(body)
            .map(Ok)
            .map_err(|error| not_ours(&error));
    }
    if matches!(
        status,
        StatusCode::URI_TOO_LONG | StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    ) {
        return Err(Failure::usage(
            "what was named is longer than any name",
            "names have at most 63 characters",
        ));
    }
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => Ok(Err(problem.into())),
        Err(_) => Ok(Err(ApiError {
            kind: ErrorKind::Internal,
            message: format!("the daemon answered {status} without a reason"),
            hint: "is it a blockd of this version? see `weft version`".to_owned(),
        })),
    }
}

/// Reads an answer as what the API promises.
pub fn parse<T: DeserializeOwned>(answer: Value) -> Outcome<T> {
    serde_json::from_value(answer).map_err(|error| not_ours(&error))
}

fn not_ours(error: &serde_json::Error) -> Failure {
    Failure::failed(
        format!("the daemon's answer is not what this weft expects: {error}"),
        "compare the versions with `weft version`",
    )
}

/// A name as part of a path: everything that could end the part or begin a query is escaped, so that the daemon
/// sees what the user typed and refuses it in its own words.
pub fn segment(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_".contains(&byte) || (byte == b'.' && text.len() > 2) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[test]
    fn a_missing_daemon_is_named_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("blockd.sock");
        let failure = block_on(Client::new(Some(socket.clone()), false).get("/v1/status")).unwrap_err();
        assert_eq!(failure.exit, Exit::Unreachable);
        let text = failure.to_string();
        assert!(
            text.contains(&format!("{} (there is no such socket)", socket.display())),
            "{text}"
        );
        assert!(
            text.contains("systemctl start weft-blockd") && text.contains("--socket"),
            "{text}"
        );

        // A socket that a dead daemon left.
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let failure = block_on(Client::new(Some(socket), false).get("/v1/status")).unwrap_err();
        assert!(failure.to_string().contains("nobody listens there"), "{failure}");
    }

    #[test]
    fn without_a_socket_both_usual_places_are_named() {
        let failure = unreachable(&SOCKETS.map(|s| (PathBuf::from(s), "x".to_owned())));
        assert!(
            SOCKETS.iter().all(|s| failure.to_string().contains(s)),
            "{failure}"
        );
    }

    /// What the client makes of these bytes from a daemon.
    fn answered(reply: &'static [u8]) -> Outcome<Value> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        block_on(async {
            let listener = tokio::net::UnixListener::bind(&socket).unwrap();
            let daemon = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(reply).await.unwrap();
            });
            let result = Client::new(Some(socket), false).get("/v1/status").await;
            daemon.await.unwrap();
            result
        })
    }

    #[test]
    fn a_problem_becomes_its_exit_code_and_words() {
        let failure = answered(
            b"HTTP/1.1 404 Not Found\r\n\r\n\
              {\"code\":\"not_found\",\"message\":\"no VDI 'x'\",\"hint\":\"list 1\"}",
        )
        .unwrap_err();
        assert_eq!(failure, Failure::not_found("no VDI 'x'", "list 1"));
    }

    #[test]
    fn answers_that_are_not_ours_are_failures() {
        for (reply, wanted) in [
            (
                &b"HTTP/1.1 500 Oh\r\ncontent-length: 2\r\n\r\nno"[..],
                "answered 500",
            ),
            (
                b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno",
                "not what this weft expects",
            ),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", "broke off"),
            (b"nonsense\r\n\r\n", "broke off"),
            (b"", "broke off"),
        ] {
            let failure = answered(reply).unwrap_err();
            assert!(failure.to_string().contains(wanted), "{failure}");
        }
    }

    #[test]
    fn names_stay_one_part_of_a_path() {
        assert_eq!(segment("web01.a"), "web01.a");
        assert_eq!(segment("../x?y#z%"), "..%2Fx%3Fy%23z%25");
        assert_eq!(segment(".."), "%2E%2E");
    }
}
