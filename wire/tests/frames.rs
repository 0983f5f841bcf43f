//! Frames there and back: any message, cut anywhere, with any bit changed.

use edge::{DiskError, KvError};
use proptest::prelude::*;
use replication::{FromReplica, Refusal, RepairContent, ReplicaReply, ReplicaRequest, ToReplica};
use store::{BlockState, BlockVersion, ClearKind, LISTED_MAX, ReadPart, StoreError};
use types::{
    BlockCrcs, BlockNo, BlockSum, DiskId, Epoch, HeapBlock, HeapRoom, HostId, Incarnation, LayerId, LeafNo,
    Lineage, LineageStep, Payload, PoolId, RequestId, Seq, ShardId, ShardNo, Token, VdiId,
};
use weft_wire::{
    Channel, Frame, Gather, HEADER_BYTES, Hello, Identity, Incoming, Outgoing, Refused, RefusedCode, VERSION,
    Welcome, WireError,
};

fn data(seed: u8, blocks: usize) -> HeapBlock {
    let bytes: Vec<u8> = (0..blocks * 4096).map(|i| (i / 7) as u8 ^ seed).collect();
    HeapBlock::new(&bytes)
}

fn crcs(data: &HeapBlock) -> BlockCrcs {
    data.bytes().chunks(4096).map(types::crc32c).collect()
}

fn seq() -> impl Strategy<Value = Seq> {
    prop_oneof![9 => 0..1u64 << 63, 1 => Just((1 << 63) - 1)].prop_map(Seq)
}

fn token() -> impl Strategy<Value = Token> {
    (any::<u64>(), any::<u64>()).prop_map(|(epoch, incarnation)| Token {
        epoch: Epoch(epoch),
        incarnation: Incarnation(incarnation),
    })
}

fn shard() -> impl Strategy<Value = ShardId> {
    any::<u64>().prop_map(ShardId::from_u64)
}

fn clear_kind() -> impl Strategy<Value = ClearKind> {
    prop_oneof![Just(ClearKind::Zero), Just(ClearKind::Trim)]
}

/// Mostly few: many blocks cost the tests time and show nothing new.
fn blocks() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 1..5usize, 1 => 5..40usize, 1 => Just(256)]
}

fn content() -> impl Strategy<Value = RepairContent<HeapBlock>> {
    prop_oneof![
        (any::<u8>(), blocks()).prop_map(|(seed, blocks)| {
            let data = data(seed, blocks);
            let crcs = crcs(&data);
            RepairContent::Data(data, crcs)
        }),
        (1..1000u32, clear_kind()).prop_map(|(count, kind)| RepairContent::Clear(count, kind)),
    ]
}

/// What readers of [`READER`] see: mostly one range, at times as much as there may be.
fn lineage() -> impl Strategy<Value = Lineage> {
    let range = |vdi, lowest: u32, more: u32| LineageStep {
        vdi,
        lowest: LayerId(lowest),
        highest: LayerId(lowest.saturating_add(more)),
    };
    let one = (any::<u32>(), any::<u32>()).prop_map(move |(lowest, more)| vec![range(READER, lowest, more)]);
    let many = (2..=Lineage::STEPS_MAX as u32, 1..=3u32).prop_map(move |(steps, own)| {
        let vdi = |step| if step < own { READER } else { VdiId(step % 7) };
        (0..steps)
            .map(|step| range(vdi(step), 10 * (steps - step), 4))
            .collect()
    });
    prop_oneof![3 => one, 1 => many].prop_map(|steps| Lineage::new(&steps).expect("in order"))
}

const READER: VdiId = VdiId(70);

