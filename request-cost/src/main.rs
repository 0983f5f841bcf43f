//! `weft-request-cost`: what one 4 KiB request of a guest costs the pure cores, and bounds on it.
//!
//! ```text
//!  check ──▶ valgrind --tool=callgrind  weft-request-cost run WORKLOAD N     ┐ the difference over N:
//!        ──▶ valgrind --tool=callgrind  weft-request-cost run WORKLOAD 2N    ┘ start-up cancels out
//! ```
//! Instructions and not time: they are the same on every run and every machine with the same instruction set, so a
//! bound can be tight. What they leave out (caches, system calls, the rings) is what `weft-bench` measures.

mod bounds;
mod host;
mod memory;

use anyhow::{Context, Result, bail};

use bounds::{BOUNDS, Workload};
use edge::allocations::{Allocations, Counting};
use host::Host;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Served before anything is counted: queues and tables grow to their size.
const WARM_UP: u64 = 2048;

const USAGE: &str = "usage: weft-request-cost check | run WORKLOAD REQUESTS";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["check"] => bounds::check(),
        ["run", name, requests] => {
            let known = BOUNDS.iter().find(|bound| bound.workload.name == *name);
            let workload = known
                .with_context(|| format!("no workload is called {name}"))?
                .workload;
            let requests = requests.parse().context("REQUESTS is a number")?;
            let allocations = run(workload, requests);
            println!("allocations {} bytes {}", allocations.calls, allocations.bytes);
            Ok(())
        }
        _ => bail!(USAGE),
    }
}

/// Serves `requests` and says what they allocated.
fn run(workload: Workload, requests: u64) -> Allocations {
    let mut host = Host::new(workload.replicas, workload.settings());
    host.serve(workload.is_write, WARM_UP, workload.depth);
    let before = Allocations::of_this_thread();
    host.serve(workload.is_write, requests, workload.depth);
    Allocations::of_this_thread() - before
}
