//! Replies: simple ones, and the chunks of structured ones, to the requests that wait for them.

use tokio::io::{AsyncRead, AsyncReadExt};

use super::{Answer, Pending, Waiting};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const FLAG_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_OFFSET_HOLE: u16 = 2;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_IS_ERROR: u16 = 1 << 15;
/// Longest chunk that carries no data of a read: a description of very many extents.
const CHUNK_BYTES_MAX: usize = 16 << 20;

/// Reads until the connection ends; why it did.
pub async fn read<R: AsyncRead + Unpin>(
    reader: &mut R,
    is_structured: bool,
    context: Option<u32>,
    waiting: &Waiting,
) -> String {
    loop {
        if let Err(why) = reply(reader, is_structured, context, waiting).await {
            return why;
        }
    }
}

async fn reply<R: AsyncRead + Unpin>(
    reader: &mut R,
    is_structured: bool,
    context: Option<u32>,
    waiting: &Waiting,
) -> Result<(), String> {
    let broken = |error: std::io::Error| format!("the connection broke: {error}");
    match reader.read_u32().await.map_err(broken)? {
        SIMPLE_MAGIC => {
            let error = reader.read_u32().await.map_err(broken)?;
            let cookie = reader.read_u64().await.map_err(broken)?;
            let mut pending = take(waiting, cookie)?;
            if error != 0 {
                pending.error = Some(named(error));
            } else if is_structured && !pending.data.is_empty() {
                return Err("the server answers a read in the way that was agreed not to be used".to_owned());
            } else {
                reader.read_exact(&mut pending.data).await.map_err(broken)?;
                pending.filled = pending.data.len();
            }
            finish(pending);
        }
        STRUCTURED_MAGIC if is_structured => {
            let flags = reader.read_u16().await.map_err(broken)?;
            let kind = reader.read_u16().await.map_err(broken)?;
            let cookie = reader.read_u64().await.map_err(broken)?;
            let length = reader.read_u32().await.map_err(broken)? as usize;
            let mut pending = take(waiting, cookie)?;
            chunk(reader, kind, length, context, &mut pending).await?;
            if flags & FLAG_DONE != 0 {
                finish(pending);
            } else if let Ok(waiting) = &mut *waiting.lock().expect("no holder panics") {
                waiting.insert(cookie, pending);
            }
        }
        _ => return Err("the server sends what is no reply".to_owned()),
    }
    Ok(())
}

async fn chunk<R: AsyncRead + Unpin>(
    reader: &mut R,
    kind: u16,
    length: usize,
    context: Option<u32>,
    pending: &mut Pending,
) -> Result<(), String> {
    let broken = |error: std::io::Error| format!("the connection broke: {error}");
    let wrong = || "the server sends more, or elsewhere, than was asked for".to_owned();
    match kind {
        CHUNK_NONE if length == 0 => {}
        CHUNK_OFFSET_DATA if length > 8 => {
            let offset = reader.read_u64().await.map_err(broken)?;
            let place = place(pending, offset, length - 8).ok_or_else(wrong)?;
            reader
                .read_exact(&mut pending.data[place])
                .await
                .map_err(broken)?;
            pending.filled += length - 8;
        }
        CHUNK_OFFSET_HOLE if length == 12 => {
            let offset = reader.read_u64().await.map_err(broken)?;
            let bytes = reader.read_u32().await.map_err(broken)? as usize;
            let place = place(pending, offset, bytes).ok_or_else(wrong)?;
            pending.data[place].fill(0);
            pending.filled += bytes;
        }
        CHUNK_BLOCK_STATUS if length >= 12 && length % 8 == 4 && length <= CHUNK_BYTES_MAX => {
            let of = reader.read_u32().await.map_err(broken)?;
            let mut extents = vec![0; length - 4];
            reader.read_exact(&mut extents).await.map_err(broken)?;
            if Some(of) != context || !pending.extents.is_empty() {
                return Err("the server tells extents of what was not asked for".to_owned());
            }
            let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().expect("four bytes"));
            pending.extents = extents
                .chunks_exact(8)
                .map(|extent| (number(&extent[..4]), number(&extent[4..])))
                .collect();
            if pending.extents.iter().any(|(bytes, _)| *bytes == 0) {
                return Err("the server tells of an extent without a byte".to_owned());
            }
        }
        kind if kind & CHUNK_IS_ERROR != 0 && (6..=CHUNK_BYTES_MAX).contains(&length) => {
            let error = reader.read_u32().await.map_err(broken)?;
            let mut rest = vec![0; length - 4];
            reader.read_exact(&mut rest).await.map_err(broken)?;
            pending.error = Some(named(error));
        }
        _ => {
            return Err(format!(
                "the server sends a chunk of kind {kind} and {length} bytes"
            ));
        }
    }
    Ok(())
}

/// Where bytes of the disk belong in what is waited for.
fn place(pending: &Pending, offset: u64, bytes: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset.checked_sub(pending.offset)?).ok()?;
    let end = start.checked_add(bytes)?;
    // No byte twice: then as many as were asked for are all of them.
    let is_room = bytes <= pending.data.len() - pending.filled.min(pending.data.len());
    (end <= pending.data.len() && is_room).then_some(start..end)
}

fn take(waiting: &Waiting, cookie: u64) -> Result<Pending, String> {
    match &mut *waiting.lock().expect("no holder panics") {
        Ok(waiting) => waiting.remove(&cookie),
        Err(_) => None,
    }
    .ok_or_else(|| "the server answers what was not asked".to_owned())
}

fn finish(pending: Pending) {
    let Pending {
        reply,
        data,
        filled,
        extents,
        error,
        ..
    } = pending;
    let answer = match error {
        Some(error) => Err(error),
        None if filled != data.len() => Err(format!("the server sent {filled} of {} bytes", data.len())),
        None if !data.is_empty() => Ok(Answer::Data(data)),
        None if extents.is_empty() => Err("the server tells of no extent".to_owned()),
        None => Ok(Answer::Extents(extents)),
    };
    // Who asked may have given up.
    let _ = reply.send(answer);
}

fn named(error: u32) -> String {
    match error {
        1 => "not permitted".to_owned(),
        5 => "input/output error".to_owned(),
        22 => "the server finds the request invalid".to_owned(),
        28 => "no space left".to_owned(),
        75 => "too large for the server".to_owned(),
        95 => "not supported by the server".to_owned(),
        108 => "the server is being shut down".to_owned(),
        error => format!("NBD error {error}"),
    }
}
