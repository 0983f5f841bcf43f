//! Runs seeds, and when one breaks a promise says how to see it again.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::trace::{self, Listener};

/// A world that a seed and a number of operations define.
#[derive(Clone, Copy)]
pub struct World {
    /// Its name on the command line.
    pub name: &'static str,
    /// Guest operations of a run unless told otherwise.
    pub ops: u64,
    /// Runs it and tells its counters; panics where a promise is broken.
    pub run: fn(seed: u64, ops: u64) -> Vec<(&'static str, u64)>,
}

thread_local! {
    static RUNNING: Cell<Option<(&'static str, u64, u64)>> = const { Cell::new(None) };
}

/// The command that repeats the run under way on this thread, for a build in which a panic ends the process.
#[must_use]
pub fn command_of_this_run() -> Option<String> {
    RUNNING.get().map(|(world, seed, ops)| command(world, seed, ops))
}

fn command(world: &str, seed: u64, ops: u64) -> String {
    format!("cargo run -p weft-sim -- {world} --seed {seed} --ops {ops} -v")
}

/// A run that broke a promise, made as short as it gets.
#[derive(Clone, Debug)]
pub struct Broken {
    /// The seed.
    pub seed: u64,
    /// Fewest operations known to show it.
    pub ops: u64,
    /// What the oracle, or an assertion in the code under test, said.
    pub why: String,
    /// The last events before it.
    pub story: Vec<String>,
}

/// Every world there is.
pub const WORLDS: [World; 3] = [
    World {
        name: "store",
        ops: 600,
        run: |seed, ops| crate::world_store::run(seed, ops).counters(),
    },
    World {
        name: "store-full",
        ops: 600,
        run: |seed, ops| crate::world_store::run_full(seed, ops).counters(),
    },
    World {
        name: "vdi",
        ops: 300,
        run: |seed, ops| crate::world_vdi::run(seed, ops).counters(),
    },
];

impl World {
    /// Runs one seed and tells its counters.
    ///
    /// # Errors
    /// What broke: the oracle's words or an assertion's.
    pub fn try_seed(&self, seed: u64, ops: u64) -> Result<Vec<(&'static str, u64)>, String> {
        RUNNING.set(Some((self.name, seed, ops)));
        catch_unwind(AssertUnwindSafe(|| (self.run)(seed, ops))).map_err(|panic| {
            panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
                .unwrap_or_else(|| "a panic without words".into())
        })
    }

    /// Looks for fewer operations that still break a promise (any promise), by halving; then tells the story.
    #[must_use]
    pub fn shrink(&self, seed: u64, ops: u64) -> Broken {
        let (mut fails, mut holds) = (ops, 0);
        while fails - holds > 1 {
            let middle = holds + (fails - holds) / 2;
            if self.try_seed(seed, middle).is_err() {
                fails = middle;
            } else {
                holds = middle;
            }
        }
        trace::listen(Listener::LastLines(60));
        let why = self
            .try_seed(seed, fails)
            .expect_err("the same seed is the same run");
        let story = trace::last_lines();
        trace::listen(Listener::Nobody);
        Broken {
            seed,
            ops: fails,
            why,
            story,
        }
    }

    /// Runs `seeds` and adds up their counters.
    ///
    /// # Errors
    /// The first seed that broke a promise.
    pub fn run_seeds(
        &self,
        seeds: std::ops::Range<u64>,
        ops: u64,
    ) -> Result<Vec<(&'static str, u64)>, Box<Broken>> {
        let mut totals: Vec<(&'static str, u64)> = Vec::new();
        for seed in seeds {
            let counters = self
                .try_seed(seed, ops)
                .map_err(|_| Box::new(self.shrink(seed, ops)))?;
            if totals.is_empty() {
                totals = counters;
            } else {
                for (total, counter) in totals.iter_mut().zip(counters) {
                    total.1 += counter.1;
                }
            }
        }
        Ok(totals)
    }
}

impl Broken {
    /// The story, the reason and the command that repeats it.
    #[must_use]
    pub fn report(&self, world: &World) -> String {
        format!(
            "{}\n\n{} seed {} broke a promise after {} operations:\n  {}\n\nsee it again:\n  {}\n",
            self.story.join("\n"),
            world.name,
            self.seed,
            self.ops,
            self.why,
            command(world.name, self.seed, self.ops)
        )
    }
}
