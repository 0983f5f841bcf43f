//! A guest that others wrote: a stock Debian kernel in QEMU (TCG: no help of the hardware needed). What runs in it says
//! `WEFT word rest` on its serial line, which is read as it comes, and is told what to do by lines there.
//!
//! `blockd/tests/cluster_faults` has this file too.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long the guest may say nothing: emulation on a busy machine is slow.
const SILENCE: Duration = Duration::from_secs(400);

const LOOK: Duration = Duration::from_millis(20);

/// Its last word, after which it powers off.
pub const DONE: &str = "done";

/// What the kernel says when a disk fails or hangs, in any words.
const COMPLAINTS: &[&str] = &[
    "I/O error",
    "EXT4-fs error",
    "blk_update_request",
    "critical target error",
    "critical medium error",
    "blocked for more than",
    "Kernel panic",
    "BUG:",
    "Oops",
];

/// What a guest is booted with.
pub struct Boot<'a> {
    pub kernel: &'a Path,
    pub initramfs: &'a Path,
    /// More for the kernel's command line.
    pub words: &'a str,
    pub processors: usize,
    pub memory_mib: u32,
    /// The vhost-user sockets of its disks, each with as many queues as there are processors.
    pub disks: &'a [&'a Path],
    /// What it may say, beside [`DONE`]; any other word means that something is wrong.
    pub vocabulary: &'static [&'static str],
    /// Where logs go.
    pub home: &'a Path,
}

/// What the guest has said so far.
#[derive(Default)]
struct Said {
    /// How often each word was said, and what came after it the last time.
    words: BTreeMap<String, (u64, String)>,
    wrong: Vec<String>,
}

/// A running guest; ended when dropped.
pub struct Machine {
    qemu: Child,
    serial: ChildStdin,
    said: Arc<Mutex<Said>>,
}

fn lock(said: &Mutex<Said>) -> MutexGuard<'_, Said> {
    said.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    pub fn start(boot: &Boot<'_>) -> Result<Machine> {
        let (processors, mib) = (boot.processors, boot.memory_mib);
        let mut command = Command::new("setpriv"); // becomes the program: same process id
        command
            .args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
            .args(["-M", "q35,accel=tcg", "-cpu", "max", "-m", &mib.to_string()])
            .args(["-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"])
            .args(["-smp", &processors.to_string()])
            .arg("-object")
            .arg(format!("memory-backend-memfd,id=mem,size={mib}M,share=on"))
            .args(["-numa", "node,memdev=mem"])
            .arg("-kernel")
            .arg(boot.kernel)
            .arg("-initrd")
            .arg(boot.initramfs)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 loglevel=4 mitigations=off panic=-1 {}",
                boot.words
            ));
        let reconnect = reconnect_option()?;
        for (number, disk) in boot.disks.iter().enumerate() {
            command
                .arg("-chardev")
                .arg(format!(
                    "socket,id=weft{number},path={},{reconnect}",
                    disk.display()
                ))
                .arg("-device")
                .arg(format!(
                    "vhost-user-blk-pci,chardev=weft{number},num-queues={processors}"
                ));
        }
        let mut qemu = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(boot.home.join("qemu.log"))?)
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let serial = qemu.stdin.take().expect("piped");
        let lines = BufReader::new(qemu.stdout.take().expect("piped"));
        let mut log = std::fs::File::create(boot.home.join("guest.log"))?;
        let said = Arc::new(Mutex::new(Said::default()));
        let listener = Arc::clone(&said);
        let vocabulary = boot.vocabulary;
        std::thread::spawn(move || {
            for line in lines.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                let _ = writeln!(log, "{line}");
                lock(&listener).hear(&line, vocabulary);
            }
        });
        Ok(Machine { qemu, serial, said })
    }

    /// How often it has said the word.
    pub fn count(&self, word: &str) -> u64 {
        lock(&self.said).words.get(word).map_or(0, |(count, _)| *count)
    }

    /// What it said after the word, the last time.
    pub fn last(&self, word: &str) -> String {
        let said = lock(&self.said);
        said.words
            .get(word)
            .map_or_else(String::new, |(_, rest)| rest.clone())
    }

    /// Fails if the guest or QEMU said that something is wrong.
    pub fn check(&mut self) -> Result<()> {
        let said = lock(&self.said);
        let (is_right, is_done) = (said.wrong.is_empty(), said.words.contains_key(DONE));
        ensure!(is_right, "the guest says:\n  {}", said.wrong.join("\n  "));
        drop(said);
        if let Some(status) = self.qemu.try_wait()?
            && !is_done
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

    /// A line on its serial line.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        self.serial
            .write_all(format!("{line}\n").as_bytes())
            .context("the guest's serial line")
    }

    /// Lets it end what it is at and power off, and waits for that.
    pub fn stop(mut self) -> Result<()> {
        self.tell("stop")?;
        self.until("it is done", |machine| machine.count(DONE) > 0)?;
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
    fn hear(&mut self, line: &str, vocabulary: &[&str]) {
        let Some((_, said)) = line.split_once("WEFT ") else {
            if COMPLAINTS.iter().any(|complaint| line.contains(complaint)) {
                self.wrong.push(line.to_owned());
            }
            return;
        };
        let (word, rest) = said.split_once(' ').unwrap_or((said, ""));
        if word != DONE && !vocabulary.contains(&word) {
            self.wrong.push(said.to_owned());
            return;
        }
        let entry = self.words.entry(word.to_owned()).or_default();
        *entry = (entry.0 + 1, rest.to_owned());
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
