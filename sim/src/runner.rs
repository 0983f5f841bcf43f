//! Runs seeds, and when one breaks a promise says how to see it again.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::trace::{self, Listener};

/// What defines a run of a world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Everything random.
    pub seed: u64,
    /// Guest operations.
    pub ops: u64,
    /// Numbers of faults that are left out, in a world that numbers them.
    pub without: BTreeSet<u32>,
}

impl Run {
    /// With all its faults.
    #[must_use]
    pub fn new(seed: u64, ops: u64) -> Run {
        Run {
            seed,
            ops,
            without: BTreeSet::new(),
        }
    }

    fn command(&self, world: &str) -> String {
        let without: Vec<String> = self.without.iter().map(u32::to_string).collect();
        let without = match without.is_empty() {
            true => String::new(),
            false => format!(" --without {}", without.join(",")),
        };
        let Run { seed, ops, .. } = self;
        format!("cargo run -p weft-sim -- {world} --seed {seed} --ops {ops}{without} -v")
    }
}

/// A world that a run defines.
#[derive(Clone, Copy)]
pub struct World {
    /// Its name on the command line.
    pub name: &'static str,
    /// Guest operations of a run unless told otherwise.
    pub ops: u64,
    /// Runs it and tells its counters; panics where a promise is broken.
    pub run: fn(&Run) -> Vec<(&'static str, u64)>,
}

thread_local! {
    static RUNNING: RefCell<Option<(&'static str, Run)>> = const { RefCell::new(None) };
    static FAULTS: Cell<u32> = const { Cell::new(0) };
}

/// The command that repeats the run under way on this thread, for a build in which a panic ends the process.
#[must_use]
pub fn command_of_this_run() -> Option<String> {
    RUNNING.with_borrow(|running| running.as_ref().map(|(world, run)| run.command(world)))
}

/// A world says that it came to fault number `no`, whether or not it is left out.
pub(crate) fn came_to_fault(no: u32) {
    FAULTS.set(no + 1);
}

/// A run that broke a promise, made as short as it gets.
#[derive(Clone, Debug)]
pub struct Broken {
    /// With the fewest operations and faults known to show it.
    pub run: Run,
    /// Faults that it came to, left out or not.
    pub faults: u32,
    /// What the oracle, or an assertion in the code under test, said.
    pub why: String,
    /// The last events before it.
    pub story: Vec<String>,
}

/// Every world there is.
pub const WORLDS: [World; 4] = [
    World {
        name: "store",
        ops: 600,
        run: |run| crate::world_store::run(run.seed, run.ops).counters(),
    },
    World {
        name: "store-full",
        ops: 600,
        run: |run| crate::world_store::run_full(run.seed, run.ops).counters(),
    },
    World {
        name: "vdi",
        ops: 300,
        run: |run| crate::world_vdi::run(run.seed, run.ops).counters(),
    },
    World {
        name: "cluster",
        ops: 150,
        run: |run| crate::world_cluster::run(run.seed, run.ops, &run.without).counters(),
    },
];

impl World {
    /// Runs one seed and tells its counters.
    ///
    /// # Errors
    /// What broke: the oracle's words or an assertion's.
    pub fn try_seed(&self, seed: u64, ops: u64) -> Result<Vec<(&'static str, u64)>, String> {
        self.try_run(&Run::new(seed, ops))
    }

    /// Runs one run and tells its counters.
    ///
    /// # Errors
    /// What broke: the oracle's words or an assertion's.
    pub fn try_run(&self, run: &Run) -> Result<Vec<(&'static str, u64)>, String> {
        RUNNING.set(Some((self.name, run.clone())));
        FAULTS.set(0);
        catch_unwind(AssertUnwindSafe(|| (self.run)(run))).map_err(|panic| {
            panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
                .unwrap_or_else(|| "a panic without words".into())
        })
    }

    /// Looks for fewer operations, and then for fewer faults, that still break a promise (any promise); then tells the
    /// story.
    #[must_use]
    pub fn shrink(&self, seed: u64, ops: u64) -> Broken {
        let mut run = self.with_fewer_ops(&Run::new(seed, ops));
        if self.try_run(&run).is_err() {
            run = self.without_faults(run, FAULTS.get());
            run = self.with_fewer_ops(&run);
        }
        trace::listen(Listener::LastLines(60));
        let why = self.try_run(&run).expect_err("the same seed is the same run");
        let story = trace::last_lines();
        trace::listen(Listener::Nobody);
        let faults = FAULTS.get();
        run.without.retain(|no| *no < faults);
        Broken {
            run,
            faults,
            why,
            story,
        }
    }

    fn with_fewer_ops(&self, run: &Run) -> Run {
        let with = |ops| Run { ops, ..run.clone() };
        let (mut fails, mut holds) = (run.ops, 0);
        while fails - holds > 1 {
            let middle = holds + (fails - holds) / 2;
            if self.try_run(&with(middle)).is_err() {
                fails = middle;
            } else {
                holds = middle;
            }
        }
        with(fails)
    }

    /// Leaves out half of the faults at a time, then a quarter, and at last single ones.
    fn without_faults(&self, mut run: Run, count: u32) -> Run {
        let mut many = count;
        while many > 1 {
            many = many.div_ceil(2);
            let mut first = 0;
            while first < count {
                let mut fewer = run.clone();
                fewer.without.extend(first..(first + many).min(count));
                if fewer.without.len() > run.without.len() && self.try_run(&fewer).is_err() {
                    run = fewer;
                }
                first += many;
            }
        }
        run
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
            "{}\n\n{} seed {} broke a promise after {} operations{}:\n  {}\n\nsee it again:\n  {}\n",
            self.story.join("\n"),
            world.name,
            self.run.seed,
            self.run.ops,
            match self.faults {
                0 => String::new(),
                faults => format!(
                    " and {} of {faults} faults",
                    faults as usize - self.run.without.len()
                ),
            },
            self.why,
            self.run.command(world.name)
        )
    }
}
