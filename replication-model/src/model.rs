//! The world as stateright sees it: which things may happen next, and what must hold in every state.

use stateright::{Model, Property};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::setup::{Ask, Setup};
use crate::world::{SHARD, State, answer_in_words, in_words};

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The guest of a life asks.
    Ask(usize, Ask),
    /// A message of a life reaches a disk.
    Deliver(usize, usize),
    /// A message of a broken link reaches its disk.
    DeliverLate(usize, usize),
    /// An answer reaches a life from a disk.
    Answer(usize, usize),
    /// The control store works on a change that a life asked for.
    Decide(usize),
    /// Its word reaches the life.
    Hear(usize),
    /// Its word is lost.
    LoseWord(usize),
    /// A writer's process dies.
    KillWriter(usize),
    /// The VDI is opened elsewhere, or again.
    TakeOver,
    /// Somebody who is going to open it reads the record already.
    ReadEarly,
    /// A disk's process dies and starts again.
    RestartDisk(usize),
    /// A link breaks.
    Cut(usize, usize),
    /// It is mended.
    Connect(usize, usize),
    /// Much time passes, and a writer notices.
    Tick(usize),
    /// Some time passes for everybody.
    Pass,
    /// Power is lost everywhere; of what was not stable this many eighths survive, on disk 0 and on the others.
    BlackOut(u8, u8),
    /// Power is lost at one disk.
    BlackOutDisk(usize),
    /// The first replica is to be replaced.
    Replace(usize),
}

/// A scenario to search.
#[derive(Clone, Copy, Debug)]
pub struct World {
    /// What it is.
    pub setup: Setup,
    /// Of how many states one is healed, to see whether it comes to rest. A power of two.
    pub heal_one_of: u64,
}

/// An assertion that fails is a promise that is broken.
fn guarded(state: &mut State, what: impl FnOnce(&mut State)) {
    let result = catch_unwind(AssertUnwindSafe(|| what(state)));
    if let Err(panic) = result {
        let said = panic.downcast_ref::<String>().cloned();
        let said = said.or_else(|| panic.downcast_ref::<&str>().map(|said| (*said).to_owned()));
        state.fail(format!("an assertion fails: {}", said.unwrap_or_default()));
    }
}

impl World {
    fn apply(&self, state: &mut State, action: Action) {
        match action {
            Action::Ask(life, ask) => state.ask(life, ask),
            Action::Deliver(life, disk) => state.deliver(life, disk),
            Action::DeliverLate(life, disk) => state.deliver_late(life, disk),
            Action::Answer(life, disk) => state.answer(life, disk),
            Action::Decide(life) => state.decide(life),
            Action::Hear(life) => state.hear(life),
            Action::LoseWord(life) => {
                state.budget.lost_words -= 1;
                state.lose_word(life);
            }
            Action::KillWriter(life) => {
                state.budget.writer_kills -= 1;
                state.kill_writer(life);
            }
            Action::TakeOver => {
                if state.lives[state.newest()].writer.is_some() {
                    state.budget.take_overs -= 1;
                }
                state.begin_life();
            }
            Action::ReadEarly => state.read_early = Some(state.control.record.clone()),
            Action::RestartDisk(disk) => {
                state.budget.disk_kills -= 1;
                state.restart_disk(disk, None);
            }
            Action::Cut(life, disk) => {
                state.budget.cuts -= 1;
                state.cut(&self.setup, life, disk);
            }
            Action::Connect(life, disk) => state.connect(life, disk),
            Action::Tick(life) => {
                state.budget.ticks -= 1;
                state.tick(life);
            }
            Action::Pass => {
                state.budget.passes -= 1;
                state.pass();
            }
            Action::BlackOut(first, others) => {
                state.budget.blackouts -= 1;
                let unstable = state.disks.iter().map(|disk| disk.store().unstable());
                let kept = |(disk, changes): (usize, usize)| {
                    let eighths = if disk == 0 { first } else { others };
                    (changes * usize::from(eighths)).div_ceil(8)
                };
                let kept: Vec<usize> = unstable.enumerate().map(kept).collect();
                state.black_out(&kept);
            }
            Action::BlackOutDisk(disk) => {
                state.budget.disk_blackouts -= 1;
                state.hurt = Some(disk);
                state.restart_disk(disk, Some(0));
            }
            Action::Replace(life) => {
                state.budget.replaces -= 1;
                state.replace(life);
            }
        }
        if state.hurt.is_some() && state.is_whole() {
            state.hurt = None;
        }
    }

