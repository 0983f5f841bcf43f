//! `weft-sim`: runs simulated worlds from seeds until one breaks a promise.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use weft_sim::cleaning::{self, Setup};
use weft_sim::runner::{self, Run, WORLDS, World};
use weft_sim::trace::{self, Listener};

/// Runs simulated worlds; each seed is one run, the same on every machine. `weft-sim cleaning --help`: what
/// cleaning costs, in simulated time.
#[derive(Parser)]
#[command(name = "weft-sim")]
struct Arguments {
    /// Which world: one disk's log store (also when full), a pool with an open
    /// virtual disk, or a cluster of hosts.
    #[arg(value_parser = ["store", "store-full", "vdi", "cluster"])]
    world: String,
    /// Seeds to run, for example 0..1000.
    #[arg(long, default_value = "0..1000", value_parser = parse_range)]
    seeds: std::ops::Range<u64>,
    /// Run this one seed only.
    #[arg(long)]
    seed: Option<u64>,
    /// Numbers of faults to leave out of it, in a world that numbers them, separated by commas.
    #[arg(long, value_delimiter = ',', requires = "seed")]
    without: Vec<u32>,
    /// Operations a guest asks for in one run.
    #[arg(long)]
    ops: Option<u64>,
    /// Go on after a seed that breaks a promise, and list them all.
    #[arg(long)]
    keep_going: bool,
    /// Stop at the first seed that breaks a promise, and only name it.
    #[arg(long, conflicts_with = "keep_going")]
    first: bool,
    /// Print every event.
    #[arg(short, long)]
    verbose: bool,
}

/// A disk filled and overwritten, in simulated time: what cleaning costs.
#[derive(Parser)]
#[command(name = "weft-sim cleaning")]
struct CleaningArguments {
    #[command(flatten)]
    setup: Setup,
}

fn parse_range(text: &str) -> Result<std::ops::Range<u64>, String> {
    let refuse = || format!("'{text}' is not a range of seeds: write for example 0..1000");
    let (from, to) = text.split_once("..").ok_or_else(refuse)?;
    let from = from.parse().map_err(|_| refuse())?;
    let to = to.parse().map_err(|_| refuse())?;
    Ok(from..to)
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1).peekable();
    if words.peek().is_some_and(|word| word == "cleaning") {
        let setup = CleaningArguments::parse_from(words).setup;
        cleaning::run(setup).print(&setup);
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::parse();
    let world = WORLDS
        .iter()
        .find(|world| world.name == arguments.world)
        .expect("the parser knows the worlds");
    let ops = arguments.ops.unwrap_or(world.ops);
    if let Some(seed) = arguments.seed {
        let without = arguments.without.into_iter().collect();
        return run_one(world, &Run { seed, ops, without }, arguments.verbose);
    }
    if cfg!(panic = "abort") {
        // Nobody is left afterwards to say which seed it was.
        let say_what = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            say_what(panic);
            if let Some(command) = runner::command_of_this_run() {
                eprintln!("see it again:\n  {command}");
            }
        }));
    } else {
        // The report below says it better, and shrinking fails on purpose many times.
        std::panic::set_hook(Box::new(|_| {}));
    }
    if arguments.keep_going || arguments.first {
        return list_broken(world, arguments.seeds, ops, arguments.first);
    }
    let begin = Instant::now();
    let count = arguments.seeds.end.saturating_sub(arguments.seeds.start);
    match world.run_seeds(arguments.seeds, ops) {
        Ok(totals) => {
            let seconds = begin.elapsed().as_secs_f64();
            println!(
                "{}: {count} seeds hold, {seconds:.1} s, {:.1} seeds/s",
                world.name,
                count as f64 / seconds
            );
            for (name, total) in totals {
                println!("  {name}: {total}");
            }
            ExitCode::SUCCESS
        }
        Err(broken) => {
            println!("{}", broken.report(world));
            ExitCode::FAILURE
        }
    }
}

fn run_one(world: &World, run: &Run, verbose: bool) -> ExitCode {
    let seed = run.seed;
    trace::listen(if verbose {
        Listener::Everything
    } else {
        Listener::LastLines(60)
    });
    match world.try_run(run) {
        Ok(counters) => {
            println!("{} seed {seed} holds: {counters:?}", world.name);
            ExitCode::SUCCESS
        }
        Err(why) => {
            for line in trace::last_lines() {
                println!("{line}");
            }
            println!("{} seed {seed} broke a promise: {why}", world.name);
            ExitCode::FAILURE
        }
    }
}

fn list_broken(world: &World, seeds: std::ops::Range<u64>, ops: u64, is_first_enough: bool) -> ExitCode {
    let count = seeds.end.saturating_sub(seeds.start);
    let mut broken = 0;
    for seed in seeds {
        if let Err(why) = world.try_seed(seed, ops) {
            broken += 1;
            let first: String = why.lines().next().unwrap_or_default().chars().take(200).collect();
            println!("{} seed {seed}: {first}", world.name);
            if is_first_enough {
                return ExitCode::FAILURE;
            }
        }
    }
    if broken == 0 {
        println!("{}: {count} seeds hold", world.name);
        ExitCode::SUCCESS
    } else {
        println!("{broken} seeds broke a promise");
        ExitCode::FAILURE
    }
}
