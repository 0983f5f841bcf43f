//! Option haggling: bytes of options in, bytes of replies and a decision out. No socket here.
//!
//! ```text
//!  client flags ──▶ Negotiation ──option──▶ Continue ──┐
//!                       ▲                     │        ├─ Close      (ABORT, or a violation)
//!                       └─────────────────────┘        └─ Transmit   (GO, EXPORT_NAME)
//! ```
//!
//! TLS has its place in [`Negotiation::option`]: STARTTLS would answer ACK and a `Next::StartTls`, on which the
//! connection wraps its stream (it is generic over it) and goes on with the same negotiation. Until then it is
//! the mode that the specification calls NOTLS: STARTTLS is unsupported, TLS_REQD is never sent.

use crate::export::ExportInfo;
use crate::proto::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, Cursor, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    PAYLOAD_BYTES_MAX, client_flag, handshake_flag, info, option, option_reply, text, transmission_flag,
};
use crate::request::Session;

/// Bytes before an option's data.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Longest data of an option that is looked at: two names and a few queries, with room. Longer ones are
/// skipped and answered with ERR_TOO_BIG.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Longest data of an option that is skipped; more is a violation, not a mistake.
pub const OPTION_SKIP_MAX: u32 = 1 << 20;

/// The smallest block size a client may assume without asking; an export with a larger one tells, and insists.
const SECTOR_BYTES_DEFAULT: u32 = 512;
/// What a write should be a multiple of to be fast: the store's block.
const BLOCK_BYTES_PREFERRED: u32 = 4096;

/// Where names lead.
pub(crate) trait Catalog {
    /// What the connection needs of the export.
    type Handle;
    /// All names, for LIST.
    fn names(&self) -> Vec<String>;
    /// The export as it is now.
    fn find(&self, name: &str) -> Option<(Self::Handle, ExportInfo)>;
}

/// Why a connection ends without a reply: the client broke a MUST, or cannot be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// "the server MUST drop the TCP connection if the client sets an unknown flag".
    #[error("unknown client flags {0:#010x}")]
    ClientFlags(u32),
    /// The stream is not where an option begins.
    #[error("an option begins with {0:#018x}")]
    OptionMagic(u64),
    /// Too long to be skipped.
    #[error("option {option} has {length} bytes of data")]
    OptionLength {
        /// Its type.
        option: u32,
        /// Its length.
        length: u32,
    },
    /// Options other than EXPORT_NAME need fixed newstyle, which the client did not agree to.
    #[error("option {0} without fixed newstyle")]
    NotFixed(u32),
    /// EXPORT_NAME cannot be answered with an error.
    #[error("no export for EXPORT_NAME")]
    NoSuchExport,
}

/// An option's header; the length is not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Option type.
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

/// What comes after an option.
#[derive(Debug)]
pub enum Next<H> {
    /// Another option.
    Continue,
    /// The transmission phase.
    Transmit(H, Session),
    /// The connection's end, once the reply is sent: the client asked for it.
    Close,
}

/// What has been agreed on so far.
#[derive(Debug)]
pub struct Negotiation {
    is_fixed: bool,
    no_zeroes: bool,
    is_structured: bool,
    /// The export for which `base:allocation` is selected; contexts hold for the export they were asked for.
    allocation_of: Option<String>,
}

/// The first 18 bytes of a connection ("Newstyle negotiation").
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    bytes[16..].copy_from_slice(&flags.to_be_bytes());
    bytes
}

impl OptionHeader {
    /// Reads a header.
    pub fn parse(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<OptionHeader, Violation> {
        let mut cursor = Cursor(bytes);
        let mut read = || Some((cursor.u64()?, cursor.u32()?, cursor.u32()?));
        let (magic, option, length) = read().expect("16 bytes are an option's header");
        if magic != OPTION_MAGIC {
            return Err(Violation::OptionMagic(magic));
        }
        if length > OPTION_SKIP_MAX {
            return Err(Violation::OptionLength { option, length });
        }
        Ok(OptionHeader { option, length })
    }
}

impl Negotiation {
    /// Begins with the client's answer to the greeting.
    pub fn new(client_flags: u32) -> Result<Negotiation, Violation> {
        if client_flags & !(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES) != 0 {
            return Err(Violation::ClientFlags(client_flags));
        }
        Ok(Negotiation {
            is_fixed: client_flags & client_flag::FIXED_NEWSTYLE != 0,
            no_zeroes: client_flags & client_flag::NO_ZEROES != 0,
            is_structured: false,
            allocation_of: None,
        })
    }

