//! Checksums of blocks, bound to where the block belongs.
//!
//! The stored sum of a block is not the crc32c of its bytes alone but of its identity (shard, layer, block,
//! seq) and that crc. A block that a disk returns from the wrong place, or an index entry that points at
//! another block's data, therefore fails its check even where the content is intact.

use crate::{BlockNo, LayerId, Seq, ShardId};

/// crc32c (Castagnoli, RFC 3720 B.4) of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// The identity that a [`BlockSum`] is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumKey {
    /// The shard the block belongs to.
    pub shard: ShardId,
    /// The layer it was written in.
    pub layer: LayerId,
    /// Its number in the shard.
    pub block: BlockNo,
    /// The write that gave it this content.
    pub seq: Seq,
}

/// A checksum bound to a [`SumKey`]; kept outside the block it protects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSum(pub u32);

/// Binds the plain crc32c of a block's bytes to the block's identity. About 10 ns.
#[must_use]
pub fn bind(key: SumKey, content_crc: u32) -> BlockSum {
    let mut bytes = [0u8; 28];
    bytes[0..8].copy_from_slice(&key.shard.to_u64().to_le_bytes());
    bytes[8..12].copy_from_slice(&key.layer.0.to_le_bytes());
    bytes[12..16].copy_from_slice(&key.block.0.to_le_bytes());
    bytes[16..24].copy_from_slice(&key.seq.0.to_le_bytes());
    bytes[24..28].copy_from_slice(&content_crc.to_le_bytes());
    BlockSum(crc32c::crc32c(&bytes))
}

/// The sum of the same bytes, bound to another layer: crc32c is linear, so it differs by what the identities differ, no
/// matter what the block holds.
#[must_use]
pub fn rebind(sum: BlockSum, from: LayerId, to: LayerId) -> BlockSum {
    let of = |layer: LayerId| {
        let mut bytes = [0u8; 28];
        bytes[8..12].copy_from_slice(&layer.0.to_le_bytes());
        crc32c::crc32c(&bytes)
    };
    BlockSum(sum.0 ^ of(from) ^ of(to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ShardNo, VdiId};

    #[test]
    fn a_sum_is_bound_to_another_layer_without_the_block() {
        for (from, to, crc) in [(0, 1, 7), (3, 0x8000_0001, u32::MAX), (5, 5, 0)] {
            let key = |layer| SumKey {
                shard: ShardId {
                    vdi: VdiId(9),
                    no: ShardNo(8),
                },
                layer: LayerId(layer),
                block: BlockNo(77),
                seq: Seq(1 << 40),
            };
            let bound = rebind(bind(key(from), crc), LayerId(from), LayerId(to));
            assert_eq!(bound, bind(key(to), crc));
        }
    }

    #[test]
    fn each_part_of_the_identity_changes_the_sum() {
        let key = SumKey {
            shard: ShardId {
                vdi: VdiId(1),
                no: ShardNo(2),
            },
            layer: LayerId(3),
            block: BlockNo(4),
            seq: Seq(5),
        };
        let sums = [
            bind(key, 7),
            bind(key, 8),
            bind(
                SumKey {
                    shard: ShardId {
                        vdi: VdiId(2),
                        no: ShardNo(2),
                    },
                    ..key
                },
                7,
            ),
            bind(
                SumKey {
                    shard: ShardId {
                        vdi: VdiId(1),
                        no: ShardNo(3),
                    },
                    ..key
                },
                7,
            ),
            bind(
                SumKey {
                    layer: LayerId(4),
                    ..key
                },
                7,
            ),
            bind(
                SumKey {
                    block: BlockNo(5),
                    ..key
                },
                7,
            ),
            bind(SumKey { seq: Seq(6), ..key }, 7),
        ];
        for (i, a) in sums.iter().enumerate() {
            for b in &sums[i + 1..] {
                assert_ne!(a, b);
            }
        }
    }
}
