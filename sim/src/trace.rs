//! The story of a run, told only when somebody listens: formatting every event costs more than simulating it.

use std::cell::RefCell;
use std::collections::VecDeque;

/// Who listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// Nobody.
    Nobody,
    /// Whoever reads the last lines after a failure.
    LastLines(usize),
    /// Standard output, at once.
    Everything,
}

/// Lines kept for a report are cut to this; printed ones are whole.
const LINE_BYTES_MAX: usize = 160;

thread_local! {
    static LISTENER: RefCell<(Listener, VecDeque<String>)> = const { RefCell::new((Listener::Nobody, VecDeque::new())) };
}

/// Sets the listener of this thread and forgets earlier lines.
pub fn listen(listener: Listener) {
    LISTENER.with_borrow_mut(|state| *state = (listener, VecDeque::new()));
}

/// Adds a line, which is only made if somebody listens.
pub fn tell(line: impl FnOnce() -> String) {
    let listener = LISTENER.with_borrow(|state| state.0);
    match listener {
        Listener::Nobody => {}
        Listener::Everything => println!("{}", line()),
        Listener::LastLines(most) => {
            let mut line = line();
            if line.len() > LINE_BYTES_MAX {
                line.truncate(line.floor_char_boundary(LINE_BYTES_MAX));
                line.push('…');
            }
            LISTENER.with_borrow_mut(|(_, lines)| {
                if lines.len() == most {
                    lines.pop_front();
                }
                lines.push_back(line);
            });
        }
    }
}

/// The last lines told on this thread, oldest first.
#[must_use]
pub fn last_lines() -> Vec<String> {
    LISTENER.with_borrow(|(_, lines)| lines.iter().cloned().collect())
}
