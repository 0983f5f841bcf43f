//! Callers that have not said who they are: so many and no more, and none of them can keep others out.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::Links;

/// Callers that are being greeted at once. One more than that ends the greeting of another.
const CALLERS_MAX: usize = 64;

/// Who is being greeted.
#[derive(Default)]
pub(super) struct Callers {
    /// Oldest first; dropping what comes with an address ends the greeting.
    greeting: BTreeMap<u64, (IpAddr, oneshot::Sender<()>)>,
    begun: u64,
}

impl Callers {
    /// Takes one in: its number, and what it must wait for beside its caller.
    pub fn add(&mut self, address: IpAddr) -> (u64, oneshot::Receiver<()>) {
        if let Some(silent) = self.most_silent() {
            self.greeting.remove(&silent);
        }
        self.begun += 1;
        let (place, let_go) = oneshot::channel();
        self.greeting.insert(self.begun, (address, place));
        (self.begun, let_go)
    }

    /// Whom to let go so that there is room for one more: the longest there of the address with most callers. Who calls and
    /// says nothing takes turns from its own address, not from those who greet at once.
    fn most_silent(&self) -> Option<u64> {
        if self.greeting.len() < CALLERS_MAX {
            return None;
        }
        let mut count = BTreeMap::<IpAddr, usize>::new();
        for (address, _) in self.greeting.values() {
            *count.entry(*address).or_default() += 1;
        }
        let most = count.values().copied().max()?;
        let mut oldest_first = self.greeting.iter();
        let silent = oldest_first.find(|(_, (address, _))| count[address] == most);
        silent.map(|(number, _)| *number)
    }
}

/// A caller's place among those that are being greeted, until it is greeted or gone.
pub(super) struct Place {
    pub links: Arc<Links>,
    pub number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.links
            .callers
            .lock()
            .expect("callers")
            .greeting
            .remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_takes_most_places_gives_one_up() {
        let mut callers = Callers::default();
        let (one, many) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let (first, mut stays) = callers.add(one);
        let mut let_go: Vec<_> = (1..CALLERS_MAX).map(|_| callers.add(many).1).collect();
        let ended = |receiver: &mut oneshot::Receiver<()>| {
            receiver.try_recv() == Err(oneshot::error::TryRecvError::Closed)
        };
        assert!(!let_go.iter_mut().any(ended));
        // Whoever comes: the oldest of the many goes, and none else.
        let (second, _also) = callers.add(one);
        let (_, _again) = callers.add(many);
        let gone: Vec<bool> = let_go.iter_mut().map(ended).collect();
        assert_eq!(gone.iter().filter(|gone| **gone).count(), 2);
        assert!(gone[0] && gone[1] && !ended(&mut stays));
        assert_eq!(callers.greeting.len(), CALLERS_MAX);
        // Where all have as many, the oldest goes.
        callers
            .greeting
            .retain(|number, _| [first, second].contains(number));
        for host in 3..=64u8 {
            let _ = callers.add(IpAddr::from([10, 0, 0, host]));
        }
        callers.greeting.remove(&second);
        let _ = callers.add(IpAddr::from([10, 0, 0, 65]));
        assert!(!ended(&mut stays));
        let _ = callers.add(IpAddr::from([10, 0, 0, 66]));
        assert!(ended(&mut stays));
    }
}
