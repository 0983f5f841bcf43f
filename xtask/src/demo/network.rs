//! The hosts' network: a namespace for each host, a cable (veth pair) from it to a switch (a bridge in one more namespace).
//!
//! A host that loses its cable goes silent without a word of farewell, as one that lost its power. A link between two
//! hosts is cut in the switch: their ports are isolated from each other, and both still reach the third.
//!
//! ```text
//!   host1 10.77.0.1 ──┐
//!   host2 10.77.0.2 ──┤ switch
//!   host3 10.77.0.3 ──┘
//! ```
//!
//! Where namespaces are not allowed, hosts are addresses of the loopback interface. That has no cables: nothing can be
//! unplugged then, and the demo says so.

use std::process::{Command, Stdio};

use anyhow::Result;

use super::undo::{self, Undo};
use crate::run::output;

/// How many hosts there are.
pub const HOSTS: usize = 3;

/// What every namespace of a demo is called at first; then its process and the part.
const PREFIX: &str = "weft-demo";

/// The network of one demo. Hosts are 1 to [`HOSTS`].
pub enum Network {
    /// Namespaces and cables.
    Namespaces {
        /// The demo's own part of their names.
        prefix: String,
        /// Removes them, and the cables with them.
        _undo: Vec<Undo>,
    },
    /// Addresses of the loopback interface.
    Loopback {
        /// The third part of the addresses, so that two demos do not meet.
        part: u32,
    },
}

impl Network {
    /// Lays the cables; on loopback if that is asked for, or if namespaces are not allowed here.
    pub fn make(on_loopback: bool) -> Network {
        let part = std::process::id() % 250 + 1;
        if on_loopback {
            return Network::Loopback { part };
        }
        remove_what_a_killed_demo_left();
        match namespaces() {
            Ok(network) => network,
            Err(error) => {
                let reason = format!("{error:#}").trim_end().replace('\n', ": ");
                println!("no network namespaces here ({reason})");
                Network::Loopback { part }
            }
        }
    }

    /// Whether cables can be unplugged.
    pub fn has_cables(&self) -> bool {
        matches!(self, Network::Namespaces { .. })
    }

    /// A host's address.
    pub fn address(&self, host: usize) -> String {
        match self {
            Network::Namespaces { .. } => format!("10.77.0.{host}"),
            Network::Loopback { part } => format!("127.77.{part}.{host}"),
        }
    }

    /// A command that runs `program` on a host, and that does not outlive the demo even if that is killed.
    pub fn command(&self, host: usize, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if let Network::Namespaces { prefix, .. } = self {
            // Not `ip netns exec`: that gives a view of the file systems of its own, too.
            command.args(["nsenter", &format!("--net=/run/netns/{prefix}-host{host}")]);
        }
        command.arg(program);
        command
    }

    /// Pulls a host's cable.
    pub fn unplug(&self, host: usize) -> Result<()> {
        self.port(host, &["down"])
    }

    /// Plugs it in again.
    pub fn plug(&self, host: usize) -> Result<()> {
        self.port(host, &["up"])
    }

    /// Cuts the link between two hosts.
    pub fn cut(&self, one: usize, other: usize) -> Result<()> {
        self.port(one, &["type", "bridge_slave", "isolated", "on"])?;
        self.port(other, &["type", "bridge_slave", "isolated", "on"])
    }

    /// Mends it.
    pub fn mend(&self, one: usize, other: usize) -> Result<()> {
        self.port(one, &["type", "bridge_slave", "isolated", "off"])?;
        self.port(other, &["type", "bridge_slave", "isolated", "off"])
    }

    /// Changes a host's port at the switch; nothing where there is no switch.
    fn port(&self, host: usize, change: &[&str]) -> Result<()> {
        if let Network::Namespaces { prefix, .. } = self {
            let switch = format!("{prefix}-switch");
            let port = format!("port{host}");
            let mut arguments = vec!["-n", &switch, "link", "set", &port];
            arguments.extend(change);
            ip(&arguments)?;
        }
        Ok(())
    }
}

fn namespaces() -> Result<Network> {
    let prefix = format!("{PREFIX}-{}", std::process::id());
    let switch = format!("{prefix}-switch");
    let mut undo = vec![make_namespace(&switch)?];
    ip(&["-n", &switch, "link", "add", "switch", "type", "bridge"])?;
    ip(&["-n", &switch, "link", "set", "switch", "up"])?;
    for host in 1..=HOSTS {
        let name = format!("{prefix}-host{host}");
        undo.push(make_namespace(&name)?);
        let (port, address) = (format!("port{host}"), format!("10.77.0.{host}/24"));
        ip(&[
            "-n", &name, "link", "add", "eth0", "type", "veth", "peer", "name", &port, "netns", &switch,
        ])?;
        ip(&["-n", &switch, "link", "set", &port, "master", "switch", "up"])?;
        ip(&["-n", &name, "address", "add", &address, "dev", "eth0"])?;
        ip(&["-n", &name, "link", "set", "eth0", "up"])?;
        ip(&["-n", &name, "link", "set", "lo", "up"])?;
    }
    Ok(Network::Namespaces { prefix, _undo: undo })
}

fn make_namespace(name: &str) -> Result<Undo> {
    ip(&["netns", "add", name])?;
    let name = name.to_owned();
    Ok(undo::later(move || remove_namespace(&name)))
}

/// With a namespace go the ends of cables in it, and with them their other ends.
fn remove_namespace(name: &str) {
    let _ = Command::new("ip")
        .args(["netns", "delete", name])
        .stderr(Stdio::null())
        .status();
}

/// A demo that was killed (SIGKILL) could not remove its namespaces: they name its process, which is gone.
fn remove_what_a_killed_demo_left() {
    let Ok(list) = ip(&["netns", "list"]) else {
        return;
    };
    for name in list.lines().filter_map(|line| line.split_whitespace().next()) {
        let process = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').nth(1))
            .and_then(|process| process.parse::<u32>().ok());
        if let Some(process) = process
            && !std::path::Path::new(&format!("/proc/{process}")).exists()
        {
            remove_namespace(name);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<String> {
    output(Command::new("ip").args(arguments))
}
