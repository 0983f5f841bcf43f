//! The words of Weft as types, shared by every crate.
//!
//! Nothing here does I/O, reads a clock or allocates more than it is asked to. An integer that could be
//! confused with another integer is a type of its own; arithmetic between units has a name.

mod block;
mod block_crcs;
mod checksum;
mod id;
mod in_flight;
mod lineage;
mod payload;
mod size;
mod time;

pub use block::{
    BLOCK_BYTES, BlockNo, LEAF_BLOCKS, LeafNo, SHARD_BLOCKS_MAX, SHARD_BYTES_DEFAULT, block_count,
    is_block_aligned,
};
pub use block_crcs::BlockCrcs;
pub use checksum::{BlockSum, SumKey, bind, crc32c, rebind};
pub use id::{
    DiskId, Epoch, HostId, Incarnation, LayerId, ParseIdError, PoolId, RequestId, Seq, ShardId, ShardNo,
    Token, VdiId,
};
pub use in_flight::InFlight;
pub use lineage::{Lineage, LineageError, LineageStep};
pub use payload::{HeapBlock, HeapRoom, Payload, Room};
pub use size::{ByteSize, ParseSizeError};
pub use time::Instant;
