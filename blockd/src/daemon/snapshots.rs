//! Snapshots: taken under load, listed, deleted, protected, gone back to.
//!
//! ```text
//!  records: a new head ─▶ notes on the disks ─▶ planes: the cut ─▶ all of the old layer complete and flushed ─▶ records: its name
//! ```
//! A daemon that dies on the way leaves a layer without a name, which is given up when the VDI is opened next: it is one
//! with the layer above it then, and nothing that was written is lost (docs/decisions/0018).

use std::collections::BTreeMap;
use std::time::Duration;

use control::{
    ApiError, ApiResult, Attachment, ControlStore, Name, Present, RecordError, Rollback, SnapshotCreate,
    SnapshotInfo, VdiRecord,
};
use jiff::Timestamp;
use snapshot::tree::{Head, Refusal, Taken};
use snapshot::{SnapshotName, Tree};
use tokio::sync::oneshot;
use types::{LayerId, Lineage, VdiId};
use vdi::{Op, Outcome, VdiError};

use super::Daemon;
use crate::plane::{Command, Hold};

/// How long what was written before a cut may take to reach the stable media of a quorum: a bound for whoever waits,
/// not for the guests, which do not.
const SEAL_WAIT: Duration = Duration::from_secs(60);

type Answer = oneshot::Receiver<Result<Outcome<edge::uring::Buf>, VdiError>>;

impl Daemon {
    /// What a VDI that is to be opened reads, with its record as that leaves it. Read from the control store itself: a
    /// host that heard of a snapshot late would go on writing into it.
    pub(super) fn lineage_to_open(&self, record: &VdiRecord) -> ApiResult<(VdiRecord, Lineage)> {
        let id = record.id;
        if record.head == LayerId(0) {
            return Ok((record.clone(), Lineage::of_layer(id, LayerId(0))));
        }
        self.records(|control| {
            control.change_layers(record, |tree| {
                let sealed: Vec<LayerId> = tree.sealed(id)?.collect();
                for layer in sealed {
                    tree.give_up(id, layer)?;
                }
                Ok(tree.head(id)?.lineage)
            })
        })
    }

    pub(super) async fn take_snapshots(&self, request: SnapshotCreate) -> ApiResult<Vec<SnapshotInfo>> {
        let mut before = Vec::new();
        for (name, _) in &request.snapshots {
            before.push(self.for_change(name).await?);
        }
        let names: Vec<SnapshotName> = request.snapshots.into_iter().map(|(_, name)| name).collect();
        self.require_quorums(&before).await?;
        let raise = |tree: &mut Tree| -> Result<Vec<Head>, Refusal> {
            let named = before.iter().zip(&names);
            named
                .map(|(vdi, name)| {
                    tree.require_free(vdi.id, name)?;
                    tree.raise(vdi.id)
                })
                .collect()
        };
        let (raised, heads) = self.records(|control| control.change_layers_of(&before, raise))?;
        for record in &raised {
            let shards = self.records(|control| control.shards(record.id))?;
            self.tell_disks_of(record, &shards)?;
        }
        let at = Timestamp::now();
        let ends: Vec<(VdiId, LayerId)> = before.iter().map(|vdi| (vdi.id, vdi.head)).collect();
        if let Err(error) = self.cut(&heads).await {
            self.give_up(&raised, &ends);
            return Err(error);
        }
        let name_all = |tree: &mut Tree| -> Result<(), Refusal> {
            for (vdi, name) in before.iter().zip(&names) {
                let taken = Taken { at, bytes: vdi.bytes };
                tree.name_sealed(vdi.id, vdi.head, name.clone(), taken)?;
            }
            Ok(())
        };
        let named = match self.records(|control| control.change_layers_of(&raised, name_all)) {
            Ok((named, ())) => named,
            Err(error) => {
                self.give_up(&raised, &ends);
                return Err(error);
            }
        };
        let mut infos = Vec::new();
        for (record, name) in named.iter().zip(&names) {
            infos.push(self.snapshot(record, name)?);
        }
        Ok(infos)
    }

