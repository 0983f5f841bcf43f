//! `weft-replication-model`: searches scenarios, prints how many states each has and whether all keep the promises.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use weft_replication_model::scenarios::SCENARIOS;
use weft_replication_model::search::{Found, Options};
use weft_replication_model::setup::{Expected, Setup};

/// Searches every state of small worlds around the real replication code.
#[derive(Parser)]
#[command(name = "weft-replication-model")]
struct Arguments {
    /// Scenarios to search; all of them if none is named.
    names: Vec<String>,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Breadth first: slower and larger, and the counterexample it finds is among the shortest.
    #[arg(long)]
    shortest: bool,
    /// Tell the way to a broken promise also where one is expected.
    #[arg(long)]
    tell: bool,
    /// Of how many states one is healed to see that it comes to rest.
    #[arg(long, default_value_t = 256)]
    heal_one_of: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // A failed assertion is a discovery; it is told with the way that leads to it.
    std::panic::set_hook(Box::new(|_| {}));
    let is_asked =
        |setup: &&Setup| arguments.names.is_empty() || arguments.names.iter().any(|name| name == setup.name);
    let chosen: Vec<&Setup> = SCENARIOS.iter().filter(is_asked).collect();
    if chosen.is_empty() {
        let names: Vec<&str> = SCENARIOS.iter().map(|setup| setup.name).collect();
        eprintln!("there are: {}", names.join(", "));
        return ExitCode::FAILURE;
    }
    let options = Options {
        threads: arguments.threads,
        is_breadth_first: arguments.shortest,
        heal_one_of: arguments.heal_one_of,
    };
    println!("| scenario | unique states | depth | seconds | comes to |\n|---|---|---|---|---|");
    let mut is_well = true;
    for setup in chosen {
        is_well &= report(setup, options, arguments.tell);
    }
    if is_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Searches one and prints what came of it; says whether that was to be expected.
fn report(setup: &Setup, options: Options, tells: bool) -> bool {
    let begin = Instant::now();
    let found = Found::search(setup, options);
    let (end, is_well) = match (&found.broken, setup.expected) {
        (None, Expected::Holds) if found.is_done_once => ("holds", true),
        (None, Expected::Holds) => ("holds, but never gets to the end of its script", false),
        (None, Expected::Breaks) => ("holds, and should not", false),
        (Some(_), Expected::Breaks) => ("breaks, as it should", true),
        (Some(_), Expected::Holds) => ("**breaks**", false),
    };
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        "| {} | {} | {} | {seconds:.1} | {end} |",
        setup.name, found.states, found.depth
    );
    if let Some(way) = &found.broken
        && (tells || !is_well)
    {
        println!("{way}");
    }
    is_well
}
