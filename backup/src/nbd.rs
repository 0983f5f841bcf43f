//! An NBD export that is read: fixed newstyle, structured replies where the server has them, several requests at once.
//!
//! What is mapped comes from `base:allocation`; what changed since another backup from a context that the caller names,
//! for example `qemu:dirty-bitmap:monday`. A server with neither is read whole. Numbers are named as the protocol's
//! specification (`doc/proto.md` of the NetworkBlockDevice project) names them. The server is not trusted: lengths are
//! held against what was asked for before anything is allocated.

mod negotiate;
mod replies;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;

use crate::error::Error;
use crate::source::{Extent, Source, What};
use negotiate::Export;

const PORT: u16 = 10809;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const COMMAND_READ: u16 = 0;
const COMMAND_DISC: u16 = 2;
const COMMAND_BLOCK_STATUS: u16 = 7;
/// Bytes whose status is asked for at once; servers may answer for less.
const STATUS_BYTES: u64 = 1 << 30;
/// Flags of `base:allocation`: a hole, or reads as zeros.
const STATE_ZERO: u32 = 1 << 1;
/// Flag of `qemu:dirty-bitmap:`: changed.
const STATE_DIRTY: u32 = 1;

type Reader = Box<dyn AsyncRead + Send + Unpin>;
type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// Where an export is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    place: Place,
    export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Tcp(String, u16),
    Unix(String),
}

/// `nbd://host[:port]/export`, `nbd+unix:///export?socket=path`.
fn parse(url: &str) -> Result<Address, String> {
    if let Some(rest) = url.strip_prefix("nbd+unix://") {
        let (export, query) = rest.split_once('?').unwrap_or((rest, ""));
        let socket = query.split('&').find_map(|part| part.strip_prefix("socket="));
        let socket = socket
            .filter(|path| !path.is_empty())
            .ok_or("its socket is not given (?socket=PATH)")?;
        let export = export
            .strip_prefix('/')
            .ok_or("before the export's name comes ///")?;
        return Ok(Address {
            place: Place::Unix(decode_percent(socket)?),
            export: decode_percent(export)?,
        });
    }
    let rest = url.strip_prefix("nbd://").ok_or("it is no NBD address")?;
    let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = match host.rsplit_once(':') {
        // Without brackets, the colons of an IPv6 address are its own.
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => {
            (name, port.parse().map_err(|_| format!("'{port}' is no port"))?)
        }
        _ => (host, PORT),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() {
        return Err("it names no host".to_owned());
    }
    Ok(Address {
        place: Place::Tcp(host.to_owned(), port),
        export: decode_percent(export)?,
    })
}

fn decode_percent(text: &str) -> Result<String, String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let digits = |a: Option<u8>, b: Option<u8>| {
            let text = [a?, b?];
            u8::from_str_radix(std::str::from_utf8(&text).ok()?, 16).ok()
        };
        bytes.push(match byte {
            b'%' => digits(rest.next(), rest.next()).ok_or("a '%' in it is not followed by two digits")?,
            byte => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())
}

/// What a request waits for.
#[derive(Debug)]
enum Answer {
    /// Exactly as many bytes as asked for.
    Data(Vec<u8>),
    /// Lengths and flags of extents, from where was asked.
    Extents(Vec<(u32, u32)>),
}

/// A request that is under way.
struct Pending {
    reply: oneshot::Sender<Result<Answer, String>>,
    offset: u64,
    data: Vec<u8>,
    /// Bytes of `data` that came.
    filled: usize,
    extents: Vec<(u32, u32)>,
    error: Option<String>,
}

/// Requests by cookie; none when the connection has ended, and why.
type Waiting = Arc<Mutex<Result<HashMap<u64, Pending>, String>>>;

/// An export that is open.
pub struct NbdSource {
    shown: String,
    export: Export,
    is_since_parent: bool,
    writer: tokio::sync::Mutex<Writer>,
    waiting: Waiting,
    next: AtomicU64,
    replies: tokio::task::JoinHandle<()>,
}

impl std::fmt::Debug for NbdSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NbdSource({}, {:?})", self.shown, self.export)
    }
}

