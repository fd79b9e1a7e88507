//! What a restarted daemon needs to find a running domain again: one JSON file per domain in the run directory, which a
//! reboot empties. The process's number alone is also written to `NAME.pid`, where scripts look for it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::process::ProcessId;

/// A running domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFile {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: Uuid,
    /// Its id.
    pub id: i32,
    /// The vireo-vmm process.
    pub process: ProcessId,
    /// The document with what the run added.
    pub live_xml: String,
    /// Length of the process's log when it started.
    pub log_start: u64,
}

/// The files of one domain in the run directory.
#[derive(Clone, Debug)]
pub struct RunFiles {
    directory: PathBuf,
    name: String,
    uuid: Uuid,
}

impl RunFiles {
    /// The files of a domain.
    pub fn new(directory: &Path, name: &str, uuid: Uuid) -> RunFiles {
        RunFiles { directory: directory.into(), name: name.into(), uuid }
    }

    /// The monitor's socket. Named by a part of the uuid, because socket paths are short.
    pub fn monitor(&self) -> PathBuf {
        let short: String = self.uuid.simple().to_string().chars().take(16).collect();
        self.directory.join(format!("{short}.mon"))
    }

    fn state(&self) -> PathBuf {
        self.directory.join(format!("{}.run", self.name))
    }

    fn pid(&self) -> PathBuf {
        self.directory.join(format!("{}.pid", self.name))
    }

    /// Writes both files; a crash in between leaves the old ones or the new ones.
    pub fn write(&self, run: &RunFile) -> io::Result<()> {
        let temporary = self.directory.join(format!("{}.run.new", self.name));
        fs::write(&temporary, serde_json::to_vec(run)?)?;
        fs::rename(&temporary, self.state())?;
        fs::write(self.pid(), format!("{}\n", run.process.pid))
    }

    /// Removes everything of a run that has ended.
    pub fn remove(&self) {
        for path in [self.state(), self.pid(), self.monitor()] {
            // What is not there need not be removed, and what cannot be removed is found stale at the next start.
            let _ = fs::remove_file(path);
        }
    }

    /// All runs that a former daemon has written down.
    pub fn read_all(directory: &Path) -> io::Result<Vec<RunFile>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "run")
                && let Ok(run) = serde_json::from_slice(&fs::read(&path)?)
            {
                found.push(run);
            }
        }
        Ok(found)
    }
}