    /// The same, with an assertion that fails as a promise that is broken.
    pub fn step(&self, state: &mut State, action: Action) {
        guarded(state, |state| self.apply(state, action));
    }

    fn faults(&self, state: &State, actions: &mut Vec<Action>) {
        let budget = state.budget;
        let newest = state.newest();
        let alive = |life: &usize| state.lives[*life].writer.is_some();
        let is_hurt = state.hurt.is_some();
        if budget.writer_kills > 0 {
            actions.extend((0..=newest).filter(alive).map(Action::KillWriter));
        }
        let may_take_over = budget.take_overs > 0 || !alive(&newest);
        if state.lives.len() < self.setup.scripts.len() && may_take_over {
            if self.setup.rules.read_after_swap || state.read_early.is_some() {
                actions.push(Action::TakeOver);
            } else {
                actions.push(Action::ReadEarly);
            }
        }
        // One host may be lost at a time: while one has lost what was complete, nothing happens to the others.
        if budget.disk_kills > 0 && !is_hurt {
            actions.extend((0..state.disks.len()).map(Action::RestartDisk));
        }
        for life in (0..=newest).filter(alive) {
            for disk in 0..state.disks.len() {
                let link = state.link_of(life, disk);
                if self.setup.is_apart && life > 0 && disk == 0 {
                    continue;
                }
                if !link.is_up {
                    actions.push(Action::Connect(life, disk));
                } else if budget.cuts > 0 && !is_hurt {
                    actions.push(Action::Cut(life, disk));
                }
            }
            if budget.ticks > 0 && !is_hurt && state.is_waiting(life) {
                actions.push(Action::Tick(life));
            }
            if budget.lost_words > 0 && !state.lives[life].saved.is_empty() {
                actions.push(Action::LoseWord(life));
            }
        }
        if budget.passes > 0 {
            actions.push(Action::Pass);
        }
        if budget.replaces > 0 && alive(&newest) {
            actions.push(Action::Replace(newest));
        }
        if budget.blackouts > 0 {
            let unstable = |disks: &[_]| {
                disks
                    .iter()
                    .map(|disk: &usize| state.disks[*disk].store().unstable())
                    .max()
            };
            let others: Vec<usize> = (1..state.disks.len()).collect();
            let choices = |disks: &[usize]| match unstable(disks) {
                None | Some(0) => &[0][..],
                Some(1) => &[0, 8][..],
                Some(_) => &[0, 4, 8][..],
            };
            for first in choices(&[0]) {
                actions.extend(
                    choices(&others)
                        .iter()
                        .map(|others| Action::BlackOut(*first, *others)),
                );
            }
        }
        if budget.disk_blackouts > 0 && !is_hurt && state.is_whole() && (0..newest).all(|life| !alive(&life))
        {
            actions.extend((0..state.disks.len()).map(Action::BlackOutDisk));
        }
    }

    /// Says one step in words.
    #[must_use]
    pub fn describe(&self, state: &State, action: Action) -> String {
        match action {
            Action::Deliver(life, disk) => {
                let message = &state.link_of(life, disk).to[0];
                format!("life {life} to disk {disk}: {}", in_words(&message.request))
            }
            Action::DeliverLate(life, disk) => {
                let message = &state.link_of(life, disk).late[0];
                format!("life {life} to disk {disk}, late: {}", in_words(&message.request))
            }
            Action::Answer(life, disk) => {
                let answer = &state.link_of(life, disk).from[0];
                format!("disk {disk} to life {life}: {}", answer_in_words(&answer.result))
            }
            Action::Decide(life) => {
                let record = &state.lives[life].saves[0];
                format!(
                    "life {life} asks control for epoch {}, in sync {:?}",
                    record.epoch, record.in_sync
                )
            }
            Action::Hear(life) => {
                let record = &state.lives[life].saved[0];
                format!(
                    "control to life {life}: epoch {}, in sync {:?}",
                    record.epoch, record.in_sync
                )
            }
            other => format!("{other:?}"),
        }
    }
}

