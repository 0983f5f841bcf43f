//! Who wants to know of changes under which prefix.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::watch;

/// Keys that changed and were not looked at since; each once, so no more than there are keys. One that ends with `/`
/// stands for all keys that begin so.
#[derive(Debug, Default)]
pub struct ChangedKeys {
    keys: Mutex<BTreeSet<String>>,
}

impl ChangedKeys {
    /// All of them; from now on only later ones are here.
    #[must_use]
    pub fn take(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.keys.lock().expect("changed keys"))
    }

    /// Has them looked at again.
    pub fn add(&self, keys: impl Iterator<Item = String>) {
        self.keys.lock().expect("changed keys").extend(keys);
    }
}

/// See the module. Counts changes; what they were is for the receiver to look up, so none can be lost.
#[derive(Debug, Default)]
pub(crate) struct Watchers {
    all: Mutex<Vec<(String, watch::Sender<u64>)>>,
    collected: Mutex<Vec<(String, Weak<ChangedKeys>)>>,
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

    /// Collects the keys under `prefix` that change from now on.
    pub fn collect(&self, prefix: &str) -> Arc<ChangedKeys> {
        let keys = Arc::new(ChangedKeys::default());
        let mut all = self.collected.lock().expect("watchers");
        all.retain(|(_, keys)| keys.strong_count() > 0);
        all.push((prefix.to_owned(), Arc::downgrade(&keys)));
        keys
    }

    /// Tells those who watch any of `keys`, each once.
    pub fn changed(&self, keys: &[&str]) {
        for (prefix, collected) in self.collected.lock().expect("watchers").iter() {
            if let Some(collected) = collected.upgrade() {
                let under = keys.iter().filter(|key| key.starts_with(prefix.as_str()));
                collected.add(under.map(|key| (*key).to_owned()));
            }
        }
        for (prefix, sender) in self.all.lock().expect("watchers").iter() {
            if keys.iter().any(|key| key.starts_with(prefix.as_str())) {
                sender.send_modify(|count| *count += 1);
            }
        }
    }
}
