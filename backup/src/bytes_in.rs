//! Little-endian integers and lengths out of bytes of unknown origin: what is not there is an error, never a panic.

use crate::error::Damage;

/// What is left to read.
pub(crate) struct BytesIn<'a>(pub &'a [u8]);

impl<'a> BytesIn<'a> {
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Damage> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Damage::Short {
            have: self.0.len(),
            wanted: count,
        })?;
        self.0 = rest;
        Ok(head)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Damage> {
        Ok(self.bytes(N)?.try_into().expect("as many as asked for"))
    }

    pub fn u8(&mut self) -> Result<u8, Damage> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u16(&mut self) -> Result<u16, Damage> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Damage> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Damage> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn i64(&mut self) -> Result<i64, Damage> {
        self.array().map(i64::from_le_bytes)
    }

    /// Text of visible ASCII with a 16-bit length, as names are: it may be shown as it is.
    pub fn text(&mut self, bytes_max: usize) -> Result<String, Damage> {
        let length = usize::from(self.u16()?);
        if length > bytes_max {
            return Err(Damage::Content("a text is too long"));
        }
        let bytes = self.bytes(length)?;
        if !bytes.iter().all(u8::is_ascii_graphic) {
            return Err(Damage::Content("a text has other characters than visible ASCII"));
        }
        Ok(bytes.iter().map(|byte| char::from(*byte)).collect())
    }

    /// Nothing may be left.
    pub fn end(&self) -> Result<(), Damage> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(Damage::Content("there is more than belongs to it"))
    }
}
