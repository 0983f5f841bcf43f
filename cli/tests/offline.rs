//! `weft disk inspect` and `weft disk fsck` on real files.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use edge::file::{Access, OsFile};
use edge::rocks::Rocks;
use store::FormatParams;
use types::{DiskId, PoolId};

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    fn disk(&self) -> PathBuf {
        let path = self.file("disk.img", 64 << 20);
        let mut file = OsFile::open(&path, Access::ReadWrite).unwrap();
        let mut index = Rocks::open_index(&self.path("index")).unwrap();
        let parameters = FormatParams {
            segment_bytes: 1 << 20,
            ..FormatParams::new(DiskId(7), PoolId(8), 9)
        };
        store::format(&mut file, &mut index, parameters).unwrap();
        path
    }
}

fn weft(arguments: &[&str], path: &Path) -> Output {
    let (before, after) = arguments.split_at(2);
    Command::new(env!("CARGO_BIN_EXE_weft"))
        .args(before)
        .arg(path)
        .args(after)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The exit code, and the one line on stderr.
fn failed(output: &Output) -> (i32, String) {
    let line = text(&output.stderr);
    assert!(
        line.starts_with("weft: ") && line.lines().count() == 1,
        "{line:?}"
    );
    (output.status.code().unwrap(), line)
}

#[test]
fn a_disk_says_what_it_is_and_is_found_sound() {
    let bench = Bench::new();
    let disk = bench.disk();
    let before = std::fs::read(&disk).unwrap();
    let output = weft(&["disk", "inspect", "--json"], &disk);
    let value: serde_json::Value = serde_json::from_str(&text(&output.stdout)).unwrap();
    assert_eq!(value["disk"], DiskId(7).to_string());
    assert_eq!(value["pool"], PoolId(8).to_string());
    let output = weft(&["disk", "fsck"], &disk);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(
        text(&output.stdout).contains("bad blocks  0"),
        "{}",
        text(&output.stdout)
    );
    let output = weft(&["disk", "inspect", "--segments"], &disk);
    assert!(
        text(&output.stdout).contains("FIRST BATCH"),
        "{}",
        text(&output.stdout)
    );
    assert!(std::fs::read(&disk).unwrap() == before, "neither writes");
}

#[test]
fn a_damaged_superblock_is_reported_and_the_other_one_used() {
    let bench = Bench::new();
    let disk = bench.disk();
    let file = File::options().write(true).open(&disk).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 4096], store::SUPERBLOCK_OFFSETS[1]).unwrap();
    let output = weft(&["disk", "fsck"], &disk);
    let (code, line) = failed(&output);
    assert!(
        code == 1 && line.contains("1 other places are damaged") && line.contains("weft scrub"),
        "{line}"
    );
    assert!(
        text(&output.stdout).contains("damage: the superblock at 65536"),
        "{}",
        text(&output.stdout)
    );
}

#[test]
fn an_index_is_built_anew_where_it_was_named() {
    let bench = Bench::new();
    let disk = bench.disk();
    let index = bench.path("other");
    let index_text = index.to_str().unwrap();
    for _ in 0..2 {
        let output = weft(&["disk", "fsck", "--rebuild-index", "--index", index_text], &disk);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stdout).contains("index rebuilt"));
    }
    // The daemon's recovery finds nothing to complain of.
    let mut file = OsFile::open(&disk, Access::ReadWrite).unwrap();
    let (_, report) = store::recover(&mut file, &mut Rocks::open_index(&index).unwrap(), 1).unwrap();
    assert_eq!(report.rebuilt, None);
}

#[test]
fn a_folder_that_is_no_index_is_left_alone() {
    let bench = Bench::new();
    let disk = bench.disk();
    let folder = bench.path("home");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("letter"), "dear").unwrap();
    let (code, line) = failed(&weft(
        &[
            "disk",
            "fsck",
            "--rebuild-index",
            "--index",
            folder.to_str().unwrap(),
        ],
        &disk,
    ));
    assert_eq!(code, 5, "{line}");
    assert!(folder.join("letter").exists());
    let nowhere = bench.path("no/such");
    let (code, line) = failed(&weft(
        &[
            "disk",
            "fsck",
            "--rebuild-index",
            "--index",
            nowhere.to_str().unwrap(),
        ],
        &disk,
    ));
    assert_eq!(code, 4, "{line}");
}

#[test]
fn a_disk_that_is_open_elsewhere_is_refused() {
    let bench = Bench::new();
    let disk = bench.disk();
    let _daemon = OsFile::open(&disk, Access::ReadWrite).unwrap();
    for command in ["inspect", "fsck"] {
        let (code, line) = failed(&weft(&["disk", command], &disk));
        assert_eq!(code, 5, "{line}");
        assert!(
            line.contains("locked") && line.contains("systemctl stop"),
            "{line}"
        );
    }
}

#[test]
fn what_is_no_disk_of_ours_is_described() {
    let bench = Bench::new();
    let blank = bench.file("blank.img", 8 << 20);
    let (code, line) = failed(&weft(&["disk", "inspect"], &blank));
    assert!(
        code == 1 && line.contains("looks blank") && line.contains("weft disk add"),
        "{code} {line}"
    );
    let (code, line) = failed(&weft(&["disk", "fsck"], &bench.path("missing")));
    assert!(code == 4, "{code} {line}");
    let (code, line) = failed(&weft(&["disk", "inspect"], bench.folder.path()));
    assert!(code == 2, "{code} {line}");
}