impl Model for World {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut state = State::new(&self.setup);
        if self.setup.is_warm {
            // Nothing but what is under way happens until there is nothing more.
            let ask = self.setup.scripts[0][0];
            self.settle(&mut state, |state| {
                (state.next_ask(&self.setup, 0) == Some(ask) && state.is_idle(0) && !state.has_asked(0))
                    .then_some(ask)
            });
        }
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.broken.is_some() {
            return;
        }
        self.progress(state, actions);
        self.faults(state, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.step(&mut state, action);
        Some(state)
    }

    fn properties(&self) -> Vec<Property<World>> {
        vec![
            Property::always("no promise is broken", |_, state: &State| state.broken.is_none()),
            Property::always(
                "when faults end, all comes to rest",
                |world: &World, state: &State| state.broken.is_some() || world.heals(state).is_ok(),
            ),
            Property::sometimes(
                "the last life's script is done",
                |world: &World, state: &State| {
                    let last = world.setup.scripts.len() - 1;
                    state.newest() == last && state.has_done(&world.setup, last)
                },
            ),
        ]
    }
}

impl World {
    /// What goes on by itself.
    pub fn progress(&self, state: &State, actions: &mut Vec<Action>) {
        for life in 0..state.lives.len() {
            for disk in 0..state.disks.len() {
                let link = state.link_of(life, disk);
                if !link.to.is_empty() {
                    actions.push(Action::Deliver(life, disk));
                }
                if !link.late.is_empty() {
                    actions.push(Action::DeliverLate(life, disk));
                }
                if !link.from.is_empty() {
                    actions.push(Action::Answer(life, disk));
                }
            }
            if !state.lives[life].saves.is_empty() {
                actions.push(Action::Decide(life));
            }
            if !state.lives[life].saved.is_empty() {
                actions.push(Action::Hear(life));
            }
            if let Some(ask) = state.next_ask(&self.setup, life) {
                actions.push(Action::Ask(life, ask));
            }
        }
    }

    /// Lets everything under way arrive, in turn, until nothing is; `ask` may have the guest of life 0 ask meanwhile.
    fn settle(&self, state: &mut State, ask: impl Fn(&State) -> Option<Ask>) {
        let mut actions = Vec::new();
        loop {
            actions.clear();
            self.progress(state, &mut actions);
            actions.retain(|action| !matches!(action, Action::Ask(..)));
            actions.extend(ask(state).map(|ask| Action::Ask(0, ask)));
            if actions.is_empty() || state.broken.is_some() {
                return;
            }
            self.step(state, actions[0]);
        }
    }

    /// Ends all faults in a copy of the state: everything that was asked for is answered, the replicas are in sync and
    /// equal, and a last read of each block tells the truth. Only for one state of so many.
    pub fn heals(&self, state: &State) -> Result<(), Arc<str>> {
        if !state.is_chosen(self.heal_one_of) {
            return Ok(());
        }
        let mut state = state.clone();
        guarded(&mut state, |state| self.heal(state));
        match state.broken {
            None => Ok(()),
            Some(why) => Err(why),
        }
    }

    fn heal(&self, state: &mut State) {
        state.hurt = None;
        if state.lives[state.newest()].writer.is_none() {
            state.begin_life();
        }
        let newest = state.newest();
        for round in 0.. {
            for disk in 0..state.disks.len() {
                if !state.link_of(newest, disk).is_up {
                    self.step(state, Action::Connect(newest, disk));
                }
            }
            self.settle(state, |_| None);
            if state.broken.is_some() {
                return;
            }
            if state.is_idle(newest) && state.is_whole() {
                break;
            }
            if round == 20 {
                let writer = state.lives[newest].writer.as_ref().map(|writer| writer.status());
                state.fail(format!(
                    "does not come to rest: {writer:?}, {:?}",
                    state.control.record
                ));
                return;
            }
            state.tick(newest);
        }
        state.compare(SHARD);
        for block in state.blocks() {
            state.ask_last(newest, block);
            self.settle(state, |_| None);
        }
        if state.broken.is_none() && !state.is_idle(newest) {
            state.fail("a read of the healed shard is not answered");
        }
    }
}
