//! Clocks and links: the other two ways in which the world reaches a core.

use types::Instant;

/// Time, read once per turn of a loop and handed to the cores as an argument.
pub trait Clock {
    /// Now; never earlier than what an earlier call returned.
    fn now(&self) -> Instant;
}

/// Messages between nodes of type `N` in submit and poll form.
///
/// An implementor owes: messages between one pair of nodes arrive in the order sent or not at all; a message is
/// delivered at most once. It does not owe delivery. It may assume messages are bounded in size by their sender.
pub trait Network<N, M> {
    /// Sends `message`; never waits.
    fn send(&mut self, from: N, to: N, message: M);

    /// Appends what has arrived: sender, receiver, message.
    fn poll(&mut self, arrived: &mut Vec<(N, N, M)>);
}
