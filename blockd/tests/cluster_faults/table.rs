//! The faults: what is done, and how it is undone. What must be so meanwhile and afterwards is the same for all of
//! them, and in `world.rs`.

use anyhow::Result;

use crate::hurt_clocks as clocks;
use crate::hurt_daemons as daemons;
use crate::hurt_disks as disks;
use crate::hurt_etcd as etcd;
use crate::hurt_links as links;
use crate::hurt_names as names;
use crate::world::World;

type Act = fn(&mut World, usize) -> Result<()>;

pub struct Fault {
    pub name: &'static str,
    /// How many hosts, pairs or kinds there are to do it to.
    pub variants: usize,
    pub needs_namespaces: bool,
    /// The guest in QEMU has to be there.
    pub needs_debian: bool,
    pub strike: Act,
    pub mend: Act,
}

const fn process(name: &'static str, variants: usize, strike: Act, mend: Act) -> Fault {
    Fault {
        name,
        variants,
        needs_namespaces: false,
        needs_debian: false,
        strike,
        mend,
    }
}

const fn link(name: &'static str, variants: usize, strike: Act, mend: Act) -> Fault {
    Fault {
        needs_namespaces: true,
        ..process(name, variants, strike, mend)
    }
}

pub const FAULTS: &[Fault] = &[
    process("kill-one", 3, daemons::kill_one, daemons::start_all),
    process("kill-two", 3, daemons::kill_two, daemons::start_all),
    process("kill-all", 1, daemons::kill_all, daemons::start_all),
    process("stop-one", 3, daemons::stop_one, daemons::continue_all),
    process("stop-two", 3, daemons::stop_two, daemons::continue_all),
    process(
        "kill-one-stop-another",
        6,
        daemons::kill_one_stop_another,
        daemons::start_and_continue_all,
    ),
    link("cut-both-ways", 3, links::cut_both_ways, links::mend),
    link("cut-one-way", 6, links::cut_one_way, links::mend),
    link("host-cut-off", 3, links::cut_off, links::mend),
    link("host-hears-nobody", 3, links::hears_nobody, links::mend),
    link("nobody-hears-host", 3, links::heard_by_nobody, links::mend),
    link("cable-pulled", 3, links::pull_cable, links::put_cable_back),
    process(
        "writer-killed-taken-over",
        3,
        daemons::kill_writer_and_take_over,
        daemons::start_all,
    ),
    process(
        "writer-stopped-taken-over",
        3,
        daemons::stop_writer_and_take_over,
        daemons::continue_old_writer,
    ),
    link(
        "writer-cut-off-taken-over",
        3,
        daemons::cut_off_writer_and_take_over,
        daemons::reach_old_writer,
    ),
    Fault {
        needs_debian: true,
        ..process(
            "host-dies-with-guest",
            1,
            daemons::kill_with_debian,
            daemons::start_all,
        )
    },
    process("etcd-leader-killed", 1, etcd::kill_leader, etcd::start),
    process("etcd-leader-stopped", 1, etcd::stop_leader, etcd::go_on),
    process("etcd-majority-killed", 3, etcd::kill_majority, etcd::start),
    process("etcd-all-killed", 1, etcd::kill_all, etcd::start),
    process("etcd-wiped", 1, etcd::wipe, etcd::recover_records),
    process(
        "record-spoiled",
        etcd::RECORDS.len(),
        etcd::spoil_record,
        etcd::put_record_back,
    ),
    process("old-disk-put-back", 3, disks::put_old_disk_back, nothing),
    process("disk-full", 3, disks::fill, disks::empty),
    process("disk-given-to-two", 3, disks::give_disk_to_another, nothing),
    process("host-renamed", 3, names::rename, names::rename_back),
    link("clocks-set-back", 3, clocks::set_back, clocks::set_right),
];

/// What there is to be mended is mended without anybody's doing.
fn nothing(_: &mut World, _: usize) -> Result<()> {
    Ok(())
}

pub const PAIRS: [(usize, usize); 3] = [(0, 1), (0, 2), (1, 2)];
pub const WAYS: [(usize, usize); 6] = [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)];
