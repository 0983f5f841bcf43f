//! The handshake: options until the server lets us at the export.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::BLOCK_BYTES;

pub const BASE_ALLOCATION: &str = "base:allocation";

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 1 << 1;
const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const OPTION_SET_META_CONTEXT: u32 = 10;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_META_CONTEXT: u32 = 4;
const REPLY_IS_ERROR: u32 = 1 << 31;
const ERR_UNSUP: u32 = REPLY_IS_ERROR + 1;
const ERR_UNKNOWN: u32 = REPLY_IS_ERROR + 6;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
/// Longest reply to an option: a message of 4,096 bytes with room for what is around it.
const REPLY_BYTES_MAX: u32 = 8192;
/// Replies to one option; a server that sends more is not going to end.
const REPLIES_MAX: usize = 1024;

/// What is known of an export before its first request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    pub bytes: u64,
    /// What reads must be aligned to.
    pub block_bytes: u32,
    pub is_structured: bool,
    /// The number of the context that was asked for.
    pub context: Option<u32>,
}

/// Why not, in words.
type Outcome<T> = Result<T, String>;

/// Opens an export of this name.
pub async fn negotiate<R, W>(reader: &mut R, writer: &mut W, name: &str, context: &str) -> Outcome<Export>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let broken = |error: std::io::Error| format!("the connection broke: {error}");
    let mut greeting = [0; 18];
    reader.read_exact(&mut greeting).await.map_err(broken)?;
    let number = |at: usize| u64::from_be_bytes(greeting[at..at + 8].try_into().expect("eight bytes"));
    if number(0) != INIT_MAGIC || number(8) != OPTION_MAGIC {
        return Err("it is no NBD server of the newstyle".to_owned());
    }
    let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
    if flags & FIXED_NEWSTYLE == 0 {
        return Err("its server is too old: it has no fixed newstyle".to_owned());
    }
    let ours = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
    writer.write_all(&ours.to_be_bytes()).await.map_err(broken)?;

    let mut export = Export::default();
    let answers = option(reader, writer, OPTION_STRUCTURED_REPLY, &[]).await?;
    export.is_structured = answers.is_ok();
    if export.is_structured {
        let mut data = Vec::new();
        put_text(&mut data, name);
        data.extend(1u32.to_be_bytes());
        put_text(&mut data, context);
        // Without contexts all is read; whether that will do is for the caller.
        for answer in option(reader, writer, OPTION_SET_META_CONTEXT, &data)
            .await?
            .unwrap_or_default()
        {
            let (kind, data) = answer;
            if kind == REPLY_META_CONTEXT && data.get(4..) == Some(context.as_bytes()) {
                export.context = Some(u32::from_be_bytes(data[..4].try_into().expect("four bytes")));
            }
        }
    }
    let mut data = Vec::new();
    put_text(&mut data, name);
    data.extend(1u16.to_be_bytes());
    data.extend(INFO_BLOCK_SIZE.to_be_bytes());
    let answers = option(reader, writer, OPTION_GO, &data)
        .await?
        .map_err(|(kind, message)| refusal(kind, name, &message))?;
    export.block_bytes = 512;
    for (_, data) in answers.iter().filter(|(kind, _)| *kind == REPLY_INFO) {
        info(data, &mut export)?;
    }
    if export.bytes == 0 {
        return Err("the export is empty, or the server does not say how large it is".to_owned());
    }
    Ok(export)
}

fn info(data: &[u8], export: &mut Export) -> Outcome<()> {
    let what = data.first_chunk().map(|bytes| u16::from_be_bytes(*bytes));
    match (what, &data[data.len().min(2)..]) {
        (Some(INFO_EXPORT), [size @ .., _, _]) if size.len() == 8 => {
            export.bytes = u64::from_be_bytes(size.try_into().expect("eight bytes"));
        }
        (Some(INFO_BLOCK_SIZE), sizes) if sizes.len() == 12 => {
            let least = u32::from_be_bytes(sizes[..4].try_into().expect("four bytes"));
            if !least.is_power_of_two() || least as usize > BLOCK_BYTES {
                return Err(format!(
                    "it is read in blocks of {least} bytes, {BLOCK_BYTES} are the most"
                ));
            }
            export.block_bytes = least.max(512);
        }
        (Some(INFO_EXPORT | INFO_BLOCK_SIZE) | None, _) => {
            return Err("the server describes the export in a way that is none".to_owned());
        }
        _ => {}
    }
    Ok(())
}

fn refusal(kind: u32, name: &str, message: &str) -> String {
    let why = match kind {
        ERR_UNKNOWN => format!("the server has no export '{name}'"),
        ERR_UNSUP => "the server is too old: it does not know the option GO".to_owned(),
        kind => format!(
            "the server refuses the export '{name}' (error {})",
            kind & !REPLY_IS_ERROR
        ),
    };
    if message.is_empty() {
        why
    } else {
        format!("{why}: {message}")
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u32).to_be_bytes());
    out.extend(text.as_bytes());
}

/// The replies to an option, or the error it was refused with.
type Replies = Result<Vec<(u32, Vec<u8>)>, (u32, String)>;

async fn option<R, W>(reader: &mut R, writer: &mut W, option: u32, data: &[u8]) -> Outcome<Replies>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let broken = |error: std::io::Error| format!("the connection broke: {error}");
    let mut out = Vec::new();
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    writer.write_all(&out).await.map_err(broken)?;
    writer.flush().await.map_err(broken)?;
    let mut replies = Vec::new();
    for _ in 0..REPLIES_MAX {
        let magic = reader.read_u64().await.map_err(broken)?;
        let of = reader.read_u32().await.map_err(broken)?;
        let kind = reader.read_u32().await.map_err(broken)?;
        let length = reader.read_u32().await.map_err(broken)?;
        if magic != OPTION_REPLY_MAGIC || of != option || length > REPLY_BYTES_MAX {
            return Err("the server answers an option in a way that is no answer to it".to_owned());
        }
        let mut data = vec![0; length as usize];
        reader.read_exact(&mut data).await.map_err(broken)?;
        match kind {
            REPLY_ACK => return Ok(Ok(replies)),
            kind if kind & REPLY_IS_ERROR != 0 => {
                let message = String::from_utf8_lossy(&data);
                let message = message.chars().filter(|c| !c.is_control()).take(200).collect();
                return Ok(Err((kind, message)));
            }
            kind => replies.push((kind, data)),
        }
    }
    Err("the server does not come to an end with its answers to an option".to_owned())
}
