//! The client against a real qemu-storage-daemon on a small file: what is measured really happens.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use weft_fio_tests::client::Timing;
use weft_fio_tests::job::{self, Op};
use weft_fio_tests::prepare::fully_written_file;
use weft_fio_tests::target::{Kind, Setup, Target};

const SPAN: u64 = 64 << 20;

const SHORT: Timing = Timing {
    ramp: Duration::from_millis(20),
    measured: Duration::from_millis(60),
};

fn setup(folder: &Path) -> Setup {
    let setup = Setup {
        files: folder.to_owned(),
        sockets: folder.to_owned(),
        span: SPAN,
        disk_bytes: 0,
        binaries: folder.to_owned(),
    };
    fully_written_file(&setup.peer_file(), SPAN * 2, 0).unwrap();
    setup
}

#[test]
fn every_job_runs_on_the_peer_and_on_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let setup = setup(folder.path());
    for kind in [Kind::Qsd, Kind::Raw] {
        let mut target = Target::start(kind, &setup).unwrap();
        target.fill(SPAN).unwrap();
        for job in job::all(SPAN) {
            let mut probes = 0;
            let figures = target.measure(&job, SHORT, 1, || probes += 1).unwrap();
            assert_eq!(probes, 2, "{}", job.name);
            assert!(
                figures.ios > 0 && figures.elapsed >= SHORT.measured / 2,
                "{}: {figures:?}",
                job.name
            );
            assert!(figures.mean_us > 0.0, "{}: {figures:?}", job.name);
        }
    }
}

#[test]
fn wrong_data_fails_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let setup = setup(folder.path());
    let mut target = Target::start(Kind::Qsd, &setup).unwrap();
    target.fill(SPAN).unwrap();
    let jobs = job::all(SPAN);
    let read = jobs.iter().find(|job| job.op == Op::Read).unwrap();
    target.measure(read, SHORT, 1, || {}).unwrap();
    // The second page comes to every place but its own.
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(setup.peer_file())
        .unwrap();
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, 4096).unwrap();
    for block in 0..read.zone.bytes / 4096 {
        file.write_all_at(&page, block * 4096).unwrap();
    }
    file.sync_all().unwrap();
    let error = format!("{:#}", target.measure(read, SHORT, 1, || {}).unwrap_err());
    assert!(error.contains("wrong data"), "{error}");
}
