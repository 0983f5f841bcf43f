//! One client: its handshake, then a reader that starts requests and a writer that sends their replies.
//!
//! ```text
//!  socket ─▶ reader ──spawns──▶ request ─┐
//!              │  ▲                      ├─▶ queue ─▶ writer ─▶ socket
//!              │  └── permits ◀──────────┼──────────────┘ (returned when the reply is sent)
//!              └───── refusals ──────────┘
//! ```
//!
//! A request holds permits, one of [`Config::requests_max`] and its length of [`Config::bytes_max`], from
//! before its data is read until its reply is on the socket. When they are out the reader waits, the socket
//! fills, and the client waits: nothing else bounds what a client has in flight, nothing else is needed.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::export::{Export, ExportInfo, Exports, Opened};
use crate::handshake::{
    Catalog, Negotiation, Next, OPTION_BYTES_MAX, OPTION_HEADER_BYTES, OptionHeader, Violation, greeting,
};
use crate::reply::{Encoder, Piece, Reply};
use crate::request::{HEADER_BYTES, Header, Request, Session};
use crate::server::Config;

/// Small requests of a burst are read with one call; data longer than this goes straight to its buffer.
const READ_BUFFER_BYTES: usize = 16 << 10;
/// Replies that one batch of the writer takes from the queue.
const BATCH_REPLIES: usize = 64;
/// Pieces of one `writev`.
const BATCH_PIECES: usize = 128;
/// A permit of [`Config::bytes_max`] stands for this many bytes.
pub(crate) const PERMIT_BYTES: u32 = 4096;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Why a connection ended other than by the client's wish.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error("the client broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("the client broke the protocol: a request begins with {0:#010x}")]
    BadMagic(u32),
    #[error("no export was chosen within {0:?}")]
    HandshakeTooLong(Duration),
    #[error("requests were still in flight {0:?} after the connection was to end")]
    GraceOver(Duration),
    #[error("a request's task panicked")]
    Panicked,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A byte stream that can be read and written at once.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    type Reader: AsyncRead + Unpin + Send + 'static;
    type Writer: AsyncWrite + Unpin + Send + 'static;
    fn halves(self) -> (Self::Reader, Self::Writer);
}

impl Stream for tokio::net::UnixStream {
    type Reader = tokio::net::unix::OwnedReadHalf;
    type Writer = tokio::net::unix::OwnedWriteHalf;
    fn halves(self) -> (Self::Reader, Self::Writer) {
        self.into_split()
    }
}

impl Stream for tokio::net::TcpStream {
    type Reader = tokio::net::tcp::OwnedReadHalf;
    type Writer = tokio::net::tcp::OwnedWriteHalf;
    fn halves(self) -> (Self::Reader, Self::Writer) {
        self.into_split()
    }
}

impl<E: Export> Catalog for Exports<E> {
    type Handle = Opened<E>;

    fn names(&self) -> Vec<String> {
        Exports::names(self)
    }

    fn find(&self, name: &str) -> Option<(Opened<E>, ExportInfo)> {
        let opened = self.open(name)?;
        let info = opened.export.info();
        assert!(
            matches!(info.sector_bytes, 512 | 4096),
            "export {name:?} has sectors of {} bytes",
            info.sector_bytes
        );
        assert!(
            info.bytes.is_multiple_of(u64::from(info.sector_bytes)),
            "export {name:?} of {} bytes is not whole sectors",
            info.bytes
        );
        assert!(
            info.description.len() <= crate::proto::STRING_BYTES_MAX,
            "export {name:?} tells a novel"
        );
        Some((opened, info))
    }
}

