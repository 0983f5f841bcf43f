//! A block's content as a small number.

use std::fmt;
use std::sync::LazyLock;

use types::{BLOCK_BYTES, Payload};

const BYTES: usize = BLOCK_BYTES as usize;

/// More different contents than a scenario writes.
const VALUES: usize = 64;

/// One block. Value 0 is a block of zeros; the others begin with their number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value(pub u8);

static BLOCKS: LazyLock<Vec<[u8; BYTES]>> = LazyLock::new(|| {
    let block = |value: usize| {
        let mut bytes = [0; BYTES];
        bytes[0] = value as u8;
        bytes
    };
    (0..VALUES).map(block).collect()
});

static CRCS: LazyLock<Vec<u32>> = LazyLock::new(|| BLOCKS.iter().map(|block| types::crc32c(block)).collect());

impl Value {
    /// crc32c of the block.
    #[must_use]
    pub fn crc(self) -> u32 {
        CRCS[usize::from(self.0)]
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

impl Payload for Value {
    fn bytes(&self) -> &[u8] {
        &BLOCKS[usize::from(self.0)]
    }

    fn slice(&self, start: usize, length: usize) -> Value {
        assert_eq!((start, length), (0, BYTES), "a value is one block");
        *self
    }

    fn overlay(&self, _: usize, _: &Value) -> Value {
        unreachable!("replication never changes a part of a block");
    }

    fn zeroed(length: usize) -> Value {
        assert_eq!(length, BYTES, "a value is one block");
        Value(0)
    }

    fn length(&self) -> usize {
        BYTES
    }
}