    /// A VDI whose layers are to be changed: written here, and there to stay.
    async fn for_change(&self, name: &Name) -> ApiResult<VdiRecord> {
        let record = self.named(name)?;
        if record.deleting {
            return Err(ApiError::conflict(
                format!("VDI {name} is being deleted"),
                "see `weft vdi list`",
            ));
        }
        self.write_here(record).await
    }

    /// A cut waits for the flush of all that was written before it: it is not begun where that cannot come.
    async fn require_quorums(&self, vdis: &[VdiRecord]) -> ApiResult<()> {
        let figures = self.all_figures().await?;
        for vdi in vdis {
            let waiting = figures
                .vdis
                .get(&vdi.id)
                .map_or(0, |status| status.shards_waiting);
            if waiting > 0 {
                return Err(ApiError::unavailable(
                    format!("{waiting} shards of VDI {} wait for replicas", vdi.name),
                    "see `weft status` for the missing disk, then try again",
                ));
            }
        }
        Ok(())
    }

    /// Lets each VDI write into its new head from one moment on; returns when all that was written before is on stable
    /// media. Several VDIs answer nobody between the first cut and the last: what comes after one of them then comes after
    /// all.
    async fn cut(&self, heads: &[Head]) -> ApiResult<()> {
        let is_group = heads.len() > 1;
        if is_group {
            self.hold(heads, Hold::Begin).await?;
        }
        let answers: Vec<(VdiId, Answer)> = heads
            .iter()
            .map(|head| {
                let op = Op::Cut {
                    lineage: head.lineage.clone(),
                };
                (head.vdi, self.request(head.vdi, op))
            })
            .collect();
        let is_one_cut = if is_group {
            // Mailboxes are worked off in order: whoever says now that it still holds has cut while it held.
            let held = self.hold(heads, Hold::Still).await;
            self.hold(heads, Hold::End).await?;
            held?
        } else {
            true
        };
        let end = tokio::time::Instant::now() + SEAL_WAIT;
        for (vdi, answer) in answers {
            self.answered(vdi, answer, end).await?;
        }
        if is_one_cut {
            return Ok(());
        }
        Err(ApiError::unavailable(
            format!(
                "the VDIs could not be held together within {} ms: nothing was kept",
                vdi::HOLD_MAX.as_millis()
            ),
            "try again, or name fewer VDIs",
        ))
    }

    /// Says it to all of them at once; whether all of them were holding.
    async fn hold(&self, heads: &[Head], hold: Hold) -> ApiResult<bool> {
        let answers: Vec<oneshot::Receiver<bool>> = heads
            .iter()
            .map(|head| {
                let (reply, answer) = oneshot::channel();
                self.home(head.vdi).send(Command::Hold {
                    vdi: head.vdi,
                    hold,
                    reply,
                });
                answer
            })
            .collect();
        let mut all = true;
        for answer in answers {
            all &= answer.await.unwrap_or(false);
        }
        Ok(all)
    }

    fn request(&self, vdi: VdiId, op: Op<edge::uring::Buf>) -> Answer {
        let (reply, answer) = oneshot::channel();
        self.home(vdi).send(Command::Request { vdi, op, reply });
        answer
    }

    async fn answered(&self, vdi: VdiId, answer: Answer, end: tokio::time::Instant) -> ApiResult<()> {
        match tokio::time::timeout_at(end, answer).await {
            Ok(Ok(Ok(_))) => Ok(()),
            Ok(Ok(Err(error))) => Err(ApiError::unavailable(format!("VDI {vdi}: {error}"), "try again")),
            Ok(Err(_)) => Err(ApiError::unavailable(
                "the daemon is stopping",
                "try again when it runs",
            )),
            Err(_) => Err(ApiError::unavailable(
                format!(
                    "what was written to VDI {vdi} did not reach enough disks within {} s",
                    SEAL_WAIT.as_secs()
                ),
                "see `weft status` for the missing disk, then try again",
            )),
        }
    }

