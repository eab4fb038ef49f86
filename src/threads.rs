//! Parallel execution, and results of threads: a panic in one continues in the thread that waits
//! for it.

use std::panic::resume_unwind;
use std::thread;

/// The result of a joined thread.
pub fn joined<T>(ended: thread::Result<T>) -> T {
    ended.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Runs both in parallel, the second in a new thread.
pub fn side_by_side<A, B: Send>(
    first: impl FnOnce() -> A,
    second: impl FnOnce() -> B + Send,
) -> (A, B) {
    thread::scope(|scope| {
        let second = scope.spawn(second);
        (first(), joined(second.join()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_done_when_it_returns() {
        let (sender, receiver) = std::sync::mpsc::channel();
        // Each waits for the other.
        let (first, second) = side_by_side(|| receiver.recv().unwrap(), || sender.send(7));
        assert_eq!((first, second), (7, Ok(())));
    }

    #[test]
    #[should_panic(expected = "in the thread")]
    fn a_panic_is_not_lost() {
        side_by_side(|| (), || panic!("in the thread"));
    }
}
