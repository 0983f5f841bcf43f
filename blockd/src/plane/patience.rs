//! How long a plane looks for news before it sleeps.
//!
//! A sleep costs more than the system call: the core goes idle, and waking it takes tens of microseconds, longest in a
//! virtual machine. At depth 1 a guest pays for that twice in every request. Looking a little longer is worth it
//! exactly while news keep coming soon; so the time spent looking grows with every short sleep and shrinks with every
//! long one, down to nothing: an idle daemon uses no CPU. (The idea is that of the kernel's `haltpoll` governor.)

use std::time::Duration;

/// Decides how long to look; told how long each sleep was.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    most: Duration,
    budget: Duration,
}

/// The first budget is the most divided by this, and nothing smaller is kept.
const STEPS: u32 = 8;

impl Patience {
    /// Looks for at most `most`; zero never looks.
    pub fn new(most: Duration) -> Patience {
        Patience {
            most,
            budget: Duration::ZERO,
        }
    }

    /// How long to look before the next sleep.
    pub fn budget(&self) -> Duration {
        self.budget
    }

    /// A sleep ended after `length`: had looking gone on, up to `most`, would it have seen the news?
    pub fn slept(&mut self, length: Duration) {
        let least = self.most / STEPS;
        self.budget = if length <= self.most {
            (self.budget * 2).clamp(least, self.most)
        } else if self.budget > least {
            self.budget / 2
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(80);

    fn after(sleeps: &[u64]) -> u128 {
        let mut patience = Patience::new(MOST);
        for microseconds in sleeps {
            patience.slept(Duration::from_micros(*microseconds));
        }
        patience.budget().as_micros()
    }

    #[test]
    fn short_sleeps_make_it_look_up_to_its_bound() {
        assert_eq!(after(&[]), 0);
        assert_eq!(after(&[50]), 10);
        assert_eq!(after(&[50, 50]), 20);
        assert_eq!(after(&[50; 20]), 80);
    }

    #[test]
    fn long_sleeps_end_the_looking() {
        assert_eq!(after(&[50, 50, 50, 50, 1000]), 40);
        assert_eq!(after(&[50, 50, 50, 50, 1000, 1000, 1000, 1000]), 0);
        assert_eq!(after(&[1000; 5]), 0);
    }

    #[test]
    fn nothing_makes_it_look_when_it_must_not() {
        let mut patience = Patience::new(Duration::ZERO);
        patience.slept(Duration::ZERO);
        assert_eq!(patience.budget(), Duration::ZERO);
    }
}
