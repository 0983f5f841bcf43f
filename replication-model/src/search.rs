//! One search, and what it found.

use std::collections::BTreeMap;
use std::fmt::Write;

use stateright::{Checker, HasDiscoveries, Model};

use crate::model::World;
use crate::setup::Setup;

/// How to search.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads.
    pub threads: usize,
    /// More memory, and the way to a broken promise is among the shortest.
    pub is_breadth_first: bool,
    /// See [`World::heal_one_of`].
    pub heal_one_of: u64,
}

/// What a search came to.
#[derive(Clone, Debug)]
pub struct Found {
    /// Different ones.
    pub states: usize,
    /// Steps of the longest way that was gone.
    pub depth: usize,
    /// A promise that is broken, with the way there.
    pub broken: Option<String>,
    /// The last life got to the end of its script at least once.
    pub is_done_once: bool,
}

impl Found {
    /// Searches every state of a scenario, or until a promise is broken.
    #[must_use]
    pub fn search(setup: &Setup, options: Options) -> Found {
        let world = World {
            setup: *setup,
            heal_one_of: options.heal_one_of,
        };
        let builder = world
            .checker()
            .threads(options.threads)
            .finish_when(HasDiscoveries::AnyFailures);
        if options.is_breadth_first {
            Found::of(&builder.spawn_bfs().join())
        } else {
            Found::of(&builder.spawn_dfs().join())
        }
    }

    fn of(checker: &impl Checker<World>) -> Found {
        let mut found = Found {
            states: checker.unique_state_count(),
            depth: checker.max_depth(),
            broken: None,
            is_done_once: false,
        };
        let discoveries: BTreeMap<_, _> = checker.discoveries().into_iter().collect();
        for (name, path) in discoveries {
            if checker.model().property(name).expectation.discovery_is_failure() {
                found.broken = Some(way(name, checker.model(), path.into_vec()));
            } else {
                found.is_done_once = true;
            }
        }
        found
    }
}

/// The steps to a broken promise, in words.
fn way(name: &str, world: &World, steps: Vec<(crate::world::State, Option<crate::model::Action>)>) -> String {
    let mut text = format!("not so: {name}\n");
    let last = steps.last().map(|(state, _)| state.clone());
    for (state, action) in steps {
        if let Some(action) = action {
            writeln!(text, "  {}", world.describe(&state, action)).expect("a string has room");
        }
    }
    let last = last.expect("a way has a beginning");
    let healed = World {
        heal_one_of: 1,
        ..*world
    };
    let why = last.broken.clone().or_else(|| healed.heals(&last).err());
    writeln!(text, "  {}", why.unwrap_or_default()).expect("a string has room");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenarios::SCENARIOS;

    /// The smallest scenario, in every test run; `cargo xtask test` searches them all.
    #[test]
    fn a_first_writer_that_dies_is_searched_to_the_end() {
        let options = Options {
            threads: 2,
            is_breadth_first: false,
            heal_one_of: 16,
        };
        let found = Found::search(&SCENARIOS[0], options);
        assert_eq!(found.broken, None);
        assert!(found.is_done_once && found.states > 1_000, "{found:?}");
    }
}
