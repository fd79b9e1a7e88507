//! Power events on their way from devices to whoever owns the lifecycle.

use std::sync::OnceLock;

use hv_core::{Lifecycle, PowerEvent};
use parking_lot::Mutex;

/// Keeps the first power event until it is taken, and tells one listener.
#[derive(Default)]
pub struct PowerLatch {
    event: Mutex<Option<PowerEvent>>,
    listener: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl PowerLatch {
    /// Says whom to tell; once. The listener must not block and must not take the event itself.
    pub fn listen(&self, listener: impl Fn() + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
    }
    /// Takes the event that waits.
    pub fn take(&self) -> Option<PowerEvent> {
        self.event.lock().take()
    }
}

impl Lifecycle for PowerLatch {
    fn request(&self, event: PowerEvent) {
        self.event.lock().get_or_insert(event);
        if let Some(listener) = self.listener.get() {
            listener();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_event_wins_until_it_is_taken() {
        let latch = PowerLatch::default();
        latch.request(PowerEvent::PowerOff);
        latch.request(PowerEvent::Reset);
        assert_eq!((latch.take(), latch.take()), (Some(PowerEvent::PowerOff), None));
        latch.request(PowerEvent::Reset);
        assert_eq!(latch.take(), Some(PowerEvent::Reset));
    }
}
