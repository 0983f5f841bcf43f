//! A part of a state, shared with the states before and after it that have the same.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// A step changes few parts of the world: the others are neither copied nor hashed again.
pub struct Sealed<T> {
    digest: u64,
    part: Arc<T>,
}

impl<T: Clone + Hash> Sealed<T> {
    /// Seals it.
    pub fn new(part: T) -> Sealed<T> {
        Sealed {
            digest: digest(&part),
            part: Arc::new(part),
        }
    }

    /// Changes a copy of it, or itself if nobody shares it.
    pub fn change<R>(&mut self, how: impl FnOnce(&mut T) -> R) -> R {
        let part = Arc::make_mut(&mut self.part);
        let result = how(part);
        self.digest = digest(part);
        result
    }
}

fn digest<T: Hash>(part: &T) -> u64 {
    let mut hasher = DefaultHasher::new();
    part.hash(&mut hasher);
    hasher.finish()
}

impl<T> Clone for Sealed<T> {
    fn clone(&self) -> Sealed<T> {
        Sealed {
            digest: self.digest,
            part: Arc::clone(&self.part),
        }
    }
}

impl<T> Deref for Sealed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.part
    }
}

impl<T> Hash for Sealed<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.digest);
    }
}

impl<T> PartialEq for Sealed<T> {
    fn eq(&self, other: &Sealed<T>) -> bool {
        self.digest == other.digest
    }
}

impl<T: fmt::Debug> fmt::Debug for Sealed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.part.fmt(f)
    }
}