fn request() -> impl Strategy<Value = ReplicaRequest<HeapBlock>> {
    let layer = any::<u32>().prop_map(LayerId);
    let block = (0..1u32 << 20).prop_map(BlockNo);
    let leaf = (0..1u32 << 16).prop_map(LeafNo);
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..2048).prop_map(|record| ReplicaRequest::Fence { record }),
        (layer.clone(), block.clone(), seq(), any::<u8>(), blocks()).prop_map(
            |(layer, block, seq, seed, blocks)| {
                let data = data(seed, blocks);
                let crcs = crcs(&data);
                ReplicaRequest::Write {
                    layer,
                    block,
                    seq,
                    data,
                    crcs,
                }
            }
        ),
        (layer.clone(), block.clone(), 1..1u32 << 20, seq(), clear_kind()).prop_map(
            |(layer, block, count, seq, kind)| ReplicaRequest::Clear {
                layer,
                block,
                count,
                seq,
                kind
            }
        ),
        Just(ReplicaRequest::Flush),
        (lineage(), block.clone(), 1..=256u32).prop_map(|(lineage, block, count)| ReplicaRequest::Read {
            lineage,
            block,
            count
        }),
        (layer.clone(), block.clone(), 1..1u32 << 20, any::<u64>()).prop_map(
            |(layer, block, count, live)| ReplicaRequest::Void {
                layer,
                block,
                count,
                live_from: Seq(live)
            }
        ),
        (layer.clone(), block, seq(), content(), any::<u64>()).prop_map(
            |(layer, block, seq, content, live)| ReplicaRequest::Repair {
                layer,
                block,
                seq,
                content,
                live_from: Seq(live)
            }
        ),
        seq().prop_map(|end| ReplicaRequest::SetEnd { end }),
        seq().prop_map(|since| ReplicaRequest::BeginResync { since }),
        (layer, any::<u64>(), leaf.clone()).prop_map(|(layer, newer, leaf)| {
            ReplicaRequest::ChangedLeaves {
                newer_than: Seq(newer),
                from: (layer, leaf),
            }
        }),
        (lineage(), leaf).prop_map(|(lineage, leaf)| ReplicaRequest::LeafVersions { lineage, leaf }),
        Just(ReplicaRequest::Drop),
    ]
}

fn version() -> impl Strategy<Value = BlockVersion> {
    let state = prop_oneof![
        Just(BlockState::Absent),
        clear_kind().prop_map(BlockState::Clear),
        any::<u32>().prop_map(|sum| BlockState::Data(BlockSum(sum))),
    ];
    (seq(), state).prop_map(|(seq, state)| BlockVersion { seq, state })
}

fn refusal() -> impl Strategy<Value = Refusal> {
    let text = "[a-zäö ]{0,80}";
    prop_oneof![
        token().prop_map(|promised| Refusal::Stale { promised }),
        Just(Refusal::NotFenced),
        (shard(), any::<u32>(), any::<u32>()).prop_map(|(shard, layer, block)| {
            Refusal::Store(StoreError::Corrupt {
                shard,
                layer: LayerId(layer),
                block: BlockNo(block),
            })
        }),
        shard().prop_map(|shard| Refusal::Store(StoreError::NoShard(shard))),
        (any::<u64>(), any::<u64>(), any::<i32>(), text).prop_map(|(offset, bytes, errno, reason)| {
            Refusal::Store(StoreError::DiskFailed(DiskError::Io {
                operation: "sync",
                offset,
                bytes,
                errno,
                reason,
            }))
        }),
        (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(offset, done, wanted)| {
            Refusal::Store(StoreError::DiskFailed(DiskError::Short {
                operation: "write",
                offset,
                done,
                wanted,
            }))
        }),
        (text, text).prop_map(|(place, reason)| {
            Refusal::Store(StoreError::IndexFailed(KvError {
                operation: "apply",
                place,
                reason,
            }))
        }),
    ]
}

