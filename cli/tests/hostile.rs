//! Every command with every argument wrong, huge or hostile: a failure is an exit code that is not 0 and one line on
//! stderr. The commands and their arguments are read from the program's own help: one that is new there and has no
//! right value in `lines::RIGHT` makes this test fail.

#[path = "support/lines.rs"]
mod lines;

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use lines::{fault, shown, words, wrong_lines};

fn weft(words: &[OsString]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft"))
        .args(words)
        .env("WEFT_SOCKET", "/nonexistent/s")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn every_wrong_argument_is_one_clear_line() {
    let mut faults = Vec::new();
    for line in wrong_lines(&weft, |_, _| true) {
        if let Some(fault) = fault(&weft(&line)) {
            faults.push(format!("weft {}: {fault}", shown(&line)));
        }
    }
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

#[test]
fn a_socket_that_is_none_is_named_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let long = folder.path().join("x".repeat(200));
    for socket in [
        Path::new(""),
        &file,
        folder.path(),
        &link,
        &long,
        Path::new("/dev/null"),
    ] {
        let output = weft(&[words("status --socket"), vec![socket.as_os_str().to_owned()]].concat());
        assert_eq!(fault(&output), None, "{}", socket.display());
        assert!(
            matches!(output.status.code(), Some(2 | 3)),
            "{}",
            socket.display()
        );
        let line = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(line.contains("--socket"), "{line}");
    }
}
