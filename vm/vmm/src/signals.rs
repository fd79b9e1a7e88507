//! Signals that ask the process to end, as notes; and one that would end it without asking.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use vmm_sys_util::signal::register_signal_handler;

use crate::event::Event;

/// SIGHUP, SIGINT, SIGQUIT, SIGTERM.
const ENDING: [i32; 4] = [1, 2, 3, 15];

static CAUGHT: AtomicI32 = AtomicI32::new(0);
static BELL: OnceLock<Event> = OnceLock::new();

extern "C" fn handle(number: i32, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    CAUGHT.store(number, Ordering::SeqCst);
    if let Some(bell) = BELL.get() {
        bell.set();
    }
}

/// Does nothing: the write that raised SIGXFSZ fails with EFBIG, and the disk's error policy decides.
extern "C" fn file_too_large(_number: i32, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {}

/// Catches the signals. The event is set when one has arrived; [`caught`] says which. A disk image that reaches a limit of
/// file sizes fails a write from now on, where it ended the machine.
pub fn catch() -> io::Result<&'static Event> {
    let event = Event::new()?;
    let bell = BELL.get_or_init(|| event);
    for number in ENDING {
        register_signal_handler(number, handle).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    }
    register_signal_handler(libc::SIGXFSZ, file_too_large).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    Ok(bell)
}

/// Takes the signal that has arrived, if any.
pub fn caught() -> Option<i32> {
    if let Some(bell) = BELL.get() {
        bell.clear();
    }
    match CAUGHT.swap(0, Ordering::SeqCst) {
        0 => None,
        number => Some(number),
    }
}