fn reply() -> impl Strategy<Value = Result<ReplicaReply<HeapBlock>, Refusal>> {
    let part = prop_oneof![
        (any::<u8>(), 1..4usize).prop_map(|(seed, blocks)| ReadPart::Data(data(seed, blocks))),
        (1..5u32).prop_map(ReadPart::Zeros),
    ];
    prop_oneof![
        (token(), seq(), prop::option::of(seq())).prop_map(|(previous, end, good_until)| {
            Ok(ReplicaReply::Promised {
                previous,
                end,
                good_until,
            })
        }),
        Just(Ok(ReplicaReply::Done)),
        prop::collection::vec(part, 1..12).prop_map(|parts| Ok(ReplicaReply::Read(parts.into()))),
        prop::collection::btree_set((0..5u32, 0..1u32 << 16), 0..=LISTED_MAX).prop_map(|leaves| {
            let place = |(layer, leaf)| (LayerId(layer), LeafNo(leaf));
            Ok(ReplicaReply::Leaves(leaves.into_iter().map(place).collect()))
        }),
        prop::collection::vec(version(), 256).prop_map(|versions| Ok(ReplicaReply::Versions(versions))),
        refusal().prop_map(Err),
    ]
}

#[derive(Clone, Debug)]
enum Said {
    Ping,
    Bye(String),
    DiskUp(u32, u128),
    DiskDown(u32),
    Request(u32, ToReplica<HeapBlock>),
    Reply(u32, FromReplica<HeapBlock>),
}

fn said() -> impl Strategy<Value = Said> {
    let address = || (any::<u32>(), shard(), token(), any::<u64>());
    prop_oneof![
        1 => Just(Said::Ping),
        1 => "[a-z ]{0,200}".prop_map(Said::Bye),
        1 => (any::<u32>(), any::<u128>()).prop_map(|(channel, disk)| Said::DiskUp(channel, disk)),
        1 => any::<u32>().prop_map(Said::DiskDown),
        8 => (address(), request()).prop_map(|((channel, shard, token, id), request)| {
            let vdi = match &request {
                ReplicaRequest::Read { .. } | ReplicaRequest::LeafVersions { .. } => READER,
                _ => shard.vdi,
            };
            let shard = ShardId { vdi, ..shard };
            Said::Request(channel, ToReplica { shard, token, id: RequestId(id), request })
        }),
        8 => (address(), reply()).prop_map(|((channel, shard, token, id), result)| {
            Said::Reply(channel, FromReplica { shard, disk: DiskId(9), token, id: RequestId(id), result })
        }),
    ]
}

fn send(out: &mut Outgoing<HeapBlock>, said: Said) {
    match said {
        Said::Ping => out.ping(),
        Said::Bye(text) => out.bye(&text),
        Said::DiskUp(channel, disk) => out.disk_up(Channel(channel), DiskId(disk)),
        Said::DiskDown(channel) => out.disk_down(Channel(channel)),
        Said::Request(channel, message) => out.request(Channel(channel), message),
        Said::Reply(channel, message) => out.reply(Channel(channel), message),
    }
}

/// A frame in the words of [`Said`].
fn heard(frame: Frame<HeapBlock>) -> Said {
    match frame {
        Frame::Ping => Said::Ping,
        Frame::Bye(text) => Said::Bye(text),
        Frame::DiskUp(channel, disk) => Said::DiskUp(channel.0, disk.0),
        Frame::DiskDown(channel) => Said::DiskDown(channel.0),
        Frame::Request(channel, message) => Said::Request(channel.0, message),
        Frame::Reply(reply) => Said::Reply(reply.channel.0, reply.from_disk(DiskId(9))),
        other => panic!("{other:?}"),
    }
}

fn encode(all: &[Said], position: u64) -> Vec<u8> {
    let mut out = Outgoing::new(position);
    for said in all {
        send(&mut out, said.clone());
    }
    let waiting = out.waiting();
    let bytes = out.take(Gather::default()).to_bytes();
    assert_eq!((bytes.len() as u64, out.waiting()), (waiting, 0));
    bytes
}

fn incoming(position: u64) -> Incoming<HeapRoom> {
    Incoming::after(position, VERSION, HeapRoom::new)
}

/// All frames of a stream that comes in pieces of `piece` bytes, and its error if it has one.
fn receive(bytes: &[u8], position: u64, piece: usize) -> (Vec<String>, Option<WireError>) {
    let mut incoming = incoming(position);
    let mut rest = bytes;
    let mut all = Vec::new();
    while !rest.is_empty() {
        let fed = incoming.put(&rest[..piece.min(rest.len())], HeapRoom::new);
        rest = &rest[fed..];
        loop {
            match incoming.next(HeapRoom::new) {
                Ok(Some(frame)) => all.push(format!("{:?}", heard(frame))),
                Ok(None) => break,
                Err(error) => return (all, Some(error)),
            }
        }
    }
    (all, None)
}