    /// Layers that were to be snapshots are none: they go on in the ones above.
    fn give_up(&self, raised: &[VdiRecord], sealed: &[(VdiId, LayerId)]) {
        let give_up = |tree: &mut Tree| -> Result<(), Refusal> {
            for (vdi, layer) in sealed {
                tree.give_up(*vdi, *layer)?;
            }
            Ok(())
        };
        if let Err(error) = self.records(|control| control.change_layers_of(raised, give_up)) {
            tracing::warn!(%error, "a snapshot that failed is given up when its VDI is opened next");
        }
    }

    /// One snapshot as it is known now.
    fn snapshot(&self, vdi: &VdiRecord, name: &SnapshotName) -> ApiResult<SnapshotInfo> {
        let all = self.snapshots(vdi)?;
        let found = all.into_iter().find(|info| info.name == name.as_str());
        found.ok_or_else(|| no_snapshot(vdi, name))
    }

    /// All snapshots of a VDI, the oldest first.
    pub(super) fn snapshots(&self, vdi: &VdiRecord) -> ApiResult<Vec<SnapshotInfo>> {
        let tree = self.records(|control| control.layers_now(vdi.id))?;
        let names: BTreeMap<VdiId, String> = self
            .records(ControlStore::vdis)?
            .into_iter()
            .map(|vdi| (vdi.id, vdi.name))
            .collect();
        let refused = |refusal: Refusal| ApiError::from(RecordError::from(refusal));
        let lineage = tree.head(vdi.id).map_err(refused)?.lineage;
        let mut infos = Vec::new();
        for (layer, snapshot) in tree.snapshots(vdi.id).map_err(refused)? {
            let clones = tree.clones(vdi.id, layer).map_err(refused)?;
            infos.push(SnapshotInfo {
                vdi: vdi.name.clone(),
                name: snapshot.name.to_string(),
                created: snapshot.created,
                bytes: snapshot.bytes,
                protected: snapshot.protected,
                parent: parent_of(&tree, vdi.id, layer).map_err(refused)?,
                is_below_head: lineage.step_of(vdi.id, layer).is_some(),
                clones: clones.filter_map(|clone| names.get(&clone).cloned()).collect(),
                layer: layer.0,
            });
        }
        Ok(infos)
    }

    pub(super) async fn delete_snapshot(&self, name: &Name, snapshot: &SnapshotName) -> ApiResult<()> {
        let record = self.for_change(name).await?;
        let serves = |door: &&Attachment| door.snapshot.as_ref() == Some(snapshot);
        if let Some(door) = record.attachments.iter().find(serves) {
            let target = &door.target;
            return Err(ApiError::conflict(
                format!("snapshot '{name}@{snapshot}' is served at {target}"),
                format!("`weft vdi detach {name}` first, with that address"),
            ));
        }
        let delete = |tree: &mut Tree| tree.delete(record.id, std::slice::from_ref(snapshot));
        self.records(|control| control.change_layers(&record, delete))?;
        Ok(())
    }

    pub(super) async fn protect_snapshot(
        &self,
        name: &Name,
        snapshot: &SnapshotName,
        protected: bool,
    ) -> ApiResult<SnapshotInfo> {
        let record = self.for_change(name).await?;
        let protect = |tree: &mut Tree| tree.protect(record.id, snapshot, protected);
        let (record, ()) = self.records(|control| control.change_layers(&record, protect))?;
        self.snapshot(&record, snapshot)
    }

