//! What the pure cores know of a buffer.

use std::fmt;
use std::sync::Arc;

/// An immutable run of bytes that is cheap to clone and to cut: a pooled buffer in the daemon, heap memory
/// in the simulator and in tests.
///
/// An implementor owes: `clone` and `slice` share the bytes, they do not copy them; the bytes never change
/// while any clone lives. It may assume that `slice` and `overlay` stay inside the payload (callers assert).
pub trait Payload: Clone + fmt::Debug + 'static {
    /// The content.
    fn bytes(&self) -> &[u8];

    /// The `length` bytes from `start`, shared.
    #[must_use]
    fn slice(&self, start: usize, length: usize) -> Self;

    /// A copy of this content in which the bytes from `start` are those of `patch`: a partial block's new
    /// content.
    #[must_use]
    fn overlay(&self, start: usize, patch: &Self) -> Self;

    /// `length` zero bytes.
    #[must_use]
    fn zeroed(length: usize) -> Self;

    /// Length in bytes.
    fn length(&self) -> usize {
        self.bytes().len()
    }
}

/// Writable bytes with one owner that become payload piece by piece, from the front: what a stream is received into.
///
/// An implementor owes: memory that starts at a multiple of 512 when fresh; `split_front` shares the bytes where it can,
/// and what was split off never changes again. It may assume that nobody splits more than there is (callers assert).
pub trait Room: fmt::Debug {
    /// What the bytes become.
    type Payload: Payload;

    /// All of it.
    fn content(&self) -> &[u8];

    /// All of it, to be written.
    fn content_mut(&mut self) -> &mut [u8];

    /// The first `length` bytes, finished; the rest stays writable.
    fn split_front(&mut self, length: usize) -> Self::Payload;
}

/// Room on the heap, for tests and for what is said once. Splitting copies.
#[derive(Debug)]
pub struct HeapRoom(Vec<u8>);

impl HeapRoom {
    /// `length` bytes that nobody should rely on.
    #[must_use]
    pub fn new(length: usize) -> HeapRoom {
        HeapRoom(vec![0xa5; length])
    }
}

impl Room for HeapRoom {
    type Payload = HeapBlock;

    fn content(&self) -> &[u8] {
        &self.0
    }

    fn content_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn split_front(&mut self, length: usize) -> HeapBlock {
        let front: Vec<u8> = self.0.drain(..length).collect();
        HeapBlock::new(&front)
    }
}

/// Payload on the heap, for the simulator and for tests.
#[derive(Clone, PartialEq, Eq)]
pub struct HeapBlock {
    bytes: Arc<[u8]>,
    start: usize,
    length: usize,
}

impl HeapBlock {
    /// A payload with this content.
    #[must_use]
    pub fn new(bytes: &[u8]) -> HeapBlock {
        HeapBlock {
            bytes: bytes.into(),
            start: 0,
            length: bytes.len(),
        }
    }
}

impl fmt::Debug for HeapBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "HeapBlock({} B, crc {:08x})",
            self.length,
            crate::crc32c(self.bytes())
        )
    }
}

impl Payload for HeapBlock {
    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    fn slice(&self, start: usize, length: usize) -> HeapBlock {
        assert!(
            start + length <= self.length,
            "slice {start}+{length} of {} B",
            self.length
        );
        HeapBlock {
            bytes: Arc::clone(&self.bytes),
            start: self.start + start,
            length,
        }
    }

    fn overlay(&self, start: usize, patch: &HeapBlock) -> HeapBlock {
        let mut bytes = self.bytes().to_vec();
        bytes[start..start + patch.length].copy_from_slice(patch.bytes());
        HeapBlock::new(&bytes)
    }

    fn zeroed(length: usize) -> HeapBlock {
        HeapBlock {
            bytes: vec![0; length].into(),
            start: 0,
            length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_and_overlays_copy() {
        let whole = HeapBlock::new(b"0123456789");
        let part = whole.slice(2, 4);
        assert_eq!(part.bytes(), b"2345");
        assert_eq!(part.slice(1, 2).bytes(), b"34");
        assert_eq!(whole.overlay(8, &part.slice(0, 2)).bytes(), b"0123456723");
        assert_eq!(whole.bytes(), b"0123456789");
    }
}