fn shown(all: &[Said]) -> Vec<String> {
    all.iter().map(|said| format!("{said:?}")).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn what_is_sent_is_heard_however_it_is_cut(
        all in prop::collection::vec(said(), 1..12),
        position in 0u64..5000,
        piece in prop_oneof![1..64usize, 64..9000usize, Just(1 << 22)],
    ) {
        let bytes = encode(&all, position);
        prop_assert_eq!(receive(&bytes, position, piece), (shown(&all), None));
    }

    #[test]
    fn a_changed_bit_is_refused_or_does_no_harm(said in said(), position in 0u64..600, bits in prop::collection::vec(any::<prop::sample::Index>(), 24)) {
        let bytes = encode(std::slice::from_ref(&said), position);
        let right = shown(&[said]);
        let front = bytes.len().min(HEADER_BYTES + 64) * 8;
        let chosen = bits.iter().map(|bit| bit.index(bytes.len() * 8));
        for bit in (0..front).chain(chosen) {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let (heard, error) = receive(&bytes, position, 1 << 22);
            // Refused; or less of it than the changed length says is there; or the very same.
            prop_assert!(error.is_some() || heard.is_empty() || heard == right, "bit {}: {:?}", bit, heard);
        }
    }

    #[test]
    fn a_stream_cut_short_is_waited_for(said in said(), cut in any::<prop::sample::Index>()) {
        let bytes = encode(std::slice::from_ref(&said), 0);
        let cut = cut.index(bytes.len());
        prop_assert_eq!(receive(&bytes[..cut], 0, 1 << 22), (vec![], None));
    }
}

fn write(block: u32, blocks: usize) -> ToReplica<HeapBlock> {
    let data = data(block as u8, blocks);
    let crcs = crcs(&data);
    ToReplica {
        shard: ShardId {
            vdi: VdiId(7),
            no: ShardNo(1),
        },
        token: Token {
            epoch: Epoch(3),
            incarnation: Incarnation(12),
        },
        id: RequestId(0x5_0000_0002),
        request: ReplicaRequest::Write {
            layer: LayerId(1),
            block: BlockNo(block),
            seq: Seq(99),
            data,
            crcs,
        },
    }
}

/// Receives a write of each size in turn, `rounds` times; bytes of data, and those of them copied, by size.
fn copies(rounds: u32, sizes: &[usize]) -> Vec<(u64, u64)> {
    let mut out = Outgoing::new(77);
    let mut incoming = incoming(77);
    let mut all = vec![(0, 0); sizes.len()];
    for (block, (blocks, sum)) in (0..rounds).flat_map(|_| sizes.iter().zip(0..)).enumerate() {
        out.request(Channel(1), write(block as u32, *blocks));
        let bytes = out.take(Gather::default()).to_bytes();
        let before = incoming.copied();
        let mut rest = &bytes[..];
        let mut frames = 0;
        while !rest.is_empty() {
            let fed = incoming.put(rest, HeapRoom::new);
            rest = &rest[fed..];
            while incoming.next(HeapRoom::new).expect("good frames").is_some() {
                frames += 1;
            }
        }
        assert_eq!(frames, 1);
        all[sum].0 += (blocks * 4096) as u64;
        all[sum].1 += incoming.copied() - before;
    }
    all
}

#[test]
fn small_writes_are_rarely_copied_and_large_ones_in_part() {
    let is_rare = |(bytes, copied): &(u64, u64), share: u64| {
        assert!(copied * share < *bytes, "{copied} of {bytes} B were copied");
    };
    is_rare(&copies(1000, &[1])[0], 14);
    is_rare(&copies(50, &[256])[0], 15);
    // One that is received apart leaves what follows it aligned.
    for small in &copies(50, &[40, 1, 1, 1])[1..] {
        is_rare(small, 3);
    }
}