    /// An option whose data was longer than [`OPTION_BYTES_MAX`] and has been skipped.
    pub fn too_big(&self, option: u32, out: &mut Vec<u8>) -> Result<(), Violation> {
        if !self.is_fixed || option == option::EXPORT_NAME {
            return Err(Violation::OptionLength {
                option,
                length: OPTION_BYTES_MAX,
            });
        }
        error(
            out,
            option,
            option_reply::ERR_TOO_BIG,
            "the option has too much data",
        );
        Ok(())
    }

    /// One option with its data; the replies are appended to `out`.
    pub(crate) fn option<C: Catalog>(
        &mut self,
        catalog: &C,
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Next<C::Handle>, Violation> {
        if option == option::EXPORT_NAME {
            return self.export_name(catalog, data, out);
        }
        if !self.is_fixed {
            return Err(Violation::NotFixed(option));
        }
        match option {
            option::ABORT => {
                reply(out, option, option_reply::ACK, &[]);
                return Ok(Next::Close);
            }
            option::LIST => list(catalog, data, out),
            option::STARTTLS => error(out, option, option_reply::ERR_UNSUP, "this server has no TLS"),
            option::INFO | option::GO => return Ok(self.go(catalog, option, data, out)),
            option::STRUCTURED_REPLY if !data.is_empty() => {
                error(
                    out,
                    option,
                    option_reply::ERR_INVALID,
                    "STRUCTURED_REPLY has no data",
                );
            }
            option::STRUCTURED_REPLY => {
                self.is_structured = true;
                reply(out, option, option_reply::ACK, &[]);
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(catalog, option, data, out);
            }
            // EXTENDED_HEADERS among them: 64-bit lengths are not spoken here.
            _ => error(out, option, option_reply::ERR_UNSUP, "unknown option"),
        }
        Ok(Next::Continue)
    }

    /// "EXPORT_NAME": size, flags and, unless waived, 124 zeroes; no way to say no but to hang up.
    fn export_name<C: Catalog>(
        &self,
        catalog: &C,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Next<C::Handle>, Violation> {
        let name = text(data).ok_or(Violation::NoSuchExport)?;
        let (handle, info) = catalog.find(name).ok_or(Violation::NoSuchExport)?;
        out.extend_from_slice(&info.bytes.to_be_bytes());
        out.extend_from_slice(&self.transmission_flags(&info).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Ok(Next::Transmit(handle, self.session(name, info)))
    }

    /// "INFO" and "GO" differ in what follows success only.
    fn go<C: Catalog>(&self, catalog: &C, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next<C::Handle> {
        let Some((name, wanted)) = parse_go(data) else {
            error(
                out,
                option,
                option_reply::ERR_INVALID,
                "malformed request for information",
            );
            return Next::Continue;
        };
        let Some((handle, info)) = catalog.find(name) else {
            error(out, option, option_reply::ERR_UNKNOWN, "no such export");
            return Next::Continue;
        };
        self.describe(option, name, &info, &wanted, out);
        if info.sector_bytes != SECTOR_BYTES_DEFAULT && !wanted.contains(&info::BLOCK_SIZE) {
            let text = "the export needs the client to keep to its block size";
            error(out, option, option_reply::ERR_BLOCK_SIZE_REQD, text);
            return Next::Continue;
        }
        reply(out, option, option_reply::ACK, &[]);
        if option == option::GO {
            Next::Transmit(handle, self.session(name, info))
        } else {
            Next::Continue
        }
    }

    /// The export's INFO replies. Size and block sizes always go along: a client skips what it does not need.
    fn describe(&self, option: u32, name: &str, info: &ExportInfo, wanted: &[u16], out: &mut Vec<u8>) {
        let mut send = |kind: u16, body: &[&[u8]]| {
            let body = [&[&kind.to_be_bytes()[..]], body].concat().concat();
            reply(out, option, option_reply::INFO, &body);
        };
        let flags = self.transmission_flags(info);
        send(info::EXPORT, &[&info.bytes.to_be_bytes(), &flags.to_be_bytes()]);
        if wanted.contains(&info::NAME) {
            send(info::NAME, &[name.as_bytes()]);
        }
        if wanted.contains(&info::DESCRIPTION) && !info.description.is_empty() {
            send(info::DESCRIPTION, &[info.description.as_bytes()]);
        }
        let preferred = BLOCK_BYTES_PREFERRED.max(info.sector_bytes);
        let sizes = [info.sector_bytes, preferred, PAYLOAD_BYTES_MAX].map(u32::to_be_bytes);
        send(info::BLOCK_SIZE, &[sizes.as_flattened()]);
    }

    /// "LIST_META_CONTEXT" and "SET_META_CONTEXT".
    fn meta_context<C: Catalog>(&mut self, catalog: &C, option: u32, data: &[u8], out: &mut Vec<u8>) {
        let is_set = option == option::SET_META_CONTEXT;
        if is_set {
            // Whatever comes of it, it replaces what was selected before.
            self.allocation_of = None;
        }
        if !self.is_structured {
            error(
                out,
                option,
                option_reply::ERR_INVALID,
                "structured replies come first",
            );
            return;
        }
        let Some((name, queries)) = parse_meta(data) else {
            error(
                out,
                option,
                option_reply::ERR_INVALID,
                "malformed query for metadata contexts",
            );
            return;
        };
        if catalog.find(name).is_none() {
            error(out, option, option_reply::ERR_UNKNOWN, "no such export");
            return;
        }
        // A list without queries is a list of all; a namespace alone lists what is in it, but selects nothing.
        let matches = |query: &&str| *query == BASE_ALLOCATION || (!is_set && *query == "base:");
        if queries.iter().any(matches) || (!is_set && queries.is_empty()) {
            let id = if is_set { BASE_ALLOCATION_ID } else { 0 };
            let body = [&id.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat();
            reply(out, option, option_reply::META_CONTEXT, &body);
            if is_set {
                self.allocation_of = Some(name.to_owned());
            }
        }
        reply(out, option, option_reply::ACK, &[]);
    }

    fn transmission_flags(&self, info: &ExportInfo) -> u16 {
        use transmission_flag as flag;
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN;
        if info.is_read_only {
            flags |= flag::READ_ONLY;
        } else {
            flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        }
        // "MUST leave this flag clear if structured replies have not been negotiated".
        if self.is_structured {
            flags |= flag::SEND_DF;
        }
        flags
    }

    fn session(&self, name: &str, info: ExportInfo) -> Session {
        Session {
            info,
            is_structured: self.is_structured,
            has_allocation: self.allocation_of.as_deref() == Some(name),
        }
    }
}

fn list<C: Catalog>(catalog: &C, data: &[u8], out: &mut Vec<u8>) {
    if !data.is_empty() {
        error(out, option::LIST, option_reply::ERR_INVALID, "LIST has no data");
        return;
    }
    for name in catalog.names() {
        let length = u32::try_from(name.len()).expect("names are at most 4096 bytes");
        let body = [&length.to_be_bytes()[..], name.as_bytes()].concat();
        reply(out, option::LIST, option_reply::SERVER, &body);
    }
    reply(out, option::LIST, option_reply::ACK, &[]);
}

/// Name, and the kinds of information wanted.
fn parse_go(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut cursor = Cursor(data);
    let name = cursor.string()?;
    let count = cursor.u16()?;
    let wanted = (0..count).map(|_| cursor.u16()).collect::<Option<Vec<_>>>()?;
    cursor.0.is_empty().then_some((name, wanted))
}

/// Name, and the queries. Their number is not believed: each takes four bytes, and the data is bounded.
fn parse_meta(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut cursor = Cursor(data);
    let name = cursor.string()?;
    let count = cursor.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(cursor.string()?);
    }
    cursor.0.is_empty().then_some((name, queries))
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, body: &[u8]) {
    let length = u32::try_from(body.len()).expect("bodies are a few names long");
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(body);
}

fn error(out: &mut Vec<u8>, option: u32, kind: u32, message: &str) {
    reply(out, option, kind, message.as_bytes());
}

#[cfg(test)]
#[path = "handshake_test.rs"]
mod tests;
