//! A guest that others wrote: a stock Debian kernel in QEMU (TCG: no help of the hardware needed), with four processors,
//! so four queues, and fio verifying in it. Its serial line is read as it comes.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long the guest may say nothing: emulation on a busy machine is slow.
const SILENCE: Duration = Duration::from_secs(400);

const LOOK: Duration = Duration::from_millis(20);

/// What the kernel says when a disk fails or hangs, in any words.
const COMPLAINTS: &[&str] = &[
    "I/O error",
    "blk_update_request",
    "critical target error",
    "critical medium error",
    "blocked for more than",
    "Kernel panic",
    "BUG:",
    "Oops",
];

/// What the guest has said so far.
#[derive(Default)]
struct Said {
    rounds: AtomicU32,
    disk_bytes: AtomicU64,
    is_up: AtomicU32,
    is_done: AtomicU32,
    wrong: Mutex<Vec<String>>,
}

/// A running guest; ended when dropped.
pub struct Machine {
    qemu: Child,
    serial: ChildStdin,
    said: Arc<Said>,
}

impl Machine {
    /// Boots `kernel` with the disk behind `socket`; logs go to `home`.
    pub fn start(
        kernel: &Path,
        initramfs: &Path,
        socket: &Path,
        queues: usize,
        home: &Path,
    ) -> Result<Machine> {
        let mut qemu = Command::new("setpriv") // becomes the program: same process id
            .args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
            .args([
                "-M",
                "q35,accel=tcg",
                "-cpu",
                "max",
                "-m",
                "640",
                "-nographic",
                "-no-reboot",
            ])
            .args(["-smp", &queues.to_string(), "-nodefaults", "-serial", "stdio"])
            .args(["-object", "memory-backend-memfd,id=mem,size=640M,share=on"])
            .args(["-numa", "node,memdev=mem"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", "console=ttyS0 loglevel=4 mitigations=off panic=-1"])
            .arg("-chardev")
            .arg(format!(
                "socket,id=weft,path={},{}",
                socket.display(),
                reconnect_option()?
            ))
            .arg("-device")
            .arg(format!("vhost-user-blk-pci,chardev=weft,num-queues={queues}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(home.join("qemu.log"))?)
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let serial = qemu.stdin.take().expect("piped");
        let lines = BufReader::new(qemu.stdout.take().expect("piped"));
        let mut log = std::fs::File::create(home.join("guest.log"))?;
        let said = Arc::new(Said::default());
        let listener = Arc::clone(&said);
        std::thread::spawn(move || {
            for line in lines.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                let _ = writeln!(log, "{line}");
                listener.hear(&line);
            }
        });
        Ok(Machine { qemu, serial, said })
    }

    /// Rounds of fio that ended well.
    pub fn rounds(&self) -> u32 {
        self.said.rounds.load(Ordering::SeqCst)
    }

    /// The size of the disk as its kernel saw it at the last round's end.
    pub fn disk_bytes(&self) -> u64 {
        self.said.disk_bytes.load(Ordering::SeqCst)
    }

    pub fn is_up(&self) -> bool {
        self.said.is_up.load(Ordering::SeqCst) != 0
    }

    /// Fails if the guest or QEMU said that something is wrong.
    pub fn check(&mut self) -> Result<()> {
        let wrong = self.said.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(wrong.is_empty(), "the guest says:\n  {}", wrong.join("\n  "));
        drop(wrong);
        if let Some(status) = self.qemu.try_wait()?
            && self.said.is_done.load(Ordering::SeqCst) == 0
        {
            bail!("QEMU ended by itself ({status})");
        }
        Ok(())
    }

    /// Waits for something that the guest will say.
    pub fn until(&mut self, what: &str, is_so: impl Fn(&Machine) -> bool) -> Result<()> {
        let start = Instant::now();
        while !is_so(self) {
            self.check()?;
            ensure!(
                start.elapsed() < SILENCE,
                "the guest hangs, not within {SILENCE:?}: {what}"
            );
            std::thread::sleep(LOOK);
        }
        self.check()
    }

    /// Lets fio end its round, powers off, and waits for that.
    pub fn stop(mut self) -> Result<()> {
        self.serial.write_all(b"stop\n")?;
        self.until("it is done", |machine| {
            machine.said.is_done.load(Ordering::SeqCst) != 0
        })?;
        let start = Instant::now();
        loop {
            match self.qemu.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("QEMU ended with {status}"),
                None => ensure!(start.elapsed() < SILENCE, "the guest does not power off"),
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Said {
    fn hear(&self, line: &str) {
        let wrong = |text: &str| {
            self.wrong
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(text.to_owned());
        };
        let Some((_, word)) = line.split_once("WEFT ") else {
            if COMPLAINTS.iter().any(|complaint| line.contains(complaint)) {
                wrong(line);
            }
            return;
        };
        if let Some(rest) = word.strip_prefix("ok ") {
            let sectors = rest
                .split_once(' ')
                .and_then(|(_, sectors)| sectors.parse::<u64>().ok());
            self.disk_bytes
                .store(512 * sectors.unwrap_or(0), Ordering::SeqCst);
            self.rounds.fetch_add(1, Ordering::SeqCst);
        } else if let Some(what) = word.strip_prefix("up ") {
            println!("guest: {what}");
            self.is_up.store(1, Ordering::SeqCst);
        } else if word.starts_with("done ") {
            self.is_done.store(1, Ordering::SeqCst);
        } else {
            wrong(word);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// QEMU 9.2 counts in milliseconds and will drop the option in seconds.
fn reconnect_option() -> Result<&'static str> {
    let output = Command::new("qemu-system-x86_64").arg("--version").output()?;
    let text = String::from_utf8(output.stdout).context("QEMU's version")?;
    let version = text.split_whitespace().nth(3).unwrap_or_default();
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    Ok(if version >= (9, 2) {
        "reconnect-ms=20"
    } else {
        "reconnect=1"
    })
}