#[test]
fn a_sender_that_does_not_align_costs_a_copy_and_nothing_else() {
    let all: Vec<Said> = (0..40).map(|block| Said::Request(1, write(block, 1))).collect();
    let bytes = encode(&all, 0);
    // What the receiver believes to be elsewhere in the stream lands askew.
    let mut incoming = incoming(100);
    let mut heard_all = Vec::new();
    let mut rest = &bytes[..];
    while heard_all.len() < all.len() {
        let fed = incoming.put(rest, HeapRoom::new);
        rest = &rest[fed..];
        while let Some(frame) = incoming.next(HeapRoom::new).expect("good frames") {
            heard_all.push(format!("{:?}", heard(frame)));
        }
    }
    assert_eq!(heard_all, shown(&all));
    assert!(incoming.copied() > 35 * 4096, "{} B copied", incoming.copied());
}

#[test]
fn what_else_may_knock_is_refused_in_words() {
    let first = |bytes: &[u8]| receive(bytes, 0, 1 << 22).1.expect("refused").to_string();
    assert_eq!(
        first(b"GET / HTTP/1.1\r\n\r\n"),
        "the other end does not speak Weft's protocol: a frame begins with [47, 45, 54, 20]"
    );
    let mut bytes = encode(&[Said::Ping], 0);
    bytes[4] = 9;
    assert_eq!(
        first(&bytes),
        "a frame of protocol version 9, where version 2 was agreed on"
    );
    bytes[4] = VERSION;
    bytes[5] = 200;
    assert_eq!(first(&bytes), "a frame of type 200, which has no place here");
    bytes[5] = 33;
    bytes[12..16].copy_from_slice(&(2u32 << 20).to_le_bytes());
    assert_eq!(
        first(&bytes),
        "a Write frame with bytes of data 2097152, at most 1048576"
    );
}

#[test]
fn seqs_that_could_not_be_counted_on_from_are_refused_in_every_field() {
    let refused = |said: Said| match receive(&encode(&[said], 0), 0, 1 << 22).1 {
        Some(WireError::Field { frame, what }) => format!("{frame}: {what}"),
        other => panic!("{other:?}"),
    };
    for seq in [Seq(1 << 63), Seq(u64::MAX)] {
        let ReplicaRequest::Write { data, crcs, .. } = write(1, 1).request else {
            unreachable!("it is a write")
        };
        let (layer, block) = (LayerId(1), BlockNo(1));
        let kind = ClearKind::Zero;
        let repair = |content| ReplicaRequest::Repair {
            layer,
            block,
            seq,
            content,
            live_from: Seq(0),
        };
        let requests = [
            ReplicaRequest::Write {
                layer,
                block,
                seq,
                data: data.clone(),
                crcs: crcs.clone(),
            },
            ReplicaRequest::Clear {
                layer,
                block,
                count: 1,
                seq,
                kind,
            },
            repair(RepairContent::Data(data, crcs)),
            repair(RepairContent::Clear(1, kind)),
            ReplicaRequest::SetEnd { end: seq },
            ReplicaRequest::BeginResync { since: seq },
        ];
        let names = [
            "Write",
            "Clear",
            "RepairData",
            "RepairClear",
            "SetEnd",
            "BeginResync",
        ];
        for (request, name) in requests.into_iter().zip(names) {
            let message = ToReplica {
                request,
                ..write(1, 1)
            };
            assert_eq!(
                refused(Said::Request(1, message)),
                format!("{name}: seq of 2^63 or more")
            );
        }
        let promised = |end, good_until| ReplicaReply::Promised {
            previous: Token::default(),
            end,
            good_until,
        };
        let fine = BlockVersion {
            seq: Seq((1 << 63) - 1),
            state: BlockState::Absent,
        };
        let mut versions = vec![fine; 256];
        versions[255].seq = seq;
        let replies = [
            (promised(seq, None), "Promised"),
            (promised(Seq(0), Some(seq)), "Promised"),
            (ReplicaReply::Versions(versions), "Versions"),
        ];
        for (reply, name) in replies {
            let ToReplica { shard, token, id, .. } = write(1, 1);
            let message = FromReplica {
                shard,
                disk: DiskId(9),
                token,
                id,
                result: Ok(reply),
            };
            assert_eq!(
                refused(Said::Reply(1, message)),
                format!("{name}: seq of 2^63 or more")
            );
        }
    }
}

