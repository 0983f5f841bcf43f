//! What the demo shows: what is done, when, what was seen, and what the guest felt of it.

use std::time::{Duration, Instant};

use super::guest::Seen;

/// The story as it is told, line by line, and the table at its end.
pub struct Report {
    began: Instant,
    step: Instant,
    felt: Vec<(String, Seen)>,
    facts: Vec<(String, String)>,
}

impl Report {
    /// The clock starts.
    pub fn begin() -> Report {
        let now = Instant::now();
        Report {
            began: now,
            step: now,
            felt: Vec::new(),
            facts: Vec::new(),
        }
    }

    /// Says what is done next.
    pub fn step(&mut self, what: &str) {
        println!("\n{:>6}  {what}", clock(self.began.elapsed()));
        self.step = Instant::now();
    }

    /// Says what was seen, with the time since the step began.
    pub fn seen(&self, what: &str) {
        println!("        {:>5.1} s: {what}", self.step.elapsed().as_secs_f64());
    }

    /// Notes what the guest felt of something.
    pub fn felt(&mut self, what: &str, seen: Seen) {
        self.seen(&format!(
            "guest: {} writes, {} blocks read again and right; longest wait {} ms",
            seen.writes,
            seen.verified,
            seen.longest.as_millis()
        ));
        self.felt.push((what.to_owned(), seen));
    }

    /// Notes a figure for the end.
    pub fn fact(&mut self, what: &str, value: String) {
        self.facts.push((what.to_owned(), value));
    }

    /// Prints what it all came to.
    pub fn print(&self) {
        println!(
            "\n{:<62} {:>7} {:>10} {:>9}",
            "What the guest felt", "writes", "blocks", "longest"
        );
        println!("{:<62} {:>7} {:>10} {:>9}", "", "", "verified", "wait");
        let mut all = Seen::default();
        for (what, seen) in &self.felt {
            line(what, *seen);
            all.writes += seen.writes;
            all.verified += seen.verified;
            all.longest = all.longest.max(seen.longest);
        }
        line("in all", all);
        println!();
        for (what, value) in &self.facts {
            println!("  {value:>12}  {what}");
        }
        println!(
            "\nNothing that was completed is lost, no block was wrong. {} in all.",
            clock(self.began.elapsed())
        );
    }
}

fn line(what: &str, seen: Seen) {
    println!(
        "  {what:<60} {:>7} {:>10} {:>6} ms",
        seen.writes,
        seen.verified,
        seen.longest.as_millis()
    );
}

fn clock(time: Duration) -> String {
    format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60)
}
