//! The command line, run as its users run it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// What a command came to.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// Runs `weft`. It speaks to nobody unless `--socket` names a daemon, and has no terminal to ask at.
pub fn weft<S: AsRef<OsStr>>(words: &[S]) -> Outcome {
    let output = Command::new(weft_program())
        .args(words)
        .env("WEFT_SOCKET", "/nonexistent/blockd.sock")
        .stdin(Stdio::null())
        .output()
        .expect("weft starts");
    Outcome {
        code: output.status.code().expect("an exit code"),
        out: String::from_utf8(output.stdout).expect("UTF-8"),
        err: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// The program beside the daemon's. Cargo builds it for its own crate's tests only, so it is built here, once: what
/// lies there may be an older one.
pub fn weft_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let blockd = Path::new(env!("CARGO_BIN_EXE_blockd"));
        let folder = blockd.parent().expect("a folder");
        let profile = match folder.file_name().and_then(OsStr::to_str).expect("a profile") {
            "debug" => "dev",
            other => other,
        };
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // What cargo says to this test of its crate would make build scripts of others run again, and a minute's worth
        // of crates be built anew, here and at the next build outside.
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_")) {
                cargo.env_remove(name);
            }
        }
        let status = cargo
            .args([
                "build",
                "--quiet",
                "--locked",
                "--package",
                "weft-cli",
                "--profile",
                profile,
            ])
            .arg("--target-dir")
            .arg(folder.parent().expect("the target directory"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        assert!(status.expect("cargo").success(), "weft does not build");
        folder.join("weft")
    })
}
