//! What runs of this world did, added up.

/// What a run did, so that a thousand runs can be asked whether they went everywhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreSummary {
    /// Requests answered.
    pub answers: u64,
    /// Power losses survived.
    pub power_losses: u64,
    /// Kills survived.
    pub kills: u64,
    /// Reads that rightly said `Corrupt`.
    pub corrupt_reads: u64,
    /// Times the disk failed and was reopened.
    pub failures: u64,
    /// Recoveries that reported damage to the log.
    pub damaged_logs: u64,
    /// Blocks rewritten by cleaning.
    pub cleaned_blocks: u64,
    /// Checkpoints taken.
    pub checkpoints: u64,
    /// Reads through more than one layer.
    pub reads_of_layers: u64,
    /// Changes of layers applied.
    pub layers_changed: u64,
    /// Ranges made void by repair.
    pub voids: u64,
    /// Times the store said it was full.
    pub fulls: u64,
    /// Index stores deleted or rolled back.
    pub indexes_lost: u64,
    /// Recoveries that died before they were through.
    pub broken_recoveries: u64,
    /// Runs of a hundred crashes on a full disk.
    pub crash_loops: u64,
}

impl StoreSummary {
    /// By name, for adding up.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("answers", self.answers),
            ("power losses", self.power_losses),
            ("kills", self.kills),
            ("corrupt reads", self.corrupt_reads),
            ("disk failures", self.failures),
            ("damaged logs", self.damaged_logs),
            ("blocks cleaned", self.cleaned_blocks),
            ("checkpoints", self.checkpoints),
            ("reads of layers", self.reads_of_layers),
            ("changes of layers", self.layers_changed),
            ("voids", self.voids),
            ("times full", self.fulls),
            ("indexes lost", self.indexes_lost),
            ("recoveries broken off", self.broken_recoveries),
            ("crash loops", self.crash_loops),
        ]
    }
}
