//! What a run did, so that a thousand runs can be asked whether they went everywhere.

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClusterSummary {
    /// Faults, done or left out.
    pub faults: u64,
    /// Faults that came at the moment at which something was done.
    pub traps: u64,
    /// Turns of the world.
    pub turns: u64,
    /// Guest requests answered.
    pub answers: u64,
    /// Of them, to guests at writers that others had taken over from.
    pub late_answers: u64,
    /// Of them, writes that were completed: before the newer writer had fenced their shard.
    pub late_writes: u64,
    /// Snapshots cut under load.
    pub snapshots: u64,
    /// Answers about snapshots.
    pub past_answers: u64,
    /// Take-overs whose old writer was cut off while its leases were young.
    pub watched: u64,
    /// Guests that were attached.
    pub attachments: u64,
    /// Writers that were fenced out.
    pub fenced: u64,
    /// Daemons killed.
    pub kills: u64,
    /// Hosts that lost power, each counted.
    pub power_losses: u64,
    /// Hosts that were stopped for a while.
    pub freezes: u64,
    /// Directions of cables that were cut.
    pub cuts: u64,
    /// Streams that broke.
    pub breaks: u64,
    /// Cables that were slow for a while.
    pub slow: u64,
    /// Hosts cut off from the control store, or whose answers from it were lost.
    pub control_away: u64,
    /// Disks that failed or went for a while.
    pub disks_away: u64,
    /// Times that replicas were to move to another disk.
    pub replaced: u64,
    /// Old copies of a disk in its place.
    pub old_copies: u64,
    /// Disks that were filled.
    pub full: u64,
    /// Blocks that travelled in resyncs.
    pub resynced: u64,
    /// Replicas that fell out of sync.
    pub degraded: u64,
}

impl ClusterSummary {
    /// By name, for adding up.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("faults", self.faults),
            ("faults at the worst moment", self.traps),
            ("turns", self.turns),
            ("answers", self.answers),
            ("answers of overtaken writers", self.late_answers),
            ("writes completed by overtaken writers", self.late_writes),
            ("snapshots", self.snapshots),
            ("answers about snapshots", self.past_answers),
            ("take-overs from a writer with young leases", self.watched),
            ("attachments", self.attachments),
            ("times fenced", self.fenced),
            ("kills", self.kills),
            ("power losses", self.power_losses),
            ("freezes", self.freezes),
            ("cuts", self.cuts),
            ("streams broken", self.breaks),
            ("slow cables", self.slow),
            ("control store away", self.control_away),
            ("disks away", self.disks_away),
            ("disks to be replaced", self.replaced),
            ("old copies", self.old_copies),
            ("disks filled", self.full),
            ("blocks resynced", self.resynced),
            ("times degraded", self.degraded),
        ]
    }
}
