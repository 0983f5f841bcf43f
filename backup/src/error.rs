//! What can go wrong with a repository, in words for people.

use std::path::PathBuf;

/// Why the bytes of an object are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// Cut, or never whole.
    #[error("it is cut short: {have} bytes where {wanted} are needed")]
    Short {
        /// Bytes there.
        have: usize,
        /// Bytes that belong there.
        wanted: usize,
    },
    /// More bytes than its kind may have.
    #[error("it has {have} bytes, its kind has {limit} at most")]
    TooLong {
        /// Bytes there.
        have: u64,
        /// The limit of its kind.
        limit: u64,
    },
    /// Not an object of a repository.
    #[error("it does not begin as objects of a backup repository do")]
    Magic,
    /// Of a later format.
    #[error("it is of version {0} of the format, this program reads version 1: a newer weft wrote it")]
    Version(u8),
    /// Another kind of object, encrypted where the repository is not, or the reverse.
    #[error("it is not the kind of object that its place says")]
    Kind,
    /// The compressed bytes are not what zstd wrote.
    #[error("its compressed bytes are damaged")]
    Compression,
    /// Not sealed with this repository's key, under this name.
    #[error("it was not written with this key under this name: it was altered, swapped or moved")]
    Seal,
    /// The content is not what the name was made from.
    #[error("its content does not have the hash that it is named by")]
    Hash,
    /// The content contradicts itself or what refers to it.
    #[error("{0}")]
    Content(&'static str),
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The storage refused or failed.
    #[error("cannot {what} {object}: {source}")]
    Storage {
        /// Read, write, list, delete.
        what: &'static str,
        /// Which object.
        object: String,
        /// As the storage says it.
        source: object_store::Error,
    },
    /// An object that another one names is not there.
    #[error("{object} is missing")]
    Missing {
        /// Which.
        object: String,
    },
    /// An object is not what was written.
    #[error("{object} is damaged: {damage}")]
    Damaged {
        /// Which.
        object: String,
        /// How.
        damage: Damage,
    },
    /// No repository at the place.
    #[error("there is no backup repository at {location}")]
    NoRepository {
        /// Where.
        location: String,
    },
    /// The place has a repository of another version.
    #[error("the repository is of format {version}, this program knows format 1: a newer weft wrote it")]
    NewerFormat {
        /// Its version.
        version: u64,
    },
    /// Encrypted, and no key was given.
    #[error("the repository is encrypted and no key was given")]
    NeedsKey,
    /// A key was given for a repository that is not encrypted.
    #[error("a key was given, but the repository is not encrypted")]
    NotEncrypted,
    /// Not the key it was made with.
    #[error("this is not the key of the repository")]
    WrongKey,
    /// A key file that is no good.
    #[error("key file {}: {reason}", path.display())]
    KeyFile {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A place that is no place for a repository.
    #[error("'{location}' is no place for backups: {reason}")]
    Location {
        /// What was written.
        location: String,
        /// Why.
        reason: String,
    },
    /// No backup of this name or id.
    #[error("there is no backup '{wanted}'")]
    NoBackup {
        /// What was asked for.
        wanted: String,
    },
    /// Several backups are meant.
    #[error("'{wanted}' is the name of several backups: {}", ids.join(", "))]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// The ids of those that it names.
        ids: Vec<String>,
    },
    /// What is backed up cannot be read.
    #[error("cannot read {what}: {reason}")]
    Source {
        /// File, device or export.
        what: String,
        /// Why.
        reason: String,
    },
    /// What is restored to cannot be written.
    #[error("cannot write {what}: {reason}")]
    Sink {
        /// File, device or export.
        what: String,
        /// Why.
        reason: String,
    },
    /// The disk cannot be a backup.
    #[error("{0}")]
    Unfit(String),
    /// A prune took this run for dead, because it said nothing for longer than a run may.
    #[error("this run was silent for so long that a prune took it for dead; the backup was not made")]
    TakenForDead,
}

impl Error {
    /// An object's damage.
    #[must_use]
    pub fn damaged(object: &(impl ToString + ?Sized), damage: Damage) -> Error {
        Error::Damaged {
            object: object.to_string(),
            damage,
        }
    }

    /// Whether it is a finding about the repository's content, as `verify` collects them, and not a failure to look.
    #[must_use]
    pub fn is_finding(&self) -> bool {
        matches!(self, Error::Missing { .. } | Error::Damaged { .. })
    }
}