/// Serves one client until it leaves, breaks the protocol, or `is_stopped` becomes true.
pub(crate) async fn serve<S: Stream, E: Export>(
    mut stream: S,
    exports: Exports<E>,
    config: Config,
    mut is_stopped: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let limit = config.handshake_timeout;
    let chosen = tokio::select! {
        chosen = timeout(limit, negotiate(&mut stream, &exports)) => {
            chosen.map_err(|_| Ended::HandshakeTooLong(limit))??
        }
        () = became_true(&mut is_stopped) => return Ok(()),
    };
    let Some((opened, session)) = chosen else {
        return Ok(());
    };
    let Opened {
        export,
        mut is_removed,
    } = opened;
    let should_end = async {
        tokio::select! {
            () = became_true(&mut is_stopped) => {}
            () = became_true(&mut is_removed) => {}
        }
    };
    transmit(stream, export, session, &config, should_end).await
}

/// Ready once the value is true, or no one is left who could make it so.
pub(crate) async fn became_true(value: &mut watch::Receiver<bool>) {
    let _ = value.wait_for(|is_true| *is_true).await;
}

/// The handshake phase; `None` when the client leaves in good order.
async fn negotiate<S: Stream, E: Export>(
    stream: &mut S,
    exports: &Exports<E>,
) -> Result<Option<(Opened<E>, Session)>, Ended> {
    stream.write_all(&greeting()).await?;
    let mut negotiation = Negotiation::new(stream.read_u32().await?)?;
    let mut out = Vec::new();
    loop {
        let mut header = [0; OPTION_HEADER_BYTES];
        match stream.read_exact(&mut header).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        };
        let OptionHeader { option, length } = OptionHeader::parse(&header)?;
        out.clear();
        let next = if length > OPTION_BYTES_MAX {
            skip(stream, length).await?;
            negotiation.too_big(option, &mut out)?;
            Next::Continue
        } else {
            let mut data = vec![0; length as usize];
            stream.read_exact(&mut data).await?;
            negotiation.option(exports, option, &data, &mut out)?
        };
        stream.write_all(&out).await?;
        match next {
            Next::Continue => {}
            Next::Transmit(opened, session) => return Ok(Some((opened, session))),
            Next::Close => return Ok(None),
        }
    }
}

