//! Debian packages: what is missing is installed, what is there is left alone.

use std::process::Command;

use anyhow::{Result, bail};

use crate::run::{output, run};

/// To build everything and to run every test: libraries, then the real clients of the tests.
pub const BUILD_AND_TEST: &[&str] = &[
    "librocksdb-dev", // index and control records
    "clang",          // bindgen of the rocksdb crate
    "libclang-dev",
    "gcc",
    "libc6-dev",
    "pkg-config",
    "protobuf-compiler", // protoc: the build of etcd-client
    "libprotobuf-dev",
    "e2fsprogs",
    "util-linux",
    "fdisk",
    "etcd-server", // the control store's tests start their own
    "openssl",     // certificates for those
    "curl",        // REST by hand, in the process tests
    "mount",       // losetup
    "iproute2",    // hosts in namespaces, in cluster_faults
    "nftables",    // links cut one way, there
    "libfaketime", // clocks set back, there
    "fio",
    "libnbd-bin",
    "qemu-utils",
    "valgrind", // instruction counts of request-cost
    "strace",   // system call counts of fio-tests
];

/// What the demo needs beside.
pub const DEMO: &[&str] = &["mmdebstrap", "procps", "fuse3"];

/// Installs those of `packages` that are not installed.
pub fn install(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|name| !is_installed(name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    require_root(&missing)?;
    eprintln!("installing: {}", missing.join(" "));
    run(apt_get().arg("update").arg("-qq"))?;
    run(apt_get()
        .args(["install", "-y", "-qq", "--no-install-recommends"])
        .args(&missing))
}

/// Installs QEMU's x86 system emulator in the version of the qemu-utils that are there.
///
/// Where qemu-utils come from another suite (backports), the emulator of the base suite would remove them: both
/// must be of one suite. A source for it is made from the base suite's own entry if there is none.
pub fn install_qemu_system() -> Result<()> {
    const EMULATOR: &str = "qemu-system-x86";
    const QUIET: [&str; 4] = ["install", "-y", "-qq", "--no-install-recommends"];
    if is_installed(EMULATOR) {
        return Ok(());
    }
    require_root(&[EMULATOR])?;
    run(apt_get().arg("update").arg("-qq"))?;
    let utils = installed_version("qemu-utils").filter(|version| version.contains("~bpo"));
    let Some(version) = utils else {
        return run(apt_get().args(QUIET).args([EMULATOR, "qemu-utils"]));
    };
    if !is_offered(EMULATOR, &version)? {
        add_backports_source()?;
        run(apt_get().arg("update").arg("-qq"))?;
    }
    // From the suite, so that what the emulator needs comes from there as well.
    run(apt_get()
        .args(QUIET)
        .args(["-t", &backports_suite()?, EMULATOR, "qemu-utils"]))
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn is_installed(package: &str) -> bool {
    installed_version(package).is_some()
}

fn installed_version(package: &str) -> Option<String> {
    let text =
        output(Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Status} ${Version}", package]))
            .ok()?;
    text.strip_prefix("installed ").map(str::to_owned)
}

fn is_offered(package: &str, version: &str) -> Result<bool> {
    let offers = output(Command::new("apt-cache").args(["madison", package]))?;
    Ok(offers.lines().any(|line| {
        line.split('|')
            .nth(1)
            .is_some_and(|offer| offer.trim() == version)
    }))
}

fn codename() -> Result<String> {
    let text = std::fs::read_to_string("/etc/os-release")?;
    match text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
    {
        Some(name) => Ok(name.trim_matches('"').to_owned()),
        None => bail!("/etc/os-release has no VERSION_CODENAME: is this Debian?"),
    }
}

fn backports_suite() -> Result<String> {
    Ok(format!("{}-backports", codename()?))
}

/// Copies the base suite's deb822 stanza under the name of its backports.
fn add_backports_source() -> Result<()> {
    let base = codename()?;
    let folder = std::path::Path::new("/etc/apt/sources.list.d");
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "sources") {
            continue;
        }
        for stanza in std::fs::read_to_string(&path)?.split("\n\n") {
            let suites = stanza.lines().find_map(|line| line.strip_prefix("Suites:"));
            if suites.is_none_or(|suites| suites.split_whitespace().next() != Some(base.as_str())) {
                continue;
            }
            let lines = stanza.lines().map(|line| {
                if line.starts_with("Suites:") {
                    format!("Suites: {base}-backports")
                } else {
                    line.to_owned()
                }
            });
            let copy = lines.collect::<Vec<_>>().join("\n") + "\n";
            std::fs::write(folder.join("weft-backports.sources"), copy)?;
            return Ok(());
        }
    }
    bail!(
        "no apt source entry for {base} in {} to copy for its backports",
        folder.display()
    )
}

fn require_root(packages: &[&str]) -> Result<()> {
    if output(Command::new("id").arg("-u"))?.trim() != "0" {
        bail!(
            "these Debian packages are missing; install them as root: apt-get install {}",
            packages.join(" ")
        );
    }
    Ok(())
}
