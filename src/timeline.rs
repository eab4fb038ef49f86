//! The start and end of a run's steps: lines of the log from which a timeline can be drawn.
//!
//! `HYPER2KVM_LOG=hyper2kvm::timeline=debug` shows them: milliseconds since the start of the
//! program, from and to, and the step. Steps of several threads run in parallel.

use std::sync::LazyLock;
use std::time::Instant;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Starts the clock.
pub fn begin() {
    LazyLock::force(&START);
}

/// A step that lasts until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Span {
    name: String,
    from: f64,
}

/// Starts a step.
pub fn span(name: impl Into<String>) -> Span {
    Span {
        from: now(),
        name: name.into(),
    }
}

fn now() -> f64 {
    START.elapsed().as_secs_f64() * 1000.0
}

impl Drop for Span {
    fn drop(&mut self) {
        tracing::debug!("{:.1} {:.1} {}", self.from, now(), self.name);
    }
}
