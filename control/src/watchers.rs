//! Who wants to know of changes under which prefix.

use std::sync::Mutex;

use tokio::sync::watch;

/// See the module. Counts changes; what they were is for the receiver to look up, so none can be lost.
#[derive(Debug, Default)]
pub(crate) struct Watchers {
    all: Mutex<Vec<(String, watch::Sender<u64>)>>,
}

impl Watchers {
    /// A receiver that hears of every later change under `prefix`.
    pub fn subscribe(&self, prefix: &str) -> watch::Receiver<u64> {
        let (sender, receiver) = watch::channel(0);
        let mut all = self.all.lock().expect("watchers");
        all.retain(|(_, sender)| !sender.is_closed());
        all.push((prefix.to_owned(), sender));
        receiver
    }

    /// Tells those who watch any of `keys`, each once.
    pub fn changed(&self, keys: &[&str]) {
        for (prefix, sender) in self.all.lock().expect("watchers").iter() {
            if keys.iter().any(|key| key.starts_with(prefix.as_str())) {
                sender.send_modify(|count| *count += 1);
            }
        }
    }
}
