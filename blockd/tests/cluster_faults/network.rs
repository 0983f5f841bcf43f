//! The hosts' network: a namespace for each, joined by a bridge; links that are cut, one way or both.
//!
//! All of it is in a network and mount namespace of the test's own (see `main.rs`), so the names are nobody else's
//! and nothing has to be removed.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

pub const HOSTS: usize = 3;

/// Where the hosts are.
pub struct Network {
    has_namespaces: bool,
    /// `cuts[from][to]`: nothing that `from` sends reaches `to`.
    cuts: [[bool; HOSTS]; HOSTS],
}

impl Network {
    pub fn start(has_namespaces: bool) -> Result<Network> {
        let network = Network {
            has_namespaces,
            cuts: Default::default(),
        };
        if has_namespaces {
            run("mkdir -p /run/netns")?;
            run("mount -t tmpfs tmpfs /run/netns")?;
            run("ip link set lo up")?;
            run("ip link add name weft0 type bridge")?;
            run("ip addr add 10.77.0.254/24 dev weft0")?;
            run("ip link set weft0 up")?;
            for host in 0..HOSTS {
                run(&format!("ip netns add h{host}"))?;
                run(&format!(
                    "ip link add v{host} type veth peer name eth0 netns h{host}"
                ))?;
                run(&format!("ip link set v{host} master weft0 up"))?;
                run(&format!(
                    "ip -n h{host} addr add {}/24 dev eth0",
                    network.address(host)
                ))?;
                run(&format!("ip -n h{host} link set eth0 up"))?;
                run(&format!("ip -n h{host} link set lo up"))?;
                let nft = format!("nsenter --net=/run/netns/h{host} nft");
                run(&format!("{nft} add table inet cuts"))?;
                run(&format!(
                    "{nft} add chain inet cuts in {{ type filter hook input priority 0; }}"
                ))?;
            }
        }
        Ok(network)
    }

    /// Of all that runs on the host.
    pub fn address(&self, host: usize) -> String {
        if self.has_namespaces {
            format!("10.77.0.{}", host + 1)
        } else {
            "127.0.0.1".to_owned()
        }
    }

    /// A port that is free on the host.
    pub fn port(&self, wanted: u16) -> u16 {
        if self.has_namespaces {
            return wanted;
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("bound").port()
    }

    /// A command that becomes a program on the host, with the process id it is started with.
    pub fn command(&self, host: usize, program: &str) -> Command {
        if self.has_namespaces {
            let mut command = Command::new("nsenter");
            command
                .arg(format!("--net=/run/netns/h{host}"))
                .arg("--")
                .arg(program);
            return command;
        }
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program);
        command
    }

    /// Nothing that `from` sends reaches `to`, until [`mend`](Network::mend).
    pub fn cut(&mut self, from: usize, to: usize) -> Result<()> {
        assert!(self.has_namespaces && from != to, "a link between two hosts");
        self.cuts[from][to] = true;
        run(&format!(
            "nsenter --net=/run/netns/h{to} nft add rule inet cuts in ip saddr {} drop",
            self.address(from)
        ))
    }

    /// The host's cable is pulled, or put back.
    pub fn plug(&mut self, host: usize, is_in: bool) -> Result<()> {
        assert!(self.has_namespaces, "there is no cable to pull");
        for other in (0..HOSTS).filter(|other| *other != host) {
            self.cuts[host][other] = !is_in;
            self.cuts[other][host] = !is_in;
        }
        run(&format!(
            "ip link set v{host} {}",
            if is_in { "up" } else { "down" }
        ))
    }

    /// All that was cut is whole. What is still on its way arrives.
    pub fn mend(&mut self) -> Result<()> {
        for to in 0..HOSTS {
            if self.cuts.iter().any(|from| from[to]) {
                run(&format!(
                    "nsenter --net=/run/netns/h{to} nft flush chain inet cuts in"
                ))?;
            }
        }
        self.cuts = Default::default();
        Ok(())
    }

    /// The two hear each other.
    pub fn is_whole(&self, a: usize, b: usize) -> bool {
        !self.cuts[a][b] && !self.cuts[b][a]
    }
}

fn run(line: &str) -> Result<()> {
    let mut words = line.split(' ');
    let output = Command::new(words.next().expect("a program"))
        .args(words)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{line} (Debian packages iproute2, nftables, util-linux)"))?;
    ensure!(
        output.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