/// Frames whose head was changed by `change`, from where the lineage begins, and signed as an attacker would.
fn refused_lineage(change: impl Fn(&mut Vec<u8>)) -> String {
    let shard = ShardId {
        vdi: READER,
        no: ShardNo(1),
    };
    let said = ToReplica {
        shard,
        request: ReplicaRequest::Read {
            lineage: Lineage::of_layer(READER, LayerId(3)),
            block: BlockNo(0),
            count: 1,
        },
        ..write(1, 1)
    };
    let mut bytes = encode(&[Said::Request(1, said)], 0);
    let mut lineage = bytes.split_off(HEADER_BYTES + 36 + 8);
    change(&mut lineage);
    bytes.extend_from_slice(&lineage);
    let head = (bytes.len() - HEADER_BYTES) as u16;
    bytes[8..10].copy_from_slice(&head.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..16]), &bytes[HEADER_BYTES..]);
    bytes[16..20].copy_from_slice(&crc.to_le_bytes());
    match receive(&bytes, 0, 1 << 22) {
        (heard, None) => format!("heard {}", heard.len()),
        (_, Some(error)) => error.to_string(),
    }
}

#[test]
fn a_lineage_is_checked_where_it_comes_in() {
    let step =
        |vdi: u32, lowest: u32, highest: u32| [vdi, lowest, highest].into_iter().flat_map(u32::to_le_bytes);
    let with = |count: u8, steps: Vec<[u32; 3]>| {
        let steps = steps
            .into_iter()
            .flat_map(|[vdi, lowest, highest]| step(vdi, lowest, highest));
        let bytes: Vec<u8> = std::iter::once(count).chain(steps).collect();
        refused_lineage(move |lineage| lineage.clone_from(&bytes))
    };
    assert_eq!(refused_lineage(|_| ()), "heard 1");
    assert_eq!(with(2, vec![[70, 3, 3], [9, 0, 5]]), "heard 1");
    assert_eq!(with(0, vec![]), "a Read frame: steps that are no lineage");
    assert_eq!(
        with(1, vec![[70, 4, 3]]),
        "a Read frame: steps that are no lineage"
    );
    let again = vec![[70, 3, 3], [70, 3, 3]];
    assert_eq!(with(2, again), "a Read frame: steps that are no lineage");
    assert_eq!(with(1, vec![[71, 3, 3]]), "a Read frame: lineage of another VDI");
    assert_eq!(with(2, vec![[70, 3, 3]]), "a Read frame: head is too short");
    let many = |count: u32| {
        (0..count)
            .map(|at| [70, 1000 - at, 1000 - at])
            .collect::<Vec<_>>()
    };
    assert_eq!(with(128, many(128)), "heard 1");
    assert_eq!(with(129, many(128)), "a Read frame: lineage of too many steps");
}

#[test]
fn messages_have_no_place_before_a_greeting_nor_a_greeting_after() {
    let mut bytes = encode(&[Said::Request(1, write(1, 1))], 0);
    bytes[4] = 0;
    let mut greeting = Incoming::new(HeapRoom::new);
    greeting.put(&bytes, HeapRoom::new);
    assert_eq!(greeting.next(HeapRoom::new).unwrap_err(), WireError::Type(33));
    let mut bytes = hello(1).encode();
    bytes[4] = VERSION;
    assert_eq!(receive(&bytes, 0, 1 << 22).1, Some(WireError::Type(1)));
}

fn identity(host: u128) -> Identity {
    Identity {
        pool: PoolId(5),
        host: HostId(host),
        incarnation: Incarnation(2),
        name: format!("host-{host}"),
    }
}

