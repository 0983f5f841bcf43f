//! What a prune may delete, and when. Pure; [`crate::prune`] does it, and docs/backup-format.md argues it.
//!
//! ```text
//!  prune:   delete manifests ─▶ mark what the others need ─▶ write `condemned/K` ─▶ ... ─▶ delete what K names and
//!                                                                             nobody needs ─▶ delete `condemned/K`
//!  create:  begin session ─▶ read all of condemned/ ─▶ say so in the session ─▶ ... ─▶ write the manifest ─▶ end
//! ```
//!
//! A create never relies on an object that it read as condemned: it stores the content again under the next generation.
//! A prune deletes what K names only when every session that is under way has said that it knows K. So whoever could
//! still rely on such an object has ended, and if it made a backup, the prune sees its manifest.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::bytes_in::BytesIn;
use crate::error::Damage;
use crate::object::{Hash, Kind, ObjectRef, SharedObject, hex};

/// Objects that one condemned list names at most.
pub const LIST_MAX: usize = 65_536;
/// Bytes of the longest condemned list.
pub const BYTES_MAX: usize = 16 + 4 + LIST_MAX * 37 + 32;

/// Which condemned list.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListId(pub [u8; 16]);

impl std::fmt::Display for ListId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl std::fmt::Debug for ListId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// A condemned list's bytes; the last 32 are the blake3 of all before.
///
/// # Panics
/// When there are more than [`LIST_MAX`] objects.
#[must_use]
pub fn encode(id: ListId, objects: &[SharedObject]) -> Vec<u8> {
    assert!(objects.len() <= LIST_MAX, "{} objects of a list", objects.len());
    let mut out = Vec::with_capacity(52 + objects.len() * 37);
    out.extend(id.0);
    out.extend((objects.len() as u32).to_le_bytes());
    for object in objects {
        object.put(&mut out);
    }
    let hash = blake3::hash(&out);
    out.extend(hash.as_bytes());
    out
}

/// The objects that a condemned list names.
///
/// # Errors
/// For all that [`encode`] does not write.
pub fn decode(bytes: &[u8], id: ListId) -> Result<Vec<SharedObject>, Damage> {
    let body = bytes.len().checked_sub(32).ok_or(Damage::Short {
        have: bytes.len(),
        wanted: 32,
    })?;
    let (body, hash) = bytes.split_at(body);
    if blake3::hash(body) != *<&[u8; 32]>::try_from(hash).expect("32 bytes") {
        return Err(Damage::Hash);
    }
    let mut input = BytesIn(body);
    if input.array()? != id.0 {
        return Err(Damage::Content("it is another list of condemned objects"));
    }
    let count = input.u32()? as usize;
    let mut objects = Vec::new();
    for _ in 0..count {
        objects.push(SharedObject::take(&mut input)?);
    }
    input.end()?;
    Ok(objects)
}

/// What a create may not rely on: for each content the highest generation that was condemned.
#[derive(Clone, Debug, Default)]
pub struct Suspects(BTreeMap<(Kind, Hash), u32>);

impl Suspects {
    /// Adds what a list names.
    pub fn add(&mut self, objects: &[SharedObject]) {
        for object in objects {
            let of = (object.kind, object.reference.hash);
            let highest = self.0.entry(of).or_insert(object.reference.generation);
            *highest = (*highest).max(object.reference.generation);
        }
    }

    /// Whether nothing is condemned.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this object, or a later generation of it, is condemned.
    #[must_use]
    pub fn contains(&self, object: &SharedObject) -> bool {
        self.0
            .get(&(object.kind, object.reference.hash))
            .is_some_and(|highest| object.reference.generation <= *highest)
    }

    /// Under which reference content is looked for and stored.
    #[must_use]
    pub fn reference(&self, kind: Kind, hash: Hash) -> ObjectRef {
        let generation = match self.0.get(&(kind, hash)) {
            None => 0,
            Some(highest) => highest.saturating_add(1),
        };
        ObjectRef { hash, generation }
    }
}

/// A run that is under way, as a prune sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionSeen {
    /// Its id.
    pub id: String,
    /// Seconds since it last said that it lives, by the storage's clock.
    pub silent_seconds: i64,
    /// Lists that it does not rely on.
    pub knows: BTreeSet<ListId>,
}

/// Sessions that are taken for dead, and for each list those that have to end before its objects may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Silent for longer than a run may be.
    pub dead: Vec<String>,
    /// Lists whose objects may be deleted, if no backup needs them.
    pub ripe: Vec<ListId>,
    /// Sessions that keep other lists waiting.
    pub waiting_for: Vec<String>,
}

/// Which sessions are dead, which lists ripe.
#[must_use]
pub fn judge(sessions: &[SessionSeen], lists: &[ListId], silent_seconds_max: i64) -> Verdict {
    let (dead, alive): (Vec<_>, Vec<_>) = sessions
        .iter()
        .partition(|session| session.silent_seconds > silent_seconds_max);
    let holds = |session: &SessionSeen, list: &ListId| !session.knows.contains(list);
    let waiting_for = alive
        .iter()
        .filter(|session| lists.iter().any(|list| holds(session, list)))
        .map(|session| session.id.clone());
    Verdict {
        dead: dead.into_iter().map(|session| session.id.clone()).collect(),
        ripe: lists
            .iter()
            .copied()
            .filter(|list| !alive.iter().any(|session| holds(session, list)))
            .collect(),
        waiting_for: waiting_for.collect(),
    }
}

/// Of these objects those that no backup needs and no list names yet, in lists of at most [`LIST_MAX`].
#[must_use]
pub fn condemn(
    stored: impl IntoIterator<Item = SharedObject>,
    needed: &HashSet<SharedObject>,
    condemned: &HashSet<SharedObject>,
) -> Vec<Vec<SharedObject>> {
    let mut unneeded: Vec<SharedObject> = stored
        .into_iter()
        .filter(|object| !needed.contains(object) && !condemned.contains(object))
        .collect();
    unneeded.sort_unstable();
    unneeded.chunks(LIST_MAX).map(<[_]>::to_vec).collect()
}

/// What of a ripe list is deleted.
#[must_use]
pub fn doomed(list: &[SharedObject], needed: &HashSet<SharedObject>) -> Vec<SharedObject> {
    list.iter()
        .copied()
        .filter(|object| !needed.contains(object))
        .collect()
}

#[cfg(test)]
#[path = "sweep_tests.rs"]
mod tests;
