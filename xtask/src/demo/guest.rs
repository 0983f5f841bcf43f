//! The demo's guest: stock Debian in QEMU (TCG: no hardware help needed), its serial line read as it comes.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use anyhow::{Context, Result, bail};

use super::PATIENCE;
use super::image::Image;
use crate::run::output;

/// A running guest.
pub struct Guest {
    machine: Option<Child>,
    serial: Option<ChildStdin>,
    words: Receiver<String>,
    rounds: u32,
    disk_bytes: u64,
}

impl Guest {
    /// Boots `image`'s kernel with the VDI behind `socket` as its only disk.
    pub fn start(image: &Image, socket: &Path, home: &Path) -> Result<Guest> {
        let mut machine = Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "q35,accel=tcg",
                "-cpu",
                "max",
                "-smp",
                "1",
                "-m",
                "512",
                "-nographic",
                "-no-reboot",
            ])
            .args(["-nodefaults", "-serial", "stdio"])
            .args([
                "-object",
                "memory-backend-memfd,id=mem,size=512M,share=on",
                "-numa",
                "node,memdev=mem",
            ])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd)
            .args([
                "-append",
                "console=ttyS0 root=/dev/vda rw quiet mitigations=off systemd.show_status=no",
            ])
            .arg("-chardev")
            .arg(format!(
                "socket,id=weft,path={},{}",
                socket.display(),
                reconnect_option()?
            ))
            .args(["-device", "vhost-user-blk-pci,chardev=weft"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(home.join("qemu.log"))?)
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let serial = machine.stdin.take().expect("piped");
        let lines = BufReader::new(machine.stdout.take().expect("piped"));
        let mut log = std::fs::File::create(home.join("guest.log"))?;
        let (say, words) = channel();
        std::thread::spawn(move || {
            for line in lines.split(b'\n').map_while(Result::ok) {
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
            machine: Some(machine),
            serial: Some(serial),
            words,
            rounds: 0,
            disk_bytes: 0,
        })
    }

    /// Waits until the guest's own program runs.
    pub fn wait_until_up(&mut self) -> Result<()> {
        let word = self.word()?;
        match word.strip_prefix("up ") {
            Some(what) => {
                eprintln!("   guest: {what}");
                Ok(())
            }
            None => bail!("the guest said '{word}' before it was up"),
        }
    }

    /// Waits for `count` more rounds of write, fsync and verify; fails if one went wrong.
    pub fn wait_rounds(&mut self, count: u32) -> Result<()> {
        for _ in 0..count {
            let word = self.word()?;
            let Some((_, sectors)) = word.strip_prefix("ok ").and_then(|rest| rest.split_once(' ')) else {
                bail!("the guest said '{word}'");
            };
            self.disk_bytes = 512
                * sectors
                    .parse::<u64>()
                    .with_context(|| format!("the guest said '{word}'"))?;
            self.rounds += 1;
        }
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

    /// Rounds seen so far.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Asks the guest to end its load and power off, and waits for that.
    pub fn stop(&mut self) -> Result<()> {
        self.serial
            .as_mut()
            .context("the guest has no serial line")?
            .write_all(b"stop\n")?;
        loop {
            let word = self.word()?;
            if word.starts_with("done ") {
                break;
            }
            if !word.starts_with("ok ") {
                bail!("the guest said '{word}'");
            }
            self.rounds += 1;
        }
        let mut machine = self.machine.take().context("the guest does not run")?;
        let start = std::time::Instant::now();
        loop {
            match machine.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("QEMU ended with {status}"),
                None if start.elapsed() > PATIENCE => {
                    machine.kill()?;
                    bail!("the guest does not power off");
                }
                None => std::thread::sleep(std::time::Duration::from_millis(50)),
            }
        }
    }

    /// Does not end the guest with us; returns its process id.
    pub fn leave_running(mut self) -> u32 {
        let machine = self.machine.take();
        // Its serial line must stay open on our side's end, or it would read an end of file.
        std::mem::forget(self.serial.take());
        machine.map_or(0, |machine| machine.id())
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

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(machine) = &mut self.machine {
            let _ = machine.kill();
            let _ = machine.wait();
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
