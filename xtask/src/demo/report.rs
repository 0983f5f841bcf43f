//! What the demo did, step by step with times, and what it measured.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Steps done and figures found.
#[derive(Default)]
pub struct Report {
    steps: Vec<(String, Duration)>,
    figures: Vec<(String, String)>,
}

impl Report {
    /// Does `action` and notes how long it took; an error names the step.
    pub fn step<T>(&mut self, what: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("== {what}");
        let start = Instant::now();
        let result = action().with_context(|| format!("demo step: {what}"))?;
        let time = start.elapsed();
        eprintln!("   done in {:.1} s", time.as_secs_f64());
        self.steps.push((what.to_owned(), time));
        Ok(result)
    }

    /// Notes a figure.
    pub fn figure(&mut self, what: &str, value: String) {
        self.figures.push((what.to_owned(), value));
    }

    /// Prints it all.
    pub fn print(&self) {
        println!("\nWeft demo");
        for (what, time) in &self.steps {
            println!("  ok {:>7.1} s  {what}", time.as_secs_f64());
        }
        let total: Duration = self.steps.iter().map(|(_, time)| *time).sum();
        println!("     {:>7.1} s  in all", total.as_secs_f64());
        for (what, value) in &self.figures {
            println!("  {value:>12}  {what}");
        }
    }
}
