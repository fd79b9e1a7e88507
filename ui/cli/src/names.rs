//! What virsh calls states, reasons, events and statistics.

/// A domain's state.
pub fn state(state: i32) -> &'static str {
    match state {
        1 => "running",
        2 => "idle",
        3 => "paused",
        4 => "in shutdown",
        5 => "shut off",
        6 => "crashed",
        7 => "pmsuspended",
        _ => "no state",
    }
}

/// Why it is in that state.
pub fn reason(state: i32, reason: i32) -> &'static str {
    let names: &[&'static str] = match state {
        1 => &[
            "unknown",
            "booted",
            "migrated",
            "restored",
            "from snapshot",
            "unpaused",
            "migration canceled",
            "save canceled",
            "event wakeup",
            "crashed",
            "post-copy",
            "post-copy failed",
        ],
        3 => &[
            "unknown",
            "user",
            "migrating",
            "saving",
            "dumping",
            "I/O error",
            "watchdog",
            "from snapshot",
            "shutting down",
            "creating snapshot",
            "crashed",
            "starting up",
            "post-copy",
            "post-copy failed",
            "api error",
        ],
        4 => &["unknown", "user"],
        5 => &["unknown", "shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from snapshot", "daemon"],
        6 => &["unknown", "panicked"],
        _ => &["unknown"],
    };
    usize::try_from(reason).ok().and_then(|index| names.get(index)).unwrap_or(&"unknown")
}

/// A lifecycle event and its detail.
pub fn lifecycle(event: i32, detail: i32) -> (&'static str, &'static str) {
    let (name, details): (_, &[&'static str]) = match event {
        0 => ("Defined", &["Added", "Updated", "Renamed", "Snapshot"]),
        1 => ("Undefined", &["Removed", "Renamed"]),
        2 => ("Started", &["Booted", "Migrated", "Restored", "Snapshot", "Event wakeup"]),
        3 => (
            "Suspended",
            &[
                "Paused",
                "Migrated",
                "I/O Error",
                "Watchdog",
                "Restored",
                "Snapshot",
                "API error",
                "Post-copy",
                "Post-copy Error",
            ],
        ),
        4 => ("Resumed", &["Unpaused", "Migrated", "Snapshot", "Post-copy"]),
        5 => ("Stopped", &["Shutdown", "Destroyed", "Crashed", "Migrated", "Saved", "Failed", "Snapshot"]),
        6 => ("Shutdown", &["Finished", "Finished after guest request", "Finished after host request"]),
        7 => ("PMSuspended", &["Memory", "Disk"]),
        8 => ("Crashed", &["Panicked", "Crashloaded"]),
        _ => ("unknown", &[]),
    };
    (name, usize::try_from(detail).ok().and_then(|index| details.get(index)).unwrap_or(&"unknown"))
}

/// A memory statistic.
pub fn memory_stat(tag: i32) -> Option<&'static str> {
    const NAMES: [&str; 13] = [
        "swap_in",
        "swap_out",
        "major_fault",
        "minor_fault",
        "unused",
        "available",
        "actual",
        "rss",
        "usable",
        "last_update",
        "disk_caches",
        "hugetlb_pgalloc",
        "hugetlb_pgfail",
    ];
    usize::try_from(tag).ok().and_then(|index| NAMES.get(index)).copied()
}
