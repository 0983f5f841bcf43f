//! `cargo xtask mutants`: deliberate bugs, each of which some test must notice.
//!
//! A promise is only as good as the test that fails when it is broken. [`table::MUTANTS`] lists bugs that somebody
//! could write, each as a text to find and what to put in its place, with the *net* that must catch it: one test of a
//! crate, or some hundred seeds of a simulated world. Each runs in a copy of the tree with a target directory of its
//! own, so that neither the tree nor its build notices.
//!
//! A mutant that does not compile proves nothing and is an error; so is a text that is not found exactly once, which
//! is how the table is kept true to the code. Before any mutant, its net is run without it: a net that fails anyway
//! catches everything.

mod table;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::run::{output, root};
use table::{MUTANTS, Mutant, Net};

/// A net that runs longer than this has caught its mutant: something waits for ever. Without mutants each takes
/// less than a minute.
const NET_SECONDS_MAX: u64 = 600;

/// What a run of a net came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Held,
    Failed,
    Hung,
}

/// Runs the mutant called `only`, or all; fails when one survives.
pub fn mutants(only: Option<&str>) -> Result<()> {
    let chosen: Vec<&Mutant> = MUTANTS
        .iter()
        .filter(|mutant| only.is_none_or(|only| mutant.name == only))
        .collect();
    if chosen.is_empty() {
        let names: Vec<&str> = MUTANTS.iter().map(|mutant| mutant.name).collect();
        bail!("no mutant has this name; there are:\n  {}", names.join("\n  "));
    }
    for mutant in &chosen {
        mutant.check_text(&root())?;
    }
    let scratch = Scratch::new()?;
    let nets: BTreeSet<Net> = chosen.iter().map(|mutant| mutant.net).collect();
    for net in nets {
        scratch.build(net).context("the tree without a mutant")?;
        let end = scratch.cast(net)?;
        ensure!(end == End::Held, "{net} fails without any mutant ({end:?})");
    }
    let mut survivors = Vec::new();
    println!("| mutant | in | caught by | after |\n|---|---|---|---|");
    for mutant in chosen {
        let begin = Instant::now();
        let end = scratch.with(mutant, || {
            scratch.build(mutant.net)?;
            scratch.cast(mutant.net)
        })?;
        let by = match end {
            End::Held => {
                survivors.push(mutant.name);
                "**survived**".into()
            }
            End::Failed => mutant.net.to_string(),
            End::Hung => format!("{}, which hung", mutant.net),
        };
        let seconds = begin.elapsed().as_secs();
        println!("| {} | `{}` | {by} | {seconds} s |", mutant.name, mutant.file);
    }
    ensure!(survivors.is_empty(), "survived: {}", survivors.join(", "));
    Ok(())
}

impl Mutant {
    /// The text to replace is there, once.
    fn check_text(&self, tree: &Path) -> Result<String> {
        let path = tree.join(self.file);
        let text =
            fs::read_to_string(&path).with_context(|| format!("mutant {}: {}", self.name, self.file))?;
        let count = text.matches(self.find).count();
        ensure!(
            count == 1,
            "mutant '{}': its text is {count} times in {}, not once; bring xtask/src/mutants/table.rs up to date:\n{}",
            self.name,
            self.file,
            self.find
        );
        Ok(text)
    }
}

/// A copy of the tree that may be spoiled.
struct Scratch {
    tree: PathBuf,
    target: PathBuf,
}

impl Scratch {
    /// Brings the copy up to date. Files that are the same keep their times, so that the build is kept too.
    fn new() -> Result<Scratch> {
        let root = root();
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let place = target.join("mutants");
        let scratch = Scratch {
            tree: place.join("tree"),
            target: place.join("target"),
        };
        let mut git = Command::new("git");
        git.args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
            .current_dir(&root);
        let listed = output(&mut git)?;
        let wanted: BTreeSet<PathBuf> = listed
            .split_terminator('\0')
            .map(PathBuf::from)
            .filter(|path| root.join(path).is_file())
            .collect();
        for path in &wanted {
            let content = fs::read(root.join(path)).with_context(|| path.display().to_string())?;
            let copy = scratch.tree.join(path);
            if fs::read(&copy).ok().as_ref() != Some(&content) {
                fs::create_dir_all(copy.parent().expect("a file in a tree"))?;
                fs::write(&copy, content).with_context(|| copy.display().to_string())?;
            }
        }
        scratch.forget_others(&scratch.tree, &wanted)?;
        Ok(scratch)
    }

    /// Removes what is not in the tree any more: a module that was split would be found twice.
    fn forget_others(&self, folder: &Path, wanted: &BTreeSet<PathBuf>) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                self.forget_others(&path, wanted)?;
            } else if !wanted.contains(path.strip_prefix(&self.tree).expect("inside")) {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .args(arguments)
            .current_dir(&self.tree)
            .env("CARGO_TARGET_DIR", &self.target)
            .stdin(Stdio::null());
        command
    }

    /// Runs `job` with the mutant in the copy, and takes it out again whatever comes.
    fn with(&self, mutant: &Mutant, job: impl FnOnce() -> Result<End>) -> Result<End> {
        let text = mutant.check_text(&self.tree)?;
        let path = self.tree.join(mutant.file);
        fs::write(&path, text.replace(mutant.find, mutant.put))?;
        let end = job().with_context(|| format!("mutant '{}'", mutant.name));
        fs::write(&path, text)?;
        end
    }

    fn build(&self, net: Net) -> Result<()> {
        let mut arguments = net.arguments(true);
        arguments.push("--quiet".into());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        output(&mut self.cargo(&arguments)).map(drop)
    }

    /// Runs a net that was built.
    fn cast(&self, net: Net) -> Result<End> {
        let arguments = net.arguments(false);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut child = self
            .cargo(&arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start cargo")?;
        let begin = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                // Somebody ended it: that says nothing about the mutant.
                ensure!(status.code().is_some(), "{net} was killed: {status}");
                return Ok(if status.success() { End::Held } else { End::Failed });
            }
            if begin.elapsed() > Duration::from_secs(NET_SECONDS_MAX) {
                child.kill()?;
                child.wait()?;
                return Ok(End::Hung);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In every test run, so that whoever changes a text hears of it at once and not at the next soak.
    #[test]
    fn every_text_is_found_once_and_every_name_is_its_own() {
        let names: BTreeSet<&str> = MUTANTS.iter().map(|mutant| mutant.name).collect();
        assert_eq!(names.len(), MUTANTS.len());
        for mutant in MUTANTS {
            mutant.check_text(&root()).unwrap();
            assert_ne!(mutant.find, mutant.put, "{}", mutant.name);
        }
    }
}
