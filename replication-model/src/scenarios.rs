//! The worlds that are searched, each to its bound.

use crate::setup::Ask::{Flush, Read, Write};
use crate::setup::{Budget, Expected, Rules, Setup};

const NONE: Budget = Budget {
    writer_kills: 0,
    take_overs: 0,
    disk_kills: 0,
    cuts: 0,
    blackouts: 0,
    disk_blackouts: 0,
    ticks: 0,
    replaces: 0,
    lost_words: 0,
    passes: 0,
};

const BASE: Setup = Setup {
    name: "",
    about: "",
    replicas: 3,
    scripts: &[],
    is_warm: true,
    is_shared: false,
    is_apart: false,
    budget: NONE,
    rules: Rules::KEPT,
    expected: Expected::Holds,
};

/// All of them.
pub const SCENARIOS: &[Setup] = &[
    Setup {
        name: "first-writer",
        about: "one writer opens a new shard of three replicas and dies",
        scripts: &[&[Write(0)], &[Read(0)]],
        is_warm: false,
        budget: Budget {
            writer_kills: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "restart",
        about: "the writer of three replicas dies and starts again",
        scripts: &[&[Write(0), Write(0), Write(256)], &[Read(0)]],
        budget: Budget {
            writer_kills: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "impatient-restart",
        about: "the writer of three replicas dies; its successor does not wait for all of them",
        scripts: &[&[Write(0), Write(0)], &[Read(0)]],
        budget: Budget {
            writer_kills: 1,
            ticks: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "take-over",
        about: "three replicas: another host takes the VDI while its writer goes on",
        scripts: &[&[Write(0), Write(0)], &[Read(0), Write(0)]],
        budget: Budget {
            take_overs: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "take-over-pair",
        about: "two replicas: another host takes the VDI while its writer goes on; a link breaks",
        replicas: 2,
        scripts: &[&[Write(0), Write(0)], &[Read(0), Write(0)]],
        budget: Budget {
            take_overs: 1,
            cuts: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "take-over-disk-restart",
        about: "one replica: another host takes the VDI and reads; the disk's process dies and the old writer is first",
        replicas: 1,
        scripts: &[&[Write(0), Write(0)], &[Read(0)]],
        budget: Budget {
            take_overs: 1,
            disk_kills: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "overtaken-read",
        about: "three replicas: another host takes the VDI and writes; the old writer is not told and reads",
        scripts: &[&[Write(0), Flush, Read(0)], &[Write(0)]],
        is_shared: true,
        is_apart: true,
        budget: Budget {
            take_overs: 1,
            passes: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "overtaken-read-pair",
        about: "the same with two replicas",
        replicas: 2,
        scripts: &[&[Write(0), Flush, Read(0)], &[Write(0)]],
        is_shared: true,
        is_apart: true,
        budget: Budget {
            take_overs: 1,
            passes: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "overtaken-read-restart",
        about: "two replicas: the host that took the VDI over restarts before it has served anybody",
        replicas: 2,
        scripts: &[&[Write(0), Read(0)], &[], &[Write(0)]],
        is_shared: true,
        is_apart: true,
        budget: Budget {
            take_overs: 1,
            writer_kills: 1,
            passes: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "overtaken-read-change",
        about: "two replicas: the old writer changes the record while another host takes over",
        replicas: 2,
        scripts: &[&[Write(0), Read(0)], &[Write(0)]],
        is_shared: true,
        is_apart: true,
        budget: Budget {
            take_overs: 1,
            cuts: 1,
            passes: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "pair-cut",
        about: "two replicas, one writer: links break twice, the in-sync set shrinks and grows",
        replicas: 2,
        scripts: &[&[Write(0), Write(0), Write(256)]],
        budget: Budget { cuts: 2, ..NONE },
        ..BASE
    },
    Setup {
        name: "pair-lost-word",
        about: "two replicas: a link breaks, and the control store's word on the change of the record is lost",
        replicas: 2,
        scripts: &[&[Write(0), Write(0)]],
        budget: Budget {
            cuts: 1,
            lost_words: 1,
            ticks: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "pair-cut-restart",
        about: "two replicas: a link breaks, the writer dies",
        replicas: 2,
        scripts: &[&[Write(0), Write(0)], &[Read(0), Write(256)]],
        budget: Budget {
            cuts: 1,
            writer_kills: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "pair-impatient",
        about: "two replicas: a link breaks, the writer dies, its successor does not wait for both",
        replicas: 2,
        scripts: &[&[Write(0), Write(0)], &[Read(0)]],
        budget: Budget {
            cuts: 1,
            writer_kills: 1,
            ticks: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "pair-blackout",
        about: "two replicas: power is lost everywhere",
        replicas: 2,
        scripts: &[&[Write(0), Flush, Write(0)], &[Read(0), Write(0)]],
        budget: Budget {
            blackouts: 1,
            cuts: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "blackout",
        about: "three replicas: power is lost everywhere",
        scripts: &[&[Write(0), Flush, Write(0)], &[Read(0), Write(0)]],
        budget: Budget { blackouts: 1, ..NONE },
        ..BASE
    },
    Setup {
        name: "disk-restart",
        about: "three replicas: one's process dies",
        scripts: &[&[Write(0), Write(0), Read(0)]],
        budget: Budget {
            disk_kills: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "cut-restart",
        about: "three replicas: a link breaks, the writer dies",
        scripts: &[&[Write(0), Write(0)], &[Read(0)]],
        budget: Budget {
            cuts: 1,
            writer_kills: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "replace-pair",
        about: "two replicas: one is replaced",
        replicas: 2,
        scripts: &[&[Write(0), Write(0)], &[Read(0)]],
        budget: Budget {
            replaces: 1,
            writer_kills: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "replace-single",
        about: "one replica: it is replaced",
        replicas: 1,
        scripts: &[&[Write(0), Flush, Write(0)], &[Read(0)]],
        budget: Budget {
            replaces: 1,
            writer_kills: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "replace-blackout",
        about: "two replicas: one is replaced, power is lost everywhere",
        replicas: 2,
        scripts: &[&[Write(0), Flush], &[Read(0)]],
        budget: Budget {
            replaces: 1,
            blackouts: 1,
            ..NONE
        },
        ..BASE
    },
    Setup {
        name: "reads-without-leases",
        about: "two replicas: a writer believes that nobody else may take the shard, and somebody does",
        replicas: 2,
        scripts: &[&[Write(0), Read(0)], &[Write(0)]],
        is_apart: true,
        budget: Budget {
            take_overs: 1,
            ..NONE
        },
        expected: Expected::Breaks,
        ..BASE
    },
    Setup {
        name: "late-messages",
        about: "three replicas: what was under way on a broken link arrives after it was mended",
        scripts: &[&[Write(0), Write(0)]],
        budget: Budget { cuts: 1, ..NONE },
        rules: Rules {
            links_break_whole: false,
            ..Rules::KEPT
        },
        expected: Expected::Breaks,
        ..BASE
    },
    Setup {
        name: "saves-of-anybody",
        about: "two replicas: the control store takes changes of the record from a writer that was overtaken",
        replicas: 2,
        scripts: &[&[Write(0), Write(0)], &[Read(0), Write(0)]],
        budget: Budget {
            cuts: 2,
            take_overs: 1,
            ..NONE
        },
        rules: Rules {
            saves_compare_the_writer: false,
            ..Rules::KEPT
        },
        expected: Expected::Breaks,
        ..BASE
    },
    Setup {
        name: "record-read-early",
        about: "two replicas: the new writer reads the record before it is the VDI's writer",
        replicas: 2,
        scripts: &[&[Write(0), Write(0)], &[Read(0), Write(0)]],
        budget: Budget {
            cuts: 1,
            take_overs: 1,
            ..NONE
        },
        rules: Rules {
            read_after_swap: false,
            ..Rules::KEPT
        },
        expected: Expected::Breaks,
        ..BASE
    },
];