fn hello(to: u128) -> Hello {
    Hello::new(identity(8), HostId(to), 3)
}

#[test]
fn greetings_travel_and_are_answered() {
    let me = identity(1);
    let hello = hello(1);
    let mut incoming = Incoming::new(HeapRoom::new);
    incoming.put(&hello.encode(), HeapRoom::new);
    let Ok(Some(Frame::Hello(heard))) = incoming.next(HeapRoom::new) else {
        panic!("no hello")
    };
    assert_eq!(heard, hello);
    let welcome = Welcome::new(heard.check(&me).expect("welcome"), &me);
    let mut incoming = Incoming::new(HeapRoom::new);
    incoming.put(&welcome.encode(), HeapRoom::new);
    let Ok(Some(Frame::Welcome(heard))) = incoming.next(HeapRoom::new) else {
        panic!("no welcome")
    };
    assert_eq!((heard.check(&hello), &heard), (Ok(()), &welcome));
    let refused = Refused {
        code: RefusedCode::Pool,
        text: "no".to_owned(),
    };
    let mut incoming = Incoming::new(HeapRoom::new);
    incoming.put(&refused.encode(), HeapRoom::new);
    assert!(matches!(incoming.next(HeapRoom::new), Ok(Some(Frame::Refused(heard))) if heard == refused));
}

#[test]
fn who_does_not_belong_is_refused_by_name() {
    let me = identity(1);
    let refused = |hello: Hello| {
        let refused = hello.check(&me).expect_err("refused");
        (refused.code, refused.text)
    };
    let mut old = hello(1);
    old.versions = (1, 1);
    assert_eq!(
        refused(old),
        (
            RefusedCode::Version,
            "host 'host-8' speaks protocol versions 1 to 1, host 'host-1' speaks 2".to_owned()
        )
    );
    let mut foreign = hello(1);
    foreign.from.pool = PoolId(6);
    let (code, text) = refused(foreign);
    assert_eq!(code, RefusedCode::Pool);
    assert!(
        text.contains("000000000006") && text.contains("000000000005"),
        "{text}"
    );
    assert_eq!(refused(hello(2)).0, RefusedCode::WrongHost);
    let mut myself = hello(1);
    myself.from.host = HostId(1);
    assert_eq!(
        refused(myself.clone()),
        (RefusedCode::Myself, "host 'host-1' called itself".to_owned())
    );
    myself.from.incarnation = Incarnation(9);
    assert!(refused(myself).1.contains("both say they are"));
    let mut answer = Welcome::new(VERSION, &identity(4));
    assert_eq!(answer.check(&hello(1)).unwrap_err().code, RefusedCode::WrongHost);
    answer.host = HostId(1);
    answer.version = VERSION + 1;
    assert_eq!(answer.check(&hello(1)).unwrap_err().code, RefusedCode::Version);
}

#[test]
fn the_example_in_the_document_is_what_is_sent() {
    let text = include_str!("../../docs/wire.md");
    let example = text.split("<!-- example -->").nth(1).expect("an example");
    let hex: Vec<u8> = example
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .flat_map(|line| {
            let cell = line.split('`').next().expect("a cell").to_owned();
            let bytes = cell
                .split_whitespace()
                .map(|byte| u8::from_str_radix(byte, 16).expect("hex"));
            bytes.collect::<Vec<_>>()
        })
        .collect();
    let mut message = write(17, 1);
    let block = HeapBlock::new(&[0x77; 4096]);
    message.request = ReplicaRequest::Write {
        layer: LayerId(1),
        block: BlockNo(17),
        seq: Seq(99),
        crcs: crcs(&block),
        data: block,
    };
    let bytes = encode(&[Said::Request(4, message)], 0);
    let (front, rest) = bytes.split_at(hex.len());
    assert_eq!(front, hex, "{front:02x?}");
    assert!(rest[..512 - front.len()].iter().all(|byte| *byte == 0));
    assert_eq!(&rest[512 - front.len()..], [0x77; 4096]);
}
