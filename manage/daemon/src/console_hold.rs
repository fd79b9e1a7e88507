//! Keeps the consoles of a run from hanging up before they have been read: a pseudo terminal throws away what nobody has
//! read when its controlling side closes, and that is where a guest says why it stopped.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;

/// The controlling sides of one run's consoles, beside those of its vireo-vmm. Cheap to clone; they close when the last
/// clone goes. A run that was found again after a restart has none: its consoles hang up with their machine.
#[derive(Clone, Debug)]
pub struct ConsoleHold {
    ended: Arc<watch::Sender<bool>>,
    _controllers: Arc<Vec<OwnedFd>>,
}

impl ConsoleHold {
    /// Holds the given descriptors.
    pub fn new(controllers: Vec<OwnedFd>) -> ConsoleHold {
        ConsoleHold { ended: Arc::new(watch::Sender::new(false)), _controllers: Arc::new(controllers) }
    }

    /// The machine has ended: whoever reads a console reads what is left.
    pub fn end(&self) {
        self.ended.send_replace(true);
    }

    /// Resolves when the machine has ended.
    pub async fn ended(&self) {
        // The sender is ours, so the wait cannot fail.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }
}
