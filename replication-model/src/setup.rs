//! What a scenario is made of.

/// One thing that a guest asks of its shard. Writes are numbered in the order of the script.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ask {
    /// One block.
    Write(u32),
    /// One block.
    Read(u32),
    /// Everything completed before.
    Flush,
}

/// How often fate may do what. Each number bounds the search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    /// A writer's process dies; its messages may still arrive.
    pub writer_kills: u8,
    /// The VDI is opened on another host while the last writer lives on.
    pub take_overs: u8,
    /// A replica's process dies and starts again: its links break, what it was writing is done.
    pub disk_kills: u8,
    /// One link between a writer and a replica breaks, with everything under way on it; it may come back.
    pub cuts: u8,
    /// Power is lost everywhere: writers and links are gone, and of each disk's unstable changes any suffix.
    pub blackouts: u8,
    /// Power is lost at one replica, when the shard is whole.
    pub disk_blackouts: u8,
    /// A writer's patience with something that does not answer comes to its end.
    pub ticks: u8,
    /// The first replica is to be replaced by a spare disk.
    pub replaces: u8,
    /// As much time passes as a new writer waits.
    pub passes: u8,
    /// The control store's word gets lost: a change was taken or not, and nobody says so until it is said again.
    pub lost_words: u8,
}

/// What the control store enforces; a scenario that must break its promises has one of them off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// A change of a shard's record is taken only from the VDI's writer.
    pub saves_compare_the_writer: bool,
    /// A writer reads the records only after it has become the VDI's writer.
    pub read_after_swap: bool,
    /// A broken link is broken at both ends: what was under way on it never arrives.
    pub links_break_whole: bool,
}

impl Rules {
    /// As the daemon keeps them.
    pub const KEPT: Rules = Rules {
        saves_compare_the_writer: true,
        read_after_swap: true,
        links_break_whole: true,
    };
}

/// What a search of a scenario must come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Every state keeps every promise.
    Holds,
    /// Some state breaks one: the rule that is off is needed.
    Breaks,
}

/// A small world to search.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// On the command line.
    pub name: &'static str,
    /// In words.
    pub about: &'static str,
    /// Replicas of the shard.
    pub replicas: usize,
    /// What each life of the VDI asks for, in order; their number is how many lives there may be.
    pub scripts: &'static [&'static [Ask]],
    /// The first life has opened the shard, and written its first block, before the search begins.
    pub is_warm: bool,
    /// Other hosts may take the shard over, and the writers know.
    pub is_shared: bool,
    /// Later lives do not reach the first disk, which is where the first life is, until faults end.
    pub is_apart: bool,
    /// Faults.
    pub budget: Budget,
    /// What is enforced.
    pub rules: Rules,
    /// What the search must come to.
    pub expected: Expected,
}

impl Setup {
    /// Whether a loss of power is among the faults, so that disks must keep account.
    #[must_use]
    pub fn may_lose_power(&self) -> bool {
        self.budget.blackouts + self.budget.disk_blackouts > 0
    }

    /// Disks in the world.
    #[must_use]
    pub fn disks(&self) -> usize {
        self.replicas + usize::from(self.budget.replaces > 0)
    }
}
