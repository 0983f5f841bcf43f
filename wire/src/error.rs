//! Why a stream of frames cannot be followed any further.

/// What was wrong with what the other end sent. The link ends with it: after a frame that cannot be read, nothing says
/// where the next one begins.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first bytes of a frame are not ours.
    #[error("the other end does not speak Weft's protocol: a frame begins with {got:02x?}")]
    Magic {
        /// What came, as much of it as there was.
        got: [u8; 4],
    },
    /// A frame of another version than the one agreed on (0: before one is agreed on).
    #[error("a frame of protocol version {got}, where version {expected} was agreed on")]
    Version {
        /// What came.
        got: u8,
        /// What should have.
        expected: u8,
    },
    /// A type that this version does not have, or that this end is not to be sent.
    #[error("a frame of type {0}, which has no place here")]
    Type(u8),
    /// Lengths or flags that the type does not allow.
    #[error("a {frame} frame with {what} {got}, at most {most}")]
    Bound {
        /// Which.
        frame: &'static str,
        /// What of it.
        what: &'static str,
        /// How much it says.
        got: u64,
        /// How much it may.
        most: u64,
    },
    /// Header or head were changed on their way.
    #[error("the checksum of a {frame} frame's head is {got:08x}, said to be {said:08x}")]
    HeadCrc {
        /// Which.
        frame: &'static str,
        /// Of what came.
        got: u32,
        /// What the sender computed.
        said: u32,
    },
    /// A block was changed on its way, or by the sender's memory.
    #[error("block {block} of a {frame} frame has checksum {got:08x}, said to be {said:08x}")]
    BlockCrc {
        /// Which.
        frame: &'static str,
        /// Which block of its payload.
        block: usize,
        /// Of what came.
        got: u32,
        /// What the sender says.
        said: u32,
    },
    /// A field that no sender of ours writes.
    #[error("a {frame} frame: {what}")]
    Field {
        /// Which.
        frame: &'static str,
        /// In words.
        what: &'static str,
    },
}
