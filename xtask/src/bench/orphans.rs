//! Processes whose parent has left them: adopted and reaped at once.
//!
//! libvirtd leaves QEMU to the first process of the system and waits until it is gone altogether. Where that process reaps
//! slowly, as in many containers, a destroy would measure it rather than libvirtd.

use std::collections::HashSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use rustix::process::{Pid, WaitOptions};

/// Between two looks; well below anything that is measured in milliseconds.
const LOOK: Duration = Duration::from_millis(1);

/// While it lives, orphans of our descendants come to us and are reaped; our own children are left alone.
pub struct Orphans {
    done: Arc<AtomicBool>,
    reaper: Option<JoinHandle<()>>,
}

impl Orphans {
    pub fn adopt() -> Result<Orphans> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let done = Arc::new(AtomicBool::new(false));
        let until = done.clone();
        let reaper = std::thread::spawn(move || {
            // A guest is named after its program; nothing else that is started here is.
            let mut guests = HashSet::new();
            while !until.load(Ordering::Relaxed) {
                guests.extend(children().into_iter().filter(|pid| is_guest(*pid)));
                guests.retain(|pid| matches!(rustix::process::waitpid(Some(*pid), WaitOptions::NOHANG), Ok(None)));
                std::thread::sleep(LOOK);
            }
        });
        Ok(Orphans { done, reaper: Some(reaper) })
    }
}

impl Drop for Orphans {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(reaper) = self.reaper.take() {
            // A reaper that panicked has nothing more to say.
            let _ = reaper.join();
        }
    }
}

/// Children of any of our threads: an orphan goes to the one that adopts.
fn children() -> Vec<Pid> {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let numbers: Vec<i32> =
        lists.flat_map(|list| list.split_whitespace().filter_map(|n| n.parse().ok()).collect::<Vec<_>>()).collect();
    numbers.into_iter().filter_map(Pid::from_raw).collect()
}

fn is_guest(pid: Pid) -> bool {
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
    name.starts_with("qemu-system")
}
