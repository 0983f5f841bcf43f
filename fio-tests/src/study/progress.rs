//! Lines on standard error: how far, how fast, how long still.

use std::time::{Duration, Instant};

/// Between two lines.
const PERIOD: Duration = Duration::from_secs(2);

/// Of one phase.
pub struct Progress {
    title: String,
    begin: Instant,
    told: Instant,
    told_done: u64,
}

impl Progress {
    /// Begins now.
    pub fn new(title: &str) -> Progress {
        let now = Instant::now();
        eprintln!("{title}");
        Progress {
            title: title.to_owned(),
            begin: now,
            told: now,
            told_done: 0,
        }
    }

    /// `done` I/Os are done now, and `share` (0 to 1) of the phase; says so every two seconds.
    pub fn tell(&mut self, now: Instant, done: u64, share: f64) {
        let since = now.saturating_duration_since(self.told);
        if since < PERIOD || share <= 0.0 {
            return;
        }
        let rate = (done - self.told_done) as f64 / since.as_secs_f64();
        let left = left(now - self.begin, share);
        let percent = share * 100.0;
        eprintln!(
            "{}: {percent:.0} %, {rate:.0}/s, {} left",
            self.title,
            in_words(left)
        );
        (self.told, self.told_done) = (now, done);
    }
}

/// If it goes on as it went so far.
fn left(elapsed: Duration, share: f64) -> Duration {
    elapsed.mul_f64((1.0 - share).max(0.0) / share)
}

fn in_words(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 {
        format!("{seconds} s")
    } else {
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_the_rate_so_far() {
        assert_eq!(left(Duration::from_secs(10), 0.25), Duration::from_secs(30));
        assert_eq!(left(Duration::from_secs(10), 1.0), Duration::ZERO);
        assert_eq!(in_words(Duration::from_secs(125)), "2 min 05 s");
        assert_eq!(in_words(Duration::from_secs(59)), "59 s");
    }
}
