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
use std::collections::btree_map::{BTreeMap, Entry};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::run::{output, root};
use table::{FEW, MUTANTS, Mutant, Net};

/// A net that runs longer than this, and five times as long as it does without a mutant, has caught it: something
/// waits for ever.
const NET_TIME_MAX: Duration = Duration::from_secs(600);

/// What a run of a net came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Held,
    Failed,
    Hung,
}

/// One run of a net.
#[derive(Clone, Copy, Debug)]
struct Cast {
    end: End,
    /// Tests, seeds or states that it looked at.
    looked_at: u64,
    took: Duration,
}

/// Which mutants.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Those whose names, files or nets contain one of these; all if there are none.
    pub words: Vec<String>,
    /// Only those of every test run.
    pub few: bool,
}

impl Choice {
    fn includes(&self, mutant: &Mutant, net: Net) -> bool {
        let net = net.to_string();
        let has = |word: &String| {
            [mutant.name, mutant.file, &net]
                .iter()
                .any(|text| text.contains(word.as_str()))
        };
        (self.words.is_empty() || self.words.iter().any(has)) && (!self.few || FEW.contains(&mutant.name))
    }
}

/// Casts the nets of the chosen mutants, each with its mutant; fails when one survives.
pub fn mutants(choice: &Choice) -> Result<()> {
    let mut chosen: Vec<(&Mutant, Net)> = MUTANTS
        .iter()
        .flat_map(|mutant| mutant.nets.iter().map(move |net| (mutant, *net)))
        .filter(|(mutant, net)| choice.includes(mutant, *net))
        .collect();
    if chosen.is_empty() {
        let names: Vec<&str> = MUTANTS.iter().map(|mutant| mutant.name).collect();
        bail!("no mutant is called so; there are:\n  {}", names.join("\n  "));
    }
    // What is built alike comes together: most of the time goes into building.
    chosen.sort_by_key(|(mutant, net)| (net.build(), mutant.file));
    for (mutant, _) in &chosen {
        mutant.check_text(&root())?;
    }
    let scratch = Scratch::new()?;
    let mut usual = BTreeMap::new();
    let mut survivors = Vec::new();
    println!("| mutant | in | caught by | after | seconds |\n|---|---|---|---|---|");
    for (mutant, net) in chosen {
        let usual = match usual.entry(net) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(unknown) => *unknown.insert(scratch.cast_without_mutants(net)?),
        };
        let limit = NET_TIME_MAX.max(5 * usual);
        let begin = Instant::now();
        let cast = scratch.with(mutant, || {
            scratch.build(net)?;
            scratch.cast(net, limit)
        })?;
        let by = match cast.end {
            End::Held => {
                survivors.push(format!("{} ({net})", mutant.name));
                format!("**survived** {net}")
            }
            End::Failed => net.to_string(),
            End::Hung => format!("{net}, which hung"),
        };
        let after = match (cast.looked_at, net) {
            (0, _) | (_, Net::Tests(..)) => "-".into(),
            (seeds, Net::World(..)) => format!("{seeds} seeds"),
            (states, Net::Search(_)) => format!("{states} states"),
        };
        let seconds = begin.elapsed().as_secs();
        println!(
            "| {} | `{}` | {by} | {after} | {seconds} |",
            mutant.name, mutant.file
        );
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
    /// What the last net said.
    said: PathBuf,
    /// Held while the copy is used: two at once would judge each other's mutants.
    _lock: File,
}

impl Scratch {
    /// Brings the copy up to date. Files that are the same keep their times, so that the build is kept too.
    fn new() -> Result<Scratch> {
        let root = root();
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let place = target.join("mutants");
        fs::create_dir_all(place.join("tree")).with_context(|| place.display().to_string())?;
        let lock = File::create(place.join("lock"))?;
        lock.lock().context("the lock of the copy")?;
        let scratch = Scratch {
            tree: place.join("tree"),
            target: place.join("target"),
            said: place.join("said"),
            _lock: lock,
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
            // Nobody looks at where it panicked, and it is built a hundred times.
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            // Each mutant touches one crate: also where CI keeps no incremental state, it pays here.
            .env("CARGO_INCREMENTAL", "1")
            .env_remove("CARGO_MANIFEST_DIR")
            .stdin(Stdio::null());
        command
    }

    /// Runs `job` with the mutant in the copy, and takes it out again whatever comes.
    fn with(&self, mutant: &Mutant, job: impl FnOnce() -> Result<Cast>) -> Result<Cast> {
        let text = mutant.check_text(&self.tree)?;
        let path = self.tree.join(mutant.file);
        fs::write(&path, text.replace(mutant.find, mutant.put))?;
        let end = job().with_context(|| format!("mutant '{}'", mutant.name));
        fs::write(&path, text)?;
        end
    }

    fn build(&self, net: Net) -> Result<()> {
        output(&mut self.cargo(&net.build())).map(drop)
    }

    /// A net that fails anyway catches everything, and one that looks at nothing catches nothing. How long it takes.
    fn cast_without_mutants(&self, net: Net) -> Result<Duration> {
        self.build(net).context("the tree without a mutant")?;
        let cast = self.cast(net, Duration::MAX)?;
        let said = || fs::read_to_string(&self.said).unwrap_or_default();
        ensure!(
            cast.end == End::Held,
            "{net} fails without any mutant:\n{}",
            said()
        );
        ensure!(cast.looked_at > 0, "{net} looks at nothing:\n{}", said());
        Ok(cast.took)
    }

    /// Runs a net that was built.
    fn cast(&self, net: Net, limit: Duration) -> Result<Cast> {
        let arguments = net.cast();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut child = self
            .cargo(&arguments)
            .stdout(File::create(&self.said)?)
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start cargo")?;
        let begin = Instant::now();
        let end = loop {
            if let Some(status) = child.try_wait()? {
                // Somebody ended it: that says nothing about the mutant.
                ensure!(status.code().is_some(), "{net} was killed: {status}");
                break if status.success() { End::Held } else { End::Failed };
            }
            if begin.elapsed() > limit {
                child.kill()?;
                child.wait()?;
                break End::Hung;
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        let said = String::from_utf8_lossy(&fs::read(&self.said)?).into_owned();
        Ok(Cast {
            end,
            looked_at: net.looked_at(&said),
            took: begin.elapsed(),
        })
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
            assert!(!mutant.nets.is_empty(), "{}", mutant.name);
        }
        for name in FEW {
            assert!(names.contains(name), "{name}");
        }
    }
}
