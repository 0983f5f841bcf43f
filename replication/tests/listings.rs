//! A shard of the largest size with something in every leaf of two layers, and between them layers that hold nothing: what is asked for ends where the shard does.

use store::LISTED_MAX;
use types::{
    DiskId, HeapBlock, Incarnation, Instant, LEAF_BLOCKS, LayerId, LeafNo, Lineage, LineageStep, RequestId,
    SHARD_BLOCKS_MAX, Seq, ShardId, ShardNo, Token, VdiId,
};
use weft_replication::{
    FromReplica, ReplicaReply, ReplicaRequest, ShardRecord, Sharing, Writer, WriterEffect, WriterEvent,
};

const SHARD: ShardId = ShardId {
    vdi: VdiId(1),
    no: ShardNo(0),
};
const LEAVES: u32 = SHARD_BLOCKS_MAX / LEAF_BLOCKS;
const HEAD: LayerId = LayerId(10_000);

struct Bench {
    writer: Writer<HeapBlock>,
    asked: Vec<(DiskId, Token, RequestId, ReplicaRequest<HeapBlock>)>,
    /// First leaf of each listing asked for.
    listings: Vec<(LayerId, LeafNo)>,
}

impl Bench {
    /// A writer of two disks that hold the same up to these seqs.
    fn new(ends: [u64; 2]) -> Bench {
        let mut record = ShardRecord::new(SHARD, vec![DiskId(1), DiskId(2)]);
        record.was_written = true;
        let every_layer = LineageStep {
            vdi: SHARD.vdi,
            lowest: LayerId(0),
            highest: HEAD,
        };
        let mut bench = Bench {
            writer: Writer::new(
                record,
                SHARD_BLOCKS_MAX,
                Lineage::new(&[every_layer]).expect("a range"),
                Incarnation(7),
                &[DiskId(1), DiskId(2)],
                Sharing::Alone,
            ),
            asked: Vec::new(),
            listings: Vec::new(),
        };
        bench.step(WriterEvent::Touch);
        for (disk, end) in [1, 2].into_iter().zip(ends) {
            let promised = ReplicaReply::Promised {
                previous: Token::default(),
                end: Seq(end),
                good_until: None,
            };
            let at = bench.asked.iter().position(|(of, ..)| *of == DiskId(disk));
            let (disk, token, id, _) = bench.asked.remove(at.expect("a fence"));
            bench.answer(disk, token, id, promised);
        }
        bench
    }

    fn step(&mut self, event: WriterEvent<HeapBlock>) {
        let mut effects = Vec::new();
        self.writer.step(Instant(0), event, &mut effects);
        for effect in effects {
            if let WriterEffect::Send(disk, message) = effect {
                self.asked
                    .push((disk, message.token, message.id, message.request));
            }
        }
    }

    fn answer(&mut self, disk: DiskId, token: Token, id: RequestId, reply: ReplicaReply<HeapBlock>) {
        self.step(WriterEvent::Replica(FromReplica {
            shard: SHARD,
            disk,
            token,
            id,
            result: Ok(reply),
        }));
    }

    /// Answers until a leaf is to be looked at.
    fn list_all(&mut self) {
        while let Some(at) = self.asked.iter().position(|(.., request)| !is_of_a_leaf(request)) {
            let (disk, token, id, request) = self.asked.remove(at);
            let reply = match request {
                ReplicaRequest::ChangedLeaves { from, .. } => {
                    self.listings.push(from);
                    ReplicaReply::Leaves(leaves().filter(|leaf| *leaf >= from).take(LISTED_MAX).collect())
                }
                _ => ReplicaReply::Done,
            };
            self.answer(disk, token, id, reply);
        }
    }

    fn expect_listings(&self, count: usize) {
        let first: Vec<u32> = (0..LEAVES).step_by(LISTED_MAX).collect();
        let pages = |layer: LayerId| first.iter().map(move |leaf| (layer, LeafNo(*leaf)));
        let mut pages: Vec<_> = pages(LayerId(0)).chain(pages(HEAD)).collect();
        // Where the head's first page begins is not known before it is there.
        pages[first.len()].0 = LayerId(1);
        assert_eq!(self.listings, pages.repeat(count));
    }
}

fn leaves() -> impl Iterator<Item = (LayerId, LeafNo)> {
    let of = |layer| (0..LEAVES).map(move |leaf| (layer, LeafNo(leaf)));
    of(LayerId(0)).chain(of(HEAD))
}

fn is_of_a_leaf(request: &ReplicaRequest<HeapBlock>) -> bool {
    matches!(
        request,
        ReplicaRequest::LeafVersions { .. } | ReplicaRequest::Read { .. }
    )
}

#[test]
fn a_resync_lists_no_leaf_beyond_the_shard() {
    let mut bench = Bench::new([50, 40]);
    bench.list_all();
    bench.expect_listings(2);
    let compared = bench.asked.iter().filter(|(.., request)| is_of_a_leaf(request));
    assert!(compared.count() > 0, "leaves are compared");
}

#[test]
fn a_scrub_lists_no_leaf_beyond_the_shard() {
    let mut bench = Bench::new([50, 50]);
    bench.step(WriterEvent::Scrub);
    bench.list_all();
    bench.expect_listings(2);
    assert_eq!(bench.asked.len(), 1, "the first leaf is read");
}
