//! How far a long command is: qemu-img's `(NN.NN/100%)`, a bar on a terminal under the tool's own name, or a line on
//! SIGUSR1. Also the limit of a rate, which is kept by waiting where progress is told.

use std::ffi::{c_int, c_void};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::getopt::Parsed;
use crate::output::{self, say, say_line};

/// Least change that is worth a new line, in percent.
const STEP: f64 = 1.0;
/// Width of the bar in characters.
const BAR: usize = 40;

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    ASKED.store(true, Ordering::Relaxed);
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// On SIGUSR1 only.
    Asked,
    /// As qemu-img.
    Percent,
    /// A bar for people.
    Bar,
}

/// Tells of one command.
pub struct Progress {
    style: Style,
    started: Instant,
    rate_bytes: Option<u64>,
    shown: Mutex<f64>,
}

impl Progress {
    /// As `-p` and `-q` say. `rate_bytes` is bytes in a second.
    pub fn of(parsed: &Parsed, rate_bytes: Option<u64>) -> Progress {
        let style = match (parsed.has("progress") && !parsed.has("quiet"), crate::program()) {
            (false, _) => Style::Asked,
            _ if output::is_gathering() => Style::Asked,
            (true, "vireo-img") if std::io::stdout().is_terminal() => Style::Bar,
            (true, _) => Style::Percent,
        };
        if style == Style::Asked {
            // Without the handler the signal ends the process, which is what a tool without progress does anyway.
            let _ = vmm_sys_util::signal::register_signal_handler(libc::SIGUSR1, on_signal);
        }
        let progress = Progress { style, started: Instant::now(), rate_bytes, shown: Mutex::new(f64::MIN) };
        progress.show(0.0);
        progress
    }

    /// Called from any thread: bytes done and bytes in all.
    pub fn report(&self, done: u64, total: u64) {
        let percent = if total == 0 { 100.0 } else { done as f64 * 100.0 / total as f64 };
        self.show(percent.min(100.0));
        let Some(rate) = self.rate_bytes.filter(|rate| *rate > 0) else { return };
        let due = Duration::from_secs_f64(done as f64 / rate as f64);
        if let Some(ahead) = due.checked_sub(self.started.elapsed()) {
            std::thread::sleep(ahead);
        }
    }

    /// The command is done.
    pub fn end(&self) {
        self.show(100.0);
        if self.style != Style::Asked {
            say_line("");
        }
    }

    fn show(&self, percent: f64) {
        if self.style == Style::Asked {
            if ASKED.swap(false, Ordering::Relaxed) {
                eprintln!("    ({percent:.2}/100%)");
            }
            return;
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if percent - *shown <= STEP && percent < 100.0 {
            return;
        }
        *shown = percent;
        let text = match self.style {
            Style::Bar => {
                let full = (percent / 100.0 * BAR as f64) as usize;
                format!("\r[{}{}] {percent:5.1} %", "#".repeat(full), "-".repeat(BAR - full.min(BAR)))
            }
            _ => format!("    ({percent:.2}/100%)\r"),
        };
        say(text);
        output::flush();
    }
}