impl NbdSource {
    /// Connects. With `changed_in`, a context that must be there, its extents are what is read.
    ///
    /// # Errors
    /// When the address is none, the server cannot be reached, or it has no such export or context.
    pub async fn open(url: &str, changed_in: Option<&str>) -> Result<NbdSource, Error> {
        let refuse = |reason: String| Error::Source {
            what: url.to_owned(),
            reason,
        };
        let address = parse(url).map_err(refuse)?;
        let (mut reader, mut writer) = connect(&address.place)
            .await
            .map_err(|error| refuse(error.to_string()))?;
        let context = changed_in.unwrap_or(negotiate::BASE_ALLOCATION);
        let export = negotiate::negotiate(&mut reader, &mut writer, &address.export, context)
            .await
            .map_err(refuse)?;
        if let Some(context) = changed_in.filter(|_| export.context.is_none()) {
            return Err(refuse(format!(
                "the server has no metadata context '{context}' for it"
            )));
        }
        let waiting: Waiting = Arc::new(Mutex::new(Ok(HashMap::new())));
        let to = Arc::clone(&waiting);
        let (is_structured, context) = (export.is_structured, export.context);
        let replies = tokio::spawn(async move {
            let why = replies::read(&mut reader, is_structured, context, &to).await;
            let ended = std::mem::replace(&mut *to.lock().expect("no holder panics"), Err(why.clone()));
            for (_, pending) in ended.into_iter().flatten() {
                let _ = pending.reply.send(Err(why.clone()));
            }
        });
        Ok(NbdSource {
            shown: url.to_owned(),
            is_since_parent: changed_in.is_some(),
            export,
            writer: tokio::sync::Mutex::new(writer),
            waiting,
            next: AtomicU64::new(1),
            replies,
        })
    }

    async fn ask(&self, command: u16, offset: u64, length: u32, data_bytes: usize) -> Result<Answer, Error> {
        let refuse = |reason: String| Error::Source {
            what: self.shown.clone(),
            reason: format!("{length} bytes at {offset}: {reason}"),
        };
        let cookie = self.next.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let pending = Pending {
            reply,
            offset,
            data: vec![0; data_bytes],
            filled: 0,
            extents: Vec::new(),
            error: None,
        };
        match &mut *self.waiting.lock().expect("no holder panics") {
            Ok(waiting) => waiting.insert(cookie, pending),
            Err(why) => return Err(refuse(why.clone())),
        };
        let request = request(command, cookie, offset, length);
        let sent = {
            let mut writer = self.writer.lock().await;
            match writer.write_all(&request).await {
                Ok(()) => writer.flush().await,
                error => error,
            }
        };
        sent.map_err(|error| refuse(error.to_string()))?;
        match answer.await {
            Ok(answer) => answer.map_err(refuse),
            Err(_) => Err(refuse("the connection has ended".to_owned())),
        }
    }
}

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut request = Vec::with_capacity(28);
    request.extend(REQUEST_MAGIC.to_be_bytes());
    request.extend(0u16.to_be_bytes());
    request.extend(command.to_be_bytes());
    request.extend(cookie.to_be_bytes());
    request.extend(offset.to_be_bytes());
    request.extend(length.to_be_bytes());
    request
}

async fn connect(place: &Place) -> std::io::Result<(Reader, Writer)> {
    match place {
        Place::Tcp(host, port) => {
            let stream = TcpStream::connect((host.as_str(), *port)).await?;
            stream.set_nodelay(true)?;
            let (reader, writer) = stream.into_split();
            Ok((
                Box::new(BufReader::with_capacity(1 << 17, reader)),
                Box::new(writer),
            ))
        }
        Place::Unix(path) => {
            let (reader, writer) = UnixStream::connect(path).await?.into_split();
            Ok((
                Box::new(BufReader::with_capacity(1 << 17, reader)),
                Box::new(writer),
            ))
        }
    }
}

impl Drop for NbdSource {
    fn drop(&mut self) {
        self.replies.abort();
    }
}

impl Source for NbdSource {
    fn bytes(&self) -> u64 {
        self.export.bytes
    }

    fn sector_bytes(&self) -> u32 {
        self.export.block_bytes
    }

    fn is_since_parent(&self) -> bool {
        self.is_since_parent
    }

