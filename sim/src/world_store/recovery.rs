//! The store comes back: what it says of its shards, held against what it may have lost.

use std::collections::BTreeMap;

use store::Request;
use types::{RequestId, Seq, ShardId};

use super::pending::Pending;
use super::{Profile, World};
use crate::boot;
use crate::store_oracle::{Doubt, ShardModel};
use crate::trace::tell;

impl World {
    /// Recovers, and tells whether the log was found damaged below what was known to be durable. Sometimes the
    /// process dies in the middle of it, again and again.
    pub(super) fn recover(&mut self, lost_cache: &mut bool) -> bool {
        let mut is_broken_off = false;
        while self.rng.chance(1, 4) {
            is_broken_off = true;
            let operations = self.rng.below(16) as u32;
            self.disk.set_cut_after(Some(operations));
            let result = store::recover(&mut self.disk, &mut self.kv, self.rng.draw());
            self.disk.set_cut_after(None);
            tell(|| {
                format!(
                    "  a recovery that dies after {operations} operations: {}",
                    result.is_err()
                )
            });
            self.summary.broken_recoveries += u64::from(result.is_err());
            if self.rng.chance(1, 2) {
                self.disk.lose_power();
                *lost_cache = true;
            }
        }
        let (store, report) = boot::recover(&mut self.rng, &mut self.disk, &mut self.kv, self.settings, 0);
        self.store = store;
        self.summary.damaged_logs += u64::from(!report.damage.is_empty());
        let is_doubted = self.check_doubt(!report.damage.is_empty(), is_broken_off);
        assert!(
            !is_doubted || self.lies(),
            "a healthy log is called damaged: {report:?}"
        );
        is_doubted
    }

    /// What was found damaged once is said until the shard's record is put again, whatever happens in between. Of a
    /// recovery that was broken off nobody knows what it found; of doubt that there was before, whether it is new.
    pub(super) fn check_doubt(&mut self, is_damaged: bool, is_broken_off: bool) -> bool {
        let mut is_doubted = is_damaged;
        for summary in self.store.shards() {
            let Some(model) = self.shards.get_mut(&summary.shard) else {
                continue;
            };
            let must_be = is_damaged || model.doubt == Doubt::Open;
            assert!(
                summary.is_doubtful || !must_be,
                "shard {} is trusted again, and nobody put its record",
                summary.shard
            );
            is_doubted |= summary.is_doubtful && (is_broken_off || model.doubt == Doubt::None);
            model.doubt = match summary.is_doubtful {
                true => Doubt::Open,
                false => Doubt::None,
            };
        }
        is_doubted
    }

    pub(super) fn compare_summaries(
        &mut self,
        pending: &BTreeMap<RequestId, Pending>,
        lost_cache: bool,
        is_damaged: bool,
    ) {
        let damage_allows_loss = self.lies() && !self.disk.damages().is_empty();
        let is_lightly_rotten = self.profile == Profile::Rot && self.rots <= 1 && !is_damaged;
        self.rots = 0;
        let mut found: BTreeMap<ShardId, store::ShardSummary> =
            self.store.shards().into_iter().map(|s| (s.shard, s)).collect();
        tell(|| format!("recovered {found:?}"));
        if is_damaged {
            self.bring_back_dropped(&found);
        }
        for (shard, mut model) in std::mem::take(&mut self.shards) {
            let is_unsure = pending.values().any(|p| match p {
                Pending::Drop { shard: s } => *s == shard,
                Pending::Record { shard: s, .. } => *s == shard && !model.is_known,
                _ => false,
            });
            let floor = match (damage_allows_loss, lost_cache) {
                (true, _) if is_lightly_rotten => model.witnessed,
                (true, _) => Seq(0),
                (false, true) => model.durable,
                (false, false) => model.completed,
            };
            match found.remove(&shard) {
                None => assert!(is_unsure || damage_allows_loss, "shard {shard} is gone"),
                Some(summary) => {
                    if let Err(why) = model.recover(&summary, floor, damage_allows_loss) {
                        panic!("after {}: {why}", if lost_cache { "power loss" } else { "kill" });
                    }
                    if is_damaged {
                        model.tatter();
                    }
                    self.shards.insert(shard, model);
                }
            }
        }
        assert!(
            found.is_empty() || damage_allows_loss,
            "shards nobody made, or that were dropped: {found:?}"
        );
        for shard in self.shards.keys().copied().collect::<Vec<_>>() {
            self.send(Request::LayersRevision { shard }, Pending::Revision { shard });
        }
    }

    /// A log that lost its tail, and says so, lost the drops in it as well: a shard may be back as it was before.
    /// Which of its lives it is, its record tells.
    pub(super) fn bring_back_dropped(&mut self, found: &BTreeMap<ShardId, store::ShardSummary>) {
        for (shard, summary) in found {
            let is_it = |model: &ShardModel| model.records.contains(&summary.record);
            if self.shards.get(shard).is_some_and(is_it) {
                continue;
            }
            let life = self
                .dropped
                .iter()
                .rposition(|(s, model)| s == shard && is_it(model));
            if let Some(life) = life {
                let (_, model) = self.dropped.swap_remove(life);
                self.dropped
                    .extend(self.shards.insert(*shard, model).map(|later| (*shard, later)));
            }
        }
    }
}
