//! The owner of one shard.

mod api;

pub use api::{
    ShardError, ShardOp, ShardReply, WriterEffect, WriterEvent, WriterNotice, WriterPhase, WriterStatus,
};
