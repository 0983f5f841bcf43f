//! Little-endian fields: a bounds-checked reader for bytes of unknown origin, and the writes that match.

use types::{Epoch, Incarnation, Token};

use crate::WireError;

/// Walks over a head; every take says whether there was enough.
pub(crate) struct Reader<'a> {
    frame: &'static str,
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    /// `frame` is what errors call it.
    pub(crate) fn new(frame: &'static str, bytes: &'a [u8]) -> Reader<'a> {
        Reader { frame, bytes }
    }

    /// An error that names the frame.
    pub(crate) fn wrong(&self, what: &'static str) -> WireError {
        WireError::Field {
            frame: self.frame,
            what,
        }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let Some((head, rest)) = self.bytes.split_at_checked(count) else {
            return Err(self.wrong("head is too short"));
        };
        self.bytes = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let bytes = self.take(N)?;
        Ok(bytes.try_into().expect("as many as asked for"))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn u128(&mut self) -> Result<u128, WireError> {
        self.array().map(u128::from_le_bytes)
    }

    pub(crate) fn token(&mut self) -> Result<Token, WireError> {
        Ok(Token {
            epoch: Epoch(self.u64()?),
            incarnation: Incarnation(self.u64()?),
        })
    }

    /// A byte for the length, then so many of UTF-8 without control characters.
    pub(crate) fn text(&mut self) -> Result<String, WireError> {
        let length = self.u8()?;
        let bytes = self.take(usize::from(length))?;
        match std::str::from_utf8(bytes) {
            Ok(text) if !text.chars().any(char::is_control) => Ok(text.to_owned()),
            _ => Err(self.wrong("text is not printable UTF-8")),
        }
    }

    /// All that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    /// All that is left, as numbers, at most `most` of them.
    pub(crate) fn rest_u32(
        &mut self,
        most: usize,
    ) -> Result<impl ExactSizeIterator<Item = u32> + use<'a>, WireError> {
        let rest = self.rest();
        if !rest.len().is_multiple_of(4) || rest.len() / 4 > most {
            return Err(self.wrong("list of a wrong length"));
        }
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        Ok(rest.chunks_exact(4).map(number))
    }

    pub(crate) fn end(&self) -> Result<(), WireError> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(self.wrong("head is too long"))
        }
    }
}

/// Appends fields.
pub(crate) trait Put {
    fn put(&mut self, bytes: &[u8]);

    fn put_u8(&mut self, value: u8) {
        self.put(&[value]);
    }

    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    fn put_u128(&mut self, value: u128) {
        self.put(&value.to_le_bytes());
    }

    fn put_token(&mut self, token: Token) {
        self.put_u64(token.epoch.0);
        self.put_u64(token.incarnation.0);
    }

    /// At most 255 bytes of it; what is not printable becomes a question mark, as the other end would refuse it.
    fn put_text(&mut self, text: &str) {
        let mut kept = String::new();
        for c in text.chars().map(|c| if c.is_control() { '?' } else { c }) {
            if kept.len() + c.len_utf8() > 255 {
                break;
            }
            kept.push(c);
        }
        self.put_u8(kept.len() as u8);
        self.put(kept.as_bytes());
    }
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}