    async fn extents(&self, from: u64) -> Result<Vec<Extent>, Error> {
        let mut at = from;
        // Until there is one that matters: none says that there is no other.
        while at < self.export.bytes {
            let length = (self.export.bytes - at).min(STATUS_BYTES);
            if self.export.context.is_none() {
                return Ok(vec![Extent {
                    offset: at,
                    bytes: self.export.bytes - at,
                    what: What::Data,
                }]);
            }
            let answer = self.ask(COMMAND_BLOCK_STATUS, at, length as u32, 0).await?;
            let Answer::Extents(told) = answer else {
                unreachable!("as it was asked");
            };
            let mut extents = Vec::new();
            for (bytes, flags) in told {
                // The last may reach further than was asked.
                let bytes = u64::from(bytes).min(self.export.bytes - at);
                let is_data = if self.is_since_parent {
                    flags & STATE_DIRTY != 0
                } else {
                    flags & STATE_ZERO == 0
                };
                if is_data && bytes > 0 {
                    extents.push(Extent {
                        offset: at,
                        bytes,
                        what: What::Data,
                    });
                }
                at += bytes;
            }
            if !extents.is_empty() {
                return Ok(extents);
            }
        }
        Ok(Vec::new())
    }

    async fn read(&self, offset: u64, bytes: usize) -> Result<Bytes, Error> {
        match self.ask(COMMAND_READ, offset, bytes as u32, bytes).await? {
            Answer::Data(data) => Ok(data.into()),
            Answer::Extents(_) => unreachable!("as it was asked"),
        }
    }

    async fn finish(&self) -> Result<(), Error> {
        // A server that is told goodbye has nothing to complain of.
        let _ = self
            .writer
            .lock()
            .await
            .write_all(&request(COMMAND_DISC, 0, 0, 0))
            .await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_or_refused() {
        let tcp = |host: &str, port, export: &str| Address {
            place: Place::Tcp(host.into(), port),
            export: export.into(),
        };
        assert_eq!(parse("nbd://host"), Ok(tcp("host", 10809, "")));
        assert_eq!(parse("nbd://host:1/a%20b/c"), Ok(tcp("host", 1, "a b/c")));
        assert_eq!(parse("nbd://[::1]:2/x"), Ok(tcp("::1", 2, "x")));
        assert_eq!(parse("nbd://[::1]/x"), Ok(tcp("::1", 10809, "x")));
        let unix = Address {
            place: Place::Unix("/run/a b".into()),
            export: "web01".into(),
        };
        assert_eq!(parse("nbd+unix:///web01?socket=/run/a%20b"), Ok(unix));
        for wrong in [
            "nbd://",
            "nbd://:1/x",
            "nbd://h:99999/x",
            "nbd://h/%zz",
            "nbd://h/%ff",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd+unix://x?socket=/a",
            "http://x",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    /// A read of 4096 bytes at 8192 with cookie 1, a question for extents with cookie 2.
    fn two_waiting() -> (Waiting, [oneshot::Receiver<Result<Answer, String>>; 2]) {
        let mut waiting = HashMap::new();
        let answers = [(1, 4096), (2, 0)].map(|(cookie, bytes)| {
            let (reply, answer) = oneshot::channel();
            let pending = Pending {
                reply,
                offset: 8192,
                data: vec![0; bytes],
                filled: 0,
                extents: Vec::new(),
                error: None,
            };
            waiting.insert(cookie, pending);
            answer
        });
        (Arc::new(Mutex::new(Ok(waiting))), answers)
    }

    fn replies(bytes: &[u8]) -> (String, [Option<Result<Answer, String>>; 2]) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (waiting, mut answers) = two_waiting();
            let why = replies::read(&mut &bytes[..], true, Some(9), &waiting).await;
            (why, answers.each_mut().map(|answer| answer.try_recv().ok()))
        })
    }

    fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
        let mut chunk = 0x668e_33ef_u32.to_be_bytes().to_vec();
        chunk.extend(flags.to_be_bytes());
        chunk.extend(kind.to_be_bytes());
        chunk.extend(cookie.to_be_bytes());
        chunk.extend((payload.len() as u32).to_be_bytes());
        chunk.extend(payload);
        chunk
    }

    fn at(offset: u64, rest: &[u8]) -> Vec<u8> {
        [&offset.to_be_bytes(), rest].concat()
    }

    #[test]
    fn a_read_is_put_together_from_its_chunks() {
        let whole = [
            chunk(0, 1, 1, &at(8192 + 1024, &[7; 3072])),
            chunk(1, 2, 1, &at(8192, &1024_u32.to_be_bytes())),
            chunk(1, 5, 2, &[9_u32, 4096, 0, 8192, 3].map(u32::to_be_bytes).concat()),
        ];
        let (_, [data, extents]) = replies(&whole.concat());
        let Some(Ok(Answer::Data(data))) = data else {
            panic!("{data:?}")
        };
        assert_eq!(data, [vec![0; 1024], vec![7; 3072]].concat());
        let Some(Ok(Answer::Extents(extents))) = extents else {
            panic!("{extents:?}")
        };
        assert_eq!(extents, [(4096, 0), (8192, 3)]);
        let (_, [refused, _]) = replies(&chunk(1, 1 << 15 | 1, 1, &[0, 0, 0, 5, 0, 0]));
        assert_eq!(refused.unwrap().unwrap_err(), "input/output error");
        // Half of it, and then that it is all.
        let (_, [short, _]) = replies(&chunk(1, 1, 1, &at(8192, &[7; 2048])));
        assert_eq!(short.unwrap().unwrap_err(), "the server sent 2048 of 4096 bytes");
    }

    #[test]
    fn what_was_not_asked_for_ends_the_connection() {
        for wrong in [
            chunk(1, 1, 3, &at(8192, &[7; 4096])),
            chunk(1, 1, 1, &at(8191, &[7; 4096])),
            chunk(1, 1, 1, &at(8192, &[7; 4097])),
            chunk(1, 1, 1, &at(u64::MAX, &[7; 2])),
            [
                chunk(0, 1, 1, &at(8192, &[7; 4096])),
                chunk(1, 1, 1, &at(8192, &[7; 1])),
            ]
            .concat(),
            chunk(1, 2, 1, &at(8192, &u32::MAX.to_be_bytes())),
            chunk(1, 5, 2, &[8_u32, 4096, 0].map(u32::to_be_bytes).concat()),
            chunk(1, 5, 2, &[9_u32, 0, 0].map(u32::to_be_bytes).concat()),
            chunk(1, 77, 1, &[]),
            b"nonsense".to_vec(),
        ] {
            let (why, [data, _]) = replies(&wrong);
            assert!(why.starts_with("the server "), "{why}");
            assert!(!matches!(data, Some(Ok(_))), "{wrong:?}");
        }
        let mut huge = chunk(1, 1, 1, &[]);
        huge[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(
            replies(&[&huge[..], &at(8192, &[])].concat())
                .0
                .starts_with("the server ")
        );
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_replies_do_no_harm(
            chunks in proptest::collection::vec((0_u16..2, 0_u16..7, 1_u64..3, proptest::collection::vec(0_u8.., 0..40)), 0..5),
            rest in proptest::collection::vec(0_u8.., 0..60),
        ) {
            let mut bytes: Vec<u8> = chunks.iter().flat_map(|(flags, kind, cookie, data)| chunk(*flags, *kind, *cookie, data)).collect();
            bytes.extend(&rest);
            replies(&bytes);
        }

        #[test]
        fn arbitrary_handshakes_do_no_harm(
            answers in proptest::collection::vec((0_usize..3, 0_u32..5, proptest::collection::vec(0_u8.., 0..40)), 0..6),
            rest in proptest::collection::vec(0_u8.., 0..60),
        ) {
            let mut bytes = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
            for (option, kind, data) in answers {
                bytes.extend(0x0003_e889_0455_65a9_u64.to_be_bytes());
                bytes.extend([8_u32, 10, 7][option].to_be_bytes());
                bytes.extend(kind.to_be_bytes());
                bytes.extend((data.len() as u32).to_be_bytes());
                bytes.extend(data);
            }
            bytes.extend(&rest);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let mut to = tokio::io::sink();
            let _ = runtime.block_on(negotiate::negotiate(&mut &bytes[..], &mut to, "web01", "base:allocation"));
        }

        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,60}") {
            let _ = parse(&format!("nbd://{text}"));
            let _ = parse(&format!("nbd+unix://{text}"));
        }
    }
}
