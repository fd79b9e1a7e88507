//! Processes as `/proc` shows them. proc(5)

use std::fs;

use rustix::process::{Pid, Signal, kill_process};

/// Kills a process as an administrator would, with no warning.
pub fn kill(pid: &str) {
    let pid = pid.trim().parse().ok().and_then(Pid::from_raw);
    // One that has ended already is what was wanted.
    pid.map(|pid| kill_process(pid, Signal::KILL));
}

/// A field of `/proc/PID/status`, or of one of its threads (`PID/task/TID`).
///
/// # Panics
/// Where there is no such process or field.
pub fn status(pid: &str, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_else(|e| panic!("process {pid}: {e}"));
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in\n{text}")).trim().to_owned()
}

/// The threads of a process, as names for [`status`].
///
/// # Panics
/// Where there is no such process.
pub fn threads(pid: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap_or_else(|e| panic!("process {pid}: {e}"));
    tasks.flatten().map(|task| format!("{pid}/task/{}", task.file_name().to_string_lossy())).collect()
}

/// The words of its command line.
///
/// # Panics
/// Where there is no such process.
pub fn command_line(pid: &str) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_else(|e| panic!("process {pid}: {e}"));
    let words = bytes.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    words.filter(|word| !word.is_empty()).collect()
}
