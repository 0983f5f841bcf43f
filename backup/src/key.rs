//! Keys: the one that people keep in a file, and those that are made from it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use ring::rand::{SecureRandom, SystemRandom};

use crate::error::Error;
use crate::object::{Hash, from_hex, hex};

/// Text in key files before the digits: a key is not mistaken for another secret, nor another secret for a key.
const PREFIX: &str = "weft-backup-key-1:";
/// Longer files are no key files.
const FILE_BYTES_MAX: u64 = 256;

/// The secret of a repository, 32 random bytes. Without it nothing of the repository can be read again.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(secret)")
    }
}

impl Key {
    /// Of these bytes, which nobody may guess.
    #[must_use]
    pub fn new(secret: [u8; 32]) -> Key {
        Key(secret)
    }

    /// A new one from the system's randomness.
    #[must_use]
    pub fn generate() -> Key {
        Key(random())
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// When it cannot be read, is open to others than its owner, or has no key.
    pub fn from_file(path: &Path) -> Result<Key, Error> {
        let refuse = |reason: String| Error::KeyFile {
            path: path.to_owned(),
            reason,
        };
        let file = File::open(path).map_err(|error| refuse(error.to_string()))?;
        // Of the open file: what is checked is what is read.
        let mode = file.metadata().map_err(|error| refuse(error.to_string()))?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(refuse(format!(
                "its mode {mode:04o} lets others than its owner at it: chmod 600 it, and think of who has read it"
            )));
        }
        let mut text = String::new();
        file.take(FILE_BYTES_MAX)
            .read_to_string(&mut text)
            .map_err(|error| refuse(error.to_string()))?;
        text.trim_end()
            .strip_prefix(PREFIX)
            .and_then(from_hex)
            .map(Key)
            .ok_or_else(|| refuse(format!("it has no key ('{PREFIX}' and 64 hexadecimal digits)")))
    }

    /// Writes it to a new file that only its owner can read.
    ///
    /// # Errors
    /// When the file exists or cannot be written.
    pub fn write_file(&self, path: &Path) -> Result<(), Error> {
        let refuse = |error: std::io::Error| Error::KeyFile {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(refuse)?;
        file.write_all(format!("{PREFIX}{}\n", hex(&self.0)).as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(refuse)
    }

    /// The keys of a repository, one for each purpose.
    #[must_use]
    pub fn of_repository(&self, repository: &[u8; 16]) -> RepositoryKeys {
        let mut material = [0; 48];
        material[..32].copy_from_slice(&self.0);
        material[32..].copy_from_slice(repository);
        RepositoryKeys {
            seal: blake3::derive_key("weft backup 1: key that seals objects", &material),
            name: blake3::derive_key("weft backup 1: key that names objects", &material),
            check: blake3::derive_key("weft backup 1: key check", &material),
        }
    }
}

/// What is made from a [`Key`] and a repository's id.
#[derive(Clone)]
pub struct RepositoryKeys {
    pub(crate) seal: [u8; 32],
    pub(crate) name: [u8; 32],
    check: [u8; 32],
}

impl std::fmt::Debug for RepositoryKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RepositoryKeys(secret)")
    }
}

impl RepositoryKeys {
    /// What the repository's `format` object keeps to know its key again. It tells nothing of the key.
    #[must_use]
    pub fn check(&self) -> Hash {
        self.check
    }
}

/// Bytes from the system's randomness.
///
/// # Panics
/// When the system has none: nothing safe can be done then.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .expect("the system gives random bytes");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_file_is_read_back_and_refused_when_others_can_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let key = Key::generate();
        key.write_file(&path).unwrap();
        assert_eq!(Key::from_file(&path).unwrap().0, key.0);
        assert!(key.write_file(&path).is_err(), "a key is never overwritten");
        for mode in [0o640, 0o604, 0o610, 0o601, 0o620, 0o602, 0o644, 0o777] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let refused = Key::from_file(&path).unwrap_err().to_string();
            assert!(
                refused.contains(&format!("{mode:04o}")) && refused.contains("chmod 600"),
                "{refused}"
            );
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        assert!(Key::from_file(&path).is_ok());
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (number, text) in [
            String::new(),
            "x".repeat(1 << 20),
            "ab".repeat(32),
            format!("{PREFIX}{}", "ab".repeat(31)),
            format!("{PREFIX}{}", "AB".repeat(32)),
            format!("{PREFIX}{}00", "ab".repeat(32)),
        ]
        .into_iter()
        .enumerate()
        {
            let path = folder.path().join(number.to_string());
            std::fs::write(&path, &text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            assert!(Key::from_file(&path).is_err(), "{number}");
        }
        assert!(Key::from_file(&folder.path().join("none")).is_err());
    }

    #[test]
    fn each_repository_and_purpose_has_its_own_key() {
        let key = Key::new([1; 32]);
        let (a, b) = (key.of_repository(&[1; 16]), key.of_repository(&[2; 16]));
        let keys = [a.seal, a.name, a.check, b.seal, b.name, b.check];
        let different: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(different.len(), keys.len());
        assert!(!format!("{key:?}{a:?}").contains('1'));
    }
}
