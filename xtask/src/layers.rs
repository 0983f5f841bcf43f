//! Who may import whom: the arrows of docs/ARCHITECTURE.md, as a check.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::{cargo, output, root};

/// Each crate's folder and the folders of ours it may depend on. A new arrow is a design change: say so in the
/// commit that adds it here.
const ARROWS: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("edge", &["types"]),
    ("store", &["types", "edge"]),
    ("replication", &["types", "edge", "store"]),
    ("wire", &["types", "edge", "store", "replication"]),
    // Searches the states of small worlds; nobody imports it.
    ("replication-model", &["types", "store", "replication"]),
    ("vdi", &["types", "store", "replication"]),
    ("snapshot", &["types"]),
    (
        "sim",
        &["types", "edge", "store", "replication", "wire", "vdi", "control"],
    ),
    ("vhost-blk", &["types", "vdi"]),
    ("nbd", &["types"]),
    ("control", &["types", "edge", "replication", "snapshot"]),
    // Disks of any kind to object storage and back: knows nothing of pools.
    ("backup", &["types"]),
    (
        "blockd",
        &[
            "types",
            "edge",
            "store",
            "replication",
            "wire",
            "vdi",
            "vhost-blk",
            "nbd",
            "control",
            "snapshot",
        ],
    ),
    // Offline tools read disks themselves; all else goes through REST.
    (
        "cli",
        &[
            "types",
            "backup",
            "control",
            "edge",
            "store",
            "replication",
            "snapshot",
        ],
    ),
    ("fio-tests", &["types"]),
    // Drives the cores as the daemon does, with its buffers, and counts.
    ("request-cost", &["types", "edge", "store", "replication", "vdi"]),
    // A separate process too; seeds and content are the simulator's.
    ("soak", &["sim"]),
    // Looks at every reader of bytes from elsewhere; nobody imports it.
    (
        "fuzz",
        &[
            "types",
            "store",
            "replication",
            "wire",
            "vhost-blk",
            "nbd",
            "control",
            "snapshot",
        ],
    ),
    ("xtask", &[]),
];

/// Crates that may not look at the world, and what they may use from outside Weft.
const PURE: &[&str] = &["types", "store", "replication", "wire", "vdi", "snapshot"];
/// Of jiff the arithmetic only: its clock and its search for time zones are refused by `clippy-pure.toml`.
const PURE_MAY_USE: &[&str] = &["crc32c", "jiff", "serde", "smallvec", "thiserror"];

/// The only files that may say `unsafe`; each argues for it at its top.
const UNSAFE_ADDRESSES: &[&str] = &[
    "edge/src/allocations.rs",
    "edge/src/uring/pool.rs",
    "edge/src/uring/ring.rs",
    "edge/src/uring/setup.rs",
    "fio-tests/src/client.rs",
    "soak/src/blkio_client.rs",
    "vhost-blk/src/bus_guard.rs",
    "vhost-blk/tests/blkio.rs",
    "vhost-blk/tests/support/guest.rs",
];

/// Fails where a file outside [`UNSAFE_ADDRESSES`] lifts the ban on `unsafe`, or one inside has no need to any more.
pub fn check_unsafe() -> Result<()> {
    let listing = output(Command::new("git").args(["ls-files", "*.rs"]).current_dir(root()))?;
    let mut found = Vec::new();
    for file in listing.lines().filter(|file| *file != "xtask/src/layers.rs") {
        let path = root().join(file);
        // A file that was removed but is still in the index has nothing to say.
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        if text.contains("allow(unsafe_code") || text.contains("expect(unsafe_code") {
            found.push(file);
        }
    }
    let mut listed = UNSAFE_ADDRESSES.to_vec();
    listed.sort_unstable();
    found.sort_unstable();
    if found != listed {
        bail!("unsafe: files that lift the ban are {found:?}, xtask/src/layers.rs lists {listed:?}");
    }
    println!("unsafe: {} files", found.len());
    Ok(())
}

/// Fails where the workspace has an arrow that the table does not.
pub fn check() -> Result<()> {
    let text = output(&mut cargo(&[
        "metadata",
        "--no-deps",
        "--format-version",
        "1",
        "--offline",
    ]))
    .or_else(|_| output(&mut cargo(&["metadata", "--no-deps", "--format-version", "1"])))?;
    let metadata: serde_json::Value = serde_json::from_str(&text).context("cargo metadata")?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata: no packages")?;
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut faults = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package without a name")?;
        let folder = name.strip_prefix("weft-").unwrap_or(name);
        let Some(arrows) = allowed.get(folder) else {
            faults.push(format!("crate {name} is not in the table of xtask/src/layers.rs"));
            continue;
        };
        let manifest = package["manifest_path"].as_str().unwrap_or_default();
        if !manifest.ends_with(&format!("/{folder}/Cargo.toml")) {
            faults.push(format!(
                "crate {name} must live in the top-level folder {folder}/"
            ));
        }
        for dependency in package["dependencies"].as_array().context("no dependencies")? {
            if !dependency["kind"].is_null() {
                continue; // Tests may look anywhere.
            }
            let on = dependency["name"].as_str().unwrap_or_default();
            match on.strip_prefix("weft-") {
                Some(ours) if !arrows.contains(&ours) => {
                    faults.push(format!("{folder} may not import {ours}"));
                }
                None if PURE.contains(&folder) && !PURE_MAY_USE.contains(&on) => {
                    faults.push(format!("{folder} is pure and may not use the crate {on}"));
                }
                _ => {}
            }
        }
    }
    if !faults.is_empty() {
        bail!("layers (see docs/ARCHITECTURE.md):\n  {}", faults.join("\n  "));
    }
    println!("layers: {} crates import only what they may", packages.len());
    Ok(())
}