/// Reads and forgets `length` bytes.
async fn skip<R: AsyncRead + Unpin>(reader: &mut R, length: u32) -> io::Result<()> {
    let wanted = u64::from(length);
    let done = tokio::io::copy(&mut reader.take(wanted), &mut tokio::io::sink()).await?;
    if done < wanted {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// What a request occupies until its reply is sent.
struct Permits {
    _request: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// A reply on its way to the writer.
struct Outgoing<D> {
    reply: Reply<D>,
    #[expect(dead_code, reason = "returned by being dropped")]
    permits: Permits,
}

/// The transmission phase.
async fn transmit<S: Stream, E: Export>(
    stream: S,
    export: Arc<E>,
    session: Session,
    config: &Config,
    should_end: impl Future<Output = ()>,
) -> Result<(), Ended> {
    let (reader, writer) = stream.halves();
    // As many places as requests: sending never waits.
    let (replies, queue) = mpsc::channel(config.requests_max);
    let mut reader = Reader {
        socket: BufReader::with_capacity(READ_BUFFER_BYTES, reader),
        export,
        session,
        request_permits: Arc::new(Semaphore::new(config.requests_max)),
        byte_permits: Arc::new(Semaphore::new((config.bytes_max / PERMIT_BYTES) as usize)),
        replies,
        requests: JoinSet::new(),
    };
    let mut writing = JoinSet::new();
    writing.spawn(write_replies(writer, queue));

    // A client to which nothing can be sent has gone, whatever it still says.
    let read = tokio::select! {
        result = reader.run() => result,
        () = should_end => Ok(()),
        result = join(&mut writing) => result,
    };
    // Requests may wait for as long as the export does, for a quorum say. Whether the client left or is sent
    // away, it does not keep its place for longer than the grace.
    let Reader {
        mut requests,
        replies,
        ..
    } = reader;
    if let Ok(finished) = timeout(config.grace, finish(&mut requests, replies, &mut writing)).await {
        return read.and(finished);
    }
    // Waited for, so that nothing holds the export once the connection is gone.
    requests.shutdown().await;
    writing.shutdown().await;
    Err(Ended::GraceOver(config.grace))
}

/// Waits for the requests in flight and for their replies to be sent.
async fn finish<D>(
    requests: &mut JoinSet<()>,
    replies: mpsc::Sender<Outgoing<D>>,
    writing: &mut JoinSet<io::Result<()>>,
) -> Result<(), Ended> {
    let mut finished = Ok(());
    while let Some(result) = requests.join_next().await {
        finished = finished.and(result.map_err(|_| Ended::Panicked));
    }
    drop(replies);
    let written = join(writing).await;
    finished.and(written)
}

/// The result of the one task in the set; fine when it has been taken already.
async fn join(tasks: &mut JoinSet<io::Result<()>>) -> Result<(), Ended> {
    match tasks.join_next().await {
        None => Ok(()),
        Some(Ok(result)) => Ok(result?),
        Some(Err(_)) => Err(Ended::Panicked),
    }
}

struct Reader<R, E: Export> {
    socket: BufReader<R>,
    export: Arc<E>,
    session: Session,
    request_permits: Arc<Semaphore>,
    byte_permits: Arc<Semaphore>,
    replies: mpsc::Sender<Outgoing<E::Data>>,
    /// Requests under way.
    requests: JoinSet<()>,
}

impl<R: AsyncRead + Unpin, E: Export> Reader<R, E> {
    /// Starts requests until the client disconnects.
    async fn run(&mut self) -> Result<(), Ended> {
        loop {
            let mut bytes = [0; HEADER_BYTES];
            match self.socket.read_exact(&mut bytes).await {
                // Hanging up without DISC is rude, but common, and means the same.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                result => result?,
            };
            let header = Header::parse(&bytes).map_err(|bad| Ended::BadMagic(bad.0))?;
            let is_last = self.start(header).await?;
            while let Some(result) = self.requests.try_join_next() {
                result.map_err(|_| Ended::Panicked)?;
            }
            if is_last {
                return Ok(());
            }
        }
    }

    /// Starts one request, or refuses it; true when it is the client's last.
    async fn start(&mut self, header: Header) -> Result<bool, Ended> {
        let encoder = Encoder {
            cookie: header.cookie,
            is_structured: self.session.is_structured,
        };
        let request = match header.check(&self.session) {
            Ok(Request::Disconnect) => return Ok(true),
            Ok(request) => request,
            Err(refusal) => {
                tracing::debug!(?header, refusal.message, "refused");
                skip(&mut self.socket, header.payload_bytes()).await?;
                let permits = self.permits(0).await;
                let reply = encoder.refused(refusal);
                let _ = self.replies.send(Outgoing { reply, permits }).await;
                return Ok(false);
            }
        };
        let permits = self.permits(request.memory_bytes()).await;
        let data = match request {
            Request::Write { length, .. } => Some(self.receive(length).await?),
            _ => None,
        };
        let export = Arc::clone(&self.export);
        let replies = self.replies.clone();
        self.requests.spawn(async move {
            let reply = perform(&*export, request, data, encoder).await;
            // The writer outlives every sender, so this says only that the connection is being torn down.
            let _ = replies.send(Outgoing { reply, permits }).await;
        });
        Ok(false)
    }

    /// Exclusive, because a future that shares the reader could not move between threads.
    async fn permits(&mut self, bytes: u32) -> Permits {
        let open = "these semaphores are never closed";
        let request = Arc::clone(&self.request_permits)
            .acquire_owned()
            .await
            .expect(open);
        let count = bytes.div_ceil(PERMIT_BYTES);
        let bytes = Arc::clone(&self.byte_permits)
            .acquire_many_owned(count)
            .await
            .expect(open);
        Permits {
            _request: request,
            _bytes: bytes,
        }
    }

    /// A write's data, from the socket into the export's own memory.
    async fn receive(&mut self, length: u32) -> Result<E::Buffer, Ended> {
        let mut buffer = self.export.buffer(length as usize).await;
        let target = buffer.as_mut();
        assert_eq!(
            target.len(),
            length as usize,
            "the export's buffer is not of the length asked for"
        );
        self.socket.read_exact(target).await?;
        Ok(buffer)
    }
}

/// Asks the export, and puts what it says into a reply.
async fn perform<E: Export>(
    export: &E,
    request: Request,
    data: Option<E::Buffer>,
    encoder: Encoder,
) -> Reply<E::Data> {
    let result = match request {
        Request::Read {
            offset,
            length,
            is_whole,
        } => {
            return match export.read(offset, length).await {
                Ok(parts) => encoder.read(offset, length, is_whole, parts),
                Err(error) => encoder.failed(&error),
            };
        }
        Request::BlockStatus {
            offset,
            length,
            is_one,
        } => {
            return match export.extents(offset, length).await {
                Ok(extents) => encoder.block_status(length, is_one, &extents),
                Err(error) => encoder.failed(&error),
            };
        }
        Request::Write { offset, fua, .. } => {
            let data = data.expect("the reader has received a write's data");
            export.write(offset, data, fua).await
        }
        Request::Flush => export.flush().await,
        Request::Trim { offset, length, fua } => export.trim(offset, length, fua).await,
        Request::WriteZeroes {
            offset,
            length,
            fua,
            no_hole,
        } => export.write_zeroes(offset, length, fua, no_hole).await,
        Request::Disconnect => unreachable!("the reader ends at a disconnect"),
    };
    match result {
        Ok(()) => encoder.done(),
        Err(error) => encoder.failed(&error),
    }
}

/// Sends replies until no one is left who could bring one, or the socket fails: the queue then closes, and the
/// replies of requests that are still under way go nowhere.
async fn write_replies<W: AsyncWrite + Unpin, D: AsRef<[u8]> + Send + Sync>(
    mut writer: W,
    mut queue: mpsc::Receiver<Outgoing<D>>,
) -> io::Result<()> {
    let mut batch = Vec::with_capacity(BATCH_REPLIES);
    while queue.recv_many(&mut batch, BATCH_REPLIES).await > 0 {
        write_pieces(&mut writer, batch.iter().flat_map(|outgoing| &outgoing.reply)).await?;
        batch.clear();
    }
    writer.shutdown().await
}

async fn write_pieces<'a, W, D>(writer: &mut W, pieces: impl Iterator<Item = &'a Piece<D>>) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
    D: AsRef<[u8]> + 'a,
{
    let mut slices = [IoSlice::new(&[]); BATCH_PIECES];
    let mut count = 0;
    for piece in pieces {
        let mut zeros = 0;
        let mut bytes: &[u8] = match piece {
            Piece::Head(head) => head,
            Piece::Data(data) => data.as_ref(),
            Piece::Zeros(length) => {
                zeros = *length;
                &[]
            }
        };
        loop {
            if bytes.is_empty() {
                bytes = &ZEROS[..zeros.min(ZEROS.len() as u64) as usize];
                zeros -= bytes.len() as u64;
            }
            if bytes.is_empty() {
                break;
            }
            slices[count] = IoSlice::new(bytes);
            count += 1;
            bytes = &[];
            if count == BATCH_PIECES {
                write_slices(writer, &mut slices[..count]).await?;
                count = 0;
            }
        }
    }
    write_slices(writer, &mut slices[..count]).await
}

async fn write_slices<W: AsyncWrite + Unpin>(
    writer: &mut W,
    mut slices: &mut [IoSlice<'_>],
) -> io::Result<()> {
    while !slices.is_empty() {
        let done = writer.write_vectored(slices).await?;
        if done == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut slices, done);
    }
    Ok(())
}

#[cfg(test)]
#[path = "connection_test.rs"]
mod tests;
