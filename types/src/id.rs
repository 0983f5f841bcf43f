//! Identities: of disks, pools, VDIs, shards and layers; and the numbers that order writes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number! {
    /// A VDI within its pool; never used again after the VDI is deleted.
    VdiId(u32)
}
number! {
    /// Number of a shard within its VDI: byte offset divided by the shard size.
    ShardNo(u32)
}
number! {
    /// A layer: the writes between two snapshots of a VDI.
    LayerId(u32)
}
number! {
    /// Number of a write within its shard, given by the writer; later writes have higher ones.
    Seq(u64)
}
number! {
    /// Grows with every change of who may write a shard, or of who its replicas are.
    Epoch(u64)
}
number! {
    /// One counter for the whole pool, taken afresh by each start of a daemon and each taking over of a VDI: no two
    /// writers ever have the same, and late messages of a past life are fenced.
    Incarnation(u64)
}
number! {
    /// Names a request until its reply; chosen by whoever asks, echoed by whoever answers.
    RequestId(u64)
}

impl Seq {
    /// The next number.
    #[must_use]
    pub fn next(self) -> Seq {
        Seq(self.0 + 1)
    }
}

/// One shard of one VDI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShardId {
    /// The VDI.
    pub vdi: VdiId,
    /// Which range of it.
    pub no: ShardNo,
}

impl ShardId {
    /// The form kept on disk: VDI in the high half.
    #[must_use]
    pub fn to_u64(self) -> u64 {
        u64::from(self.vdi.0) << 32 | u64::from(self.no.0)
    }

    /// Reads the form kept on disk.
    #[must_use]
    pub fn from_u64(value: u64) -> ShardId {
        ShardId {
            vdi: VdiId((value >> 32) as u32),
            no: ShardNo(value as u32),
        }
    }
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vdi, self.no)
    }
}

/// The right to write a shard. Replicas remember the highest they promised and refuse lower ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Token {
    /// Compared first.
    pub epoch: Epoch,
    /// Compared where epochs are equal.
    pub incarnation: Incarnation,
}

/// A string that is not an identity of the kind asked for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is not an id: 32 hexadecimal digits, dashes allowed")]
pub struct ParseIdError(pub String);

macro_rules! uuid {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let x = self.0;
                write!(
                    f,
                    "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
                    x >> 96,
                    x >> 80 & 0xffff,
                    x >> 64 & 0xffff,
                    x >> 48 & 0xffff,
                    x & 0xffff_ffff_ffff
                )
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let digits: String = text.chars().filter(|c| *c != '-').collect();
                let refuse = || ParseIdError(text.chars().take(64).collect());
                if digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(refuse());
                }
                u128::from_str_radix(&digits, 16).map($name).map_err(|_| refuse())
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

uuid! {
    /// A disk of the pool: written in its superblock, random, never changed.
    DiskId
}
uuid! {
    /// The pool a disk was given to.
    PoolId
}
uuid! {
    /// A host of the pool: random, kept where its daemon keeps its state, never changed.
    HostId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_print_and_parse() {
        let id = DiskId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        assert_eq!(id.to_string(), "01234567-89ab-cdef-0011-223344556677");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("0123".parse::<DiskId>().is_err());
        assert!("+1234567-89ab-cdef-0011-223344556677".parse::<DiskId>().is_err());
    }

    #[test]
    fn shard_ids_survive_the_disk() {
        let id = ShardId {
            vdi: VdiId(7),
            no: ShardNo(u32::MAX),
        };
        assert_eq!(ShardId::from_u64(id.to_u64()), id);
    }

    #[test]
    fn an_epoch_outranks_any_incarnation() {
        let old = Token {
            epoch: Epoch(1),
            incarnation: Incarnation(900),
        };
        let new = Token {
            epoch: Epoch(2),
            incarnation: Incarnation(1),
        };
        assert!(new > old);
    }
}
