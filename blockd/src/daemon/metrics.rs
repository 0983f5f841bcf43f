//! `/metrics` in Prometheus' text format (exposition format 0.0.4).

use std::fmt::Write;
use std::sync::atomic::Ordering;

use control::{ApiResult, ControlStore};
use store::StoreStats;
use types::BLOCK_BYTES;

use super::Daemon;
use crate::plane::{LinkFigures, LinkRole, PlaneFigures};

/// Metric families under construction.
#[derive(Default)]
struct Text(String);

impl Text {
    fn family(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        samples: impl IntoIterator<Item = (String, u64)>,
    ) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }
}

type DiskFigure = (&'static str, &'static str, &'static str, fn(&StoreStats) -> u64);

/// Name, type, help and source of what each disk has one of.
const DISK_FIGURES: &[DiskFigure] = &[
    (
        "weft_disk_capacity_bytes",
        "gauge",
        "Bytes replicas can store on the disk.",
        |s| s.capacity_bytes,
    ),
    (
        "weft_disk_live_bytes",
        "gauge",
        "Bytes of live data on the disk.",
        |s| s.live_blocks * BLOCK_BYTES,
    ),
    (
        "weft_disk_segments",
        "gauge",
        "Segments of the disk's log.",
        |s| u64::from(s.segments),
    ),
    (
        "weft_disk_segments_free",
        "gauge",
        "Segments that hold nothing.",
        |s| u64::from(s.segments_free),
    ),
    (
        "weft_disk_written_bytes_total",
        "counter",
        "Bytes appended for guests.",
        |s| s.written_blocks * BLOCK_BYTES,
    ),
    (
        "weft_disk_cleaned_bytes_total",
        "counter",
        "Bytes appended by cleaning.",
        |s| s.cleaned_blocks * BLOCK_BYTES,
    ),
    ("weft_disk_batches_total", "counter", "Appends to the log.", |s| {
        s.batches
    }),
    ("weft_disk_syncs_total", "counter", "Syncs of the disk.", |s| {
        s.syncs
    }),
    (
        "weft_disk_checkpoints_total",
        "counter",
        "Index checkpoints.",
        |s| s.checkpoints,
    ),
    (
        "weft_disk_corrupt_blocks_total",
        "counter",
        "Blocks whose checksum failed.",
        |s| s.corrupt_blocks,
    ),
    (
        "weft_disk_cached_index_bytes",
        "gauge",
        "Index leaves in memory.",
        |s| s.cached_bytes,
    ),
    (
        "weft_disk_waiting_for_space",
        "gauge",
        "Requests that wait for free space.",
        |s| s.waiting_for_space,
    ),
];

type LinkFigure = (&'static str, &'static str, &'static str, fn(&LinkFigures) -> u64);

/// Name, type, help and source of what each link to another host has one of. `of` says whose it is: writers' here, with
/// their plane; or disks' here, with the plane of the other host.
const LINK_FIGURES: &[LinkFigure] = &[
    ("weft_link_disks", "gauge", "Disks reached on the link.", |l| {
        l.disks as u64
    }),
    (
        "weft_link_frames_sent_total",
        "counter",
        "Messages sent since the link was made.",
        |l| l.frames_sent,
    ),
    (
        "weft_link_frames_received_total",
        "counter",
        "Messages and signs of life received.",
        |l| l.frames_received,
    ),
    (
        "weft_link_sends_total",
        "counter",
        "Sends, each of all messages of a turn.",
        |l| l.sends,
    ),
    (
        "weft_link_receives_total",
        "counter",
        "Receives that brought something.",
        |l| l.receives,
    ),
    ("weft_link_sent_bytes_total", "counter", "Bytes sent.", |l| {
        l.bytes_sent
    }),
    (
        "weft_link_received_bytes_total",
        "counter",
        "Bytes received.",
        |l| l.bytes_received,
    ),
    (
        "weft_link_copied_bytes_total",
        "counter",
        "Bytes of data copied from where they landed.",
        |l| l.copied_bytes,
    ),
    (
        "weft_link_unsent_bytes",
        "gauge",
        "Bytes that wait to be sent.",
        |l| l.unsent_bytes,
    ),
    (
        "weft_link_unanswered_bytes",
        "gauge",
        "Bytes of requests that the disks here have not answered.",
        |l| l.unanswered_bytes,
    ),
];

impl Daemon {
    pub(super) async fn metrics_text(&self) -> ApiResult<String> {
        let figures = self.all_figures().await?;
        let mut text = Text::default();
        for (name, kind, help, value) in DISK_FIGURES {
            let samples = figures
                .disks
                .iter()
                .map(|(disk, (stats, _))| (format!("{{disk=\"{disk}\"}}"), value(stats)));
            text.family(name, kind, help, samples);
        }
        let disks = self.records(ControlStore::disks)?;
        let up = disks.iter().map(|disk| {
            (
                format!("{{disk=\"{}\"}}", disk.id),
                u64::from(self.is_up(disk.id)),
            )
        });
        text.family("weft_disk_up", "gauge", "Whether the disk is served.", up);
        let vdis = self.records(ControlStore::vdis)?;
        let of_vdi = |value: fn(&vdi::VdiStatus) -> u64| {
            vdis.iter()
                .filter_map(|vdi| figures.vdis.get(&vdi.id).map(|status| (vdi, status)))
                .map(|(vdi, status)| (format!("{{vdi=\"{}\"}}", vdi.name), value(status)))
                .collect::<Vec<_>>()
        };
        text.family(
            "weft_vdi_shards",
            "gauge",
            "Shards of the VDI.",
            of_vdi(|s| u64::from(s.shards)),
        );
        text.family(
            "weft_vdi_shards_whole",
            "gauge",
            "Shards whose replicas are all in sync.",
            of_vdi(|s| u64::from(s.shards_whole)),
        );
        text.family(
            "weft_vdi_shards_waiting",
            "gauge",
            "Shards whose writes wait.",
            of_vdi(|s| u64::from(s.shards_waiting)),
        );
        text.family(
            "weft_vdi_requests_in_flight",
            "gauge",
            "Requests under way.",
            of_vdi(|s| s.in_flight as u64),
        );
        text.family(
            "weft_vdi_resync_leaves_left",
            "gauge",
            "Leaves still to compare in resyncs.",
            of_vdi(|s| s.resync_leaves_left),
        );
        let bytes = vdis
            .iter()
            .map(|vdi| (format!("{{vdi=\"{}\"}}", vdi.name), vdi.bytes));
        text.family("weft_vdi_bytes", "gauge", "Virtual size.", bytes);
        for (name, help, counter) in [
            (
                "weft_blocks_repaired_total",
                "Blocks repaired from another replica.",
                &self.events.repaired,
            ),
            (
                "weft_blocks_unreadable_total",
                "Blocks found without a good copy.",
                &self.events.unreadable,
            ),
            (
                "weft_blocks_resynced_total",
                "Blocks copied by resync.",
                &self.events.resynced,
            ),
        ] {
            text.family(
                name,
                "counter",
                help,
                [(String::new(), counter.load(Ordering::Relaxed))],
            );
        }
        let of_plane = |value: fn(&PlaneFigures) -> u64| {
            let planes = figures.planes.iter().enumerate();
            planes
                .map(|(n, plane)| (format!("{{plane=\"{n}\"}}"), value(plane)))
                .collect::<Vec<_>>()
        };
        text.family(
            "weft_guest_queues",
            "gauge",
            "Guests' queues served.",
            of_plane(|plane| plane.guests as u64),
        );
        text.family(
            "weft_plane_enters_total",
            "counter",
            "Times a data-plane thread entered the kernel for its ring.",
            of_plane(|plane| plane.enters),
        );
        text.family(
            "weft_plane_allocations_total",
            "counter",
            "Times a data-plane thread asked the heap for memory.",
            of_plane(|plane| plane.allocations),
        );
        for (name, kind, help, value) in LINK_FIGURES {
            let planes = figures.planes.iter().enumerate();
            let samples = planes.flat_map(|(number, plane)| {
                let label = move |link: &LinkFigures| match link.role {
                    LinkRole::Dialled => {
                        format!("{{host=\"{}\",plane=\"{number}\",of=\"writers\"}}", link.host)
                    }
                    LinkRole::Served { plane } => {
                        format!("{{host=\"{}\",plane=\"{plane}\",of=\"disks\"}}", link.host)
                    }
                };
                plane.links.iter().map(move |link| (label(link), value(link)))
            });
            text.family(name, kind, help, samples);
        }
        // The planes share one pool: each sees the same counters.
        if let Some(plane) = figures.planes.first() {
            let served = [("pool", plane.pool.pooled), ("heap", plane.pool.heap)];
            let samples = served.map(|(from, count)| (format!("{{from=\"{from}\"}}"), count));
            text.family(
                "weft_buffers_total",
                "counter",
                "Buffers handed out, by where from.",
                samples,
            );
        }
        Ok(text.0)
    }
}