    /// The VDI becomes what it was. Guests are hung up on first: none may see its disk turn into another.
    pub(super) async fn roll_back(&self, name: &Name, request: Rollback) -> ApiResult<VdiRecord> {
        let record = self.for_change(name).await?;
        let id = record.id;
        if !record.attachments.is_empty() && !request.force {
            return Err(ApiError::needs_force(
                format!("VDI {name} is attached: its guests would see their disk change"),
                format!("`weft vdi detach {name}` first, or --force to hang up on them"),
            ));
        }
        self.require_quorums(std::slice::from_ref(&record)).await?;
        let at = Timestamp::now();
        let keep = match request.present {
            Present::Kept(name) => Some(name),
            Present::KeptByTime => Some(name_by_time(at)),
            Present::Discarded => None,
        };
        let taken = Taken {
            at,
            bytes: record.bytes,
        };
        let keep = keep.map(|name| (name, taken));
        // Refused before anybody is hung up on.
        let mut trial = self.records(|control| control.layers_now(id))?;
        trial
            .roll_back(id, &request.to, keep.clone())
            .map_err(RecordError::from)?;
        self.close_doors_of(id).await;
        let outcome = self.roll_back_unused(&record, &request.to, keep).await;
        let record = match &outcome {
            Ok(after) => after,
            Err(_) => &record,
        };
        self.open_doors_of(record).await;
        outcome
    }

    async fn roll_back_unused(
        &self,
        record: &VdiRecord,
        to: &SnapshotName,
        keep: Option<(SnapshotName, Taken)>,
    ) -> ApiResult<VdiRecord> {
        let id = record.id;
        let end = tokio::time::Instant::now() + SEAL_WAIT;
        self.answered(id, self.request(id, Op::Flush), end).await?;
        let figures = self.all_figures().await?;
        let under_way = figures.vdis.get(&id).map_or(0, |status| status.in_flight);
        if under_way > 0 {
            return Err(ApiError::unavailable(
                format!(
                    "{under_way} requests of guests of VDI {} are still under way",
                    record.name
                ),
                "try again",
            ));
        }
        let roll_back = |tree: &mut Tree| tree.roll_back(id, to, keep);
        let (record, (head, _)) = self.records(|control| control.change_layers(record, roll_back))?;
        let shards = self.records(|control| control.shards(id))?;
        self.tell_disks_of(&record, &shards)?;
        self.cut(std::slice::from_ref(&head)).await?;
        Ok(record)
    }

    /// What a reader of a snapshot reads, and its size.
    pub(super) fn view(&self, vdi: &VdiRecord, name: &SnapshotName) -> ApiResult<(Lineage, u64)> {
        let tree = self.records(|control| control.layers_now(vdi.id))?;
        let layer = tree.find(vdi.id, name).map_err(RecordError::from)?;
        let lineage = tree.lineage(vdi.id, layer).map_err(RecordError::from)?;
        let snapshot = tree.snapshot_of(vdi.id, layer).map_err(RecordError::from)?;
        Ok((lineage, snapshot.expect("just found").bytes))
    }
}

/// The snapshot that a layer came after, with its VDI's name where that is another.
fn parent_of(tree: &Tree, vdi: VdiId, layer: LayerId) -> Result<Option<String>, Refusal> {
    let mut at = tree.below(vdi, layer)?;
    while let Some(below) = at {
        if let Some(snapshot) = tree.snapshot_of(below.vdi, below.layer)? {
            return Ok(Some(snapshot.name.to_string()));
        }
        at = tree.below(below.vdi, below.layer)?;
    }
    Ok(None)
}

fn no_snapshot(vdi: &VdiRecord, name: &SnapshotName) -> ApiError {
    ApiError::not_found(
        format!("VDI '{}' has no snapshot '{name}'", vdi.name),
        format!("see `weft snapshot list {}`", vdi.name),
    )
}

fn name_by_time(at: Timestamp) -> SnapshotName {
    let text = at.strftime("before-rollback-%Y%m%d-%H%M%S").to_string();
    text.parse().expect("letters, digits and dashes")
}
