//! The demo's guest: stock Debian in QEMU (TCG: no hardware help needed), its serial line read as it comes.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::PATIENCE;
use super::image::Image;
use super::process::Process;
use crate::run::output;

/// A running guest.
pub struct Guest {
    machine: Process,
    serial: ChildStdin,
    words: Receiver<String>,
    round: u32,
    disk_bytes: u64,
    seen: Seen,
}

/// What the guest's load did and felt in a while.
#[derive(Clone, Copy, Default)]
pub struct Seen {
    /// Durable writes of 4 KiB.
    pub writes: u64,
    /// Blocks read again and found right.
    pub verified: u64,
    /// The longest that one write or one read took.
    pub longest: Duration,
}

impl Guest {
    /// Boots `image`'s kernel with the VDI behind `socket` as its only disk; `qemu` is the command to begin with. The
    /// guest's load first looks for what it had completed up to `round` in an earlier life.
    pub fn start(mut qemu: Command, image: &Image, socket: &Path, home: &Path, round: u32) -> Result<Guest> {
        // Two processors: with one, QEMU's emulation takes an instruction with a lock prefix, Linux's barrier, for a plain one.
        qemu.args(["-M", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "512"])
            .args(["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"])
            .args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on"])
            .args(["-numa", "node,memdev=mem"])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 root=/dev/vda rw quiet mitigations=off systemd.show_status=no weft.round={round}"
            ))
            .arg("-chardev")
            .arg(format!(
                "socket,id=weft,path={},{}",
                socket.display(),
                reconnect_option()?
            ))
            .args(["-device", "vhost-user-blk-pci,chardev=weft,num-queues=1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(home.join("qemu.log"))?);
        let machine = Process::start("QEMU", &mut qemu)?;
        let (serial, lines) = machine.pipes();
        let mut log = std::fs::File::create(home.join("guest.log"))?;
        let (say, words) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(lines).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                let _ = writeln!(log, "{line}");
                if let Some((_, word)) = line.split_once("WEFT ")
                    && say.send(word.to_owned()).is_err()
                {
                    // Nobody listens any more; the log goes on.
                }
            }
        });
        Ok(Guest {
            machine,
            serial,
            words,
            round,
            disk_bytes: 0,
            seen: Seen::default(),
        })
    }

    /// Waits until the guest's load begins; returns its kernel's version.
    pub fn wait_until_up(&mut self) -> Result<String> {
        let word = self.word()?;
        match word.strip_prefix("up ") {
            Some(kernel) => Ok(kernel.to_owned()),
            None => bail!("the guest said '{word}' before it was up"),
        }
    }

    /// Waits until the guest has looked for what an earlier life had completed; returns how many blocks it compared, and
    /// how many of them were newer: written, but not yet reported.
    pub fn wait_until_found(&mut self) -> Result<(u64, u64)> {
        let word = self.word()?;
        let mut numbers = word
            .strip_prefix("found ")
            .unwrap_or_default()
            .split(' ')
            .map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(blocks)), Some(Ok(newer))) => Ok((blocks, newer)),
            _ => bail!("the guest said '{word}'"),
        }
    }

    /// Waits for `count` more rounds of write and verify; fails if one went wrong.
    pub fn wait_rounds(&mut self, count: u32) -> Result<()> {
        for _ in 0..count {
            let word = self.word()?;
            self.hear(&word)?;
        }
        Ok(())
    }

    /// Hears what the guest has said already, without waiting.
    pub fn listen(&mut self) -> Result<()> {
        while let Ok(word) = self.words.try_recv() {
            self.hear(&word)?;
        }
        Ok(())
    }

    /// What was seen since this was asked last.
    pub fn take_seen(&mut self) -> Seen {
        std::mem::take(&mut self.seen)
    }

    fn hear(&mut self, word: &str) -> Result<()> {
        let numbers: Option<Vec<u64>> = word
            .strip_prefix("ok ")
            .map(|rest| rest.split(' ').map_while(|number| number.parse().ok()).collect());
        let Some([round, sectors, writes, verified, microseconds]) = numbers.as_deref() else {
            bail!("the guest said '{word}'");
        };
        self.round = u32::try_from(*round).context("a round's number")?;
        self.disk_bytes = 512 * sectors;
        self.seen.writes += writes;
        self.seen.verified += verified;
        self.seen.longest = self.seen.longest.max(Duration::from_micros(*microseconds));
        Ok(())
    }

    /// Waits until the guest's kernel sees its disk with `bytes`.
    pub fn wait_size(&mut self, bytes: u64) -> Result<()> {
        for _ in 0..40 {
            self.wait_rounds(1)?;
            if self.disk_bytes == bytes {
                return Ok(());
            }
        }
        bail!("the guest sees a disk of {} B, not {bytes} B", self.disk_bytes)
    }

    /// SIGKILL to QEMU, as by a power cut. Returns the last round that the guest reported as complete.
    pub fn kill(mut self) -> Result<u32> {
        self.machine.kill()?;
        // The serial line ends with it; what it said until then counts, but a line that was cut short.
        while let Ok(word) = self.words.recv_timeout(PATIENCE) {
            let heard = self.hear(&word);
            if word.starts_with("MISMATCH") {
                heard?;
            }
        }
        Ok(self.round)
    }

    /// Asks the guest to end its load and power off, and waits for that.
    pub fn stop(mut self) -> Result<()> {
        self.serial.write_all(b"stop\n")?;
        loop {
            let word = self.word()?;
            if word.starts_with("done ") {
                return self.machine.wait();
            }
            self.hear(&word)?;
        }
    }

    fn word(&mut self) -> Result<String> {
        match self.words.recv_timeout(PATIENCE) {
            Ok(word) => Ok(word),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest said nothing for {} s: it hangs", PATIENCE.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the guest ended; see guest.log and qemu.log"),
        }
    }
}

/// QEMU 9.2 counts in milliseconds and will drop the option in seconds.
fn reconnect_option() -> Result<&'static str> {
    let text = output(Command::new("qemu-system-x86_64").arg("--version"))?;
    let version = text.split_whitespace().nth(3).unwrap_or_default();
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    Ok(if version >= (9, 2) {
        "reconnect-ms=200"
    } else {
        "reconnect=1"
    })
}
