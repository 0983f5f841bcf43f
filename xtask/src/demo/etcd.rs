//! etcd, the cluster's control store: a member on each host.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::network::{HOSTS, Network};
use super::process::Process;
use crate::run::output;

/// Where a member's clients find it.
pub fn client_url(network: &Network, host: usize) -> String {
    format!("http://{}:2379", network.address(host))
}

fn peer_url(network: &Network, host: usize) -> String {
    format!("http://{}:2380", network.address(host))
}

/// Starts a host's member, its data and its log below `home`.
pub fn start(network: &Network, host: usize, home: &Path) -> Result<Process> {
    let (client, peer) = (client_url(network, host), peer_url(network, host));
    let all: Vec<String> = (1..=HOSTS)
        .map(|host| format!("host{host}={}", peer_url(network, host)))
        .collect();
    let mut command = network.command(host, "etcd");
    command
        .arg(format!("--name=host{host}"))
        .arg(format!("--data-dir={}", home.join("etcd").display()))
        .arg(format!("--listen-client-urls={client}"))
        .arg(format!("--advertise-client-urls={client}"))
        .arg(format!("--listen-peer-urls={peer}"))
        .arg(format!("--initial-advertise-peer-urls={peer}"))
        .arg(format!("--initial-cluster={}", all.join(",")))
        .arg("--initial-cluster-state=new")
        .arg("--initial-cluster-token=weft-demo")
        // A member that was cut off does not unseat the leader when it comes back.
        .arg("--pre-vote=true");
    Process::start_logged(
        &format!("etcd on host {host}"),
        &mut command,
        &home.join("etcd.log"),
    )
}

/// Whether a member says that it leads and can still reach a majority.
pub fn leads(network: &Network, host: usize) -> bool {
    asked(network, host, "metrics")
        .is_some_and(|text| text.lines().any(|line| line == "etcd_server_is_leader 1"))
        && is_healthy(network, host)
}

/// Whether a member serves.
pub fn is_healthy(network: &Network, host: usize) -> bool {
    asked(network, host, "health").is_some_and(|text| text.contains("\"true\""))
}

fn asked(network: &Network, host: usize, page: &str) -> Option<String> {
    let mut command: Command = network.command(host, "curl");
    command.args(["--silent", "--max-time", "5"]);
    output(command.arg(format!("{}/{page}", client_url(network, host)))).ok()
}
