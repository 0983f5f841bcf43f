//! The `format` object: what the repository is. Written once, when the first backup comes.

use serde::{Deserialize, Serialize};

use crate::error::{Damage, Error};
use crate::key::Key;
use crate::object::{from_hex, hex};
use crate::sealed::Sealer;
use crate::{CHUNK_BYTES, PAGE_CHUNKS};

/// Its path.
pub const PATH: &str = "format";
/// Longer ones are not read.
pub const BYTES_MAX: u64 = 4096;

const VERSION: u64 = 1;
const CIPHER: &str = "aes-256-gcm";

/// As it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Format {
    weft_backup: u64,
    id: String,
    chunk_bytes: u64,
    page_chunks: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encryption: Option<Encryption>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Encryption {
    cipher: String,
    key_check: String,
}

/// What comes before all else, whatever the version.
#[derive(Deserialize)]
struct Version {
    weft_backup: u64,
}

/// The object of a new repository.
#[must_use]
pub fn encode(id: [u8; 16], key: Option<&Key>) -> String {
    let format = Format {
        weft_backup: VERSION,
        id: hex(&id),
        chunk_bytes: CHUNK_BYTES,
        page_chunks: PAGE_CHUNKS as u64,
        encryption: key.map(|key| Encryption {
            cipher: CIPHER.to_owned(),
            key_check: hex(&key.of_repository(&id).check()),
        }),
    };
    serde_json::to_string_pretty(&format).expect("it is printable") + "\n"
}

/// How a repository of this `format` object seals its objects, with this key.
///
/// # Errors
/// When it is of another version, is damaged, or the key is not its key.
pub fn decode(object: &[u8], key: Option<&Key>) -> Result<Sealer, Error> {
    let damaged = |what| Error::damaged(PATH, Damage::Content(what));
    let version: Version =
        serde_json::from_slice(object).map_err(|_| damaged("it does not say which version it is of"))?;
    if version.weft_backup != VERSION {
        return Err(Error::NewerFormat {
            version: version.weft_backup,
        });
    }
    let format: Format =
        serde_json::from_slice(object).map_err(|_| damaged("it is not as format 1 writes it"))?;
    let repository = from_hex(&format.id).ok_or_else(|| damaged("its id is not 32 hexadecimal digits"))?;
    if format.chunk_bytes != CHUNK_BYTES || format.page_chunks != PAGE_CHUNKS as u64 {
        return Err(damaged(
            "its chunks or pages are of another size than those of format 1",
        ));
    }
    let keys = match (format.encryption, key) {
        (None, None) => None,
        (None, Some(_)) => return Err(Error::NotEncrypted),
        (Some(_), None) => return Err(Error::NeedsKey),
        (Some(encryption), Some(key)) => {
            if encryption.cipher != CIPHER {
                return Err(damaged("its cipher is unknown"));
            }
            let keys = key.of_repository(&repository);
            if encryption.key_check != hex(&keys.check()) {
                return Err(Error::WrongKey);
            }
            Some(keys)
        }
    };
    Ok(Sealer { repository, keys })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_knows_its_key() {
        let (key, other) = (Key::new([1; 32]), Key::new([2; 32]));
        let plain = encode([7; 16], None);
        let sealed = encode([7; 16], Some(&key));
        assert!(decode(plain.as_bytes(), None).unwrap().keys.is_none());
        assert_eq!(decode(sealed.as_bytes(), Some(&key)).unwrap().repository, [7; 16]);
        assert!(matches!(
            decode(plain.as_bytes(), Some(&key)),
            Err(Error::NotEncrypted)
        ));
        assert!(matches!(decode(sealed.as_bytes(), None), Err(Error::NeedsKey)));
        assert!(matches!(
            decode(sealed.as_bytes(), Some(&other)),
            Err(Error::WrongKey)
        ));
        let moved = sealed.replace(&hex(&[7; 16]), &hex(&[8; 16]));
        assert!(matches!(
            decode(moved.as_bytes(), Some(&key)),
            Err(Error::WrongKey)
        ));
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let newer = r#"{"weft_backup": 2, "something": "new"}"#;
        let refused = decode(newer.as_bytes(), None).unwrap_err();
        assert!(refused.to_string().contains("format 2"), "{refused}");
        for wrong in [
            "",
            "{}",
            "[]",
            "\u{0}",
            &encode([1; 16], None).replace("1048576", "4096"),
            &encode([1; 16], None).replace("01", "0x"),
            &encode([1; 16], None).replace("\"id\"", "\"more\":1,\"id\""),
        ] {
            assert!(
                matches!(decode(wrong.as_bytes(), None), Err(Error::Damaged { .. })),
                "{wrong}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = decode(&bytes, None);
        }
    }
}
