//! What is said before anything else: who calls whom, in which pool, in which versions of the protocol.
//!
//! The layouts here never change, so that every version can tell every other one why they do not understand each other.

use types::{HostId, Incarnation, PoolId};

use crate::bytes::{Put, Reader};
use crate::frame::{NO_VERSION, Type, put_front};
use crate::{VERSION, WireError};

/// Who a host is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The pool it belongs to.
    pub pool: PoolId,
    /// Which host.
    pub host: HostId,
    /// Counts the starts of its daemon.
    pub incarnation: Incarnation,
    /// What people call it; at most 255 bytes are sent.
    pub name: String,
}

/// First frame of the end that dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Versions it speaks, lowest and highest.
    pub versions: (u8, u8),
    /// Who it is.
    pub from: Identity,
    /// Whom it means to reach.
    pub to: HostId,
    /// Which of its data-plane threads the link is for: a new link of the same thread takes the place of its last one.
    pub plane: u16,
}

/// First frame of the end that was dialled, when it agrees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version that all frames after this one have.
    pub version: u8,
    /// Who it is; the pool is the caller's.
    pub host: HostId,
    /// Counts the starts of its daemon.
    pub incarnation: Incarnation,
    /// What people call it.
    pub name: String,
}

/// First and last frame of the end that was dialled, when it does not agree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refused {
    /// For programs.
    pub code: RefusedCode,
    /// For people: which values clash.
    pub text: String,
}

/// Why a host does not talk to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RefusedCode {
    /// No version that both speak.
    Version = 1,
    /// Another pool.
    Pool = 2,
    /// The caller meant another host.
    WrongHost = 3,
    /// The caller is this host itself.
    Myself = 4,
    /// The caller is not a host of this pool, as far as is known here.
    Unknown = 5,
    /// A later life of the caller was here already.
    OldLife = 6,
    /// TLS is asked for here, and the caller does not speak it or has the certificate of somebody else.
    Tls = 7,
    /// A reason of a later version.
    Other = 255,
}

impl RefusedCode {
    fn of(number: u8) -> RefusedCode {
        match number {
            1 => RefusedCode::Version,
            2 => RefusedCode::Pool,
            3 => RefusedCode::WrongHost,
            4 => RefusedCode::Myself,
            5 => RefusedCode::Unknown,
            6 => RefusedCode::OldLife,
            7 => RefusedCode::Tls,
            _ => RefusedCode::Other,
        }
    }
}

impl Hello {
    /// The greeting of `from` to `to`.
    #[must_use]
    pub fn new(from: Identity, to: HostId, plane: u16) -> Hello {
        Hello {
            versions: (VERSION, VERSION),
            from,
            to,
            plane,
        }
    }

    /// The frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        framed(Type::Hello, |out| {
            out.put_u8(self.versions.0);
            out.put_u8(self.versions.1);
            out.put_u16(self.plane);
            out.put_u128(self.from.pool.0);
            out.put_u128(self.from.host.0);
            out.put_u64(self.from.incarnation.0);
            out.put_u128(self.to.0);
            out.put_text(&self.from.name);
        })
    }

    pub(crate) fn decode(head: &[u8]) -> Result<Hello, WireError> {
        let mut head = Reader::new("Hello", head);
        let versions = (head.u8()?, head.u8()?);
        let plane = head.u16()?;
        let from = Identity {
            pool: PoolId(head.u128()?),
            host: HostId(head.u128()?),
            incarnation: Incarnation(head.u64()?),
            name: String::new(),
        };
        let to = HostId(head.u128()?);
        let from = Identity {
            name: head.text()?,
            ..from
        };
        // What a later version may add is left unread: the layout up to here is for ever.
        Ok(Hello {
            versions,
            from,
            to,
            plane,
        })
    }

    /// Whether `me` talks to the caller; the version to talk in. Whether the caller is a member is not known here.
    ///
    /// # Errors
    /// The first thing that is wrong, to be sent back.
    pub fn check(&self, me: &Identity) -> Result<u8, Refused> {
        let refuse = |code, text: String| Err(Refused { code, text });
        let (low, high) = self.versions;
        let caller = &self.from;
        if low > high || VERSION < low || VERSION > high {
            return refuse(
                RefusedCode::Version,
                format!(
                    "host '{}' speaks protocol versions {low} to {high}, host '{}' speaks {VERSION}",
                    caller.name, me.name
                ),
            );
        }
        if caller.pool != me.pool {
            return refuse(
                RefusedCode::Pool,
                format!(
                    "host '{}' is of pool {}, host '{}' of pool {}",
                    caller.name, caller.pool, me.name, me.pool
                ),
            );
        }
        if caller.host == me.host {
            let text = if caller.incarnation == me.incarnation {
                format!("host '{}' called itself", me.name)
            } else {
                format!(
                    "hosts '{}' and '{}' both say they are {}",
                    caller.name, me.name, me.host
                )
            };
            return refuse(RefusedCode::Myself, text);
        }
        if self.to != me.host {
            return refuse(
                RefusedCode::WrongHost,
                format!(
                    "host '{}' called {}, but this is host '{}', {}",
                    caller.name, self.to, me.name, me.host
                ),
            );
        }
        Ok(VERSION)
    }
}

impl Welcome {
    /// The answer of `me`.
    #[must_use]
    pub fn new(version: u8, me: &Identity) -> Welcome {
        Welcome {
            version,
            host: me.host,
            incarnation: me.incarnation,
            name: me.name.clone(),
        }
    }

    /// The frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        framed(Type::Welcome, |out| {
            out.put_u8(self.version);
            out.put(&[0; 3]);
            out.put_u128(self.host.0);
            out.put_u64(self.incarnation.0);
            out.put_text(&self.name);
        })
    }

    pub(crate) fn decode(head: &[u8]) -> Result<Welcome, WireError> {
        let mut head = Reader::new("Welcome", head);
        let version = head.u8()?;
        head.take(3)?;
        Ok(Welcome {
            version,
            host: HostId(head.u128()?),
            incarnation: Incarnation(head.u64()?),
            name: head.text()?,
        })
    }

    /// Whether this is the answer to `hello`.
    ///
    /// # Errors
    /// A version that was not offered, or another host.
    pub fn check(&self, hello: &Hello) -> Result<(), Refused> {
        let refuse = |code, text: String| Err(Refused { code, text });
        if !(hello.versions.0..=hello.versions.1).contains(&self.version) {
            return refuse(
                RefusedCode::Version,
                format!(
                    "host '{}' chose protocol version {}, which was not offered",
                    self.name, self.version
                ),
            );
        }
        if self.host != hello.to {
            return refuse(
                RefusedCode::WrongHost,
                format!(
                    "{} was called, host '{}', {}, answered",
                    hello.to, self.name, self.host
                ),
            );
        }
        Ok(())
    }
}

impl Refused {
    /// The frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        framed(Type::Refused, |out| {
            out.put_u8(self.code as u8);
            out.put_text(&self.text);
        })
    }

    pub(crate) fn decode(head: &[u8]) -> Result<Refused, WireError> {
        let mut head = Reader::new("Refused", head);
        Ok(Refused {
            code: RefusedCode::of(head.u8()?),
            text: head.text()?,
        })
    }
}

fn framed(kind: Type, write_head: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put_front(&mut out, 0, NO_VERSION, kind, 0, write_head);
    out
}
