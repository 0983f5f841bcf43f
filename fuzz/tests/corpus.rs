//! The corpus, replayed; then changes to it from a seed. `WEFT_FUZZ_SEED` and `WEFT_FUZZ_RUNS` choose others.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use weft_fuzz::mutate::{Random, change};
use weft_fuzz::{TARGETS, Target};

/// Changed inputs a target: all targets together take a few seconds.
const RUNS: u64 = 3_000;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Every kept input, by file name.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut inputs: Vec<_> = entries
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read(&path).unwrap())
        })
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    inputs
}

fn attempt(target: Target, input: &[u8], how: impl FnOnce() -> String) {
    if catch_unwind(AssertUnwindSafe(|| target(input))).is_err() {
        let file = std::env::temp_dir().join("weft-fuzz-input");
        std::fs::write(&file, input).unwrap();
        panic!("{}; the input is {}", how(), file.display());
    }
}

#[test]
fn kept_inputs_and_changes_to_them_do_no_harm() {
    let seed = setting("WEFT_FUZZ_SEED", 1);
    let runs = setting("WEFT_FUZZ_RUNS", RUNS);
    for (name, target, length_max) in TARGETS {
        let inputs = corpus(name);
        for (file, input) in &inputs {
            attempt(*target, input, || format!("corpus/{name}/{file}"));
        }
        let mut random = Random::new(seed);
        for run in 0..runs {
            let input = &inputs[random.below(inputs.len())].1;
            let other = &inputs[random.below(inputs.len())].1;
            let changed = change(&mut random, input, other, *length_max);
            attempt(*target, &changed, || {
                format!(
                    "{name}, change {run}: rerun with WEFT_FUZZ_SEED={seed} WEFT_FUZZ_RUNS={} \
                     cargo test -p weft-fuzz",
                    run + 1
                )
            });
        }
    }
}

#[test]
fn every_corpus_has_its_target() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(
            TARGETS
                .iter()
                .any(|(known, _, _)| *known == name.to_str().unwrap()),
            "{name:?}"
        );
    }
    let manifest = include_str!("../Cargo.toml");
    for (name, _, _) in TARGETS {
        assert!(
            manifest.contains(&format!("name = \"{name}\"")),
            "{name} has no libFuzzer entrance"
        );
    }
}
