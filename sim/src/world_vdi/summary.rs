//! What a run did, so that a thousand runs can be asked whether they went everywhere.

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct VdiSummary {
    /// Guest requests answered.
    pub answers: u64,
    /// Kills of everything.
    pub kills: u64,
    /// Power losses of everything.
    pub power_losses: u64,
    /// Disks that went away and came back.
    pub disks_away: u64,
    /// Disks replaced by empty ones.
    pub disks_replaced: u64,
    /// Sectors of content damaged.
    pub rotten: u64,
    /// Blocks the VDI said it repaired.
    pub repaired: u64,
    /// Blocks that travelled in resyncs.
    pub resynced: u64,
    /// Replicas that fell out of sync.
    pub degraded: u64,
    /// Scrubs that ended.
    pub scrubs: u64,
    /// Daemons that were taken over and lived on.
    pub takeovers: u64,
    /// Writes and syncs that a disk said it had done.
    pub lies: u64,
    /// Indexes and superblocks that were deleted, spoiled or replaced by older ones.
    pub meddled: u64,
    /// Turns in which some disk was full.
    pub full_turns: u64,
    /// VDIs deleted.
    pub deletions: u64,
    /// Snapshots cut under load.
    pub snapshots: u64,
    /// Answers about snapshots.
    pub past_answers: u64,
}

impl VdiSummary {
    /// By name, for adding up.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("answers", self.answers),
            ("kills", self.kills),
            ("power losses", self.power_losses),
            ("disks away", self.disks_away),
            ("disks replaced", self.disks_replaced),
            ("sectors damaged", self.rotten),
            ("blocks repaired", self.repaired),
            ("blocks resynced", self.resynced),
            ("times degraded", self.degraded),
            ("scrubs", self.scrubs),
            ("takeovers", self.takeovers),
            ("lies", self.lies),
            ("meddled with", self.meddled),
            ("full turns", self.full_turns),
            ("deletions", self.deletions),
            ("snapshots", self.snapshots),
            ("answers about snapshots", self.past_answers),
        ]
    }
}
